import json

import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from detr_irpe import build_model
from detr_irpe.drawing import attention_maps, cell_of, draw_objects, side_by_side
from detr_irpe.predict import Detector, get_predict_parser, main
from irpe_train.launch import launch
from tests.helpers.tiny_detr import published_flags, tiny_transformer

NAMES = {1: "seven", 4: "three"}


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.jpg"
    Image.linear_gradient("L").resize((60, 40)).convert("RGB").save(path)
    return path


def write_checkpoint(path, categories: dict | None = NAMES, **flags) -> str:
    """A tiny model as training leaves it, with the published flags only; every query is sure of class 4."""
    torch.manual_seed(0)
    args = published_flags(enc_rpe2d="rpe-2.0-product-ctx-1-qk", num_classes=5, image_size=160, **flags)
    model = build_model(args)[0]
    detr = getattr(model, "detr", model)
    torch.nn.init.constant_(detr.class_embed.bias[4], 9.0)
    del args.num_classes, args.backbone_weights
    content = {"model": model.state_dict(), "epoch": 3, "args": args}
    torch.save(content if categories is None else content | {"categories": categories}, path)
    return str(path)


def predict(*words: object) -> None:
    main(get_predict_parser().parse_args([*map(str, words), "--device", "cpu"]))


def test_boxes_json_and_pictures(tmp_path, photo):
    predict(photo, "--resume", write_checkpoint(tmp_path / "x.pth"), "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "photo.json").read_text())
    assert (found["width"], found["height"], len(found["objects"])) == (60, 40, 5)
    for entry in found["objects"]:
        assert entry["category_id"] == 4 and entry["category"] == "three" and entry["score"] > 0.9
        x0, y0, x1, y1 = entry["box"]
        assert x0 < x1 and y0 < y1
    assert Image.open(tmp_path / "out" / "photo.png").size == (720, 480)  # enlarged twelve times
    assert not (tmp_path / "out" / "photo_attention.png").exists()


def test_attention_and_encodings(tmp_path, photo):
    resume = write_checkpoint(tmp_path / "x.pth")
    predict(photo, "--resume", resume, "--out", tmp_path, "--attention", "--point", "5,5", "--point", "59,39")
    assert Image.open(tmp_path / "photo_attention.png").height > 100
    assert Image.open(tmp_path / "encodings.png").height > 100
    predict(photo, "--resume", resume, "--out", tmp_path / "own", "--attention", "--threshold", "1")  # no detection
    assert (tmp_path / "own" / "photo_attention.png").exists()
    with pytest.raises(ValueError, match=r"--point 60,0 lies outside the image, which is 60 x 40 pixels"):
        predict(photo, "--resume", resume, "--out", tmp_path, "--attention", "--point", "60,0")


def test_tables_need_no_image(tmp_path):
    predict("--tables", "--resume", write_checkpoint(tmp_path / "x.pth"), "--out", tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["encodings.png"]
    with pytest.raises(ValueError, match="name images, or ask for --tables"):
        predict("--resume", tmp_path / "x.pth", "--out", tmp_path / "out")


def test_masks(tmp_path, photo):
    predict(photo, "--resume", write_checkpoint(tmp_path / "x.pth", masks=True), "--out", tmp_path)
    (first, *_) = json.loads((tmp_path / "photo.json").read_text())["objects"]
    assert coco_mask.decode(first["segmentation"]).shape == (40, 60)


def test_ground_truth_stands_on_the_left(tmp_path, photo):
    annotations = {
        "images": [{"id": 9, "file_name": "photo.jpg"}],
        "annotations": [{"image_id": 9, "category_id": 1, "bbox": [10, 10, 20, 20]}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(annotations))
    resume = write_checkpoint(tmp_path / "x.pth")
    annotated = ["--resume", resume, "--out", tmp_path, "--annotations", tmp_path / "instances.json"]
    predict(photo, *annotated)
    picture = Image.open(tmp_path / "photo.png")
    assert picture.size == (2 * 720 + 8, 480)
    edge = picture.getpixel((120, 240))  # the left edge of the box
    assert max(edge) - min(edge) > 100  # coloured, where the photo is grey
    photo.rename(tmp_path / "other.jpg")
    with pytest.raises(ValueError, match="--annotations: no image called other.jpg there"):
        predict(tmp_path / "other.jpg", *annotated)


def test_published_checkpoints_speak_of_coco(tmp_path):
    args = published_flags()
    torch.save({"model": build_model(args)[0].state_dict(), "args": args}, tmp_path / "detr.pth")
    names = Detector(str(tmp_path / "detr.pth"), torch.device("cpu")).names
    assert (names[1], names[90]) == ("person", "toothbrush")
    assert Detector(write_checkpoint(tmp_path / "own.pth", categories=None), torch.device("cpu")).names == {}


def test_what_cannot_be_predicted(tmp_path, photo):
    resume = write_checkpoint(tmp_path / "x.pth")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(OSError, match="text.png: not an image that can be read"):
        predict(tmp_path / "text.png", "--resume", resume, "--out", tmp_path)
    with pytest.raises(ValueError, match="more than one image is called photo"):
        predict(photo, tmp_path / "a" / "photo.png", "--resume", resume, "--out", tmp_path)
    torch.save({"model": torch.load(resume, weights_only=False)["model"]}, tmp_path / "bare.pth")
    with pytest.raises(ValueError, match="bare.pth has no 'args': the flags it was trained with"):
        predict(photo, "--resume", tmp_path / "bare.pth", "--out", tmp_path)


def test_from_the_command_line_a_mistake_is_one_message(tmp_path, photo, capsys):
    words = [photo, "--resume", tmp_path / "none.pth", "--out", tmp_path, "--device", "cpu"]
    with pytest.raises(SystemExit, match="1"):
        launch(main, get_predict_parser(), list(map(str, words)))
    assert "none.pth: no such file" in capsys.readouterr().err


def test_an_image_without_objects_is_drawn_as_it_is():
    image = Image.new("RGB", (600, 500), "navy")
    drawn = draw_objects(image, torch.zeros(0, 4), [], [])
    assert drawn.tobytes() == image.tobytes()
    assert side_by_side(image, image).size == (1208, 500)


def test_cells():
    assert cell_of((0, 0), (60, 40), 2, 3) == 0
    assert cell_of((59.9, 39.9), (60, 40), 2, 3) == 5
    assert cell_of((20, 19), (60, 40), 2, 3) == 1


@pytest.mark.parametrize("enc_rpe2d", ["", "rpe-2.0-product-ctx-1-qk", "rpe-2.0-cross-bias-0-k"])
def test_the_attention_drawn_is_the_attention_used(enc_rpe2d):
    layer = tiny_transformer(enc_rpe2d).encoder.layers[0].self_attn
    torch.manual_seed(0)
    query_key, value = torch.randn(2, 1, 6, 16, dtype=torch.float64)
    padding = torch.tensor([[False] * 5 + [True]])
    inputs = (query_key, value, padding, 2, 3)
    weights = layer.weights(query_key, padding, 2, 3)
    heads = weights @ layer.project(query_key, query_key, value)[2]
    torch.testing.assert_close(layer.merge(heads), layer(*inputs))
    maps = attention_maps(layer, inputs, token=4)
    assert list(maps) == ["mean of heads", "head 0", "head 1"]
    torch.testing.assert_close(maps["head 1"], weights[0, 1, 4].view(2, 3))
    assert maps["mean of heads"][1, 2] == 0
