"""``--eval --expect`` in both packages: a tiny model is not a published one, and the card says so."""

import json
import os
from functools import partial

import pytest

from deit_irpe.train import main
from tests.helpers.deit_runs import MODEL, deit
from tests.helpers.detr_runs import detr
from tests.helpers.tiny_coco import write_tiny_coco
from tests.helpers.tiny_images import write_images


@pytest.fixture
def images(tmp_path):
    for split in ("train", "val"):
        write_images(tmp_path / "images" / split, {"ant": 4, "bee": 4})
    return tmp_path / "images"


def card_of(folder, name):
    card = json.loads((folder / "card.json").read_text())
    assert card["name"] == name and card["verdict"] == "FAIL"
    assert (folder / "card.md").read_text().startswith(f"# {name}: FAIL")
    return card, {line["figure"]: line["here"] for line in card["figures"]}


def test_deit(images, tmp_path):
    out, name = tmp_path / "out", "deit_tiny_patch16_224_ctx_product_50_shared_k"
    (trained,) = deit(images, out, "--epochs", "1", model=MODEL)
    assert trained.code == 0, trained.text
    (ended,) = deit(images, out, "--eval", "--resume", "auto", "--expect", name, model=MODEL)
    assert ended.code == 1 and f"# {name}: FAIL" in ended.text
    card, figures = card_of(out, name)
    assert 0 <= figures["acc1"] <= 100 and figures["macs_M"] > 0 and figures["buckets"] == 50
    assert card["checkpoint"]["file"] == "checkpoint.pth" and card["data"][0]["files"] == 8
    (ended,) = deit(images, out, "--eval", "--resume", "auto", "--expect", model=MODEL)
    assert ended.code == 1 and "name the row: --expect NAME" in ended.text
    assert "Accuracy of the network" not in ended.text  # said before the evaluation


@pytest.mark.parametrize("flag", ["--resume", "--finetune"])
def test_deit_from_an_address_on_a_split(tmp_path, flag):
    name = "deit_tiny_patch16_224_ctx_product_50_shared_k"
    write_images(tmp_path / "images", {"ant": 4, "bee": 4})
    split = ["--val-split", "0.25"]
    (trained,) = deit(tmp_path / "images", tmp_path / "run", *split, "--epochs", "1", model=MODEL)
    assert trained.code == 0, trained.text
    cache = tmp_path / "home" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (tmp_path / "run" / "checkpoint.pth").rename(cache / "mine.pth")
    address = "https://example.org/mine.pth?download=1"
    (ended,) = deit(
        tmp_path / "images", tmp_path / "out", *split, "--eval", flag, address, "--expect", name, model=MODEL,
        main=partial(main_with_home, str(tmp_path / "home")),
    )  # fmt: skip
    card, figures = card_of(tmp_path / "out", name)
    assert card["checkpoint"]["file"] == "mine.pth" and figures["acc1"] is not None
    assert card["data"][0]["path"] == "images" and card["data"][0]["files"] == 8


def main_with_home(home, args):
    os.environ["TORCH_HOME"] = home
    main(args)


def test_detr(tmp_path):
    data = write_tiny_coco(tmp_path / "coco", train=2, val=2)
    out, name = tmp_path / "out", "rpe-2.0-product-ctx-1-k"
    (trained,) = detr(data, out, "--epochs", "1")
    assert trained.code == 0, trained.text
    (ended,) = detr(data, out, "--eval", "--resume", "auto", "--expect")
    assert ended.code == 1 and f"# {name}: FAIL" in ended.text  # found by its encoding
    card, figures = card_of(out, name)
    assert -1 <= figures["AP"] < 0.4 and card["data"][0]["path"] == "instances_val2017.json"
