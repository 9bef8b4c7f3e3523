"""The only reader of annotation files: what it accepts, what it refuses and how it names the place."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from detr_irpe.data.annotations import Annotations
from detr_irpe.data.json_columns import FLAG, JsonList
from detr_irpe.data.segmentations import decode_masks, problem_of, to_rle
from tests.helpers.tiny_coco import edit_annotations, write_tiny_coco

HEIGHT, WIDTH = 40, 56


def column(values):
    return JsonList("a.json", "things", [{"x": value} for value in values])


def read(root, **options):
    return Annotations(root / "annotations/instances_train2017.json", **options)


@pytest.mark.parametrize("values", [[1, 2, 3], ["1", 2, "3"], [1.0, 2, 3], [" 1", "+2", 3]])
def test_integers_are_exact(values):
    found = column(values).integers("x")
    assert found.dtype == np.int64 and found.tolist() == [1, 2, 3]


@pytest.mark.parametrize("value", [2**53 + 1, -(2**63), 2**63 - 1])
def test_large_integers_keep_every_digit(value):
    assert column([value, str(value)]).integers("x").tolist() == [value, value]


@pytest.mark.parametrize(
    "value", [1.5, 1e300, 2.0**60, float("nan"), "1.5", "x", "", "1_0", "١", [1], {}, True, 2**63, "9" * 40]
)
def test_what_is_not_an_integer_is_refused_by_its_place(value):
    with pytest.raises(ValueError, match=r"^a.json: things\[1\]\['x'\] is .*; expected an integer$"):
        column([1, value]).integers("x")


def test_what_is_missing_is_refused_or_has_a_default():
    with pytest.raises(ValueError, match=r"a.json: things\[1\] lacks 'x'"):
        column([1, None]).integers("x")
    assert column([1, None]).integers("x", default=7).tolist() == [1, 7]
    assert column([3, None]).integers("x", default=range(1, 3)).tolist() == [3, 2]
    assert column([]).integers("x").shape == (0,)


def test_flags_and_ranges():
    assert column([True, False, 1, "0", None]).integers("x", default=0, valid=FLAG).tolist() == [1, 0, 1, 0, 0]
    for value in (2, -1):
        with pytest.raises(ValueError, match=rf"things\[0\]\['x'\] is {value}; expected an integer from 0 to 1"):
            column([value]).integers("x", valid=FLAG)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e39, 10**400, "nan", "x", True, [1]])
def test_what_is_not_a_finite_number_is_refused(value):
    assert column([1, 2.5, "3.5", "1e2", None]).numbers("x", default=[9.0] * 5).tolist() == [1, 2.5, 3.5, 100, 9]
    with pytest.raises(ValueError, match=r"things\[1\]\['x'\] is .*; expected a finite number"):
        column([1, value]).numbers("x", default=[0, 0])
    with pytest.raises(ValueError, match=r"things\[0\]\['x'\] is .*; expected a list of four finite numbers"):
        column([[1, 2, 3, value]]).boxes("x")


@pytest.mark.parametrize("value", [[1, 2, 3], [1, 2, 3, 4, 5], 7, "1234", {}, [[1, 2, 3, 4]]])
def test_invalid_boxes_are_refused(value):
    assert column([[1, 2, 3, 4], ["1", 2.5, 3, 4]]).boxes("x").tolist() == [[1, 2, 3, 4], [1, 2.5, 3, 4]]
    assert column([]).boxes("x").shape == (0, 4)
    with pytest.raises(ValueError, match="expected a list of four finite numbers"):
        column([value]).boxes("x")


def test_the_first_three_of_many_are_named():
    with pytest.raises(
        ValueError, match=r"things\[0\].* things\[1\].* things\[2\]\['x'\] is \"c\" and 2 more; expected an integer"
    ):
        column(list("abcde")).integers("x")


@pytest.mark.parametrize("value", [5, ["a.jpg"], "", "\ud800"])
def test_what_is_not_text_is_refused(value):
    with pytest.raises(ValueError, match=r"things\[0\]\['x'\] is .*; expected text"):
        column([value]).texts("x")


def test_paths_lose_dots_that_mean_nothing():
    names = ["./a.jpg", "x/././/a.jpg", "../a.jpg", ".a/b./a.jpg", "http://a.jpg", ".//a.jpg"]
    wanted = ["a.jpg", "x/a.jpg", "../a.jpg", ".a/b./a.jpg", "http://a.jpg", "a.jpg"]
    assert column(names).paths("x") == wanted


@pytest.mark.parametrize(
    "content", [b"[1]", b"{}", b'{"images": 5}', b"{", b"\xff", b"[" * 100_000, b'{"images": [1]}']
)
def test_what_is_not_an_annotation_file_is_refused(tmp_path, content):
    path = tmp_path / "instances_train2017.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"instances_train2017.json: (not|images\[0\] is 1; expected an object)"):
        Annotations(path)


def test_two_values_of_one_name_are_refused_and_the_same_one_twice_is_read(tmp_path):
    root = write_tiny_coco(tmp_path)
    path = root / "annotations/instances_train2017.json"
    whole = path.read_text()
    for text in (whole[:-1] + ', "annotations": []}', whole.replace('"iscrowd": 0', '"iscrowd": 0, "iscrowd": 1', 1)):
        path.write_text(text)
        with pytest.raises(
            ValueError, match=r"instances_train2017.json: .*two values of '(annotations|iscrowd)' in one"
        ):
            Annotations(path)
    path.write_text(whole.replace('"iscrowd": 0', '"iscrowd": 0, "iscrowd": 0'))
    assert len(read(root).ids)


def test_ids_as_text_numbers_and_a_byte_order_mark_change_nothing(tmp_path):
    plain = read(write_tiny_coco(tmp_path / "a"))
    root = write_tiny_coco(tmp_path / "b")

    def odd(content):
        for entry in content["annotations"]:
            entry.update(image_id=str(entry["image_id"]), id=float(entry["id"]), category_id=f"{entry['category_id']}")
            entry.update(bbox=[str(side) for side in entry["bbox"]], iscrowd=False, area=None)
        for entry in content["images"]:
            entry.update(id=float(entry["id"]), height=str(entry["height"]))

    edit_annotations(root, "train2017", odd)
    path = root / "annotations/instances_train2017.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    other = read(root)
    for name in ("image_ids", "sizes", "boxes", "labels", "ids", "iscrowd", "area"):
        assert torch.equal(getattr(plain, name), getattr(other, name)), name
    assert plain.categories == other.categories


def test_area_is_that_of_the_box_where_it_is_missing(tmp_path):
    root = write_tiny_coco(tmp_path)
    edit_annotations(root, "train2017", lambda c: c["annotations"][0].update(bbox=[1, 2, 3.5, 4], area=None))
    assert read(root).area[0] == 14


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c["categories"].append({"id": 20_001, "name": "x"}), "category ids 20001: expected 0 to 20000"),
        (lambda c: c["categories"].append({"id": -1, "name": "x"}), "category ids -1"),
        (lambda c: c["categories"].append({"id": 3, "name": "x"}), r"duplicate category ids: 1 \(3\)"),
        (lambda c: c.update(categories=None), "no 'categories'"),
        (lambda c: c["categories"][0].update(name="\ud800"), r"categories\[0\]\['name'\] is"),
        (lambda c: c.update(categories={"3": "red"}), "its 'categories' is .*; expected a list"),
        (lambda c: c.update(annotations={}), "its 'annotations' is {}; expected a list"),
        (lambda c: c["annotations"].append(None), r"annotations\[6\] is null; expected an object"),
        (lambda c: c["images"][0].update(height=-1), r"images\[0\]\['height'\] is -1; expected an integer from 0 to"),
        (lambda c: c["annotations"][1].update(category_id=5), r"1 annotations of categories .* \(ids 5\)"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, change, words):
    root = write_tiny_coco(tmp_path)
    edit_annotations(root, "train2017", change)
    with pytest.raises(ValueError, match=f"instances_train2017.json: {words}"):
        read(root)


def random_masks(count, seed=0):
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, HEIGHT, WIDTH), dtype=np.uint8)
    for mask in masks:
        for _ in range(rng.integers(0, 6)):
            y, x = rng.integers(0, HEIGHT), rng.integers(0, WIDTH)
            mask[y : y + rng.integers(1, 30), x : x + rng.integers(1, 40)] ^= 1
    return masks


def compressed(mask):
    runs = coco_mask.encode(np.asfortranarray(mask))
    return {"size": [HEIGHT, WIDTH], "counts": runs["counts"].decode()}


def test_run_lengths_of_pycocotools_pass_and_come_back():
    masks = random_masks(200)
    shapes = [compressed(mask) for mask in masks]
    assert [problem_of(shape, HEIGHT, WIDTH) for shape in shapes] == [None] * 200
    assert np.array_equal(decode_masks(shapes, HEIGHT, WIDTH).numpy(), masks)


def test_no_damaged_run_length_reaches_the_decoder():
    """A letter of the text changed, lost or added: it is refused, or still describes every pixel of the image."""
    rng, refused = np.random.default_rng(0), 0
    for mask in random_masks(300, seed=1):
        text = list(compressed(mask)["counts"])
        place = rng.integers(len(text))
        change = rng.integers(3)
        text[place : place + int(change < 2)] = [chr(rng.integers(32, 127))] * int(change != 1)
        shape = {"size": [HEIGHT, WIDTH], "counts": "".join(text)}
        if problem_of(shape, HEIGHT, WIDTH):
            refused += 1
        else:
            assert decode_masks([shape], HEIGHT, WIDTH).shape == (1, HEIGHT, WIDTH)
            back = to_rle(shape, HEIGHT, WIDTH)
            assert coco_mask.area(back) == int(decode_masks([shape], HEIGHT, WIDTH).sum())
    assert refused > 200


@pytest.mark.parametrize(
    "shape, words",
    [
        ([[1, 1, 9, 9]], "a polygon of 4 numbers"),
        ([[1, 1, 9, 9, 5]], "a polygon of 5 numbers"),
        ([1, 1, 9, 9, 5, 5], "not a list of numbers"),
        ([[]], "a polygon of 0 numbers"),
        ([["1", 1, 9, 9, 5, 5]], "not a list of numbers"),
        ([[1, 1, 9, 9, 5, float("nan")]], "far outside"),
        ([[1, 1, 9, 9, 5, 1e9]], "far outside"),
        ([[1, 1, 9, 9, 5, 10**400]], "far outside"),
        ([[1, 1, 9, 9, 5, 5], [-1000, 1, 9, 9, 5, 5]], "far outside"),
        ("polygon", "neither polygons nor run lengths"),
        ({"size": [56, 40], "counts": [2240]}, r"size \[56, 40\], the image is \[40, 56\]"),
        ({"size": ["40", "56"], "counts": [2240]}, "size"),
        ({"size": [40.0, 56.0], "counts": [2240]}, "size"),
        ({"counts": [2240]}, "size None"),
        ({"size": [40, 56]}, "not counts of pixels"),
        ({"size": [40, 56], "counts": [2239]}, "of 2239 pixels, the image has 2240"),
        ({"size": [40, 56], "counts": [-1, 2241]}, "not counts of pixels"),
        ({"size": [40, 56], "counts": [2240.0]}, "not counts of pixels"),
        ({"size": [40, 56], "counts": "zzzz"}, "not counts of pixels"),
        ({"size": [40, 56], "counts": ""}, "not counts of pixels"),
        ({"size": [40, 56], "counts": "ü"}, "not counts of pixels"),
        ({"size": [40, 56], "counts": "QR2\x0f"}, "not counts of pixels"),  # its bits would be 2113 and 127
        ({"size": [40, 56], "counts": "\ud800"}, "not counts of pixels"),
        ({"size": [40, 56], "counts": "oooooooooooooooooooooooooooo0"}, "not counts of pixels"),
        # Its last number, -16, is written in seven letters, which pycocotools reads as -8.
        ({"size": [40, 56], "counts": "Xo0T3PQ1`oooooO"}, "not counts of pixels"),
    ],
)
def test_masks_that_do_not_fit_are_refused_by_their_place(tmp_path, shape, words):
    root = write_tiny_coco(tmp_path)
    read(root, with_masks=True)
    edit_annotations(root, "train2017", lambda c: c["annotations"][1].update(segmentation=shape))
    with pytest.raises(ValueError, match=rf"segmentation of annotation 2 of image 102: .*{words}"):
        read(root, with_masks=True)
    read(root)  # it does not check boxes


@pytest.mark.parametrize(("height", "width"), [(40, 10), (10, 40)])
def test_a_polygon_may_reach_beyond_its_image_on_each_side(height, width):
    assert problem_of([[-width, -height, 2 * width, -height, 2 * width, 2 * height]], height, width) is None
    for x, y in ((2 * width + 1, 0), (-width - 1, 0), (0, 2 * height + 1), (0, -height - 1)):
        assert "far outside" in problem_of([[0, 0, x, y, 1, 1]], height, width)


COORDINATES = st.sampled_from(
    [0, 1, 30.5, -40, -56, 80, 112, -40.01, -56.01, 80.01, 112.01, float("nan"), 1e300, -1e300]
)
POLYGONS = st.lists(st.one_of(st.integers(0, 9), COORDINATES), min_size=4, max_size=9)
SHAPES = st.lists(st.one_of(st.lists(POLYGONS, max_size=3), st.just({"size": [40, 56], "counts": [2240]})), max_size=4)


@settings(deadline=None)
@given(SHAPES)
def test_shapes_that_fit_can_be_decoded(shapes):
    """The decoder checks nothing: what passes here must give a mask of the image's size."""
    fitting = [shape for shape in shapes if not problem_of(shape, HEIGHT, WIDTH)]
    assert decode_masks(fitting, HEIGHT, WIDTH).shape == (len(fitting), HEIGHT, WIDTH)


def test_segmentations_come_back_as_they_are_in_the_file(tmp_path):
    root = write_tiny_coco(tmp_path)
    shape = [[1, 1.25, 9, 9, 5, 1e-3], [0, 0, 30.1, 0, 30.1, 20]]
    edit_annotations(root, "train2017", lambda c: c["annotations"][1].update(segmentation=shape))
    entries = json.loads((root / "annotations/instances_train2017.json").read_text())["annotations"]
    annotations = read(root, with_masks=True)
    for index, image_id in enumerate(annotations.image_ids.tolist()):
        wanted = [entry["segmentation"] for entry in entries if entry["image_id"] == image_id]
        assert annotations.segmentations_of_image(index) == wanted
