"""The only decoder: bit-equal to Pillow for the published data, a stated rule or a refusal for the rest.

And how images are found for a prediction.
"""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from irpe_train.outputs import OutputFolder, result_names
from irpe_train.pixels import UnreadableImage, decode_image, files_of, is_turned, read_image
from tests.helpers.tiny_images import write_images

NOISE = np.random.RandomState(0).randint(0, 256, (6, 9, 4), dtype=np.uint8)
RAMP = np.linspace(0, 65535, 54).round().astype(np.uint16).reshape(6, 9)


def encoded(image: Image.Image, suffix: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, suffix, **options)
    return file.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x112] = orientation
    return exif


ORDINARY = {
    "grey JPEG": (Image.fromarray(NOISE[..., 0]), "JPEG"),
    "colour JPEG": (Image.fromarray(NOISE[..., :3]), "JPEG"),
    "CMYK JPEG": (Image.fromarray(NOISE, "CMYK"), "JPEG"),
    "transparent PNG": (Image.fromarray(NOISE), "PNG"),
    "grey and alpha PNG": (Image.fromarray(NOISE[..., :2], "LA"), "PNG"),
    "palette PNG": (Image.fromarray(NOISE[..., :3]).quantize(16), "PNG"),
    "black and white PNG": (Image.fromarray(NOISE[..., 0]).convert("1"), "PNG"),
    "GIF": (Image.fromarray(NOISE[..., :3]).quantize(16), "GIF"),
    "BMP": (Image.fromarray(NOISE[..., :3]), "BMP"),
    "WebP": (Image.fromarray(NOISE[..., :3]), "WEBP"),
}


@pytest.mark.parametrize("kind", ORDINARY)
def test_ordinary_images_are_what_pillow_makes_of_them(kind):
    data = encoded(*ORDINARY[kind])
    image = decode_image(data, "x")
    assert image.mode == "RGB"
    assert np.array_equal(image, Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("suffix", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled(suffix):
    seen = np.asarray(decode_image(encoded(Image.fromarray(RAMP), suffix), "x"))
    assert np.array_equal(seen, np.repeat((RAMP / 257).round().astype(np.uint8)[..., None], 3, 2))
    assert seen.min() == 0 and seen.max() == 255


def test_sixteen_bit_tiff_of_the_other_byte_order_is_the_same_picture():
    big = Image.frombytes("I;16B", (9, 6), RAMP.astype(">u2").tobytes())
    assert np.array_equal(
        decode_image(encoded(big, "TIFF"), "x"), decode_image(encoded(Image.fromarray(RAMP), "PNG"), "x")
    )


def png_of_sixteen_bit_colour(pixels: np.ndarray) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_sixteen_bit_colour_is_scaled_too():
    wide = np.stack([RAMP, RAMP.T.reshape(6, 9), RAMP[::-1]], 2)
    seen = np.asarray(decode_image(png_of_sixteen_bit_colour(wide), "x")).astype(int)
    assert abs(seen - (wide / 257).round()).max() <= 1


@pytest.mark.parametrize("pixels", [RAMP.astype(np.float32) / 65535, RAMP.astype(np.int32)], ids=["float", "32 bits"])
def test_pixels_without_a_known_range_are_refused_by_name(pixels):
    with pytest.raises(UnreadableImage, match=r"scan\.tif: .*whose black and white are unknown; save it with 8 or 16"):
        decode_image(encoded(Image.fromarray(pixels), "TIFF"), "scan.tif")


@pytest.mark.parametrize("bits", [8, 16])
def test_signed_pixels_are_refused_by_name(bits):
    with pytest.raises(UnreadableImage, match=r"depth\.tif: .*\(signed pixels, whose black and white are unknown"):
        decode_image(small_tiff(bits, 1, bytes(54 * bits // 8), kind=2), "depth.tif")


def small_tiff(bits: int, white: int, data: bytes, kind: int = 1) -> bytes:
    """A TIFF of 9 x 6 grey pixels; ``white``: 0 where zero is white; ``kind``: 2 for signed numbers."""
    tags = ((256, 9), (257, 6), (258, bits), (259, 1), (262, white), (273, 8), (277, 1), (278, 6), (279, len(data)))
    tags += ((339, kind),)
    entries = b"".join(struct.pack("<HHIHxx", tag, 3, 1, value) for tag, value in tags)
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_a_tiff_of_twelve_bits_or_with_zero_for_white_is_the_same_picture():
    rows = (int("".join(f"{value >> 4:012b}" for value in row) + "0000", 2) for row in RAMP.tolist())
    twelve, wanted = small_tiff(12, 1, b"".join(row.to_bytes(14, "big") for row in rows)), (RAMP / 257).round()
    for data in (small_tiff(16, 1, RAMP.tobytes()), twelve, small_tiff(16, 0, (65535 - RAMP).tobytes())):
        assert abs(np.asarray(decode_image(data, "x"))[..., 0] - wanted).max() <= 1


def test_a_program_that_calls_itself_an_image_is_not_run():
    text = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 6\n%%EndComments\nshowpage\n"
    with pytest.raises(UnreadableImage, match="x.jpg: .*a PostScript program, which is not run"):
        decode_image(text, "x.jpg")


@pytest.mark.parametrize("suffix", ["PNG", "TIFF"])  # Pillow turns a TIFF while it loads it
@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 mean nothing; cameras write 0 for "unknown"
def test_orientation_is_applied_on_request_only(orientation, suffix):
    data = encoded(Image.fromarray(NOISE[..., :3]), suffix, exif=turned(orientation))
    stored = decode_image(data, "x")
    assert np.array_equal(stored, NOISE[..., :3]) and is_turned(stored) == (1 < orientation < 9)
    corners = {2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (-1, 0), 7: (-1, -1), 8: (0, -1)}
    corner = corners.get(orientation, (0, 0))
    upright = np.asarray(decode_image(data, "x", upright=True))
    assert upright.shape[:2] == ((9, 6) if 5 <= orientation <= 8 else (6, 9))
    assert np.array_equal(upright[0, 0], NOISE[corner][:3])  # which stored corner is at the top left


def test_sixteen_bits_and_an_orientation_go_together():
    for suffix in ("PNG", "TIFF"):
        data = encoded(Image.fromarray(RAMP), suffix, exif=turned(6))
        assert decode_image(data, "x").size == (9, 6) and decode_image(data, "x", upright=True).size == (6, 9)


def test_a_bomb_is_refused_in_one_line():
    with pytest.raises(UnreadableImage, match=r"^big\.png: too many pixels .*; scale it down$"):
        decode_image(encoded(Image.new("1", (14000, 14000)), "PNG"), "big.png")


PHOTO = encoded(Image.fromarray(NOISE[..., :3]), "PNG")


@pytest.mark.parametrize("data", [b"", b"no image", PHOTO[:40], PHOTO[:60] + b"???" + PHOTO[63:]])
def test_a_damaged_file_is_named(data):
    with pytest.raises(UnreadableImage, match=r"^x\.png: this image cannot be read \("):
        decode_image(data, "x.png")


def test_a_photo_of_a_phone_that_is_only_named_jpg_is_called_what_it_may_be():
    with pytest.raises(
        UnreadableImage, match=r"x\.jpg: .*\(not an image, or in a format .*not read here, such as HEIC\)"
    ):
        decode_image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "x.jpg")


def test_pipes_and_folders_are_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name, reason in (
        ("pipe.png", "not a plain file"),
        ("folder.png", "not a plain file"),
        ("x.png", "no such file"),
    ):
        with pytest.raises(UnreadableImage, match=rf"{name}: {reason}"):
            read_image(tmp_path / name)
    (tmp_path / "x.png").write_bytes(PHOTO)
    assert np.array_equal(read_image(tmp_path / "x.png"), NOISE[..., :3])

    def broken(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", broken)
    with pytest.raises(UnreadableImage, match=r"x.png: cannot be read \(Input/output error\)"):
        read_image(tmp_path / "x.png")


@pytest.mark.parametrize(
    "exif", [b"", b"garbage!!!", b"II*\0\x08\0\0\0\x05\0\x12\x01"], ids=["empty", "garbage", "cut"]
)
def test_an_image_with_damaged_metadata_is_read(exif):
    file = io.BytesIO()
    Image.new("RGB", (6, 4)).save(file, "JPEG", exif=b"Exif\0\0" + exif)
    image = decode_image(file.getvalue(), "x.jpg", upright=True)
    assert image.size == (6, 4) and not is_turned(image)


def test_folders_and_patterns(tmp_path, monkeypatch):
    write_images(tmp_path, {"photos/a": 2, "photos/b": 1, "photos/out": 1, "photos/.ipynb_checkpoints": 1})
    (tmp_path / "photos/._0.png").touch()
    (tmp_path / "photos/notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    found = files_of(["photos"], besides=Path("photos/out"))
    assert found == [Path("photos/a/0.png"), Path("photos/a/1.png"), Path("photos/b/0.png")]
    assert files_of(["photos/a/*.png", "photos/a/1.png"], besides=Path("out")) == found[:2]
    for pattern in ("photos/**/*.png", "photos/[ab]", "photos/[!n]*", "photo*"):  # folders that fit are searched
        assert files_of([pattern], besides=Path("photos/out")) == found
    write_images(tmp_path / "elsewhere", {"c": 1})
    (tmp_path / "photos/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "photos")
    linked = Path("photos/linked/c/0.png")
    assert files_of(["photos"], besides=Path("photos/out")) == [*found, linked]
    assert files_of(
        ["photos/**/*.png", str(tmp_path / "photos/a"), "elsewhere/../photos/b"], besides=Path("x/../photos/out")
    ) == [*found, linked]  # each once, by its shortest name
    (tmp_path / "[x].png").touch()
    assert files_of(["[x].png"], besides=Path("out")) == [Path("[x].png")]  # a file's name wins over a pattern
    for text, words in (
        ("photos/*.jpg", r"photos/\*.jpg: no image matches this pattern"),
        ("empty", "empty: no image in"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=words):
            files_of([text], besides=Path("out"))
    (tmp_path / "empty/X.PNG").touch()
    assert files_of(["empty"], besides=Path("out")) == [Path("empty/X.PNG")]


def test_a_folder_that_cannot_be_listed_is_not_left_out(tmp_path, monkeypatch):
    write_images(tmp_path, {"photos/a": 1, "photos/b": 1})
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)  # root may read everything
    with pytest.raises(PermissionError, match="photos/b"):
        files_of([str(tmp_path / "photos")], besides=Path("out"))


def test_what_predict_wrote_is_not_found_in_a_folder(tmp_path):
    write_images(tmp_path, {"photos": 1, "photos/first/a": 1})
    out = OutputFolder(tmp_path / "photos" / "first")
    out.wrote("a/0.png")
    found = tmp_path / "photos" / "0.png"
    assert files_of([str(tmp_path / "photos")], besides=tmp_path / "second") == [found]
    result = str(out.folder / "a/0.png")
    assert files_of([result], besides=tmp_path / "second") == [Path(result)]  # but where it is named
    (out.folder / "a/0.png").write_bytes(b"a photograph")
    assert len(files_of([str(tmp_path / "photos")], besides=tmp_path / "second")) == 2


@pytest.mark.parametrize("named", ["photos", "photos/a", "photos/*.jpg", "photos/**/*"])
def test_results_may_go_where_the_images_are_or_above(tmp_path, named):
    for name in ("a.jpg", "a/b.jpg"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(PHOTO)
    out = tmp_path / "photos"
    found = files_of([str(tmp_path / named)], besides=out)
    names = result_names(found)
    for name in names.values():
        (out / f"{name}.jpg").parent.mkdir(exist_ok=True)
        (out / f"{name}_result.jpg").write_bytes(PHOTO)
        OutputFolder(out, names).wrote(f"{name}_result.jpg")
    assert len(found) == {"photos": 2, "photos/**/*": 2}.get(named, 1)
    assert (
        files_of([str(tmp_path / named)], besides=out) == found == files_of([str(tmp_path / named)], besides=tmp_path)
    )
