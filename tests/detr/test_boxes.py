import torch
from torchvision.ops import generalized_box_iou

from detr_irpe.boxes import paired_giou, scale_to_pixels


def random_corners(n: int, scale: float) -> torch.Tensor:
    low = torch.rand(n, 2)
    return torch.cat([low, low + scale * torch.rand(n, 2)], dim=1)


def test_pixels():
    boxes = torch.tensor([[[0.5, 0.5, 0.25, 1.0]], [[0.0, 1.0, 0.5, 0.5]]])
    scaled = scale_to_pixels(boxes, torch.tensor([[10, 100], [20, 8]]))
    assert scaled.tolist() == [[[50, 5, 25, 10]], [[0, 20, 4, 10]]]


def test_giou_by_hand():
    """Unit squares side by side with a gap of one: no overlap, union 2, hull 3."""
    left, right = torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([[2.0, 0, 3, 1]])
    assert paired_giou(left, right).item() == -torch.tensor(1 / 3).item()
    assert paired_giou(left, left).item() == 1


def test_giou_is_the_diagonal_of_torchvision():
    for scale in (1.0, 1e-3):  # tiny boxes too: nothing is added to the areas
        boxes, others = random_corners(20, scale), random_corners(20, scale)
        others[10:] = boxes[10:] + scale / 10
        torch.testing.assert_close(paired_giou(boxes, others), generalized_box_iou(boxes, others).diagonal())
