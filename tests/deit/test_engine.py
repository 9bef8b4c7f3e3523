"""One epoch of training, step by step, and the figures of an evaluation."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import SequentialSampler, TensorDataset

from deit_irpe.engine import evaluate, train_one_epoch
from irpe_train.errors import NonFiniteLoss
from irpe_train.loader import TrainLoader
from irpe_train.logger import set_up_logging
from irpe_train.precision import Precision
from irpe_train.run_folder import Checkpoints
from irpe_train.state import TrainState
from irpe_train.steps import Steps

CPU = Precision("none", torch.device("cpu"))


class Average:
    """Records the weights at each update."""

    def __init__(self):
        self.seen = []

    def update(self, model):
        self.seen.append(model.weight.detach().clone())


def started(model, *, lr=0.1, accumulate=1):
    """Five batches of two images of an epoch: optimizer and steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    data = TensorDataset(torch.randn(10, 3), torch.arange(10) % 2)
    loader = TrainLoader(data, SequentialSampler(data), batch_size=2, seed=0)
    state = TrainState(model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 9))
    return optimizer, Steps(loader, state, Checkpoints("", ()), seed=0, accumulate=accumulate)


def criterion(images, outputs, targets):
    return F.cross_entropy(outputs, targets)


@pytest.mark.parametrize(("accumulate", "updates"), [(1, 5), (2, 3), (5, 1)])
def test_the_average_is_updated_once_for_each_update_and_after_it(accumulate, updates):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer, steps = started(model, accumulate=accumulate)
    average = Average()

    start = model.weight.detach().clone()
    stats = train_one_epoch(model.eval(), criterion, steps, optimizer, CPU, ema=average)
    assert len(average.seen) == updates and torch.equal(average.seen[-1], model.weight)
    weights = [start, *average.seen]
    assert all(not torch.equal(a, b) for a, b in zip(weights, weights[1:], strict=False))
    assert list(stats) == ["lr", "loss"] and stats["lr"] == 0.1 and model.training


def test_the_model_sees_mixed_images_and_the_loss_mixed_targets():
    model, seen = torch.nn.Linear(3, 2), []
    optimizer, steps = started(model)

    def noted(images, outputs, targets):
        seen.append((images, targets))
        return F.cross_entropy(outputs, targets)

    mixed = torch.full((2, 3), 7.0), torch.full((2, 2), 0.5)
    train_one_epoch(model, noted, steps, optimizer, CPU, mixup=lambda images, targets: mixed)
    assert len(seen) == 5 and all(images is mixed[0] and targets is mixed[1] for images, targets in seen)


def test_a_loss_that_is_not_finite_stops_before_the_update():
    model = torch.nn.Linear(3, 2)
    optimizer, steps = started(model)
    before = model.weight.detach().clone()
    with pytest.raises(NonFiniteLoss):
        train_one_epoch(model, lambda *all: criterion(*all) * float("nan"), steps, optimizer, CPU)
    assert torch.equal(model.weight, before)


def test_the_gradient_is_clipped_at_each_update():
    model = torch.nn.Linear(3, 2)
    optimizer, steps = started(model, lr=1.0)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    train_one_epoch(model, criterion, steps, optimizer, CPU, max_norm=1e-3)
    moved = [(new - old).square().sum() for new, old in zip(model.parameters(), weights, strict=True)]
    assert 0 < torch.stack(moved).sum().sqrt() <= 5e-3 * (1 + 1e-5)  # five steps of that length


def test_the_model_trains_in_the_requested_mode():
    model, modes = torch.nn.Linear(3, 2), []
    model.register_forward_hook(lambda module, inputs, output: modes.append(module.training))
    for mode in (True, False):
        optimizer, steps = started(model)
        train_one_epoch(model, criterion, steps, optimizer, CPU, train_mode=mode)
    assert modes == [True] * 5 + [False] * 5


def test_an_epoch_that_was_interrupted_counts_on(capsys):
    set_up_logging(0)
    model = torch.nn.Linear(3, 2)
    optimizer, steps = started(model)
    steps.state.step = 2
    train_one_epoch(model, criterion, steps, optimizer, CPU)
    assert "Epoch: [0]  [4/5]" in capsys.readouterr().out and steps.state.step == 5


class Seven(torch.nn.Module):
    """Returns its input as the scores of seven classes; zeros in training."""

    def forward(self, images):
        self.seen = images.dtype if not torch.is_autocast_enabled("cpu") else torch.get_autocast_dtype("cpu")
        return images * (not self.training)


@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_the_figures_of_an_evaluation(amp, capsys):
    """Two of five images are right, four of them among the first five; the loss is a mean of means over batches."""
    places = [0, 4, 5, 0, 4]  # how many classes have a higher score than the true one
    scores = torch.arange(7.0).flip(0).expand(5, 7)
    batches = [(scores[:3], torch.tensor(places[:3])), (scores[3:], torch.tensor(places[3:]))]
    model, precision = Seven().train(), Precision(amp, torch.device("cpu"))
    stats = evaluate(model, batches, precision)
    losses = [F.cross_entropy(*batch).item() for batch in batches]
    assert stats == {"loss": pytest.approx(sum(losses) / 2), "acc1": 40.0, "acc5": 80.0}
    assert losses[0] != pytest.approx(losses[1])
    assert model.seen == (torch.bfloat16 if amp == "bf16" else torch.float32)
    assert "NaN" not in capsys.readouterr().out
    evaluate(model, [(scores / 0, torch.arange(5))], precision)
    assert "warning: the outputs for some images are NaN or infinite, so these figures" in capsys.readouterr().out
