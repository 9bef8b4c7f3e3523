"""Archives of images: hostile members are refused before anything is read."""

import io
import struct
import tarfile
import zipfile

import pytest

from detr_irpe.data.archives import check_archive
from irpe_train.errors import BadData


def write_tar(path, *members):
    with tarfile.open(path, "w") as archive:
        for name, kind, size in members:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, size, "/etc/passwd"
            archive.addfile(member, io.BytesIO(b"x" * size))
    return path


def write_zip(path, *names, contents=b"x" * 100):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, contents)
    return path


def test_plain_archives_pass(tmp_path):
    check_archive(write_tar(tmp_path / "a.tar", ("train", tarfile.DIRTYPE, 0), ("train/n01/1.jpg", tarfile.REGTYPE, 9)))
    check_archive(write_zip(tmp_path / "a.zip", "train2017/1.jpg", "annotations/x.json"))


@pytest.mark.parametrize("name", ["../evil.png", "a/../../evil.png", "/etc/passwd", "a\\..\\..\\evil", "C:/evil.png"])
def test_members_that_point_outside_are_refused(tmp_path, name):
    for path in (write_zip(tmp_path / "a.zip", name), write_tar(tmp_path / "a.tar", (name, tarfile.REGTYPE, 1))):
        with pytest.raises(BadData, match="points outside of the archive"):
            check_archive(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    with pytest.raises(BadData, match="'x.png' is neither a plain file nor a folder"):
        check_archive(write_tar(tmp_path / "a.tar", ("x.png", kind, 0)))


def test_members_that_claim_to_be_huge_are_refused(tmp_path):
    with pytest.raises(BadData, match=r"a.zip: refused: member 'x.png' claims 10,000,000 bytes, stored in"):
        check_archive(write_zip(tmp_path / "a.zip", "x.png", contents=b"\0" * 10**7))
    path = write_zip(tmp_path / "b.zip", "x.png")
    contents = path.read_bytes()
    entry = contents.rindex(b"PK\x01\x02")  # the claimed size, in the directory at the end
    path.write_bytes(contents[: entry + 24] + struct.pack("<I", 3 * 10**9) + contents[entry + 28 :])
    with pytest.raises(BadData, match="claims 3,000,000,000 bytes"):
        check_archive(path)


def test_damaged_and_missing_archives_are_named(tmp_path):
    with pytest.raises(BadData, match="none.tar: no such file"):
        check_archive(tmp_path / "none.tar")
    for name in ("a.tar", "a.zip"):
        (tmp_path / name).write_bytes(b"hello" * 300)
        with pytest.raises(BadData, match=f"{name}: damaged, or not a"):
            check_archive(tmp_path / name)
