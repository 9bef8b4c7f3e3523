"""Curves of published and own logs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from irpe_lab.plots import curve, plot_runs, read_log
from irpe_train.errors import BadData

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "plot_logs.py"


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def deit(epoch):
    return {
        "train_lr": 1e-6,
        "train_loss": 7.0 - epoch,
        "test_loss": 6.0,
        "test_acc1": 70.0 + epoch,
        "test_acc5": 90.0,
        "epoch": epoch,
        "n_parameters": 5,
    }


def detr(epoch):
    return {
        "train_lr": 1e-4,
        "train_class_error": 90.0,
        "train_loss": 30.0,
        "train_loss_bbox": 2.0,
        "train_loss_giou": 1.0,
        "test_class_error": 80.0,
        "test_loss": 20.0,
        "test_loss_bbox": 2.0,
        "test_loss_giou": 1.0,
        "test_coco_eval_bbox": [0.1 * epoch] + [-1.0] * 11,
        "epoch": epoch,
        "n_parameters": 4,
    }


def test_both_published_formats(tmp_path):
    a = write(tmp_path / "a" / "log.txt", map(deit, range(3)))
    b = write(tmp_path / "b" / "log.txt", map(detr, range(3)))
    panels = plot_runs([a, b.parent], tmp_path / "out" / "x.png")
    assert panels == [
        "loss",
        "top-1 accuracy (%)",
        "box AP",
        "class error (%)",
        "box L1 loss",
        "GIoU loss",
        "learning rate",
    ]
    assert (tmp_path / "out" / "x.png").read_bytes().startswith(b"\x89PNG")
    assert plot_runs([a], tmp_path / "y.png") == ["loss", "top-1 accuracy (%)", "learning rate"]


def test_training_is_solid_and_test_dashed_in_one_colour_a_run(tmp_path, monkeypatch):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    drawn, named = [], []
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, style, **kw: drawn.append((style, kw["color"])))
    monkeypatch.setattr(Figure, "legend", lambda self, handles, **kw: named.extend(h.get_label() for h in handles))
    names = ("none_seed0", "none_seed1", "product")
    runs = [write(tmp_path / f"log_{name}.txt", map(deit, range(3))) for name in names]
    plot_runs(runs, tmp_path / "x.png")
    assert drawn[:6] == [("-", "C0"), ("--", "C0"), ("-", "C0"), ("--", "C0"), ("-", "C1"), ("--", "C1")]
    assert named == ["none", "product", "train", "test"]


def test_curve_takes_ap_from_the_list():
    assert curve([detr(0), detr(2), {"epoch": 3}], "test_coco_eval_bbox") == ([0, 2], [0.0, 0.2])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no epoch in it yet"),
        ('{"epoch": 0}\nnot json\n', "line 2 is not a JSON object with 'epoch'"),
        ('{"a": 1}\n', "line 1 is not"),
        ("[1]\n", "line 1 is not"),
    ],
)
def test_bad_logs_are_named(tmp_path, text, words):
    (tmp_path / "log.txt").write_text(text)
    with pytest.raises(BadData, match=f"log.txt: {words}"):
        read_log(tmp_path)


def test_missing_log_and_nothing_to_draw(tmp_path):
    with pytest.raises(BadData, match="no such log; give a run's folder or its log.txt"):
        read_log(tmp_path / "none")
    with pytest.raises(BadData, match="has a figure that can be drawn"):
        plot_runs([write(tmp_path / "log.txt", [{"epoch": 0}])], tmp_path / "x.png")


def test_script(tmp_path):
    write(tmp_path / "log.txt", map(deit, range(2)))
    done = subprocess.run([sys.executable, SCRIPT, tmp_path, "-o", tmp_path / "x.png"], capture_output=True, text=True)
    assert done.returncode == 0 and "x.png: loss, top-1 accuracy (%), learning rate" in done.stdout, done.stderr
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path / "none", "-o", tmp_path / "y.png"], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.startswith("plot_logs.py: ") and "Traceback" not in done.stderr
