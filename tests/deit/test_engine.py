"""One epoch: the average of the weights moves with each update, and with nothing else."""

import pytest
import torch
from torch.utils.data import SequentialSampler, TensorDataset

from deit_irpe.engine import train_one_epoch
from irpe_train.loader import TrainLoader
from irpe_train.precision import Precision
from irpe_train.run_folder import Checkpoints
from irpe_train.state import TrainState
from irpe_train.steps import Steps


class Average:
    """Notes the weights each time it is updated."""

    def __init__(self):
        self.seen = []

    def update(self, model):
        self.seen.append(model.weight.detach().clone())


@pytest.mark.parametrize(("accumulate", "updates"), [(1, 5), (2, 3), (5, 1)])
def test_the_average_is_updated_once_for_each_update_and_after_it(accumulate, updates):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = TensorDataset(torch.randn(10, 3), torch.arange(10) % 2)
    loader = TrainLoader(data, SequentialSampler(data), batch_size=2, seed=0, name_of=str)
    state = TrainState(model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 9))
    steps = Steps(loader, state, Checkpoints("", ()), seed=0, accumulate=accumulate)
    precision, average = Precision("none", torch.device("cpu")), Average()

    def criterion(images, outputs, targets):
        return torch.nn.functional.cross_entropy(outputs, targets)

    start = model.weight.detach().clone()
    stats = train_one_epoch(model.eval(), criterion, steps, optimizer, precision, ema=average)
    assert len(average.seen) == updates and torch.equal(average.seen[-1], model.weight)
    weights = [start, *average.seen]
    assert all(not torch.equal(a, b) for a, b in zip(weights, weights[1:], strict=False))
    assert list(stats) == ["lr", "loss"] and stats["lr"] == 0.1 and model.training
