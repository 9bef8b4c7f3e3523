"""A user's own folder: held out by class, fine-tuned on, and evaluated class by class."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from deit_irpe.args import get_args_parser
from deit_irpe.confusion import class_rows, draw_confusion, write_confusion
from deit_irpe.data.from_flags import validation_set
from deit_irpe.data.split import split_folder
from deit_irpe.engine import evaluate
from irpe_train.precision import Precision
from tests.helpers.deit_runs import deit, deit_ok
from tests.helpers.tiny_images import write_images


def names_of(data):
    return {data.name(index) for index in range(len(data))}


def test_each_class_gives_its_share_and_every_image_is_in_one_part(tmp_path):
    write_images(tmp_path, {"a": 10, "b": 4, "c": 2})
    train, val = (split_folder(tmp_path, part, 0.2) for part in (True, False))
    assert np.bincount(val.labels).tolist() == [2, 1, 1] and np.bincount(train.labels).tolist() == [8, 3, 1]
    assert not names_of(train) & names_of(val) and len(names_of(train) | names_of(val)) == 16
    assert train.classes == val.classes == ["a", "b", "c"]
    assert names_of(split_folder(tmp_path, False, 0.2)) == names_of(val)
    assert names_of(split_folder(tmp_path, False, 0.2, seed=1)) != names_of(val)
    assert np.bincount(split_folder(tmp_path, False, 0.999).labels).tolist() == [9, 3, 1]  # one is left for training


def test_what_was_held_out_stays_so_when_images_are_added(tmp_path, monkeypatch):
    write_images(tmp_path / "train", {"a": 6, "b": 6})
    written = tmp_path / "out/val_split.txt"
    before = names_of(split_folder(tmp_path, False, 0.5, written=written))
    assert sorted(written.read_text().split()) == sorted(name.split("/train/")[1] for name in before)
    write_images(tmp_path / "train", {"a": 20, "b": 20}, seed=5)
    said = []
    monkeypatch.setattr("deit_irpe.data.split.logger.info", said.append)
    assert names_of(split_folder(tmp_path, False, 0.2, seed=3, written=written)) == before
    assert said == [f"--val-split: 6 of 40 images are held out, as {written} lists"]
    assert len(split_folder(tmp_path, True, 0.5, written=written)) == 34
    (tmp_path / "train/a/0.png").unlink()
    written.write_text("a/0.png\n")
    with pytest.raises(ValueError, match="val_split.txt: a/0.png is not in .*train; 1 of 1 are not: restore or"):
        split_folder(tmp_path, True, 0.5, written=written)


def test_the_list_of_the_run_of_the_weights_is_used_first(tmp_path):
    """Photographs were added: another draw would evaluate on images that were trained on."""
    write_images(tmp_path / "train", {"a": 6, "b": 6})
    trained, other = tmp_path / "out/val_split.txt", tmp_path / "other/val_split.txt"
    before = names_of(split_folder(tmp_path, False, 0.5, written=trained))
    write_images(tmp_path / "train", {"a": 20, "b": 20}, seed=5)
    assert names_of(split_folder(tmp_path, False, 0.5, seed=3, trained=trained)) == before
    for _ in range(2):
        assert names_of(split_folder(tmp_path, False, 0.5, seed=3, written=other, trained=trained)) == before
    assert other.read_text() == trained.read_text()
    other.write_text("of another run")
    assert names_of(split_folder(tmp_path, False, 0.5, written=other, trained=trained)) == before
    assert other.read_text() == "of another run"


def test_fine_tuning_holds_out_what_its_weights_were_not_trained_on(tmp_path, monkeypatch):
    def held(*flags):
        flags = ["--data-path", str(tmp_path / "photos"), "--val-split", "0.5", *map(str, flags)]
        return names_of(validation_set(get_args_parser().parse_args(flags)))

    write_images(tmp_path / "photos", {"a": 6, "b": 6})
    before = held("--output_dir", tmp_path / "one")
    write_images(tmp_path / "photos", {"a": 20, "b": 20}, seed=5)
    monkeypatch.setattr("deit_irpe.data.split.logger.warning", pytest.fail)
    finetune = "--finetune", tmp_path / "one/best.pth"
    begun = "--output_dir", tmp_path / "two", "--resume", "auto", *finetune
    assert held(*finetune) == held(*begun) == before
    (tmp_path / "two/val_split.txt").write_text("a/1.png\nb/1.png\n")
    assert len(held(*begun)) == 2  # the run keeps its split
    assert len(held("--finetune", tmp_path / "published.pth")) == 20
    (tmp_path / "one/val_split.txt").write_text("x/1.png\n")  # of other photographs
    assert len(held(*finetune)) == 20


def test_what_cannot_be_split_is_refused(tmp_path):
    write_images(tmp_path / "one", {"a": 2, "b": 1})
    with pytest.raises(ValueError, match="--val-split: class 'b' has one image"):
        split_folder(tmp_path / "one", True, 0.2)
    write_images(tmp_path / "two/val", {"a": 2})
    with pytest.raises(ValueError, match="two/val already exists; leave out --val-split"):
        split_folder(tmp_path / "two", True, 0.2)
    for fraction in (0, 1, float("nan")):
        with pytest.raises(ValueError, match="--val-split .*: give the share of images to hold out"):
            split_folder(tmp_path / "one", True, fraction)
    for name in ("x\ny.png", "x\u2028y.png"):  # the list has one name per line
        (tmp_path / "one/a" / name).touch()
        with pytest.raises(ValueError, match="has a line break in its name; rename this file"):
            split_folder(tmp_path / "one", True, 0.2)
        (tmp_path / "one/a" / name).unlink()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "0 of 3 images of class 'a' are held out; expected some, not all"),
        ("a/0.png\n", "0 of 3 images of class 'b' are held out"),
        ("a/0.png\nb/0.png\nb/1.png\nb/2.png\n", "3 of 3 images of class 'b' are held out"),
        ("/x/a/0.png\nb/0.png\n", "val_split.txt: /x/a/0.png is not in"),
        ("a\\0.png\nb/0.png\n", r"val_split.txt: a.0.png is not in"),
    ],
)
def test_a_list_that_leaves_a_class_without_images_is_refused(tmp_path, text, words):
    write_images(tmp_path / "data", {"a": 3, "b": 3})
    written = tmp_path / "val_split.txt"
    written.write_text(text)
    with pytest.raises(ValueError, match=words):
        split_folder(tmp_path / "data", True, 0.5, written=written)


def test_a_list_that_went_through_an_editor(tmp_path):
    write_images(tmp_path / "data", {"a": 3, "b": 3})
    (tmp_path / "data/a/2.png").rename(tmp_path / "data/a/caf\udce9.png")
    written = tmp_path / "val_split.txt"
    written.write_bytes(b"\xef\xbb\xbfa/caf\xe9.png\r\n\r\nb/1.png")
    held = names_of(split_folder(tmp_path / "data", False, 0.5, written=written))
    assert held == {str(tmp_path / "data" / name) for name in ("a/caf\udce9.png", "b/1.png")}


COUNTS = torch.tensor([[3, 1, 0], [0, 2, 0], [0, 0, 0]])


def test_the_figures_of_each_class():
    """The third class has no images and was never predicted: its percentages stay empty."""
    rows = class_rows(COUNTS, ["a", "b", "c"])
    assert rows == [("a", 4, 3, "75.00", 3, "100.00"), ("b", 2, 2, "100.00", 3, "66.67"), ("c", 0, 0, "", 0, "")]


@pytest.mark.filterwarnings("error")
def test_tables_and_picture(tmp_path):
    names = ["a,b", "$x_1$ and $" + 30 * "$" + "\u732b", "caf\udce9"]  # the last is a folder's name in Latin-1
    files = write_confusion(COUNTS, names, tmp_path)
    assert [file.name for file in files] == ["eval_confusion.csv", "eval_classes.csv", "eval_confusion.png"]
    with open(files[0], newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert list(csv.reader(file))[:2] == [["true \\ predicted", *names], ["a,b", "3", "1", "0"]]
    with open(files[1], newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert list(csv.reader(file))[:2] == [
            ["class", "images", "correct", "recall", "predicted", "precision"],
            ["a,b", "4", "3", "75.00", "3", "100.00"],
        ]
    with Image.open(files[2]) as picture:
        assert min(picture.size) > 900  # 300 dots an inch
    axis = draw_confusion(COUNTS, ["a", "b", "c"]).axes[0]
    shares = axis.images[0].get_array()
    assert shares[0].tolist() == [0.75, 0.25, 0.0] and shares.mask[2].all()  # a class without images is blank
    numbers = {text.get_position(): (text.get_text(), text.get_color()) for text in axis.texts}
    assert numbers == {(0, 0): ("3", "black"), (1, 0): ("1", "white"), (1, 1): ("2", "black")}  # (column, row)
    for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["a", "b", "c"]


def test_tables_replace_only_tables(tmp_path):
    outside = tmp_path / "thesis.csv"
    outside.write_text("mine")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "eval_confusion.csv").symlink_to(outside)
    (folder / "eval_classes.csv").write_text("also mine")
    (folder / "eval_confusion.png").mkdir()
    for _ in range(2):
        write_confusion(COUNTS, ["a", "b", "c"], folder)
    assert outside.read_text() == "mine" and (folder / "eval_classes.1.csv").read_text() == "also mine"
    assert (folder / "eval_confusion.1.png").is_dir() and not (folder / "eval_classes.2.csv").exists()


def test_the_row_is_the_truth_and_the_column_the_answer():
    model = torch.nn.Flatten()
    loader = [(torch.eye(3)[[1, 1, 0]].view(3, 3, 1, 1), torch.tensor([0, 1, 2]))]
    confusion = torch.zeros(3, 3, dtype=torch.int64)
    evaluate(model, loader, Precision("none", torch.device("cpu")), confusion)
    assert confusion.tolist() == [[0, 1, 0], [0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--val-split", "1"), "--val-split 1: give the share"),
        (("--val-split", "0.2", "--load-tar"), "--val-split is for folders of images"),
    ],
)
def test_wrong_flags(tmp_path, flags, words):
    (ended,) = deit(tmp_path / "photos", tmp_path / "out", *flags)
    assert ended.code == 1 and words in ended.text


@pytest.mark.parametrize(
    ("out", "flags"), [("", ["--val-split", "0.5"]), ("run", ["--val-split", "0.5"]), ("train/x", [])]
)
def test_results_among_the_classes_would_become_one(tmp_path, out, flags):
    write_images(tmp_path, {"photos/a": 4, "photos/b": 4})
    if not flags:
        write_images(tmp_path, {f"photos/{split}/{name}": 2 for split in ("train", "val") for name in "ab"})
    (ended,) = deit(tmp_path / "photos", tmp_path / "photos" / out, *flags)
    assert ended.code == 1 and "among the classes of" in ended.text and not (tmp_path / "photos/.lock").exists()


def test_from_a_folder_to_the_figures_of_its_classes(tmp_path):
    write_images(tmp_path / "photos", {"a": 8, "b": 8})
    flags = ["--val-split", "0.25", "--epochs", "1"]
    assert "4 of 16 images are held out" in deit_ok(tmp_path / "photos", tmp_path / "out", *flags)
    best = tmp_path / "out" / "best.pth"
    # A config may set --finetune: the evaluated checkpoint replaces it, and its file is not read
    text = deit_ok(
        tmp_path / "photos", tmp_path / "out", *flags, "--eval", "--resume", best, "--finetune", tmp_path / "no.pth"
    )
    assert "on the 4 test images" in text and "eval_classes.csv" in text
    write_images(tmp_path / "photos", {"a": 20, "b": 20})
    assert "on the 4 test images" in deit_ok(tmp_path / "photos", tmp_path, *flags, "--eval", "--resume", best)
    text = deit_ok(tmp_path / "photos", tmp_path, *flags, "--eval", "--finetune", best, "--seed", 1)
    assert "on the 4 test images" in text and "no such list" not in text
    (ended,) = deit(tmp_path / "photos", tmp_path, *flags, "--eval", "--finetune", ".")
    assert ended.code == 1 and "checkpoint .: a folder; give the file in it" in ended.text
    moved = (tmp_path / "moved").mkdir() or best.rename(tmp_path / "moved/x.pth")
    text = deit_ok(tmp_path / "photos", tmp_path / "new", *flags, "--eval", "--resume", moved)
    assert f"warning: {tmp_path}/moved/val_split.txt: no such list, so --seed 0 holds out images; some may" in text
    with open(tmp_path / "out/eval_classes.csv", newline="") as file:
        assert [row["images"] for row in csv.DictReader(file)] == ["2", "2"]
