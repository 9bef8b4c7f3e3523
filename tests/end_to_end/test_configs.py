"""Every file of configs/: it parses, builds its model, trains two steps on the demo data, quotes correct figures."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

import deit_irpe.model_stats
import detr_irpe.model_stats
from deit_irpe.args import get_args_parser as deit_parser
from detr_irpe.args import get_args_parser as detr_parser
from irpe_lab.grid import read_grid
from irpe_ops import build_rpe, parse_rpe_spec
from irpe_train import card
from irpe_train.config import parse_args
from irpe_train.zoo import read_zoo
from tests.helpers.deit_runs import deit_ok
from tests.helpers.detr_runs import TINY, detr_ok
from tests.helpers.tiny_coco import write_tiny_coco

ROOT = Path(__file__).resolve().parents[2]
DEIT = sorted(
    [
        *ROOT.glob("configs/deit/*.yaml"),
        ROOT / "configs/detr/demo_backbone.yaml",
        ROOT / "configs/ablation/demo_run.yaml",
    ]
)
DETR = sorted(set(ROOT.glob("configs/detr/*.yaml")) - {ROOT / "configs/detr/demo_backbone.yaml"})
GRIDS = sorted(set(ROOT.glob("configs/ablation/*.yaml")) - set(DEIT))
TRAINS = {"deit_irpe": deit_parser, "detr_irpe": detr_parser}
ZOO = read_zoo()


def name_of(path):
    return f"{path.parent.name}/{path.stem}"


def flags_of(path):
    """The config, and the flags that it says to add by hand."""
    teacher = ["--teacher-path", "x.pth"] if "distilled" in path.stem else []
    return ["--config", str(path), *teacher]


def facts(module, *flags: str) -> dict:
    """Counts of the model of the command line ``flags``: parameters, MACs, buckets."""
    return module.stats_of_flags(flags)


def stated_in(header):
    """The figures in the first lines of a config: "5,717,416 parameters", "7 x 7 + 1 buckets", "tables of 2 x 82"."""
    stated = {}
    if found := re.search(r"([\d,]{9,}) (?:trainable )?parameters", header):
        stated["n_parameters"] = int(found[1].replace(",", ""))
    if found := re.search(r"(\d+) x (\d+)( \+ 1)? buckets", header):
        stated["buckets"] = int(found[1]) * int(found[2]) + bool(found[3])
    if found := re.search(r"tables of (?:(\d) x )?(\d+)", header):
        stated["buckets"] = int(found[1] or 1) * int(found[2])
    return stated


def test_every_published_row_and_baseline_has_a_config():
    present = {str(path.relative_to(ROOT)) for path in [*DEIT, *DETR]}
    assert {entry.config for entry in ZOO.models.values()} <= present
    names = {name_of(path) for path in [*DEIT, *DETR]}
    sizes = ("tiny", "small", "base")
    plain = {f"deit/{size}{kind}" for size in sizes for kind in ("", "_distilled")} | {
        "detr/r50_150epochs",
        "detr/r50_300epochs",
    }
    assert plain <= names
    assert len(GRIDS) == 7


@pytest.mark.parametrize("path", [*DEIT, *DETR], ids=name_of)
def test_config_parses_builds_and_opens_with_its_command(path):
    header = path.read_text().partition("\n\n")[0]
    module = detr_irpe.model_stats if path in DETR else deit_irpe.model_stats
    args = parse_args(detr_parser() if path in DETR else deit_parser(), flags_of(path))
    assert re.search(r"scripts/train_de\w+\.sh|python -m de\w+_irpe|demo\.yaml", header)
    built, stated = facts(module, *flags_of(path)), stated_in(header)
    assert stated == {name: built[name] for name in stated}
    if path.stem in ("tiny", "small", "base", "r50_150epochs", "r50_300epochs"):
        assert stated.keys() == {"n_parameters"} and built["buckets"] == 0
    elif path.stem.endswith(("_k", "_qk", "_qkv")) or "enc_rpe2d" in path.read_text() and args.epochs >= 150:
        assert stated.keys() == {"buckets"}


@pytest.mark.parametrize("entry", ZOO.models.values(), ids=lambda entry: entry.name)
def test_published_rows(entry):
    """The figures that need no data are reproduced; the config's first lines quote the published ones."""
    module = deit_irpe.model_stats if entry.package == "deit_irpe" else detr_irpe.model_stats
    told = facts(module, "--config", str(ROOT / entry.config))
    lines = card.compare(entry.name, {key: value for key, value in told.items() if key in entry.expect})
    verdicts = {line["figure"]: line["verdict"] for line in lines}
    counted = {"params_M", "n_parameters", "macs_M", "buckets"} & set(entry.expect)
    assert {figure for figure, verdict in verdicts.items() if verdict == "PASS"} == counted
    assert "FAIL" not in verdicts.values()
    header = (ROOT / entry.config).read_text()
    for figure, value in entry.expect.items():
        if figure not in ("n_parameters", "buckets"):
            assert re.search(rf"\b{re.escape(str(value))}0*\b", header), figure


def test_the_committed_cards_are_those_of_the_committed_zoo():
    for entry in ZOO.models.values():
        saved = json.loads((ROOT / "logs" / "cards" / f"{entry.name}.json").read_text())
        assert saved["verdict"] == "partial" and saved["config"] == entry.config
        assert {line["figure"]: line["published"] for line in saved["figures"]} == entry.expect


@pytest.mark.parametrize("path", GRIDS, ids=name_of)
def test_grid(path):
    """Every run's flags parse and its encoding can be built; published names are zoo rows of the same encoding."""
    grid = read_grid(path)
    package = grid.task.package
    key = {"deit_irpe": "rpe", "detr_irpe": "enc_rpe2d"}[package]
    for run in grid.runs:
        args = parse_args(TRAINS[package](), [*grid.flags(run), "--seed", "1", "--output_dir", "x"])
        spec = getattr(args, key)
        config = None if spec in ("none", "") else parse_rpe_spec(spec)
        built = {role for role, rpe in zip("qkv", build_rpe(config, 8, 2), strict=True) if rpe is not None}
        assert built == set(config.rpe_on if config else "") and (
            spec in run or run == "none" or path.stem.startswith("positions")
        )
        assert args.output_dir == "x" and args.seed == 1
    for run, row in grid.published.items():
        entry = ZOO.find(row)
        config = yaml.safe_load((ROOT / entry.config).read_text())
        module = deit_irpe.model_stats if package == "deit_irpe" else detr_irpe.model_stats
        assert facts(module, *grid.flags(run)) == facts(module, "--config", str(ROOT / entry.config))
        assert config["epochs"] == parse_args(TRAINS[package](), grid.flags(run)).epochs


def test_the_ablations_cover_the_product_of_the_paper():
    for name, key in (("deit", "rpe"), ("detr", "enc_rpe2d")):
        modes = [flags[key] for flags in read_grid(ROOT / f"configs/ablation/{name}_modes.yaml").runs.values()]
        configs = [parse_rpe_spec(spec) for spec in modes if spec not in ("none", "")]
        seen = {(config.method, config.mode, config.shared_head, config.rpe_on) for config in configs}
        wanted = {
            (method, mode, shared, on)
            for method in ("euc", "quant", "cross", "product")
            for mode in ("ctx", "bias")
            for shared in (True, False)
            for on in ("q", "k", "v", "qk", "qv", "kv", "qkv")
            if mode == "ctx" or "v" not in on
        }
        assert seen == wanted and len(modes) == len(wanted) + 1
        ratios = {}
        for flags in read_grid(ROOT / f"configs/ablation/{name}_buckets.yaml").runs.values():
            if flags[key] not in ("none", ""):
                config = parse_rpe_spec(flags[key])
                ratios.setdefault((config.method, config.mode), set()).add(int(2 * config.ratio))
        assert len(ratios) == 8 and all(len(sizes) >= 4 for sizes in ratios.values())


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Eight training and four validation digits of the demo data, as an image folder."""
    sklearn = pytest.importorskip("sklearn.datasets")
    images, labels = sklearn.load_digits(return_X_y=True)
    root = tmp_path_factory.mktemp("digits")
    chosen = [int(i) for digit in (0, 1) for i in np.flatnonzero(labels == digit)[:6]]
    for number, index in enumerate(chosen):
        folder = root / ("train" if number % 6 < 4 else "val") / str(labels[index])
        folder.mkdir(parents=True, exist_ok=True)
        pixels = (images[index].reshape(8, 8) * 15.9).astype(np.uint8)
        Image.fromarray(pixels).resize((32, 32)).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return write_tiny_coco(tmp_path_factory.mktemp("coco"), train=4, val=2)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "regnety_002.pth"
    torch.save({"model": timm.create_model("regnety_002", num_classes=2).state_dict()}, path)
    return ["--teacher-model", "regnety_002", "--teacher-path", str(path)]


@pytest.mark.parametrize("path", DEIT, ids=name_of)
def test_deit_config_trains_two_steps(path, digits, teacher, tmp_path):
    shrunk = ["--epochs", "1", "--batch-size", "4", "--input-size", "32", "--no-model-ema"]
    if path.stem != "demo_backbone":
        shrunk += ["--model-kwargs", "patch_size=16", "embed_dim=32", "depth=1", "num_heads=2"]
    text = deit_ok(
        digits, tmp_path / "out", "--config", path, *shrunk, *(teacher if "distilled" in path.stem else []), model=[]
    )
    assert "[1/2]" in text and "* Acc@1" in text
    (entry,) = (json.loads(line) for line in (tmp_path / "out" / "log.txt").read_text().splitlines())
    assert np.isfinite(entry["train_loss"])


@pytest.mark.parametrize("path", DETR, ids=name_of)
def test_detr_config_trains_two_steps(path, coco, tmp_path):
    encoding = yaml.safe_load(path.read_text()).get("enc_rpe2d", "")
    text = detr_ok(
        coco, tmp_path / "out", "--config", path, *TINY, "--enc_rpe2d", encoding, "--epochs", "1", "--batch_size", "2"
    )
    assert "[1/2]" in text
    (entry,) = (json.loads(line) for line in (tmp_path / "out" / "log.txt").read_text().splitlines())
    assert np.isfinite(entry["train_loss"]) and len(entry["test_coco_eval_bbox"]) == 12
