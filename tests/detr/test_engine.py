"""What the loops pass to losses and post-processors, with stand-ins that record it."""

from types import SimpleNamespace

import torch

from detr_irpe.engine import evaluate, train_one_epoch
from irpe_train.metrics import MetricLogger
from irpe_train.precision import Precision


class Images:
    def to(self, device, non_blocking=False):
        return self


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.modes = torch.nn.Parameter(torch.ones(())), []

    def forward(self, images):
        self.modes.append(self.training)
        self.autocast = torch.is_autocast_enabled("cpu")
        return {"weight": self.weight}


class Criterion(torch.nn.Module):
    weight_dict = {"loss_ce": 2.0}

    def __init__(self):
        super().__init__()
        self.modes = []

    def forward(self, outputs, targets):
        self.modes.append(self.training)
        return {"loss_ce": outputs["weight"] ** 2, "class_error": torch.zeros(())}


class Steps(list):
    """Two steps, each an update."""

    group_size, group_ends = 1, True
    state = SimpleNamespace(meters=MetricLogger(), epoch=0, step=0)

    def watch(self, loss, *, lr, terms):
        self.watched = (loss.item(), lr, list(terms))

    def confirm(self):
        """What the ranks find raises here, so it must come before the update."""
        self.confirmed = [*getattr(self, "confirmed", ()), round(self.model.weight.item(), 6)]

    def log_every(self, every):
        return self.state.meters.log_every(self, every=every)


def batch(image_id, size, original):
    target = {"image_id": image_id, "size": size, "orig_size": original}
    return Images(), [{name: torch.tensor(value) for name, value in target.items()}]


BATCHES = [batch([7], [20, 30], [40, 60]), batch([8], [20, 25], [80, 100])]
CPU = Precision("none", torch.device("cpu"))


def train(model, criterion, steps, precision=CPU, **options):
    steps.model = model
    return train_one_epoch(model, criterion, steps, torch.optim.SGD(model.parameters(), lr=0.1), precision, **options)


def test_training_follows_an_evaluation_in_training_mode():
    """The criterion divides by the objects of all processes in training, and by its own in evaluation."""
    model, criterion, steps = Model().eval(), Criterion().eval(), Steps(BATCHES)
    averages = train(model, criterion, steps)
    assert model.modes == criterion.modes == [True, True]
    assert abs(model.weight.item() - 0.36) < 1e-6  # each update leaves 1 - 0.1 * 4 of it
    assert list(averages) == ["lr", "class_error", "loss", "loss_ce", "loss_ce_unscaled", "class_error_unscaled"]
    assert steps.confirmed == [1.0, 0.6]
    assert abs(steps.watched[0] - 2 * 0.36) < 1e-6 and steps.watched[1:] == (0.1, ["loss_ce"])


def test_the_gradient_is_clipped_at_each_update():
    model = Model()
    train(model, Criterion(), Steps(BATCHES), max_norm=0.5)
    assert abs(model.weight.item() - 0.9) < 1e-5  # two steps of 0.1 * 0.5


def test_batches_of_a_group_add_up():
    model, steps = Model(), Steps(BATCHES)
    steps.group_size, steps.group_ends = 2, False
    train(model, Criterion(), steps)
    assert model.weight == 1 and model.weight.grad == 4  # the mean of two


def test_the_model_alone_runs_under_autocast():
    def criterion(outputs, targets):
        assert not torch.is_autocast_enabled("cpu")
        return Criterion()(outputs, targets)

    criterion.train, criterion.eval, criterion.weight_dict = lambda: None, lambda: None, Criterion.weight_dict
    model, precision = Model(), Precision("bf16", torch.device("cpu"))
    train(model, criterion, Steps(BATCHES), precision)
    assert model.autocast
    model.autocast = False
    found = SimpleNamespace(update=lambda found: None)
    averages = evaluate(model, criterion, {"bbox": lambda *sizes: [{}]}, BATCHES, found, None, precision)
    assert model.autocast
    assert list(averages) == ["class_error", "loss", "loss_ce", "loss_ce_unscaled", "class_error_unscaled"]


def test_evaluation_scales_boxes_to_the_original_and_cuts_masks_at_the_size_that_was_seen():
    calls = []

    def noted(name, result):
        def postprocess(*sizes):
            calls.append((name, [s.tolist() for s in sizes if isinstance(s, torch.Tensor)]))
            return result

        return postprocess

    seen = {"bbox": [], "panoptic": []}
    evaluator = SimpleNamespace(update=lambda found: seen["bbox"].extend(found))
    panoptic = SimpleNamespace(update=lambda image_id, png, segments: seen["panoptic"].append(image_id))
    postprocessors = {
        "bbox": noted("bbox", [{}]),
        "segm": noted("segm", [{}]),
        "panoptic": noted("panoptic", [{"png_string": b"", "segments_info": []}]),
    }
    model, criterion = Model(), Criterion()
    evaluate(model, criterion, postprocessors, BATCHES, evaluator, panoptic, CPU)
    assert model.modes == criterion.modes == [False, False]
    assert seen == {"bbox": [7, 8], "panoptic": [7, 8]}
    assert calls == [
        ("bbox", [[[40, 60]]]),
        ("segm", [[[40, 60]], [[20, 30]]]),
        ("panoptic", [[[20, 30]], [[40, 60]]]),
        ("bbox", [[[80, 100]]]),
        ("segm", [[[80, 100]], [[20, 25]]]),
        ("panoptic", [[[20, 25]], [[80, 100]]]),
    ]
