"""What `annotation_problems` says about boxes, at each edge."""

import json
import re

import pytest

from detr_irpe.data.annotations import Annotations
from detr_irpe.data.problems import Problem, annotation_problems
from tests.helpers.tiny_coco import edit_annotations, write_tiny_coco


def problems_of(tmp_path, boxes, **options):
    """The problems of one image of 40 x 56 pixels with these boxes."""
    objects = [{"id": i, "image_id": 1, "category_id": 3, "bbox": box} for i, box in enumerate(boxes)]
    images, path = [{"id": 1, "file_name": "a.jpg", "height": 40, "width": 56}], tmp_path / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": objects, "categories": [{"id": 3, "name": "red"}]}))
    return [problem for problem in annotation_problems(Annotations(path), 10, **options) if problem.count]


@pytest.mark.parametrize("axis, side", [(0, 56), (1, 40)])
def test_boxes_that_reach_outside_by_more_than_a_pixel_and_boxes_without_a_pixel_inside(tmp_path, axis, side):
    for begin, length, outside, lost in (
        *((-1, 9, False, False), (-1.5, 9, True, False), (-9, 9.5, True, False), (-9, 9, True, True)),
        *((side - 8, 9, False, False), (side - 8, 9.5, True, False), (side - 0.5, 9, True, False)),
        *((side, 9, True, True), (5, 0, False, True), (5, 0.5, False, False)),
    ):
        box = [5, 5, 9, 9]
        box[axis], box[2 + axis] = begin, length
        text = str([problem.what for problem in problems_of(tmp_path, [box])])
        assert ("reach outside" in text, "without any object to learn" in text) == (outside, lost), box
    assert "any object to find: AP will be -1: 1" in str(problems_of(tmp_path, [box[:2] + [0, 0]], train=False)[-1])


@pytest.mark.parametrize(
    "words, boxes, others",
    [
        ("look like fractions", [[0, 0, 1, 1]] * 9 + [[30, 5, 9, 9]], [[5, 5, 9, 8], [0, 0, 1, 1.5], [-0.5, 0, 1, 1]]),
        (
            "look like two corners",
            [[20, 10, 57, 41], [20, 10, 56, 41], [0, 0, 30, 30], *([i, i, 20, 20] for i in range(8))],
            [[-0.5, 0, 20, 20], [0, -0.5, 20, 20], [9, 0, 9, 20], [0, 9, 20, 9]] + [[0, 0, 57.5, 20], [0, 0, 20, 41.5]],
        ),
        ("look like two corners", [[20, 10, 57, 41], *([i, i, 20, 20] for i in range(9))], [[0, 0, 9, 9]]),
        ("look like two corners", [[28, 20, 32, 24 + i / 2] for i in range(6)], [[9, 0, 9, 20]]),
        (
            "look like centre and size",
            [*([50, 30, 12, 12 - i] for i in range(4)), *([20, 20, i, 12] for i in range(1, 37))],
            [[20, 20, 12, 9]],
        ),
        (
            "look like centre and size",
            [*([50, 30, 12, 12 - i] for i in range(3)), [51, 36, 12, 10], [5, 4, 12, 10]],
            [[4.5, 20, 12, 10], [20, 3.5, 12, 10], [51.5, 20, 12, 10], [20, 36.5, 12, 10]],
        ),
        (
            "all in the top left",
            [[18, 10, 10, 10], *([0, 0, 9, i] for i in (1, 2, 3))],
            [[19, 0, 9.5, 9], [0, 11, 9, 9.5]],
        ),
    ],
)
def test_what_boxes_look_like_is_said_of_all_or_of_none(tmp_path, words, boxes, others):
    (said,) = (problem for problem in problems_of(tmp_path, boxes) if re.search("look like|all in", problem.what))
    assert words in said.what and said.count == len(boxes)
    for other in others:
        assert words not in str(problems_of(tmp_path, [*boxes, other])), other
    if len(boxes) < 6:
        assert words not in str(problems_of(tmp_path, boxes[:3]))  # may be by chance


def test_half_of_the_boxes_may_be_wrong_and_the_first_three_are_named(tmp_path):
    good, empty = [[30 + i, 5, 9, 9] for i in range(4)], [[i, 5, 9, 0] for i in range(5)]
    for count, stops in ((4, False), (5, True)):
        (problem,) = problems_of(tmp_path, good + empty[:count])
        assert problem.stops() == stops and len(problem.places) == 3
    problem = Problem("bad", allowed=1)
    assert str(problem) == "bad: 0"
    for place, stops, text in (
        ("a", False, "bad: 1 (a)"),
        ("b", True, "bad: 2 (a, b)"),
        ("c", True, "bad: 3 (a, b, c)"),
    ):
        problem.add(place)
        assert problem.stops() == stops and str(problem) == text
    problem.add("d")
    assert str(problem) == "bad: 4 (a, b, c, ...)"


@pytest.mark.parametrize("sides", [[], ["width"], ["height"], ["width", "height"]])
def test_nothing_is_found_in_a_good_file(tmp_path, sides):
    root = write_tiny_coco(tmp_path)
    edit_annotations(root, "train2017", lambda c: [image.pop(side) for image in c["images"] for side in sides])
    annotations = Annotations(root / "annotations/instances_train2017.json")
    assert not any(problem.count for problem in annotation_problems(annotations, 10))
