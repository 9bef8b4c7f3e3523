"""Each example runs unchanged, and asserts its own claims. The fine-tuning is shortened to an epoch."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.snippets import REPOSITORY
from tests.helpers.tiny_images import write_images

EXAMPLES = REPOSITORY / "examples"
CLAIMS = {
    "swin_windows": r"the same output with Swin's bias in iRPE tables; [\d,]+ parameters",
    "transformer_encoder": r"a 5 x 7 map gives the same result alone and padded to 8 x 9",
}


def run(name: str, monkeypatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *flags])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize("name", CLAIMS)
def test_the_example_runs_and_says_what_it_found(name, monkeypatch, capsys):
    run(name, monkeypatch)
    assert re.search(CLAIMS[name], capsys.readouterr().out)


def test_plain_weights_gain_an_encoding_by_finetuning(tmp_path, monkeypatch, capsys):
    for split, count in (("train", 32), ("val", 2)):
        write_images(tmp_path / "data" / split, {"ant": count, "bee": count})
    run("finetune_digits", monkeypatch, "--out", str(tmp_path), "--data", str(tmp_path / "data"), "--epochs", "1")
    printed = capsys.readouterr().out
    plain = json.loads((tmp_path / "plain/log.txt").read_text())["test_acc1"]
    assert f"on the 4 test images: {plain:.1f}%" in printed.split("an encoding that is zero:")[1]
    weights = torch.load(tmp_path / "with_irpe/checkpoint.pth", weights_only=False)["model"]
    assert weights["blocks.0.attn.rpe_k.lookup_table_weight"].any()
    assert (tmp_path / "finetune.png").stat().st_size > 10_000


def test_every_example_is_listed_and_tested():
    files = {path.stem for path in EXAMPLES.glob("*.py")}
    assert files == set(CLAIMS) | {"finetune_digits"}
    assert all(f"examples/{name}.py" in Path(EXAMPLES / "README.md").read_text() for name in files)
