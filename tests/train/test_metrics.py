"""Averages and progress lines."""

import os
import re

import pytest
import torch

from irpe_train.logger import log_details, logger, set_up_logging
from irpe_train.metrics import MetricLogger, SmoothedValue


def test_means_are_over_iterations_or_over_images():
    meters = MetricLogger()
    meters.update(loss=1.0, lr=0.5)
    meters.update(loss=torch.tensor(4.0), lr=0.5)
    meters.update(acc1=torch.tensor(100.0), n=1)
    meters.update(acc1=50.0, n=3)
    assert meters.averages() == {"loss": 2.5, "lr": 0.5, "acc1": 62.5}


def test_window_statistics():
    value = SmoothedValue(window_size=3, fmt="{median:.1f} {avg:.1f} {global_avg:.1f} {max:.1f} {value:.1f}")
    for x in (10, 1, 2, 6):
        value.update(x)
    assert str(value) == "2.0 3.0 4.8 6.0 6.0"
    assert str(SmoothedValue()) == "0.0000 (0.0000)"


def test_tensors_are_read_when_someone_looks():
    meters = MetricLogger()
    for step in range(3):
        meters.update(
            a=torch.tensor(float(step)),
            b=torch.tensor(1, dtype=torch.int64),
            c=torch.tensor([2.0], requires_grad=True).half(),
        )
    assert len(meters._pending) == 9 and meters._meters["a"].count == 0
    assert not any(values.requires_grad for _, _, values in meters._pending)  # or they would keep the graph
    assert meters.meters["a"].count == 3 and not meters._pending
    assert meters.averages() == {"a": 1.0, "b": 1.0, "c": 2.0}


def test_order_is_that_of_first_mention():
    meters = MetricLogger()
    meters.update(lr=torch.tensor(0.1), loss=1.0)
    assert list(meters.averages()) == ["lr", "loss"]
    assert str(meters) == "lr: 0.100000  loss: 1.0000 (1.0000)"


def test_state_goes_on_bit_for_bit():
    values = torch.rand(50).tolist()
    whole, first, second = MetricLogger(), MetricLogger(), MetricLogger()
    for i, value in enumerate(values):
        whole.update(x=torch.tensor(value), n=3)
        (first if i < 40 else second).update(x=torch.tensor(value), n=3)
        if i == 39:
            second.load_state_dict(first.state_dict())
    assert second.state_dict() == whole.state_dict() and second.averages() == whole.averages()


def test_averages_are_printed_in_the_published_words(capsys):
    set_up_logging(0)
    meters = MetricLogger()
    for loss in (1.0, 2.0, 6.0):
        meters.update(lr=0.5, loss=loss, loss_giou=2 * loss)
    meters.averages()
    printed = capsys.readouterr().out
    assert printed == "Averaged stats: lr: 0.500000  loss: 2.0000 (3.0000)  loss_giou: 4.0000 (6.0000)\n"


def test_lines_without_a_terminal_fit_one_and_the_file_has_every_term_as_published(capsys, tmp_path):
    set_up_logging(0)
    log_details(tmp_path)
    meters = MetricLogger()
    terms = {f"loss_{name}_{layer}": 3.25 for name in ("ce", "bbox", "giou") for layer in range(6)}
    for _ in meters.log_every(range(1200), every=10, header="Epoch: [299]", later=lambda step_time: 90_000):
        meters.update(lr=1e-4, class_error=100.0, loss=33.25, **terms)
    meters.averages()
    lines = capsys.readouterr().out.splitlines()
    words = r"Epoch: \[299\]  \[   0/1200\]  eta: 0:00:\d\d  lr: 0.000100  class_error: 100.00  "
    assert re.match(words + r"loss: 33.2500 \(33.2500\)  run: 1 day, 1:00:\d\d$", lines[0])
    assert max(map(len, lines)) < 140 and len(lines[0]) < 124 and len(lines) == 121 + 2
    assert lines[-1] == "Averaged stats: lr: 0.000100  class_error: 100.00  loss: 33.2500 (33.2500)"
    details = (tmp_path / f"detail_{tmp_path.name}.log").read_text().splitlines()
    assert len(details) == len(lines)
    for line in (details[0], details[-1]):
        assert all(f"{name}: 3.2500 (3.2500)" in line for name in terms) and "class_error: 100.00  loss: 33" in line
    assert re.search(r"time: \d\.\d+  data: \d\.\d+  max mem: \d+$", details[0])


def test_lines_without_a_terminal(capsys):
    set_up_logging(0)
    meters = MetricLogger()
    for step in meters.log_every(range(25), every=10, header="Epoch: [3]", images_per_step=8):
        meters.update(loss=float(step))
    lines = capsys.readouterr().out.splitlines()
    assert [re.match(r"Epoch: \[3\]  \[ ?(\d+)/25\]  eta: ", line).group(1) for line in lines[:-1]] == [
        "0",
        "10",
        "20",
        "24",
    ]
    assert re.search(r"eta: 0:00:0\d  loss: 0.0000 \(0.0000\)  \d+ img/s$", lines[0])
    assert re.search(r"\d+ img/s  max mem: \d+$", lines[-2])
    assert re.search(r"Total time: 0:00:00 \(0\.\d+ s / it\)$", lines[-1])


def test_times_are_those_of_the_clock(capsys, tmp_path, monkeypatch):
    set_up_logging(0)
    log_details(tmp_path)
    now = [100.0]
    monkeypatch.setattr("irpe_train.metrics.time.monotonic", lambda: now[0])

    class Slow:
        def __len__(self):
            return 60

        def __iter__(self):
            for _ in range(57, 60):
                now[0] += 1
                yield

    options = dict(every=57, header="E", start=57, images_per_step=9, later=lambda step_time: 600 * step_time)
    for _ in MetricLogger().log_every(Slow(), **options):
        now[0] += 2
    first, _, total = capsys.readouterr().out.splitlines()
    assert first == "E  [57/60]  eta: 0:00:06  3 img/s  run: 0:30:06"
    assert total == "E Total time: 0:00:09 (3.0000 s / it)"
    assert "time: 3.0000  data: 1.0000" in (tmp_path / f"detail_{tmp_path.name}.log").read_text().splitlines()[0]


def test_interrupted_epoch_counts_on(capsys):
    set_up_logging(0)

    class Rest:
        def __len__(self):
            return 25

        def __iter__(self):
            return iter(range(12, 25))

    list(MetricLogger().log_every(Rest(), every=10, header="E", start=12))
    assert re.findall(r"\[(\d+)/25\]", capsys.readouterr().out) == ["20", "24"]


def test_empty_loader(capsys):
    assert list(MetricLogger().log_every([], header="Test:")) == [] and MetricLogger().averages() == {}


@pytest.mark.parametrize("rank", [0, 1])
def test_other_ranks_print_warnings_alone_with_their_rank(rank, capsys):
    from irpe_train.logger import logger

    set_up_logging(rank)
    logger.info("* Acc@1 73.700")
    logger.warning("look")
    set_up_logging(0)
    assert capsys.readouterr().out == ("* Acc@1 73.700\nwarning: look\n" if rank == 0 else "[rank 1] warning: look\n")


def test_a_name_that_is_not_text_is_printed(capsys):
    set_up_logging(0)
    logger.info(f"caf\xe9 {os.fsdecode(b'caf' + bytes([0xE9]))}")
    printed = capsys.readouterr()
    assert printed.out == "caf\xe9 caf\\udce9\n" and not printed.err
