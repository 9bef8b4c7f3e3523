"""Which loss goes with which augmentation, and distillation against its formula in fp64."""

import pytest
import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from deit_irpe.args import get_args_parser
from deit_irpe.losses import DistillationLoss, classification_loss
from deit_irpe.models.finetune import resize_pos_embed
from deit_irpe.train import build_criterion


@pytest.mark.parametrize(
    ("mixes", "smoothing", "expected"),
    [
        (True, 0.1, SoftTargetCrossEntropy),
        (True, 0.0, SoftTargetCrossEntropy),
        (False, 0.1, LabelSmoothingCrossEntropy),
        (False, 0.0, nn.CrossEntropyLoss),
    ],
)
def test_the_loss_fits_the_targets(mixes, smoothing, expected):
    assert type(classification_loss(mixes=mixes, smoothing=smoothing)) is expected


def softmax(row):
    exp = [torch.exp(value) for value in row]
    return [value / sum(exp) for value in exp]


@pytest.mark.parametrize("kind", ["none", "soft", "hard"])
def test_distillation_is_its_formula(kind):
    torch.manual_seed(0)
    logits, distilled, teacher_logits = torch.randn(3, 2, 5).double()
    targets, alpha, tau = torch.tensor([1, 4]), 0.3, 2.0
    loss = DistillationLoss(nn.CrossEntropyLoss(), lambda images: teacher_logits, kind, alpha, tau)
    got = loss(torch.zeros(2, 3, 4, 4), (logits, distilled), targets)

    base = sum(-torch.log(softmax(logits[i])[targets[i]]) for i in range(2)) / 2
    if kind == "none":
        expected = base
    elif kind == "hard":
        hard = sum(-torch.log(softmax(distilled[i])[teacher_logits[i].argmax()]) for i in range(2)) / 2
        expected = (1 - alpha) * base + alpha * hard
    else:
        divergence = 0.0
        for i in range(2):
            student, teacher = softmax(distilled[i] / tau), softmax(teacher_logits[i] / tau)
            divergence += sum(t * (torch.log(t) - torch.log(s)) for s, t in zip(student, teacher, strict=True))
        expected = (1 - alpha) * base + alpha * divergence * tau**2 / 10
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_teacher_is_not_part_of_the_loss_module():
    loss = DistillationLoss(nn.CrossEntropyLoss(), nn.Linear(2, 2), "soft")
    assert not list(loss.parameters()) and not loss.state_dict()


def test_distillation_says_what_it_needs():
    with pytest.raises(ValueError, match="needs a teacher"):
        DistillationLoss(nn.CrossEntropyLoss(), None, "hard")
    with pytest.raises(ValueError, match="expected none, soft or hard"):
        DistillationLoss(nn.CrossEntropyLoss(), None, "warm")
    with pytest.raises(ValueError, match="needs a model with a distillation head"):
        DistillationLoss(nn.CrossEntropyLoss(), nn.Identity(), "soft")(
            torch.zeros(1), torch.zeros(1, 2), torch.zeros(1).long()
        )


def test_losses_are_computed_in_fp32_for_bf16_outputs():
    loss = DistillationLoss(nn.CrossEntropyLoss())
    assert loss(torch.zeros(1), torch.zeros(1, 2, dtype=torch.bfloat16), torch.tensor([0])).dtype == torch.float32


def test_a_teacher_in_half_precision_is_compared_in_fp32():
    scores = torch.randn(4, 5).bfloat16()
    images, outputs, targets = torch.zeros(4), (torch.randn(4, 5), torch.randn(4, 5)), torch.arange(4)
    half, full = (
        DistillationLoss(nn.CrossEntropyLoss(), lambda _, answer=answer: answer, "soft")(images, outputs, targets)
        for answer in (scores, scores.float())
    )
    assert torch.equal(half, full)


def test_a_teacher_is_asked_in_evaluation_mode_and_never_learns(tmp_path):
    """Batch norm shows it: in training mode an output would depend on the others, and its means change."""
    torch.manual_seed(0)
    own = timm.create_model("resnet10t", num_classes=3)
    for module in own.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
    torch.save(own.state_dict(), tmp_path / "teacher.pth")
    flags = [
        "--distillation-type",
        "soft",
        "--teacher-model",
        "resnet10t",
        "--teacher-path",
        str(tmp_path / "teacher.pth"),
    ]
    args = get_args_parser().parse_args(flags)
    teacher = build_criterion(args, list("abc"), torch.device("cpu"))._teacher[0]
    images = torch.randn(4, 3, 64, 64)
    torch.testing.assert_close(teacher(images)[:1], teacher(images[:1]))
    torch.testing.assert_close(teacher(images), own.eval()(images))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert torch.equal(teacher.bn1.running_mean, own.bn1.running_mean)


def test_a_teacher_sees_images_of_another_size_than_it_was_trained_on(tmp_path):
    own = timm.create_model("deit_tiny_patch16_224", num_classes=3)
    torch.save(own.state_dict(), tmp_path / "teacher.pth")
    flags = ["--teacher-model", "deit_tiny_patch16_224", "--teacher-path", str(tmp_path / "teacher.pth")]
    args = get_args_parser().parse_args([*flags, "--distillation-type", "soft", "--input-size", "64x32"])
    teacher = build_criterion(args, list("abc"), torch.device("cpu"))._teacher[0]
    assert teacher(torch.zeros(1, 3, 64, 32)).shape == (1, 3)
    assert torch.equal(teacher.pos_embed, resize_pos_embed(own.pos_embed, (14, 14), (4, 2)))
