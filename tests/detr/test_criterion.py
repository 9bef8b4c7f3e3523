import math

import pytest
import torch
import torch.distributed as dist
from torchvision.ops import box_convert, generalized_box_iou

from detr_irpe.models.criterion import SetCriterion
from detr_irpe.models.matcher import HungarianMatcher
from tests.detr.test_matcher import random_outputs
from tests.helpers.tiny_detr import random_targets

CLASSES, EOS = 7, 0.1


def criterion(**options) -> SetCriterion:
    return SetCriterion(CLASSES, HungarianMatcher(), {}, EOS, **options)


def outputs_with_layers(batch: int = 2, queries: int = 6) -> dict:
    return random_outputs(batch, queries) | {"aux_outputs": [random_outputs(batch, queries) for _ in range(2)]}


def slow_losses(outputs: dict, targets: list[dict]) -> dict[str, float]:
    """Every loss term as a loop over queries or pairs, in fp64."""
    matches = HungarianMatcher()(outputs, targets)
    pairs = [(image, q.item(), i.item()) for image, match in enumerate(matches) for q, i in zip(*match, strict=True)]
    num_boxes = max(sum(len(t["labels"]) for t in targets), 1)
    wanted = {(image, q): targets[image]["labels"][i].item() for image, q, i in pairs}
    logits = outputs["pred_logits"].double()
    entropy = weights = 0.0
    for image in range(logits.shape[0]):
        for q in range(logits.shape[1]):
            label = wanted.get((image, q), CLASSES)
            weight = EOS if label == CLASSES else 1.0
            entropy -= weight * logits[image, q].log_softmax(-1)[label].item()
            weights += weight
    distance = giou = 0.0
    for image, q, i in pairs:
        box, target = outputs["pred_boxes"][image, q].double(), targets[image]["boxes"][i].double()
        distance += (box - target).abs().sum().item()
        corners = [box_convert(of, "cxcywh", "xyxy")[None] for of in (box, target)]
        giou += 1 - generalized_box_iou(*corners).item()
    right = sum(logits[key].argmax().item() == label for key, label in wanted.items())
    count_errors = [
        abs(sum(row.argmax().item() != CLASSES for row in logits[image]) - len(target["labels"]))
        for image, target in enumerate(targets)
    ]
    return {
        "loss_ce": entropy / weights,
        "class_error": 100 - 100 * right / max(len(pairs), 1),
        "loss_bbox": distance / num_boxes,
        "loss_giou": giou / num_boxes,
        "cardinality_error": sum(count_errors) / len(targets),
    }


@pytest.mark.parametrize("counts", [[3, 2], [0, 4], [0, 0], [8, 1]])
def test_against_loops(counts):
    torch.manual_seed(sum(counts))
    outputs, targets = outputs_with_layers(), random_targets(counts)
    losses = criterion()(outputs, targets)
    expected = slow_losses(outputs, targets)
    for index, layer in enumerate(outputs["aux_outputs"]):
        expected |= {f"{name}_{index}": x for name, x in slow_losses(layer, targets).items() if name != "class_error"}
    assert list(losses) == list(expected)  # the published names in the published order
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name


def test_the_class_error_of_one_object():
    outputs, targets = random_outputs(1, 1), random_targets([1])
    outputs["pred_logits"][..., targets[0]["labels"]] = 9.0
    assert criterion()(outputs, targets)["class_error"] == 0


def test_the_class_loss_has_a_deterministic_kernel_on_cuda(monkeypatch):
    """One row per query: with a third dimension PyTorch takes nll_loss2d, which raises under --deterministic."""
    seen, real = [], torch.nn.functional.cross_entropy
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda x, *rest: seen.append(x.dim()) or real(x, *rest))
    criterion()(outputs_with_layers(), random_targets([3, 2]))
    assert set(seen) == {2}


def test_mask_losses_against_loops():
    torch.manual_seed(0)
    outputs = random_outputs(2, 4) | {"pred_masks": torch.randn(2, 4, 3, 3)}
    targets = random_targets([2, 1])
    targets[0]["masks"], targets[1]["masks"] = torch.rand(2, 6, 4) > 0.5, torch.rand(1, 5, 8) > 0.5
    losses = criterion(masks=True)(outputs, targets)
    focal = dice = 0.0
    for image, match in enumerate(HungarianMatcher()(outputs, targets)):
        for q, i in zip(*map(torch.Tensor.tolist, match), strict=True):
            mask = torch.nn.functional.interpolate(  # the masks of the batch are padded to 6 x 8
                outputs["pred_masks"][image, q].double()[None, None], size=(6, 8), mode="bilinear"
            )[0, 0]
            wanted = torch.zeros(6, 8, dtype=torch.float64)
            given = targets[image]["masks"][i]
            wanted[: given.shape[0], : given.shape[1]] = given
            p = mask.sigmoid()
            for pixel, truth in zip(p.flatten().tolist(), wanted.flatten().tolist(), strict=True):
                agreed = pixel if truth else 1 - pixel
                focal += (0.25 if truth else 0.75) * (1 - agreed) ** 2 * -math.log(agreed) / 48
            dice += (1 - (2 * (p * wanted).sum() + 1) / (p.sum() + wanted.sum() + 1)).item()
    assert losses["loss_mask"].item() == pytest.approx(focal / 3, rel=1e-5)
    assert losses["loss_dice"].item() == pytest.approx(dice / 3, rel=1e-5)
    assert list(losses)[3:] == ["loss_giou", "cardinality_error", "loss_mask", "loss_dice"]


@pytest.mark.parametrize("masks", [False, True])
def test_a_batch_without_objects_has_finite_losses_and_gradients(masks):
    outputs = random_outputs(2, 4) | {"pred_masks": torch.randn(2, 4, 3, 3)}
    for tensor in outputs.values():
        tensor.requires_grad_()
    losses = criterion(masks=masks)(outputs, random_targets([0, 0], size=(6, 6)))
    assert losses["loss_bbox"] == losses["loss_giou"] == 0 and losses["class_error"] == 100
    sum(losses.values()).backward()
    assert all(tensor.grad.isfinite().all() for name, tensor in outputs.items() if masks or name != "pred_masks")


def test_predictions_that_are_not_finite_give_losses_that_are_not():
    outputs = random_outputs(1, 4)
    outputs["pred_boxes"][:] = float("nan")
    losses = criterion()(outputs, random_targets([2]))
    assert losses["loss_ce"].isfinite() and not losses["loss_bbox"].isfinite() and not losses["loss_giou"].isfinite()


def batch_of_two(counts: list[int]) -> tuple[dict, list[dict]]:
    torch.manual_seed(0)
    outputs, targets = random_outputs(2, 5), random_targets([3, 2])
    return outputs, [{key: value[:n] for key, value in t.items()} for t, n in zip(targets, counts, strict=True)]


COUNTS = [[3, 0], [3, 2], [0, 0]]


def losses_of_one_process(rank: int, folder: str) -> None:
    """Each process has one image of the batch."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for number, counts in enumerate(COUNTS):
        outputs, targets = batch_of_two(counts)
        own = {key: value[rank : rank + 1] for key, value in outputs.items()}
        torch.save(criterion()(own, targets[rank : rank + 1]), f"{folder}/{number}-{rank}.pt")
    if rank == 0:  # an evaluation waits for nobody
        torch.save(criterion().eval()(*batch_of_two([3, 2])), f"{folder}/evaluated.pt")
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_average_to_one_batch(tmp_path):
    """Also without objects on one process, or on both: no process hangs."""
    torch.multiprocessing.start_processes(losses_of_one_process, (str(tmp_path),), nprocs=2, start_method="fork")
    for number, counts in enumerate(COUNTS):
        together = criterion()(*batch_of_two(counts))
        first, second = (torch.load(tmp_path / f"{number}-{rank}.pt") for rank in range(2))
        for name in ("loss_bbox", "loss_giou"):
            torch.testing.assert_close((first[name] + second[name]) / 2, together[name])
    alone = criterion().eval()(*batch_of_two([3, 2]))
    assert torch.load(tmp_path / "evaluated.pt") == alone
