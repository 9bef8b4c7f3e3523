"""Every Python snippet of docs/equip.md and docs/gallery.md runs, in order; each ends with its own assertion."""

import pytest

from tests.helpers.snippets import REPOSITORY, python_blocks, run_python_blocks

EQUIP = REPOSITORY / "docs" / "equip.md"


def test_the_tutorial_runs():
    namespace = run_python_blocks(EQUIP)
    assert {"model", "SelfAttention", "EncoderAttention", "WindowAttention", "CrossAttention"} <= namespace.keys()


def test_the_gallery_runs():
    pytest.importorskip("transformers")
    assert len(run_python_blocks(EQUIP.with_name("gallery.md"))["tables"]) == 2


def test_every_snippet_checks_itself():
    blocks = python_blocks(EQUIP) + python_blocks(EQUIP.with_name("gallery.md"))
    assert len(blocks) >= 6
    assert [line for line, code in blocks if "assert " not in code] == []


def test_a_wrong_snippet_names_its_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\nx = 1\n```\n\n```bash\nexit 1\n```\n\n```python\ny = x\nassert y == 2\n```\n")
    assert python_blocks(page) == [(4, "x = 1\n"), (12, "y = x\nassert y == 2\n")]
    with pytest.raises(AssertionError) as error:
        run_python_blocks(page)
    assert error.traceback[-1].lineno + 1 == 13
