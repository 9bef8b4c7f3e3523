"""Each change of docs/extend.md, made exactly as on the page in a folder of its own, trains two steps."""

import csv
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from irpe_train.checkpoint import read_checkpoint
from tests.helpers.quick_python import quick_programs
from tests.helpers.smaller import DEIT, TINY_VIT, extra_flags
from tests.helpers.snippets import REPOSITORY
from tests.helpers.tiny_coco import write_tiny_coco
from tests.helpers.tiny_images import write_images

PAGE = REPOSITORY / "docs" / "extend.md"
PACKAGES = ("deit_irpe", "detr_irpe", "irpe_ops", "irpe_train", "irpe_lab")


def blocks_of(title: str) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks of a section."""
    section = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)[1]
    return re.findall(r"^```(\w+)\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)


def apply_diff(diff: str, folder: Path) -> None:
    """Each hunk's old lines must be in its file, once."""
    for part in re.split(r"^\+\+\+ ", diff, flags=re.MULTILINE)[1:]:
        name, *hunks = re.split(r"\n@@\n", part.rstrip("\n"))
        text = (folder / name).read_text()
        for hunk in hunks:
            lines = [(line[:1], line[1:]) for line in hunk.split("\n")]
            old = "".join(f"{line}\n" for sign, line in lines if sign != "+")
            assert text.count(old) == 1, f"{name} has not, or not once:\n{old}"
            text = text.replace(old, "".join(f"{line}\n" for sign, line in lines if sign != "-"))
        (folder / name).write_text(text)


def carry_out(title: str, folder: Path, *flags: str) -> None:
    """Write the section's files, apply its diffs to a copy of the packages, run its commands."""
    blocks = blocks_of(title)
    fork = any(language == "diff" for language, _ in blocks)
    for name in PACKAGES if fork else ():
        shutil.copytree(REPOSITORY / name, folder / name)
    shutil.copytree(REPOSITORY / "configs", folder / "configs")
    for language, content in blocks:
        if language == "diff":
            apply_diff(content, folder)
        elif named := re.match(r"# (\S+)\n", content):
            (folder / named[1]).write_text(content)
    commands = "".join(content for language, content in blocks if language == "bash")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), *([] if fork else [str(REPOSITORY)])]),
        "PATH": f"{quick_programs()}:{os.environ['PATH']}",
        "IRPE_EXTRA_FLAGS": " ".join(flags) if "detr_irpe" in commands else " ".join([DEIT, *TINY_VIT, *flags]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    fewer = "irpe_lab.ablate rings.yaml --seeds 0 --gpus-per-run 1 --only '*rings*'"  # one run of three
    commands = commands.replace("irpe_lab.ablate rings.yaml", fewer)
    ran = subprocess.run(["bash", "-e", "-c", commands], cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def losses(run: Path) -> list[float]:
    return [json.loads(line)["train_loss"] for line in (run / "log.txt").read_text().splitlines()]


@pytest.fixture
def folder(tmp_path) -> Path:
    for split, count in (("train", 8), ("val", 2)):
        write_images(tmp_path / "ImageNet" / split, {"ant": count, "bee": count})
    return tmp_path


def test_a_bucket_method_trains_and_is_a_row_of_an_ablation(folder):
    carry_out("A bucket method", folder)
    assert all(math.isfinite(loss) for loss in losses(folder / "outputs" / "rings"))
    assert (folder / "rings.png").stat().st_size > 1000
    (table,) = folder.glob("outputs/**/table.csv")
    with table.open(newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["rpe-1.9-rings-ctx-1-k"]
    assert [row["buckets"] for row in rows.values()] == ["5"]  # rings: 0 to 3, and the class token's


def test_an_attention_of_your_own_trains(folder):
    flags = ("--no-abs-pos", "--input-size", "224", "--model-kwargs", "patch_size=56", *TINY_VIT[4:])
    carry_out("An attention of your own", folder, *flags)
    assert all(math.isfinite(loss) for loss in losses(folder / "outputs" / "sharper"))
    weights = read_checkpoint(folder / "outputs" / "sharper" / "checkpoint.pth")["model"]
    assert "blocks.0.attn.log_sharpness" in weights and "pos_embed" not in weights


def test_a_mode_trains(folder):
    carry_out("A mode", folder)
    assert all(math.isfinite(loss) for loss in losses(folder / "outputs" / "dir"))


def test_a_decoder_for_detr_trains(tmp_path):
    write_tiny_coco(tmp_path / "coco_data")
    carry_out("A decoder for DETR", tmp_path, extra_flags("irpe detect train "))
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "outputs" / "crossing"))
    weights = read_checkpoint(tmp_path / "outputs" / "crossing" / "checkpoint.pth")["model"]
    assert weights["transformer.decoder.layers.1.multihead_attn.rpe_k.lookup_table_weight"].shape == (1, 8, 81)


def test_a_backbone_for_detr_trains(tmp_path):
    write_tiny_coco(tmp_path / "coco_data")
    carry_out(
        "A backbone for DETR", tmp_path, extra_flags("irpe detect train "), "--backbone convnext_atto --image_size 96"
    )
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "outputs" / "convnext"))
    weights = read_checkpoint(tmp_path / "outputs" / "convnext" / "checkpoint.pth")["model"]
    assert weights["input_proj.weight"].shape[1] == 320  # of ConvNeXt's last stage


def test_a_flag_reaches_the_optimizer(tmp_path):
    write_tiny_coco(tmp_path / "coco_data")
    carry_out("A flag", tmp_path, extra_flags("irpe detect train "))
    groups = read_checkpoint(tmp_path / "outputs" / "sgd" / "checkpoint.pth")["optimizer"]["param_groups"]
    assert [group["momentum"] for group in groups] == [0.9, 0.9]


def test_a_size_and_an_optimizer_are_flags(folder):
    carry_out("A size, an optimizer", folder, "--model-kwargs patch_size=8 embed_dim=48 depth=1 num_heads=3")
    saved = read_checkpoint(folder / "outputs" / "sized" / "checkpoint.pth")
    assert saved["model"]["blocks.0.attn.rpe_k.lookup_table_weight"].shape == (1, 16, 50)
    assert saved["optimizer"]["param_groups"][0]["grad_averaging"]  # of timm's Lamb


def test_a_backend_trains(folder):
    carry_out("A backend", folder)
    assert "single" in (folder / "outputs" / "single" / "detail_single.log").read_text()
    assert all(math.isfinite(loss) for loss in losses(folder / "outputs" / "single"))


def test_a_loss_trains(folder):
    carry_out("A loss", folder)
    (loss,) = losses(folder / "outputs" / "bce")
    assert 0.5 < loss < 0.9  # log 2 for each class, of an untrained model


def test_a_data_set_trains(folder):
    listed = folder / "listed"
    (folder / "ImageNet").rename(listed)
    for split in ("train", "val"):
        lines = [f"{path.relative_to(listed)},{path.parent.name}\n" for path in listed.glob(f"{split}/*/*.png")]
        (listed / f"{split}.csv").write_text("".join(sorted(lines)))
    carry_out("A data set", folder)
    assert all(math.isfinite(loss) for loss in losses(folder / "outputs" / "listed"))


def test_a_diff_that_does_not_fit_is_seen(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\ny = 2\n")
    apply_diff("+++ a.py\n@@\n-x = 1\n+x = 3\n@@\n y = 2\n+z = 4\n", tmp_path)
    assert (tmp_path / "a.py").read_text() == "x = 3\ny = 2\nz = 4\n"
    with pytest.raises(AssertionError, match="a.py has not, or not once"):
        apply_diff("+++ a.py\n@@\n-x = 1\n+x = 3\n", tmp_path)
