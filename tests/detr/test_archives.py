"""Archives of images: hostile members are refused before anything is read."""

import random
import struct
import zipfile

import pytest

from detr_irpe.data.image_files import FilesInZip, members_of
from irpe_train.errors import BadData
from tests.helpers.tiny_coco import write_tiny_coco


def write_zip(path, *names, contents=b"x" * 100):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, contents)
    return path


def test_plain_archives_pass_and_are_read(tmp_path):
    path = write_zip(tmp_path / "train2017.zip", "train2017/", "train2017/1.jpg", "annotations/x.json")
    assert list(members_of(path)) == ["1.jpg", "annotations/x.json"]
    images = FilesInZip(path, ["1.jpg", "2.jpg"])
    assert images.read(0) == b"x" * 100 and images.missing == ["2.jpg"]


@pytest.mark.parametrize("stored", ["./s/é.jpg", "a//s/é.jpg", "a\\s\\é.jpg", "./a/./s/é.jpg"])  # in a.zip
@pytest.mark.parametrize("says_utf8", [True, False])  # Info-ZIP and macOS do not
def test_a_member_is_found_however_its_packer_spells_the_path(tmp_path, stored, says_utf8):
    path = write_zip(tmp_path / "a.zip", stored.replace("é", "_" * len("é".encode())))
    contents = path.read_bytes().replace(b"__", "é".encode())
    entry = contents.rindex(b"PK\x01\x02")
    contents = contents[: entry + 9] + bytes([8 * says_utf8]) + contents[entry + 10 :]
    path.write_bytes(contents)
    assert list(members_of(path)) == ["s/é.jpg"]
    assert FilesInZip(path, ["s/é.jpg"]).read(0) == b"x" * 100


@pytest.mark.parametrize("name", ["../evil.png", "a/../../evil.png", "/etc/passwd", "a\\..\\..\\evil", "C:/evil.png"])
def test_members_that_point_outside_are_refused(tmp_path, name):
    with pytest.raises(BadData, match="points outside the archive"):
        members_of(write_zip(tmp_path / "a.zip", name))


def test_members_that_claim_to_be_huge_are_refused(tmp_path):
    with pytest.raises(BadData, match=r"a.zip: refused: member 'x.png' claims 10,000,000 bytes, stored in"):
        members_of(write_zip(tmp_path / "a.zip", "x.png", contents=b"\0" * 10**7))
    path = write_zip(tmp_path / "b.zip", "x.png")
    contents = path.read_bytes()
    entry = contents.rindex(b"PK\x01\x02")  # the claimed size, in the directory at the end
    path.write_bytes(contents[: entry + 24] + struct.pack("<I", 3 * 10**9) + contents[entry + 28 :])
    with pytest.raises(BadData, match="claims 3,000,000,000 bytes"):
        members_of(path)


def test_damaged_and_missing_archives_are_named(tmp_path):
    with pytest.raises(BadData, match="none.zip: no such file"):
        members_of(tmp_path / "none.zip")
    (tmp_path / "a.zip").write_bytes(b"hello" * 300)
    with pytest.raises(BadData, match="a.zip: damaged, or not a .zip"):
        members_of(tmp_path / "a.zip")
    whole = write_zip(tmp_path / "b.zip", "1.jpg", "2.jpg").read_bytes()
    for cut in (1, len(whole) // 2, len(whole) - 1):
        (tmp_path / "b.zip").write_bytes(whole[:cut])
        with pytest.raises(BadData, match="b.zip: damaged"):
            members_of(tmp_path / "b.zip")


def test_no_flipped_bit_and_no_cut_silently_gives_another_image(tmp_path):
    path = write_tiny_coco(tmp_path, zips=True) / "train2017.zip"
    names, whole, rng = [f"{i:012d}.jpg" for i in range(100, 106)], path.read_bytes(), random.Random(0)

    def images():
        files = FilesInZip(path, names)
        if files.missing:
            raise FileNotFoundError(f"{path}: {files.missing}")
        return [files.read(i) for i in range(len(names))]

    right, refused = images(), 0
    for number in range(500):
        damaged = bytearray(whole)
        if number < 400:  # half of the flips in the directory at the end
            place = rng.randrange(0 if number % 2 else len(whole) - 700, len(whole))
            damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged if number < 400 else damaged[: rng.randrange(len(whole))])
        try:
            assert images() == right  # dates and the like have no meaning here
        except (OSError, BadData) as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 400
