import pytest

from irpe_train.errors import RunError
from irpe_train.outputs import OutputFolder


def test_only_what_was_written_before_is_replaced(tmp_path):
    out = OutputFolder(tmp_path / "new" / "out")
    out.refuse_to_replace(["a.json"])
    out.path("a.json").write_text("1")
    out.wrote("a.json")
    OutputFolder(tmp_path / "new" / "out").refuse_to_replace(["a.json", "b.json"])
    (tmp_path / "new" / "out" / "b.json").write_text("mine")
    with pytest.raises(RunError, match=r"b.json: already there, and not a result of predict; nothing was written"):
        OutputFolder(tmp_path / "new" / "out").refuse_to_replace(["a.json", "b.json"])


def test_a_result_that_was_edited_is_somebodys(tmp_path):
    out = OutputFolder(tmp_path)
    out.path("a.json").write_text("1")
    out.wrote("a.json")
    (tmp_path / "a.json").write_text("corrected by hand")
    with pytest.raises(RunError, match="a.json: already there"):
        out.refuse_to_replace(["a.json"])


def test_a_damaged_list_protects_everything(tmp_path):
    (tmp_path / "a.json").write_text("1")
    (tmp_path / ".written_by_predict").write_bytes(b"\xff\xfe a.json")
    with pytest.raises(RunError, match="a.json"):
        OutputFolder(tmp_path).refuse_to_replace(["a.json"])
