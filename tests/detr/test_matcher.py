from itertools import permutations

import pytest
import torch
from torchvision.ops import box_convert, generalized_box_iou

from detr_irpe.models.matcher import HungarianMatcher
from tests.helpers.tiny_detr import random_targets


def random_outputs(batch: int, queries: int, classes: int = 7) -> dict:
    return {
        "pred_logits": torch.randn(batch, queries, classes + 1) * 2,
        "pred_boxes": torch.rand(batch, queries, 4) * 0.4 + 0.3,
    }


def slow_cost(outputs: dict, target: dict, image: int, query: int, number: int, weights=(1, 5, 2)) -> float:
    of_class, of_box, of_giou = weights
    probability = outputs["pred_logits"][image, query].double().softmax(-1)[target["labels"][number]]
    box, wanted = outputs["pred_boxes"][image, query].double(), target["boxes"][number].double()
    giou = generalized_box_iou(box_convert(box, "cxcywh", "xyxy")[None], box_convert(wanted, "cxcywh", "xyxy")[None])
    return (of_box * (box - wanted).abs().sum() - of_class * probability - of_giou * giou).item()


def test_against_all_assignments():
    torch.manual_seed(0)
    outputs, targets = random_outputs(3, 5), random_targets([3, 0, 5])
    matches = HungarianMatcher(1, 5, 2)(outputs, targets)
    for image, (target, (queries, objects)) in enumerate(zip(targets, matches, strict=True)):
        n = len(target["labels"])
        cost = [[slow_cost(outputs, target, image, q, i) for i in range(n)] for q in range(5)]
        best = min(permutations(range(5), n), key=lambda chosen: sum(cost[q][i] for i, q in enumerate(chosen)))
        assert dict(zip(queries.tolist(), objects.tolist(), strict=True)) == {q: i for i, q in enumerate(best)}
        assert queries.dtype == objects.dtype == torch.int64 and queries.tolist() == sorted(queries.tolist())


def test_costs_are_those_of_the_formula():
    """The costs themselves: an assignment can be right although a term is wrong."""
    torch.manual_seed(0)
    outputs, targets = random_outputs(2, 5), random_targets([3, 2])
    for weights in ((1, 5, 2), (3, 0.5, 7), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        costs = HungarianMatcher(*weights).costs(outputs["pred_logits"][None], outputs["pred_boxes"][None], targets)
        assert costs.shape == (1, 2, 5, 5) and costs.dtype == torch.float32
        for image in range(2):
            for query in range(5):
                of_query = [
                    slow_cost(outputs, target, image, query, number, weights)
                    for target in targets
                    for number in range(len(target["labels"]))
                ]
                assert costs[0, image, query].tolist() == pytest.approx(of_query, abs=1e-5)


def test_more_objects_than_queries():
    ((queries, objects),) = HungarianMatcher()(random_outputs(1, 2), random_targets([5]))
    assert queries.tolist() == [0, 1] and len(set(objects.tolist())) == 2


def test_layers_together_as_each_alone():
    torch.manual_seed(0)
    layers, targets = [random_outputs(2, 6) for _ in range(3)], random_targets([4, 2])
    together = HungarianMatcher().match_layers(layers, targets)
    for layer, matches in zip(layers, together, strict=True):
        for ours, alone in zip(matches, HungarianMatcher()(layer, targets), strict=True):
            assert torch.equal(ours[0], alone[0]) and torch.equal(ours[1], alone[1])


def test_one_transfer_to_the_cpu_for_all_layers(monkeypatch):
    calls = []

    def counted(name):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, **k: (calls.append(name), original(self, *a, **k))[1])

    for name in ("cpu", "item", "tolist", "__bool__", "nonzero"):
        counted(name)
    HungarianMatcher().match_layers([random_outputs(2, 6) for _ in range(6)], random_targets([4, 2]))
    assert calls == ["cpu"]


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_is_matched_in_fp32(autocast):
    torch.manual_seed(0)
    outputs, targets = random_outputs(2, 20), random_targets([10, 9])
    logits, boxes = (value.bfloat16()[None] for value in outputs.values())
    double = [{**target, "boxes": target["boxes"].double()} for target in targets]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        ours = HungarianMatcher().costs(logits, boxes, double)
    assert torch.equal(ours, HungarianMatcher().costs(logits.float(), boxes.float(), targets))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_predictions_that_are_not_finite_are_matched_last(value):
    outputs = random_outputs(1, 4)
    outputs["pred_boxes"][0, 1] = value
    outputs["pred_logits"][0, 2] = value
    for count, expected in ((2, [0, 3]), (4, [0, 1, 2, 3])):
        ((queries, objects),) = HungarianMatcher()(outputs, random_targets([count]))
        assert queries.tolist() == expected and sorted(objects.tolist()) == list(range(count))


def test_something_must_cost():
    with pytest.raises(ValueError, match="--set_cost_giou are all 0: give one above 0"):
        HungarianMatcher(0, 0, 0)


def test_each_image_has_targets():
    with pytest.raises(ValueError, match="matching: 2 images with 1 targets; expected one for each"):
        HungarianMatcher()(random_outputs(2, 5), random_targets([3]))
