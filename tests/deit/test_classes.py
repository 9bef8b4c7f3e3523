"""Classes are identities: data and checkpoint may name different ones, or the same ones in another order."""

import json
import tarfile

import numpy as np
import pytest
import torch

from deit_irpe.data.classes import check_resumed_classes, check_same_classes, renumber, stored_classes
from deit_irpe.data.datasets import build_dataset
from deit_irpe.data.hugging_face import _numbered
from deit_irpe.data.images import LabelledImages
from deit_irpe.models import create_model
from deit_irpe.models.finetune import fit_classes
from deit_irpe.train import agree_on_classes
from irpe_train.checkpoint import Checkpoint
from irpe_train.errors import BadCheckpoint
from tests.deit.test_archives import tar_of
from tests.helpers.deit_runs import deit, deit_ok
from tests.helpers.tiny_images import write_images

SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)


def data_of(*classes: str) -> LabelledImages:
    return LabelledImages(list(classes), [""] * len(classes), list(range(len(classes))))


def test_labels_take_the_numbers_of_the_checkpoint():
    data = data_of("cat", "dog")
    renumber(data, ["emu", "dog", "cat"], whose="the checkpoint")
    assert (data.classes, data.labels.tolist()) == (["emu", "dog", "cat"], [2, 1])


def test_a_class_that_the_checkpoint_has_not_is_named():
    with pytest.raises(ValueError, match=r"validation data have classes that the checkpoint lacks: dog\.?$"):
        renumber(data_of("cat", "dog"), ["cat", "cow"], whose="the checkpoint")
    with pytest.raises(ValueError, match="0, 1. Their classes are numbers: name them, see docs/data.md"):
        renumber(data_of("0", "1"), ["cat", "dog"], whose="the checkpoint")


def test_data_with_fixed_numbers_are_refused_in_another_order():
    class Fixed:
        classes = ("a", "b")

    renumber(Fixed(), ["a", "b"], whose="train")
    with pytest.raises(ValueError, match="the same classes in another order"):
        renumber(Fixed(), ["b", "a"], whose="train")


@pytest.mark.parametrize("classes", [{"a": 1}, [], ["a", 3], ["a", "a"], "ab"])
def test_malformed_classes_of_a_checkpoint(classes):
    with pytest.raises(BadCheckpoint, match="checkpoint x.pth: its 'classes' are not a list of different names"):
        stored_classes(Checkpoint("x.pth", {"classes": classes}))


def test_classes_that_are_not_text():
    stored_classes(Checkpoint("x.pth", {"classes": ["caf\udce9"]}))  # a folder's name in Latin-1
    with pytest.raises(BadCheckpoint, match=r"checkpoint x.pth: its class '\\ud800' is not text"):
        stored_classes(Checkpoint("x.pth", {"classes": ["a", "\ud800"]}))


def test_published_checkpoints_keep_no_classes():
    assert stored_classes(Checkpoint("x.pth", {"model": {}})) is None
    check_resumed_classes(None, ["a"], source="x.pth")


def test_many_differences_are_counted():
    with pytest.raises(ValueError, match="only in train: 0, 1, 10, 11, 2 and 7 more$"):
        check_same_classes([*map(str, range(12)), "x"], ["x"])


def test_heads_follow_the_names_of_the_classes():
    model = create_model("deit_tiny_distilled_patch16_224", num_classes=3, **SMALL)
    weights = model.state_dict()
    assert fit_classes(model, weights, None, ["a", "b", "c"]) == (weights, {})
    assert fit_classes(model, weights, ["a", "b", "c"], ["a", "b", "c"])[1] == {}
    permuted, notes = fit_classes(model, weights, ["a", "b", "c"], ["c", "a", "b"])
    heads = ["head.weight", "head.bias", "head_dist.weight", "head_dist.bias"]
    assert list(notes) == heads
    for key in heads:
        assert torch.equal(permuted[key], weights[key][[2, 0, 1]])
    fresh, notes = fit_classes(model, weights, ["a", "b", "c"], ["a", "b", "d"])  # as many, but different ones
    assert weights.keys() - fresh.keys() == set(heads)
    assert notes["head.weight"] == "starts fresh: different classes, 3 there, 3 here"


@pytest.fixture(scope="module")
def trained(colours, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "out"
    deit_ok(colours, out, "--epochs", "1", "--no-model-ema")
    return out / "checkpoint.pth"


def accuracy(text: str) -> str:
    return next(line for line in text.splitlines() if "* Acc@1" in line).split("* Acc@1")[1]


def reordered(colours, root, names):
    """The images of ``colours`` as shards whose classes are listed in the order ``names``."""
    data = build_dataset(colours, False)
    members = []
    for index, label in enumerate(data.labels):
        number = names.index(data.classes[label])
        members += [(f"{index}.png", data.read(index)), (f"{index}.cls", str(number).encode())]
    root.mkdir()
    tar_of(root / "x-val-0.tar", *members)
    (root / "classes.txt").write_text("\n".join(names))
    return root


def test_evaluation_is_the_same_in_whatever_order_the_data_number_the_classes(colours, trained, tmp_path):
    whole = deit_ok(colours, tmp_path / "out", "--eval", "--resume", trained)
    root = reordered(colours, tmp_path / "shards", ["dog", "ant", "cat", "bee"])
    other = deit_ok(root, tmp_path / "out", "--eval", "--resume", trained, "--data-set", "WDS")
    assert accuracy(other) == accuracy(whole)
    assert "labels are numbered as in the checkpoint: images of 4 of its 4 classes" in other


def test_evaluation_on_some_of_the_classes_takes_their_outputs(colours, trained, tmp_path):
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        tar.add(colours / "val" / "dog", "dog")
    text = deit_ok(tmp_path, tmp_path / "out", "--eval", "--resume", trained, "--load-tar")
    assert "images of 1 of its 4 classes" in text and "on the 5 test images" in text


@pytest.mark.parametrize(
    ("classes", "flags", "words"),
    [
        ("abcd", ("--eval", "--resume"), "classes that the checkpoint lacks: a, b, c, d"),
        ("abcd", ("--resume",), "different classes; only in the checkpoint: ant, bee, cat, dog"),
        (
            "abc",
            ("--eval", "--finetune"),
            "never trained: --finetune: head.weight starts fresh: different classes, 4 there, 3 here",
        ),
        ("abcd", ("--eval", "--finetune"), "--finetune: head.weight starts fresh: different classes, 4 there, 4 here"),
    ],
)
def test_other_classes_are_refused_and_named(trained, tmp_path, classes, flags, words):
    for split in ("train", "val"):
        write_images(tmp_path / split, dict.fromkeys(classes, 2))
    (ended,) = deit(tmp_path, tmp_path / "out", *flags, trained, "--epochs", "2")
    assert ended.code == 1 and words in ended.text and "Traceback" not in ended.text, ended.text


def test_a_checkpoint_without_names_needs_as_many_classes(trained, tmp_path):
    unnamed = torch.load(trained, weights_only=False)
    del unnamed["classes"]
    torch.save(unnamed, tmp_path / "unnamed.pth")
    write_images(tmp_path / "val", {"a": 1, "b": 1})
    (ended,) = deit(tmp_path, tmp_path / "out", "--eval", "--resume", tmp_path / "unnamed.pth")
    told = "its head has 4 outputs without class names; the data have 2. To evaluate on some of its classes, put their "
    assert ended.code == 1 and told + "names into it (docs/evaluate.md)" in ended.text


def test_outputs_that_are_not_finite_are_no_result(colours, trained, tmp_path):
    broken = torch.load(trained, weights_only=False)
    broken["model"]["head.weight"].fill_(3e38)  # finite, but no product with it is
    torch.save(broken, tmp_path / "broken.pth")
    (ended,) = deit(colours, tmp_path / "out", "--eval", "--resume", tmp_path / "broken.pth")
    assert ended.code == 1 and "outputs are not finite: use an earlier checkpoint, or --amp none" in ended.text
    assert "Traceback" not in ended.text and not list((tmp_path / "out").glob("confusion*"))


def test_resuming_in_another_order_is_refused():
    with pytest.raises(BadCheckpoint, match="x.pth: the training data have its classes in another order"):
        check_resumed_classes(["a", "b"], ["b", "a"], source="x.pth")


def test_a_teacher_of_other_classes_is_refused(colours, trained, tmp_path):
    other = torch.load(trained, weights_only=False) | {"classes": ["ant", "bee", "cow", "dog"]}
    torch.save(other, tmp_path / "teacher.pth")
    flags = ("--distillation-type", "hard", "--teacher-path", tmp_path / "teacher.pth", "--epochs", "1")
    (ended,) = deit(colours, tmp_path / "out", *flags)
    assert ended.code == 1 and "only in the training data: cat" in ended.text, ended.text
    torch.save(other | {"classes": ["bee", "ant", "cat", "dog"]}, tmp_path / "teacher.pth")
    (ended,) = deit(colours, tmp_path / "out", *flags)
    assert ended.code == 1 and "teacher.pth: the training data have its classes in another order" in ended.text


def test_hugging_face_labels_as_text_are_the_classes_of_the_folder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs Hugging Face datasets: pip install datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def written(labels, name):
        rows = {"image": [{"bytes": b"x", "path": None}] * len(labels), "label": labels}
        (tmp_path / name).mkdir()
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / name / "train-00000-of-00001.parquet")
        return tmp_path / name

    text = build_dataset(written(["dog", "ant", "dog"], "text"), True, data_set="HFDS")
    assert (text.classes, text.labels.tolist()) == (["ant", "dog"], [1, 0, 1])
    numbers = build_dataset(written([2, 0], "numbers"), True, data_set="HFDS")
    assert (numbers.classes, numbers.labels.tolist()) == (["0", "1", "2"], [2, 0])
    for name, labels in (("minus", [0, -1]), ("missing", [0, None]), ("floats", [0.5, 1.0]), ("huge", [0, 10**9])):
        with pytest.raises(
            ValueError, match=f"{name}: train: image . has the label {labels[1] if name != 'floats' else 0.5}"
        ):
            build_dataset(written(labels, name), True, data_set="HFDS")


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_hugging_face_classes_are_those_of_each_file(tmp_path, monkeypatch, form):
    """``datasets`` applies the names of the training file to the numbers of validation: its c would be a b."""
    datasets = pytest.importorskip("datasets", reason="needs Hugging Face datasets: pip install datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    sets = datasets.DatasetDict()
    for split, names in (("train", ["a", "b", "c"]), ("validation", ["a", "c"])):
        kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        rows = {"image": [{"bytes": b"x", "path": None}] * 2, "label": [0, 1]}
        sets[split] = datasets.Dataset.from_dict(rows, features=kinds)
    (tmp_path / "set").mkdir()
    if form == "arrow":
        sets.save_to_disk(tmp_path / "set")
    else:
        for split in sets:
            sets[split].to_parquet(tmp_path / f"set/{split}-0.parquet")
    assert build_dataset(tmp_path / "set", True, data_set="HFDS").classes == ["a", "b", "c"]
    with pytest.raises(ValueError, match=r"set/validation.*: its classes are \['a', 'c'\], those of other files"):
        build_dataset(tmp_path / "set", False, data_set="HFDS")


def test_the_order_of_numbers_as_names_is_shown_where_a_checkpoint_has_no_names(caplog):
    caplog.set_level("INFO", logger="irpe")
    numbers = LabelledImages(["0", "1", "10", "2"], ["x.png"], [0])  # folders in alphabetical order
    agree_on_classes(Checkpoint("x.pth", {}), None, numbers)
    assert "x.pth does not name its classes; they are assumed to be in the data's order: 0, 1, 10, ..." in caplog.text
    caplog.clear()
    assert agree_on_classes(Checkpoint("x.pth", {"classes": ["0", "1", "2", "10"]}), None, numbers)[2] == "2"
    assert "does not name" not in caplog.text


def test_labels_count_from_zero_to_the_last_name():
    assert _numbered([1, 0], ["a", "b"], "set") == (["a", "b"], [1, 0])
    for label in (2, -1, True, "a"):
        with pytest.raises(ValueError, match=f"set: image 1 has the label {label!r}; expected 0 to 1"):
            _numbered([0, label], ["a", "b"], "set")
    with pytest.raises(ValueError, match="set: no images"):
        _numbered([], None, "set")
    for empty in ("", " "):  # as unlabelled images in a table have
        with pytest.raises(ValueError, match=f"set: image 1 has the label '{empty}'; expected"):
            _numbered(["a", empty], None, "set")


def test_the_mistakes_of_inaturalist_files_are_named(tmp_path):
    def write(**files):
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))

    image = {"file_name": "train_val2018/Birds/0/x.jpg"}
    write(categories=[{"name": "a"}], train2018={"annotations": [{"category_id": 0}], "images": [image]})
    for val, words in (
        ({"images": []}, "val2018.json: no list 'images'"),
        ([], "val2018.json: no list 'images'"),
        ("{", "val2018.json: not valid JSON"),
        ({"images": [{"file_name": "x.jpg"}]}, "val2018.json: .*x.jpg.*not in iNaturalist.s format"),
        ({"images": [{"file_name": "t/Birds/-1/x.jpg"}]}, "val2018.json: .*-1/x.jpg.*not in iNaturalist.s format"),
        ({"images": [{"file_name": "t/Birds/7/x.jpg"}]}, "val2018.json: .*7/x.jpg.*not in iNaturalist.s format"),
        ({"images": [7]}, "val2018.json: 7: not in iNaturalist.s format"),
    ):
        write(val2018=val)
        with pytest.raises(ValueError, match=words):
            build_dataset(tmp_path, False, data_set="INAT")
    write(val2018={"images": [image]})
    for number in (0.5, False, None):
        write(train2018={"annotations": [{"category_id": number}], "images": [image]})
        with pytest.raises(ValueError, match="train2018.json: .*not in iNaturalist.s format"):
            build_dataset(tmp_path, False, data_set="INAT")
    write(train2018={"annotations": [{"category_id": "0"}], "images": [image]})
    for name in (None, 7, ["a"]):
        write(categories=[{"name": name}])
        with pytest.raises(ValueError, match="train2018.json: .*not in iNaturalist.s format"):
            build_dataset(tmp_path, False, data_set="INAT")
    write(categories="7")
    with pytest.raises(ValueError, match="categories.json: 7: not in iNaturalist.s format"):
        build_dataset(tmp_path, False, data_set="INAT")
    write(categories=[{"name": "a"}])
    np.testing.assert_array_equal(build_dataset(tmp_path, False, data_set="INAT").labels, [0])
