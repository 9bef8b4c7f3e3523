"""Every flag of a run reaches its destination with its own value."""

import numpy as np
import pytest
import torch

from deit_irpe import optimizer as optimizers
from deit_irpe import train
from deit_irpe.args import get_args_parser
from deit_irpe.data import from_flags
from deit_irpe.data.datasets import build_dataset
from deit_irpe.models.from_flags import build_ema
from irpe_train import loader as loaders
from irpe_train.config import ConfigError, parse_args

CPU = torch.device("cpu")


def flags(*argv):
    return get_args_parser().parse_args(list(map(str, argv)))


def given_to(monkeypatch, module, name: str) -> list:
    """What ``module`` calls ``name`` with from now on: (arguments, keywords) of each call."""
    calls = []
    monkeypatch.setattr(module, name, lambda *args, **kwargs: calls.append((args, kwargs)) or (None, None))
    return calls


def test_mixup():
    words = "--mixup 0.3 --cutmix 0.4 --mixup-prob 0.5 --mixup-switch-prob 0.6 --mixup-mode pair --smoothing 0.2"
    made = from_flags.build_mixup(flags(*words.split()), 7)
    assert (made.mixup_alpha, made.cutmix_alpha, made.mix_prob, made.switch_prob) == (0.3, 0.4, 0.5, 0.6)
    assert (made.mode, made.label_smoothing, made.num_classes) == ("pair", 0.2, 7)
    made = from_flags.build_mixup(flags("--mixup", 0, "--cutmix", 0, "--cutmix-minmax", 0.2, 0.6), 7)
    assert made.cutmix_minmax == [0.2, 0.6] and made.mixup_alpha == 0
    assert from_flags.build_mixup(flags("--mixup", 0, "--cutmix", 0), 7) is None


def test_augmentation(monkeypatch):
    made = given_to(monkeypatch, from_flags, "build_transform")
    monkeypatch.setattr(from_flags, "_images", lambda *args: None)
    words = "--color-jitter 0.1 --aa none --hflip 0.2 --train-interpolation random --reprob 0.3 --remode rand"
    from_flags.training_set(flags(*words.split(), "--recount", 4, "--input-size", "64x96"))
    wanted = dict(color_jitter=0.1, aa=None, hflip=0.2, interpolation="random", reprob=0.3, remode="rand", recount=4)
    assert made == [((True, (64, 96)), wanted)]
    from_flags.training_set(flags("--no-aug"))
    assert made[1][0] == (False, (224, 224)) and made[1][1]["aa"] == "rand-m9-mstd0.5-inc1"
    from_flags.validation_set(flags("--input-size", 64))
    assert made[2] == ((False, (64, 64)), {})


def test_optimizer_and_schedule(monkeypatch):
    optimizer = given_to(monkeypatch, optimizers, "create_optimizer_v2")
    schedule = given_to(monkeypatch, optimizers, "create_scheduler_v2")
    words = (
        "--opt sgd --weight-decay 0.1 --opt-eps 1e-5 --opt-betas 0.8 0.9 --momentum 0.7 --sched step --epochs 9 "
        "--warmup-epochs 2 --warmup-lr 1e-4 --min-lr 1e-3 --decay-epochs 4 --decay-rate 0.2 --lr-noise 0.1 0.3 "
        "--lr-noise-pct 0.5 --lr-noise-std 2 --seed 6"
    )
    model = torch.nn.Linear(1, 1)
    optimizers.build_optimizer(flags(*words.split()), model, 0.25)
    wanted = dict(opt="sgd", lr=0.25, weight_decay=0.1, eps=1e-5, betas=[0.8, 0.9], momentum=0.7)
    assert optimizer == [((optimizers.parameter_groups(model, 0.1),), wanted)]
    optimizers.build_scheduler(flags(*words.split()), "optimizer")
    wanted = dict(sched="step", num_epochs=9, warmup_epochs=2, warmup_lr=1e-4, min_lr=1e-3, decay_epochs=4)
    wanted |= dict(decay_rate=0.2, noise=[0.1, 0.3], noise_pct=0.5, noise_std=2.0, noise_seed=6)
    assert schedule == [(("optimizer",), wanted)]


def test_moving_average_and_loss():
    model = torch.nn.Linear(1, 1)
    assert build_ema(flags("--model-ema-decay", 0.5), model).decay == 0.5
    assert build_ema(flags("--no-model-ema"), model) is None
    loss = train.build_criterion(flags("--mixup", 0, "--cutmix", 0, "--smoothing", 0.3), ["a"], CPU)
    assert loss.base.smoothing == 0.3 and loss.kind == "none"


def test_distillation(monkeypatch):
    monkeypatch.setattr(train.models, "build_teacher", lambda *args: "teacher")
    words = "--distillation-type soft --distillation-alpha 0.3 --distillation-tau 4"
    loss = train.build_criterion(flags(*words.split()), ["a"], CPU)
    assert (loss.kind, loss.alpha, loss.tau, loss._teacher) == ("soft", 0.3, 4.0, ["teacher"])


def test_a_config_flag_in_capitals_is_not_ignored():
    with pytest.raises(ConfigError, match="--config a.yaml: write --config in lower case, so that it is read first"):
        parse_args(get_args_parser(), ["--CONFIG", "a.yaml"])


def test_training_batches(colours):
    images = build_dataset(colours, True)

    def order(*argv, images=images):
        made = from_flags.training_loader(flags("--num_workers", 0, *argv), images, CPU)
        made._order.place(0, 0)
        return made.batch_size, made._order.indices

    once, other, again = (order("--no-repeated-aug", "--batch-size", 5, "--seed", seed) for seed in (0, 1, 0))
    assert once == again != other and once[0] == 5 and sorted(once[1]) == list(range(48))
    size, repeated = order("--batch-size", 16)
    assert size == 16 and len(set(repeated)) == 16 and len(repeated) == 48  # three copies of each
    seven = build_dataset(colours, True)
    seven.keep(np.arange(len(seven)) < 7)
    assert order(images=seven)[0] == 6  # Mixup pairs images
    assert order("--mixup", 0, "--cutmix", 0, images=seven)[0] == 7


@pytest.mark.parametrize(("more", "steps"), [([], 2), (["--no-dist-eval"], 4)])
def test_validation_batches(colours, monkeypatch, more, steps):
    """22 images in batches of 6, by two processes; without --dist-eval each gets all of them."""
    monkeypatch.setattr(loaders, "world_size", lambda: 2)
    made = from_flags.validation_loader(
        flags("--num_workers", 0, "--batch-size", 4, *more), build_dataset(colours, False), CPU
    )
    assert len(made.batches[0]) == 6 and len(made) == steps
