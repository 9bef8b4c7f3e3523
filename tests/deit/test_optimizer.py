"""Learning rates, linear scaling and parameter groups against the figures of the published runs."""

import math

import pytest
import torch
from torch import nn

from deit_irpe.args import get_args_parser
from deit_irpe.optimizer import build_optimizer, build_scheduler, parameter_groups, scaled_lr
from irpe_train.errors import BadFlags


def flags(*argv):
    return get_args_parser().parse_args(list(map(str, argv)))


def rates(epochs, lr, *argv):
    args = flags("--epochs", epochs, *argv)
    optimizer = build_optimizer(args, nn.Linear(2, 2), lr)
    scheduler = build_scheduler(args, optimizer)
    seen = []
    for epoch in range(epochs):
        seen.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch)
    return seen


def test_the_rate_of_every_epoch_is_the_published_one():
    """Epoch e runs at the schedule's value for e - 1: linear from 1e-6 over 5 epochs, then half a cosine to 1e-5."""
    lr = scaled_lr(5e-4, batch_size=128, world_size=8)
    assert lr == 1e-3

    def schedule(t):
        return 1e-6 + t * (lr - 1e-6) / 5 if t < 5 else 1e-5 + 0.5 * (lr - 1e-5) * (1 + math.cos(math.pi * t / 300))

    expected = [1e-6] + [schedule(epoch - 1) for epoch in range(1, 300)]
    seen = rates(300, lr)
    assert seen == pytest.approx(expected, rel=1e-12)
    assert seen[0] == seen[1] == 1e-6 and seen[2] == pytest.approx(2.008e-4)
    assert seen[299] == pytest.approx(1.0108554e-5, rel=1e-6)


def test_tanh_has_the_published_bounds():
    def schedule(t):
        share = t / 300
        return 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 - math.tanh(-6 * (1 - share) + 4 * share))

    seen = rates(300, 1e-3, "--sched", "tanh", "--warmup-epochs", 0)
    assert seen[0] == 1e-3 and seen[1:] == pytest.approx([schedule(t) for t in range(299)], rel=1e-12)
    warm = rates(300, 1e-3, "--sched", "tanh")
    assert warm[:2] == [1e-6, 1e-6] and warm[2] == pytest.approx(1e-6 + (schedule(5) - 1e-6) / 5, rel=1e-12)
    assert warm[6:] == seen[6:]
    assert rates(9, 1e-3, "--sched", "tanh", "--lr-noise", 0.5) != rates(
        9, 1e-3, "--sched", "tanh", "--lr-noise", 0.9, 1.0
    )


def test_steps_come_as_often_and_are_as_large_as_asked_for():
    seen = rates(9, 1e-3, *["--sched", "step", "--warmup-epochs", "0", "--decay-epochs", "3", "--decay-rate", "0.5"])
    assert seen == pytest.approx([1e-3 * 0.5 ** (max(epoch - 1, 0) // 3) for epoch in range(9)], rel=1e-12)


def test_linear_scaling_counts_every_image_of_an_update():
    assert scaled_lr(5e-4, 64, 1) == 6.25e-5
    assert scaled_lr(5e-4, 64, 2, accumulate=4) == 5e-4


def test_without_warm_up_the_first_two_epochs_run_at_the_full_rate():
    assert rates(4, 1e-3, "--warmup-epochs", 0)[:2] == [1e-3, 1e-3]


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token, self.dist_token, self.pos_embed = (nn.Parameter(torch.zeros(1, n, 4)) for n in (1, 1, 6))
        self.lookup_table_weight = nn.Parameter(torch.zeros(1, 4, 3))
        self.lookup_table_bias = nn.Parameter(torch.zeros(1, 3))
        self.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)
        self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)


def test_tables_and_dist_token_are_decayed_and_vectors_are_not():
    model = Tokens()
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    spared, decayed = parameter_groups(model, 0.05)
    assert [name_of[id(p)] for p in spared["params"]] == [
        "cls_token",
        "pos_embed",
        "linear.bias",
        "norm.weight",
        "norm.bias",
    ]
    assert [name_of[id(p)] for p in decayed["params"]] == [
        "dist_token",
        "lookup_table_weight",
        "lookup_table_bias",
        "linear.weight",
    ]
    assert (spared["weight_decay"], decayed["weight_decay"]) == (0.0, 0.05)


def test_without_weight_decay_there_is_one_group_in_the_order_of_the_model():
    model = Tokens()
    (group,) = parameter_groups(model, 0.0)
    assert group["weight_decay"] == 0
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters() if p.requires_grad]


def test_the_default_optimizer_is_adamw_as_published():
    optimizer = build_optimizer(flags(), nn.Linear(2, 2), 1e-3)
    assert type(optimizer) is torch.optim.AdamW
    assert [(g["lr"], g["weight_decay"], g["betas"], g["eps"]) for g in optimizer.param_groups] == [
        (1e-3, 0.0, (0.9, 0.999), 1e-8),
        (1e-3, 0.05, (0.9, 0.999), 1e-8),
    ]
    assert type(build_optimizer(flags("--opt", "sgd"), nn.Linear(2, 2), 0.1)) is torch.optim.SGD


@pytest.mark.parametrize(
    "name, hint",
    [("adamww", "did you mean adamw or"), ("fused_adam", "did you mean fusedadam or"), ("zz", "lists all")],
)
def test_an_unknown_optimizer_is_refused_with_its_neighbours(name, hint):
    """timm itself reads ``fused_adam`` as ``adam``, without a word."""
    with pytest.raises(BadFlags, match=f"--opt {name}: timm has no such optimizer; .*{hint}"):
        build_optimizer(flags("--opt", name), nn.Linear(2, 2), 0.1)
    build_optimizer(flags("--opt", "Lookahead_AdamW"), nn.Linear(2, 2), 0.1)
