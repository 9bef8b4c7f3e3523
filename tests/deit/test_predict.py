"""Pictures of predictions, from our checkpoints and from those that keep fewer flags."""

import argparse
import json
import os
import signal
from pathlib import Path

import pytest
import timm
import torch
from onnx import helper
from PIL import Image

from deit_irpe import create_model
from deit_irpe import predict as prediction
from deit_irpe.args import get_export_parser as export_flags
from deit_irpe.data.transforms import MEAN, STD
from deit_irpe.export import main as export
from deit_irpe.load_model import Classifier, load_model, load_onnx
from deit_irpe.predict import attention_calls, attention_maps, encoding_maps, get_predict_parser, main, points_of
from irpe_train.config import parse_args
from irpe_train.errors import BadCheckpoint
from tests.helpers.processes import run_ranks
from tests.helpers.tiny_images import write_images

KWARGS = ["img_size=32", "patch_size=8", "embed_dim=32", "depth=2", "num_heads=2"]
SPEC = "rpe-1.9-product-ctx-1-qkv"


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint whose class token prefers the third of four classes by far."""
    torch.manual_seed(0)
    model = create_model(
        "deit_tiny_patch16_224", SPEC, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=4
    )
    for name, parameter in model.named_parameters():
        if "lookup" in name:
            torch.nn.init.normal_(parameter)
    torch.nn.init.constant_(model.head.bias[2:3], 20.0)
    args = argparse.Namespace(model="deit_tiny_patch16_224", rpe=SPEC, model_kwargs=KWARGS, input_size=32, nb_classes=4)
    torch.save({"model": model.state_dict(), "args": args, "classes": ["ant", "bee", "cat", "dog"]}, tmp_path / "x.pth")
    return tmp_path / "x.pth"


def predict(tmp_path, *flags):
    return run_ranks(
        main,
        get_predict_parser,
        [*map(str, flags), "--device", "cpu", "--out", str(tmp_path / "out")],
        tmp_path / "outputs",
    )[0]


def test_pictures_and_json(checkpoint, tmp_path):
    write_images(tmp_path, {"images": 2}, side=50)
    ended = predict(tmp_path, tmp_path / "images" / "0.png", "--resume", checkpoint, "--attention", "0,3")
    assert ended.code == 0, ended.text
    ended = predict(tmp_path, tmp_path / "images" / "0.png", tmp_path / "images" / "1.png", "--resume", checkpoint)
    assert ended.code == 0, ended.text
    first, second = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert first["top"][0]["class"] == "cat" and first["top"][0]["number"] == 2 and len(first["top"]) == 4
    assert first["top"][0]["probability"] > 0.99 and second["image"].endswith("1.png")
    written = {file.name for file in (tmp_path / "out").iterdir() if file.name[0] != "."}
    assert written == {"predictions.json", "tables.png", "0.png", "1.png", "0_attention_0-3.png", "0_encoding_0-3.png"}


def test_tables_need_no_image(checkpoint, tmp_path):
    ended = predict(tmp_path, "--tables", "--resume", checkpoint)
    assert ended.code == 0 and "tables.png is in" in ended.text, ended.text
    assert [file.name for file in (tmp_path / "out").glob("[!.]*")] == ["tables.png"]
    ended = predict(tmp_path, "--resume", checkpoint)
    assert ended.code == 1 and "name images, or give --tables" in ended.text
    contents = torch.load(checkpoint, weights_only=False)
    contents["args"].rpe = "none"
    contents["model"] = {key: value for key, value in contents["model"].items() if "lookup" not in key}
    torch.save(contents, checkpoint)
    write_images(tmp_path, {"images": 1}, side=50)
    ended = predict(tmp_path, tmp_path / "images", "--tables", "--resume", checkpoint)
    assert ended.code == 1 and f"--tables: {checkpoint} has no relative position encoding" in ended.text
    assert not (tmp_path / "out/0.png").exists()  # refused before the work


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_maps_are_the_weights_that_the_block_uses(checkpoint, qk_norm):
    """If only one token has a value, 1, the block's output for every other token is its weight for that one."""
    model, _, _ = load_model(str(checkpoint))
    if qk_norm:
        norms = {"norm_layer": torch.nn.LayerNorm, "qk_norm": True}
        sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
        model = create_model("deit_tiny_patch16_224", SPEC, **sizes, **norms).eval()
    attn, images, got = model.blocks[-1].attn, torch.randn(1, 3, 32, 32), []
    attn.rpe_v = None
    with torch.no_grad():
        expected = attention_maps(attention_calls(model, images)[-1], 1, 2)  # (2, 4, 4)
        values = torch.zeros(1, 17, 32)
        values[0, 1 + 3 * 4 + 0] = 1.0  # the patch at (3, 0), after the class token
        attn.qkv.register_forward_hook(lambda module, inputs, output: torch.cat([output[..., :64], values], dim=-1))
        attn.norm.register_forward_hook(lambda module, inputs, output: got.append(output))
        model(images)
    weights = got[0].unflatten(-1, (2, 16))[0, 1 + 1 * 4 + 2]  # (heads, 16), each the same number
    assert torch.allclose(weights, expected[:, 3, 0, None].expand(2, 16), atol=1e-6)
    on_patches = expected.sum((1, 2))
    assert (on_patches > 0).all() and (on_patches < 1).all()  # the rest is on the class token


@pytest.mark.parametrize("spec", ["rpe-1.9-product-ctx-0-qk", "rpe-1.9-cross-bias-1-qk", "none"])
def test_encoding_maps_are_what_the_scores_get(spec):
    """The eager backend calls encodings as modules, so that a hook sees what they add."""
    sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    model = create_model("deit_tiny_patch16_224", spec, attn_backend="eager", **sizes).eval()
    added, token = {}, 1 + 1 * 4 + 2
    for name, module in model.named_modules():
        if name.endswith((".rpe_q", ".rpe_k")):
            module.register_forward_hook(lambda _, inputs, output, name=name: added.update({name: output[0]}))
    for name, parameter in model.named_parameters():
        if "lookup_table" in name:
            torch.nn.init.normal_(parameter)
    with torch.no_grad():
        model(images := torch.randn(1, 3, 32, 32))
        wanted = {name: x[:, token, 1:] if name.endswith("k") else x[:, 1:, token] for name, x in added.items()}
        found = encoding_maps(attention_calls(model, images), 1, 2)
    assert len(found) == (0 if spec == "none" else 4) and found.keys() == wanted.keys()
    for name, maps in found.items():
        assert maps.shape[1:] == (4, 4)
        torch.testing.assert_close(maps.flatten(1), wanted[name])


def test_pictures_show_the_classes_best_first_and_the_patch_that_looks(checkpoint, tmp_path, monkeypatch):
    """On 4 x 4 patches of a 32-pixel image, patch 1,3 (row, column) has its centre at 28,12 (x, y)."""
    write_images(tmp_path, {"images": 1}, side=50)
    tops, looks = [], []
    monkeypatch.setattr(prediction, "draw_top", lambda image, names, shares: tops.append((names, shares)))
    monkeypatch.setattr(prediction, "draw_over_image", lambda *drawn: looks.append(drawn))
    monkeypatch.setattr(prediction, "_save", lambda figure, out, name: None)
    flags = [str(tmp_path / "images/0.png"), "--resume", str(checkpoint), "--out", str(tmp_path / "out")]
    main(get_predict_parser().parse_args([*flags, "--device", "cpu", "--attention", "1,3"]))
    ((names, shares),) = tops
    assert names[0] == "cat" and shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1)
    ((image, points, (maps,), title),) = looks
    assert image.size == (32, 32) and points == [(28.0, 12.0)] and "attention of patch 1,3" in title
    assert torch.allclose(maps["mean of the heads"], (maps["head 0"] + maps["head 1"]) / 2)


@pytest.mark.parametrize(
    ("flags", "words"), [(("--attention", "0,4"), "outside the 4x4 patches"), (("--rpe", "none"), "does not fit this")]
)
def test_mistakes_are_explained(checkpoint, tmp_path, flags, words):
    write_images(tmp_path, {"images": 1})
    ended = predict(tmp_path, tmp_path / "images" / "0.png", "--resume", checkpoint, *flags)
    assert ended.code == 1 and words in ended.text and "Traceback" not in ended.text


@pytest.mark.parametrize(
    ("name", "kind"), [("vit_small_patch16_18x2_224", "ParallelThingsBlock"), ("resnet18", "ResNet")]
)
def test_attention_that_is_not_timms_is_not_drawn(name, kind):
    with pytest.raises(ValueError, match=f"draws timm's Attention, with or without iRPE, not {kind}"):
        points_of(timm.create_model(name), [])


def test_one_bad_image_costs_the_others_nothing(checkpoint, tmp_path):
    write_images(tmp_path, {"images": 1})
    (tmp_path / "text.png").write_text("no image")
    os.mkfifo(tmp_path / "pipe.png")
    bad = [tmp_path / "text.png", tmp_path / "absent.png", tmp_path / "pipe.png"]
    ended = predict(tmp_path, *bad, tmp_path / "images" / "0.png", "--resume", checkpoint)
    assert ended.code == 1 and "3 of 4 images could not be predicted" in ended.text
    assert f"{bad[0]}: this image cannot be read" in ended.text and f"{bad[1]}: no such file" in ended.text
    assert f"{bad[2]}: not a plain file" in ended.text and "Traceback" not in ended.text
    assert [one["image"] for one in json.loads((tmp_path / "out/predictions.json").read_text())] == [
        str(tmp_path / "images" / "0.png")
    ]


def test_a_second_prediction_adds_to_the_first(checkpoint, tmp_path):
    write_images(tmp_path, {"one": 2, "two": 3})
    predict(tmp_path, tmp_path / "one", "--resume", checkpoint)
    predict(tmp_path, tmp_path / "two/2.png", tmp_path / "one/1.png", "--resume", checkpoint)
    images = [one["image"] for one in json.loads((tmp_path / "out/predictions.json").read_text())]
    assert images == [str(tmp_path / name) for name in ("one/0.png", "two/2.png", "one/1.png")]


def end_at_the_third_image(args, number):
    pictures, prediction.PAUSE = [], 0.0
    real = prediction.draw_top

    def draw(*shown):
        pictures.append(shown)
        if len(pictures) == 3:
            os.kill(os.getpid(), number)
        return real(*shown)

    prediction.draw_top = draw
    main(args)


def main_killed(args):
    end_at_the_third_image(args, signal.SIGKILL)


def main_interrupted(args):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    end_at_the_third_image(args, signal.SIGINT)


@pytest.mark.parametrize(("main", "code"), [(main_killed, -9), (main_interrupted, 130)])
def test_what_was_predicted_is_kept_whatever_ends_the_program(checkpoint, tmp_path, main, code):
    write_images(tmp_path, {"one": 4})
    argv = [str(tmp_path / "one"), "--resume", str(checkpoint), "--device", "cpu", "--out", str(tmp_path / "out")]
    (ended,) = run_ranks(main, get_predict_parser, argv, tmp_path / "outputs")
    kept = [Path(one["image"]).stem for one in json.loads((tmp_path / "out/predictions.json").read_text())]
    assert ended.code == code and kept == ["0", "1"] == sorted(x.stem for x in (tmp_path / "out").glob("?.png"))


def test_an_image_is_listed_once_from_whichever_folder_it_is_named(checkpoint, tmp_path, monkeypatch):
    write_images(tmp_path, {"one": 1, "other": 1})
    for folder, image in (("one", "0.png"), ("other", "../one/0.png")):
        monkeypatch.chdir(tmp_path / folder)
        assert predict(tmp_path, image, "--resume", checkpoint).code == 0
    (entry,) = json.loads((tmp_path / "out/predictions.json").read_text())
    assert entry["image"] == str(tmp_path / "one/0.png")


def test_names_with_dollars_and_other_letters(checkpoint, tmp_path):
    write_images(tmp_path, {"images": 1})
    (tmp_path / "images/0.png").rename(tmp_path / "images/$5_$10_{é.png")
    ended = predict(tmp_path, tmp_path / "images", "--resume", checkpoint, "--attention")
    assert ended.code == 0 and (tmp_path / "out/$5_$10_{é_attention_2-2.png").is_file(), ended.text


def test_the_photographs_are_never_replaced(checkpoint, tmp_path):
    write_images(tmp_path, {"out": 1})
    photograph = (tmp_path / "out/0.png").read_bytes()
    ended = predict(tmp_path, tmp_path / "out/0.png", "--resume", tmp_path / "nothing.pth")  # not even opened
    assert ended.code == 1 and f"{tmp_path / 'out/0.png'}: already there, and not a result of predict" in ended.text
    assert (tmp_path / "out/0.png").read_bytes() == photograph and len(list((tmp_path / "out").iterdir())) == 1
    (tmp_path / "out/predictions.json").write_text("[]")
    write_images(tmp_path, {"other": 2})
    ended = predict(tmp_path, tmp_path / "other/1.png", "--resume", checkpoint)
    assert ended.code == 1 and "predictions.json: already there" in ended.text
    assert (tmp_path / "out/predictions.json").read_text() == "[]"


def test_an_image_called_like_a_flag_and_a_class_name_without_end():
    assert parse_args(get_predict_parser(), ["--resume", "x.pth", "--", "--0.png"]).images == ["--0.png"]
    bars = prediction.draw_top(Image.new("RGB", (4, 4)), ["x" * 10**6], [1.0]).axes[1]
    assert bars.get_yticklabels()[0].get_text() == "x" * 60


def test_bars_are_percentages_with_the_best_on_top():
    bars = prediction.draw_top(Image.new("RGB", (4, 4)), ["red, scarlet", "green"], [0.75, 0.25]).axes[1]
    assert [bar.get_width() for bar in bars.patches] == [75, 25] and bars.get_xlim() == (0, 100)
    assert [label.get_text() for label in bars.get_yticklabels()] == ["red", "green"] and bars.yaxis_inverted()


def test_the_patch_in_the_middle_looks_unless_others_are_named():
    model = timm.create_model("deit_tiny_patch16_224", img_size=(64, 96), depth=1)
    assert points_of(model, []) == [(2, 3)] and points_of(model, [(3, 5), (0, 0), (3, 5)]) == [(3, 5), (0, 0)]
    for row, col in ((4, 0), (0, 6)):
        with pytest.raises(ValueError, match=f"--attention {row},{col}: outside the 4x6 patches"):
            points_of(model, [(row, col)])


def test_an_image_called_like_another_result(checkpoint, tmp_path):
    write_images(tmp_path, {"images": 1})
    (tmp_path / "images/0.png").rename(tmp_path / "images/tables.png")
    ended = predict(tmp_path, tmp_path / "images/tables.png", "--resume", checkpoint, "--tables")
    assert ended.code == 1 and "two results would be called tables.png" in ended.text


def test_an_exported_file_predicts_the_same(checkpoint, tmp_path):
    write_images(tmp_path, {"images": 2}, side=50)
    export(parse_args(export_flags(), ["--resume", str(checkpoint), "--out", str(tmp_path / "x")]))
    results = []
    for source in (checkpoint, tmp_path / "x.onnx"):
        ended = predict(tmp_path, tmp_path / "images", "--resume", source)
        assert ended.code == 0, ended.text
        results.append(json.loads((tmp_path / "out/predictions.json").read_text()))
    for ours, exported in zip(*results, strict=True):
        assert [one["class"] for one in ours["top"]] == [one["class"] for one in exported["top"]]
        for one, other in zip(ours["top"], exported["top"], strict=True):
            assert abs(one["probability"] - other["probability"]) < 1e-5
    for flags, words in ((["--attention"], "give the checkpoint"), (["--rpe", "none"], "leave out --model, --rpe")):
        ended = predict(tmp_path, tmp_path / "images", "--resume", tmp_path / "x.onnx", *flags)
        assert ended.code == 1 and words in ended.text and "Traceback" not in ended.text
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    ended = predict(tmp_path, tmp_path / "images", "--resume", tmp_path / "bad.onnx")
    assert ended.code == 1 and "bad.onnx: not a classifier that deit_irpe.export wrote" in ended.text


def small_onnx(path: Path, *, input="images", output="logits", channels=3, batch=None, kind=1, **told) -> Path:
    """An exported classifier: its output is the mean of each channel; ``told``: metadata that differ."""
    images, logits = ([batch, channels, 32, 32], [batch, channels])
    nodes = [helper.make_node("ReduceMean", [input, "axes"], [output], keepdims=0)]
    places = [helper.make_tensor_value_info(*one) for one in ((input, kind, images), (output, kind, logits))]
    axes = helper.make_tensor("axes", 7, [2], [2, 3])
    graph = helper.make_graph(nodes, "g", places[:1], places[1:], [axes])
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 18)])
    told = {"classes": ["a", "b", "c"], "input_size": 32, "mean": MEAN, "std": STD} | told
    helper.set_model_props(model, {key: json.dumps(value) for key, value in told.items() if value is not None})
    path.write_bytes(model.SerializeToString())
    return path


def test_an_exported_file_is_tried_before_it_is_used(tmp_path):
    pixels = torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    model, classes, size = load_onnx(small_onnx(tmp_path / "x.onnx", author="me", input_size="32x32"))
    assert (classes, size) == (["a", "b", "c"], (32, 32))
    assert torch.allclose(model(pixels), pixels.mean((2, 3)), atol=1e-6)
    bad = Classifier(str(small_onnx(tmp_path / "X.ONNX")), torch.device("cpu"))
    bad.pixels = lambda image: torch.full((1, 3, 32, 32), torch.nan)
    with pytest.raises(BadCheckpoint, match="X.ONNX: its output has values that are NaN"):
        bad(None)
    with pytest.raises(BadCheckpoint, match="none.onnx: no such file"):
        load_onnx(tmp_path / "none.onnx")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(classes=["a", "b"]), r"it has 2 classes, but its output for one image is \(1, 3\)"),
        (dict(classes=["a", "b", "c", "d"]), "it has 4 classes"),
        (dict(classes=["a", "a", "b"]), "not a list of different names"),
        (dict(classes=["a", "b", "\ud800"]), "is not text"),
        (dict(classes=None), "it names no classes"),
        (dict(input_size=64), "Got: 64 Expected: 32"),
        (dict(input_size=None), "KeyError: 'input_size'"),
        (dict(input_size=0), "its input_size: expected pixels"),
        (dict(input_size=True), "its input_size: expected pixels"),
        (dict(input_size=[32, 32]), "its input_size: expected pixels"),
        (dict(input_size=10**4), "its input_size is 10000"),
        (dict(input_size="9" * 5000), "its input_size: Exceeds the limit"),
        (dict(mean=[0, 0, 0]), "are not those of this program"),
        (dict(channels=4), "Got: 3 Expected: 4"),
        (dict(batch=2), "Got: 1 Expected: 2"),
        (dict(input="pixels"), "pixels"),
        (dict(output="scores"), "logits"),
        (dict(kind=11), r"expected: \(tensor\(double\)\)"),
    ],
    ids=str,
)
def test_exported_files_of_others_are_refused_by_name(tmp_path, wrong, words):
    with pytest.raises(BadCheckpoint, match=rf"x\.onnx: not a classifier that deit_irpe.export wrote .*{words}"):
        load_onnx(small_onnx(tmp_path / "x.onnx", **wrong))


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_names_that_are_not_text_are_replaced_by_a_second_prediction(checkpoint, tmp_path):
    write_images(tmp_path, {"images": 2})
    for number, name in enumerate(("caf\udce9.png", "x\ny\tz.png")):
        (tmp_path / f"images/{number}.png").rename(tmp_path / "images" / name)
    for _ in range(2):
        ended = predict(tmp_path, tmp_path / "images", "--resume", checkpoint)
        assert ended.code == 0 and r"/caf\udce9.png: " in ended.text and r"/x\ny\tz.png: " in ended.text, ended.text


def test_flags_of_another_model_are_reported(checkpoint, monkeypatch):
    said = []
    monkeypatch.setattr("deit_irpe.load_model.logger.warning", said.append)
    load_model(str(checkpoint), rpe=SPEC, input_size=32)
    other = SPEC.replace("1.9", "1.8")
    load_model(str(checkpoint), rpe=other)
    assert said == [f"flags differ from the checkpoint's: rpe={other} (stored: {SPEC}). Those given now are used"]


def test_weights_alone_need_the_model_named(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("deit_irpe.load_model.logger.warning", pytest.fail)  # no stored flags to differ from
    weights = torch.load(checkpoint, weights_only=False)["model"]
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="does not say which model it is: add --model NAME"):
        load_model(str(tmp_path / "weights.pth"))
    model, _, classes = load_model(
        str(tmp_path / "weights.pth"), model="deit_tiny_patch16_224", rpe=SPEC, model_kwargs=KWARGS, input_size=32
    )
    assert classes == ["class 0", "class 1", "class 2", "class 3"] and not model.training


def test_python_callers_give_an_image_of_any_mode(checkpoint):
    photo = Image.linear_gradient("L").resize((40, 50))
    classifier = Classifier(checkpoint, torch.device("cpu"))
    wanted = classifier(photo.convert("RGB"))
    assert classifier.pixels(photo).shape == (1, 3, 32, 32)
    for mode in ("L", "LA", "RGBA", "CMYK"):
        torch.testing.assert_close(classifier(photo.convert(mode)), wanted)
    with pytest.raises(TypeError, match="load_model: unknown flag inputsize, num_class; known are"):
        load_model(str(checkpoint), inputsize=64, num_class=3)
