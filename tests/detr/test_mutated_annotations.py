"""Annotation files with random mistakes: trained on and scored as plain pycocotools does, or refused in one line."""

import contextlib
import io
import json

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detr_irpe import check_data
from detr_irpe.args import get_check_parser
from detr_irpe.check_data import quick_check
from detr_irpe.data.coco import CocoDetection
from detr_irpe.data.coco_eval import CocoEvaluator
from detr_irpe.data.transforms import train_transforms
from detr_irpe.predict import Truth
from tests.helpers.tiny_coco import write_tiny_coco

VALUES = st.one_of(
    st.sampled_from([None, True, False, "", "x", "101", "3", [], {}, [[]], [1, 2], [[1, 1, 9, 1, 9, 9]], float("nan")]),
    st.integers(-3, 120),
    st.sampled_from([2**31, 2**53 + 1, 2**63, 10**400, -1, 0]),
    st.floats(),
    st.lists(st.floats(-100, 200), min_size=4, max_size=4),
    st.text(max_size=5),
    st.fixed_dictionaries(
        {"size": st.just([40, 56]), "counts": st.one_of(st.text(max_size=9), st.lists(st.integers()))}
    ),
)
FORMS = st.sampled_from([str, float, lambda value: [value], lambda value: -value if isinstance(value, int) else value])
CHANGES = st.lists(
    st.tuples(st.integers(0, 10**6), st.one_of(st.tuples(st.just("set"), VALUES), st.tuples(st.just("form"), FORMS),
                                               st.tuples(st.sampled_from(["drop", "double"]), st.none()))),
    min_size=1, max_size=2,
)  # fmt: skip


def places(value, path=()):
    """Every key or index path in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def mutate(content: dict, changes) -> None:
    for number, (kind, how) in changes:
        paths = list(places(content))
        *above, key = paths[number % len(paths)]
        holder = content
        for step in above:
            holder = holder[step]
        if kind == "set":
            holder[key] = how
        elif kind == "drop":
            holder.pop(key)
        elif kind == "double" and isinstance(holder, list):
            holder.append(holder[key])
        elif kind == "form":
            with contextlib.suppress(TypeError, ValueError):
                holder[key] = how(holder[key])


def detections(dataset) -> dict:
    """The objects of a set, shifted a little, and one of another class."""
    found = {}
    for index in range(len(dataset)):
        objects = dataset.annotations.of_image(index)
        corners = torch.cat([objects["boxes"][:, :2], objects["boxes"][:, :2] + objects["boxes"][:, 2:]], 1)
        boxes = torch.cat([corners + 1, torch.tensor([[0.0, 0, 9, 9]])])
        labels = torch.cat([objects["labels"], torch.tensor([3])])
        scores = torch.linspace(0.9, 0.3, len(labels))
        found[int(dataset.annotations.image_ids[index])] = {"boxes": boxes, "labels": labels, "scores": scores}
    return found


def plain_figures(path, found) -> list[float] | None:
    """The figures of plain pycocotools for the same detections; None if it cannot read the file."""
    content = json.loads(path.read_text())
    ids = [entry.get("id") for entry in content["annotations"]]
    typed = all(type(e["image_id"]) is type(e["category_id"]) is int for e in content["annotations"])
    typed &= all(type(e["id"]) is int for e in content["images"] + content["categories"])
    typed &= all(type(i) is int and i > 0 for i in ids) and abs(max(found, default=0)) < 2**53
    typed &= all(type(e.get(name)) in (int, float) for e in content["annotations"] for name in ("area", "iscrowd"))
    typed &= all(type(side) in (int, float) for e in content["annotations"] for side in e["bbox"])
    if not typed:
        return None
    rows = [
        {"image_id": i, "category_id": int(c), "bbox": [*b[:2], b[2] - b[0], b[3] - b[1]], "score": s}
        for i, of_image in found.items()
        for b, c, s in zip(*(of_image[name].tolist() for name in ("boxes", "labels", "scores")), strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(path)
        truth.dataset.setdefault("info", {})
        scorer = COCOeval(truth, truth.loadRes(rows), "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return scorer.stats.tolist()


def outcome_of(root, original: str, changes) -> str:
    """The outcome for a changed training file: "refused", "scored", "compared"; anything unexpected is raised."""
    path = root / "annotations/instances_train2017.json"
    content = json.loads(original)
    mutate(content, changes)
    path.write_text(json.dumps(content))
    status = check_data.main(get_check_parser().parse_args(["--coco_path", str(root), "--num_workers", "0", "--masks"]))
    try:
        sets = [CocoDetection(root, s, train_transforms(40), return_masks=True) for s in ("val2017", "train2017")]
        quick_check(sets, 20_000)
    except (ValueError, OSError) as error:
        assert "\n" not in str(error) and ("train2017" in str(error) or "val2017" in str(error)), error
        assert status == 1, f"training refuses ({error}) and the check is content"
        return "refused"
    assert status == 0, "training starts and the check refuses"
    truth = Truth(path, {3: "red"})
    assert [truth.number_of(root / "train2017" / name) for name in truth.files] == list(range(len(sets[1])))
    for item in range(len(sets[1])):  # nothing fails later
        image, target = sets[1][item]
        assert len(target["boxes"]) == len(target["masks"]) and target["boxes"].isfinite().all()
    found = detections(sets[1])
    ours = []
    for backend in ("pycocotools", "faster-coco-eval"):
        scorer = CocoEvaluator(sets[1].annotations, backend=backend)
        scorer.update(found)
        ours.append(scorer.summarize()["bbox"].stats)
    assert ours[0] == pytest.approx(ours[1], abs=1e-12)
    wanted = plain_figures(path, found)
    if wanted is None:
        return "scored"
    assert ours[0] == pytest.approx(wanted, abs=1e-6)  # the libraries round boxes at different places
    return "compared"


def check_many(root, examples: int, seed_: int = 0) -> dict[str, int]:
    write_tiny_coco(root, train=4, val=3)
    original, counts = (root / "annotations/instances_train2017.json").read_text(), {}

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @seed(seed_)
    @given(CHANGES)
    def check(changes):
        outcome = outcome_of(root, original, changes)
        counts[outcome] = counts.get(outcome, 0) + 1

    check()
    return counts


def test_every_mistake_is_refused_or_scored_as_pycocotools_does(tmp_path):
    counts = check_many(tmp_path, 25)
    assert counts["refused"] > 2 and counts["compared"] > 0, counts


@pytest.mark.slow
@pytest.mark.parametrize("seed_", [1, 2, 3])
def test_every_one_of_many_mistakes_is_refused_or_scored_as_pycocotools_does(tmp_path, seed_):
    counts = check_many(tmp_path, 250, seed_)
    print(counts)
    assert sum(counts.values()) >= 200 and min(counts.get(k, 0) for k in ("refused", "scored", "compared")) > 5, counts
