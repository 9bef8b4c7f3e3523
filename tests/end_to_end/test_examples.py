"""Each example runs unchanged, and asserts its own claims."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.helpers.snippets import REPOSITORY

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


def test_every_example_is_listed_and_tested():
    files = {path.stem for path in EXAMPLES.glob("*.py")}
    assert files == set(CLAIMS)
    assert all(f"examples/{name}.py" in Path(EXAMPLES / "README.md").read_text() for name in files)
