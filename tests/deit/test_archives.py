"""Tar files and shards: the images of the folder they were made of, or a refusal that names archive and member."""

import io
import os
import random
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deit_irpe.data.classes import stored_classes
from deit_irpe.data.images import FolderImages
from deit_irpe.data.shards import ShardImages
from deit_irpe.data.tar_files import TarImages
from irpe_train.checkpoint import Checkpoint
from irpe_train.errors import RunError
from irpe_train.outputs import LIST, OutputFolder
from irpe_train.pixels import files_of


def tar_of(file: Path, *members: str | tuple[str, bytes], kind: bytes = tarfile.REGTYPE, mode: str = "w") -> Path:
    """A tar with these members; those without contents get their name."""
    with tarfile.open(file, mode) as tar:
        for member in members:
            name, content = member if isinstance(member, tuple) else (member, member.encode())
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(content) if kind == tarfile.REGTYPE else 0
            info.linkname = "elsewhere"
            tar.addfile(info, io.BytesIO(content))
    return file


def seen(data) -> tuple[list[str], list[tuple[int, bytes]]]:
    return list(data.classes), [(int(label), data.read(index)) for index, label in enumerate(data.labels)]


CLASSES = ["cat/1.jpg", "cat/images/2.png", "cat/9.jpg", "dog/a/b/3.jpg", "dog/a/0.jpg", "emu/4.JPEG", "emu/notes.txt"]


def write_files(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


@pytest.mark.parametrize("around", ["", "./", "val/", "./val/"])
def test_a_tar_is_its_folder_whatever_is_around_the_classes(tmp_path, around):
    folder = FolderImages(write_files(tmp_path / "val", CLASSES))
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        tar.add(tmp_path / "val", around or ".", recursive=False)  # as `tar -cf val.tar .` writes it
        for name in reversed(CLASSES):
            tar.add(tmp_path / "val" / name, around + name)
    assert seen(TarImages(tmp_path / "val.tar")) == seen(folder)
    assert [label for label, _ in seen(folder)[1]] == [0, 0, 0, 1, 1, 2]


PARTS = st.sampled_from(["a", "b", "B", "a.b", "é", "0", "_"])
TREES = st.lists(st.lists(PARTS, min_size=1, max_size=4).map(lambda parts: "/".join(parts) + ".png"), min_size=1)


@settings(max_examples=40, deadline=None)
@given(TREES)
def test_any_tar_is_its_folder_or_refused(tmp_path_factory, names):
    root = tmp_path_factory.mktemp("tree")
    write_files(root / "val", names)
    with tarfile.open(root / "val.tar", "w") as tar:
        for entry in sorted((root / "val").iterdir(), reverse=True):
            tar.add(entry, entry.name)
    try:
        packed = seen(TarImages(root / "val.tar"))
    except ValueError as error:
        single_class_in_folders = len({name.split("/")[0] for name in names}) == 1
        assert str(root / "val.tar") in str(error)
        assert any("/" not in name for name in names) or single_class_in_folders
    else:
        assert packed == seen(FolderImages(root / "val"))


def inner(*names: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))
    return file.getvalue()


def test_an_inner_tar_is_a_class(tmp_path):
    file = tar_of(tmp_path / "train.tar", ("n2.tar", inner("n2_1.JPEG", "n2_0.JPEG")), ("n1.tar", inner("n1_5.JPEG")))
    assert seen(TarImages(file)) == (["n1", "n2"], [(0, b"n1_5.JPEG"), (1, b"n2_0.JPEG"), (1, b"n2_1.JPEG")])
    assert TarImages(file).name(0) == f"{file}:n1/n1_5.JPEG"


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (["x.png", "a/y.png"], "x.png is not in a class folder"),
        (["val/a/x.png", "b/y.png"], "images below val/ and b/y.png: which folders are the classes"),
        (["all/a/x.png", "all/b/y.png"], "everything is below all/: is that the class"),
        (["a/x.png", "a/x.png"], "two members are called 'a/x.png'"),
        (["a/x.png", "./a/x.png"], "two members are called 'a/x.png'"),
        (["a/x.png", "../y.png"], "'../y.png' points outside"),
        (["a/x.png", "/b/y.png"], "'/b/y.png' points outside"),
        (["a/x.txt"], "no images in it"),
        ([("a.tar", inner("x.png")), ("b.tar", inner())], "b: no images in this class folder"),
        ([("a.tar", inner("x.png")), ("b.tar", inner("y.png")[:1024])], "b.tar: it was cut after 'y.png'"),
        ([("a.tar", b"no tar at all")], "a.tar: not an uncompressed tar file"),
    ],
)
def test_folders_without_classes_are_refused(tmp_path, members, words):
    with pytest.raises(ValueError, match=f"val.tar: .*{words}"):
        TarImages(tar_of(tmp_path / "val.tar", *members))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE]
)
def test_links_pipes_devices_and_sparse_files_are_refused(tmp_path, kind):
    tar_of(tmp_path / "val.tar", "a/x.png")
    tar_of(tmp_path / "val.tar", "a/y.png", kind=kind, mode="a")
    with pytest.raises(ValueError, match="val.tar: 'a/y.png' is a link, a device or sparse: pack plain files"):
        TarImages(tmp_path / "val.tar")


def test_an_empty_folder_of_a_tar_is_an_empty_class(tmp_path):
    tar_of(tmp_path / "val.tar", "a/x.png")
    tar_of(tmp_path / "val.tar", "b", kind=tarfile.DIRTYPE, mode="a")
    with pytest.raises(ValueError, match="val.tar: b: no images in this class folder"):
        TarImages(tmp_path / "val.tar")


def test_an_archive_after_the_archive_is_refused(tmp_path):
    one, other = tar_of(tmp_path / "1.tar", "a/x.png"), tar_of(tmp_path / "2.tar", "a/y.png")
    (tmp_path / "val.tar").write_bytes(one.read_bytes() + other.read_bytes())
    with pytest.raises(ValueError, match="it continues after its end marker .after 'a/x.png'."):
        TarImages(tmp_path / "val.tar")


def test_a_damaged_header_is_distinguished_from_a_truncation(tmp_path):
    tar_of(tmp_path / "val.tar", "a/x.png", ("a/y.png", b""))  # only zeros after the second header
    data = bytearray((tmp_path / "val.tar").read_bytes())
    data[1024] ^= 1
    (tmp_path / "val.tar").write_bytes(data)
    with pytest.raises(ValueError, match="val.tar: damaged after 'a/x.png'"):
        TarImages(tmp_path / "val.tar")


def damaged(data: bytes, count: int, *, cut: bool):
    """Copies of ``data`` with one bit flipped, or cut short; with the place."""
    draw = random.Random(0)
    for _ in range(count):
        place = draw.randrange(len(data))
        flipped = bytearray(data)
        flipped[place] ^= 1 << draw.randrange(8)
        yield place, data[:place] if cut else bytes(flipped)


@pytest.mark.parametrize("cut", [False, True], ids=["400 flipped bits", "100 cuts"])
@pytest.mark.parametrize("form", ["folders", "inner tars"])
def test_no_damage_of_a_tar_silently_changes_what_is_read(tmp_path, form, cut):
    """A tar has checksums for headers, not for contents: only the decoder can see a flipped bit inside an image."""
    pixels = bytes(range(256)) * 3
    images = [(f"{name}/{i}.png", pixels) for i in range(4) for name in "ab"]
    if form == "inner tars":
        images = [(f"{name}.tar", inner("0.png", "1.png", "2.png")) for name in "ab"]
    data = tar_of(tmp_path / "val.tar", *images).read_bytes()
    whole = TarImages(tmp_path / "val.tar")
    refused = 0
    for place, changed in damaged(data, 100 if cut else 400, cut=cut):
        (tmp_path / "val.tar").write_bytes(changed)
        try:
            found = TarImages(tmp_path / "val.tar")
        except ValueError as error:
            assert "val.tar: " in str(error)
            refused += 1
            continue
        assert (found.classes, found.names.tolist()) == (whole.classes, whole.names.tolist()), place
        for of in ("labels", "places", "sizes"):
            np.testing.assert_array_equal(getattr(found, of), getattr(whole, of))
    assert refused > 50


@pytest.mark.parametrize("cut", [False, True], ids=["400 flipped bits", "100 cuts"])
def test_no_damage_of_a_shard_silently_changes_what_is_read(tmp_path, cut):
    """Except for the digit of a .cls itself, which nothing can check."""
    pairs = [pair for i in range(6) for pair in ((f"{i}.png", b"x" * 300), (f"{i}.cls", b"%d" % (i % 3)))]
    data = tar_of(tmp_path / "x-val-0.tar", *pairs).read_bytes()
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    whole = ShardImages(tmp_path, False)
    refused = 0
    for place, changed in damaged(data, 100 if cut else 400, cut=cut):
        (tmp_path / "x-val-0.tar").write_bytes(changed)
        try:
            found = ShardImages(tmp_path, False)
        except ValueError as error:
            assert "x-val-0.tar: " in str(error) or "class numbers from" in str(error)
            refused += 1
            continue
        assert found.names.tolist() == whole.names.tolist()
        np.testing.assert_array_equal(found.places, whole.places)
        assert (found.labels != whole.labels).sum() <= (data[place : place + 1].isdigit() and not cut)
    assert refused > 50


def shards(root: Path, *names: str) -> Path:
    for name in names:
        tar_of(root / name, ("1.jpg", b"x"), ("1.cls", b"0"))
    return root


def test_the_split_is_a_word_of_the_shards_name(tmp_path):
    train = ["retrieval-train-0.tar", "Train_00.tar", "training.tar"]
    val = ["imagenet1k-validation-00-of-01.tar", "val0.tar", "x.valid.tar"]
    shards(tmp_path, *train, *val, "notes.tar", "retrieval-test-0.tar")
    assert [file.name for file in ShardImages(tmp_path, True).files] == sorted(train)
    assert [file.name for file in ShardImages(tmp_path, False).files] == sorted(val)


@pytest.mark.parametrize("name", ["trainval-0.tar", "retrieval-0.tar", "train-val-0.tar", "mytrain.tar"])
def test_a_shard_that_could_be_either_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}: is it for training or for validation"):
        ShardImages(shards(tmp_path, "x-val-0.tar", name), False)


def test_a_link_to_another_shard_does_not_count_its_images_twice(tmp_path):
    (shards(tmp_path, "x-val-0.tar") / "x-val-1.tar").symlink_to("x-val-0.tar")
    with pytest.raises(ValueError, match="x-val-1.tar: a link to a shard that is read already"):
        ShardImages(tmp_path, False)


@pytest.mark.parametrize("name", ["x-val-0.tar.md5", "x-val-0.tar.sha256sum", "x-val-0.tar.idx", "x-train-0.tar.json"])
def test_checksums_and_indexes_beside_shards_are_no_shards(tmp_path, name):
    (shards(tmp_path, "x-val-0.tar") / name).write_bytes(b"x")
    assert [file.name for file in ShardImages(tmp_path, False).files] == ["x-val-0.tar"]


@pytest.mark.parametrize("name", ["x-val-1.tar.part", "x-val-1.tar.gz", "x-val-1.tgz", "x-val-1.tar.zst"])
def test_a_compressed_shard_beside_the_others_is_not_left_out(tmp_path, name):
    (shards(tmp_path, "x-val-0.tar") / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=f"{name}: no plain .tar"):
        ShardImages(tmp_path, False)


@pytest.mark.parametrize(
    ("name", "words"),
    [("x-val-1.tar", "x-val-1.tar: named like a shard, but not a file"), ("classes.txt", "classes.txt")],
)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("gone")])
def test_a_pipe_or_folder_named_like_a_shard_or_the_list_of_classes_is_refused(tmp_path, name, words, make):
    make(shards(tmp_path, "x-val-0.tar") / name)
    with pytest.raises((ValueError, OSError, RunError), match=words):
        ShardImages(tmp_path, False)


def test_the_key_of_a_sample_ends_at_the_first_dot_of_its_file(tmp_path):
    """As in WebDataset: ``seg.png`` is another part of the sample, and dots in folder names do not count."""
    members = [("v1.0/7.jpg", b"image"), ("v1.0/7.seg.png", b"mask"), ("v1.0/7.cls", b"1"), ("v1.0/8.x.jpg", b"?")]
    file = tar_of(tmp_path / "x-val-0.tar", *members[:3])
    data = ShardImages(tmp_path, False)
    assert seen(data) == (["0", "1"], [(1, b"image")]) and data.name(0) == f"{file}:v1.0/7.jpg"
    tar_of(tmp_path / "x-val-0.tar", *members)
    with pytest.raises(ValueError, match="sample 'v1.0/8' has x.jpg; expected cls and one of jpg"):
        ShardImages(tmp_path, False)


def test_a_label_is_read_to_its_end(tmp_path):
    tar_of(tmp_path / "x-val-0.tar", "0.jpg", ("0.cls", b" " * 30 + b"0\r\n"), "1.jpg", ("1.cls", b"0" * 30 + b"1"))
    assert ShardImages(tmp_path, False).labels.tolist() == [0, 1]


def test_two_images_of_a_sample_are_refused(tmp_path):
    tar_of(tmp_path / "x-val-0.tar", "1.jpg", "1.JPG", ("1.cls", b"0"))
    with pytest.raises(ValueError, match="sample '1' has two .jpg"):
        ShardImages(tmp_path, False)


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (b"-1", "1.cls holds '-1'; expected a class number"),
        ("²".encode(), "1.cls holds '²'"),
        (b"", "1.cls holds ''"),
        (b"0" * 1000 + b"1", "1.cls holds '0{39}; expected a class number"),
        (b"9999999999999", "class numbers from 9999999999999 to 9999999999999; expected 0 to 99999; or list them"),
    ],
)
def test_an_invalid_label_is_refused(tmp_path, label, words):
    tar_of(tmp_path / "x-val-0.tar", "1.jpg", ("1.cls", label))
    with pytest.raises(ValueError, match=words):
        ShardImages(tmp_path, False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"cat\ndog\ncat\n", "line 3: 'cat' comes twice"),
        ("caf\u00e9\ncafe\u0301\n".encode(), "line 2: 'caf\u00e9' comes twice"),
        (b"cat\n\ndog\n", "line 2: empty"),
        (b"c\xe4t\n", "not UTF-8 text"),
    ],
)
def test_a_list_of_classes_names_each_once(tmp_path, text, words):
    (shards(tmp_path, "x-val-0.tar") / "classes.txt").write_bytes(text)
    with pytest.raises(ValueError, match=f"classes.txt: {words}"):
        ShardImages(tmp_path, False)


def test_a_list_of_classes_from_windows(tmp_path):
    (shards(tmp_path, "x-val-0.tar") / "classes.txt").write_bytes("\ufeffchat\x0cnoir\r\nchien\r\n\r\n".encode())
    assert ShardImages(tmp_path, False).classes == ["chat\x0cnoir", "chien"]  # only a line break ends a line


def test_pictures_that_predict_wrote_are_not_training_images(tmp_path):
    write_files(tmp_path / "val", ["a/0.png", "a/results/0.png", "b/1.png"])
    OutputFolder(tmp_path / "val/a/results").wrote("0.png")
    with pytest.raises(ValueError, match="val/a/results: predict wrote pictures there"):
        FolderImages(tmp_path / "val")
    with pytest.raises(ValueError, match=f"val.tar: a/results/{LIST}: predict wrote pictures there"):
        TarImages(tar_of(tmp_path / "val.tar", f"a/results/{LIST}", "a/results/0.png", "b/1.png"))
    (tmp_path / "val/a/results" / LIST).unlink()
    assert len(FolderImages(tmp_path / "val")) == 3


def test_links_to_folders_are_followed(tmp_path):
    """A user's symlinks are intended, as long as nothing is read twice."""
    elsewhere = write_files(tmp_path / "elsewhere", ["1.png", "deep/2.png"])
    more = write_files(tmp_path / "more", ["3.png", "deep/4.png"])
    write_files(tmp_path / "val", ["a/0.png"])
    os.symlink(elsewhere, tmp_path / "val/b")
    os.symlink(more, tmp_path / "val/a/more")
    os.symlink(elsewhere / "1.png", tmp_path / "val/a/z.png")
    classes, images = seen(FolderImages(tmp_path / "val"))
    assert classes == ["a", "b"] and [label for label, _ in images] == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("link", "target", "words"),
    [
        ("a/again", ".", "val/a/again: a symlink to a folder already read"),
        ("a/up", "../..", "val/a/up/val: a symlink to a folder already read"),
        ("a/second", "deep", "val/a/second: a symlink to a folder already read"),
        ("a/other", "../b", "val/b: a symlink to a folder already read, or its target"),
        ("c", "b", "val/c: a symlink to a folder already read"),
        ("a/lost.png", "nowhere", "val/a/lost.png: neither a file nor a folder"),
        ("a/lost", "nowhere", "val/a/lost: a broken link"),
        ("lost", "nowhere", "val/lost: a broken link"),
    ],
)
def test_links_that_would_count_images_twice_or_not_at_all_are_refused(tmp_path, link, target, words):
    write_files(tmp_path / "val", ["a/0.png", "a/deep/1.png", "b/2.png"])
    os.symlink(target, tmp_path / "val" / link)
    with pytest.raises(ValueError, match=words):
        FolderImages(tmp_path / "val")


def test_a_pipe_among_the_images_is_refused_and_not_waited_for(tmp_path):
    write_files(tmp_path / "val", ["a/0.png"])
    os.mkfifo(tmp_path / "val/a/1.png")
    with pytest.raises(ValueError, match="val/a/1.png: neither a file nor a folder"):
        FolderImages(tmp_path / "val")


HIDDEN = [
    ".ipynb_checkpoints/x.png",
    "a/.ipynb_checkpoints/0.png",
    "a/._0.png",
    ".DS_Store",
    "._a",
    "._b.tar",
    ".net/y.jpg",
    "@eaDir/z.jpg",
    "a/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg",
    "__MACOSX/a/._0.png",
]


@pytest.mark.parametrize("around", ["", "./", "val/"])
def test_hidden_files_and_folders_are_skipped(tmp_path, monkeypatch, around):
    said = []
    monkeypatch.setattr("deit_irpe.data.images.logger.info", said.append)
    names = ["a/0.png", "b/1.png"]
    folder = FolderImages(write_files(tmp_path / ".cache/val", names + HIDDEN))  # hidden parents do not matter
    archive = TarImages(tar_of(tmp_path / "val.tar", *(around + name for name in HIDDEN + names)))
    assert folder.classes == archive.classes == ["a", "b"] and len(folder) == len(archive) == 2
    assert said[0].endswith(
        "hidden, so not classes: .DS_Store, ._a, ._b.tar, .ipynb_checkpoints, .net, @eaDir, __MACOSX"
    )
    if around != "val/":
        assert said[1] == said[0].replace(str(tmp_path / ".cache/val"), str(tmp_path / "val.tar"))


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("a.tar", b""), "b/0.png", "b.zip"], "b.zip: images packed in it are not read"),
        (["a/0.png", "b.tar.gz"], "b.tar.gz: images packed in it are not read"),
        (["a/0.png", "b/0.png", ("b.tar", b"")], "two members are b/0.png, one of them in a tar"),
    ],
)
def test_a_class_that_is_packed_otherwise_or_twice_is_refused(tmp_path, members, words):
    inner = tar_of(tmp_path / "inner.tar", "0.png").read_bytes()
    file = tar_of(tmp_path / "val.tar", *((one[0], inner) if isinstance(one, tuple) else one for one in members))
    with pytest.raises(ValueError, match=words):
        TarImages(file)


def test_pictures_of_other_kinds_are_reported_as_left_out(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("irpe_train.pixels.logger.warning", said.append)
    names = ["a/0.png", "b/c/1.HEIC", "b/1.png", "a/x.heic", "a/y.gif", "notes.txt"]
    places = write_files(tmp_path / "val", names), tar_of(tmp_path / "val.tar", *names)
    FolderImages(places[0]), TarImages(places[1])
    told = ": left out because their format is not read: 1 .gif, 2 .heic; save pictures as .jpg, unpack archives"
    assert said == [f"{place}{told}" for place in places]
    assert len(files_of([str(places[0])], besides=tmp_path / "out")) == 2 and said[2] == said[0]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_name_is_one_class_however_unicode_spells_it(tmp_path, form):
    """macOS stores an accent separately from its letter; a folder copied from there is the same data set."""
    names = [unicodedata.normalize(form, name) for name in ("caf\u00e9/0.png", "cafz/1.png", "cafe/2.png")]
    for data in (FolderImages(write_files(tmp_path / "val", names)), TarImages(tar_of(tmp_path / "val.tar", *names))):
        assert data.classes == ["cafe", "cafz", "caf\u00e9"]
        assert [data.read(index).decode() for index in range(3)] == [names[2], names[1], names[0]]
    below = [*(f"a/{name}" for name in names), "b/0.png"]
    for data in (FolderImages(write_files(tmp_path / "x", below)), TarImages(tar_of(tmp_path / "x.tar", *below))):
        assert [data.read(index).decode() for index in range(3)] == [below[2], below[1], below[0]]
    assert stored_classes(Checkpoint("x", {"classes": [names[0]]})) == ["caf\u00e9/0.png"]
    write_files(tmp_path / "val", ["caf\u00e9/0.png", "cafe\u0301/0.png"])
    with pytest.raises(ValueError, match="val/.*png, ...: two classes are called 'caf\u00e9', in two spellings of Uni"):
        FolderImages(tmp_path / "val")


def test_hidden_members_of_a_shard_are_left_out(tmp_path):
    tar_of(
        tmp_path / "x-val-0.tar", ("._0.jpg", b"mac"), "0.jpg", ("._0.cls", b"mac"), ("0.cls", b"0"), (".x/1.jpg", b"")
    )
    (tmp_path / "._x-val-0.tar").write_bytes(b"what macOS leaves on other disks")
    assert len(ShardImages(tmp_path, False)) == 1
