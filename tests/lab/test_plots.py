"""Curves of published logs and our own."""

import itertools
import json
import subprocess
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from PIL import Image

from irpe_lab.console_log import read_log
from irpe_lab.figures import TASKS
from irpe_lab.plots import COLOURS, curve, plot_intervals, plot_runs
from irpe_lab.results import Outcome, Row, bootstrap_interval
from irpe_train.errors import BadData
from tests.helpers.quick_python import quick_programs

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


def titles(figure):
    return [axis.get_title() for axis in figure.axes]


def test_both_published_formats(tmp_path):
    a = write(tmp_path / "a" / "log.txt", map(deit, range(3)))
    b = write(tmp_path / "b" / "log.txt", map(detr, range(3)))
    drawn = plot_runs([a, b.parent], tmp_path / "out" / "x.png")
    assert titles(drawn) == [
        "loss",
        "top-1 accuracy (%)",
        "box AP",
        "class error (%)",
        "box L1 loss",
        "GIoU loss",
        "learning rate",
    ]
    with Image.open(tmp_path / "out" / "x.png") as picture:
        assert picture.size == tuple(round(300 * inches) for inches in drawn.get_size_inches())
    assert drawn.axes[-1].get_subplotspec().get_geometry()[:2] == (3, 3)
    assert titles(alone := plot_runs([a])) == ["loss", "top-1 accuracy (%)", "learning rate"]
    assert alone.axes[0].get_subplotspec().get_geometry()[:2] == (1, 3)


def test_seeds_are_one_line_in_a_band_training_solid_and_test_dashed(tmp_path):
    """Seeds at 7 and 5 of the training loss: their mean 6 is drawn, the band reaches from 5 to 7."""
    seeds = [
        write(tmp_path / f"log_none_seed{i}.txt", [deit(e) | {"train_loss": 7.0 - 2 * i} for e in range(3)])
        for i in (0, 1)
    ]
    other = write(tmp_path / "log_product.txt", map(deit, range(3)))
    drawn = plot_runs([*seeds, other])
    loss = drawn.axes[0]
    assert [(line.get_linestyle(), line.get_color()) for line in loss.lines] == [
        ("-", COLOURS[0]),
        ("--", COLOURS[0]),
        ("-", COLOURS[1]),
        ("--", COLOURS[1]),
    ]
    assert list(loss.lines[0].get_ydata()) == [6.0, 6.0, 6.0]
    (band,) = [band for band in loss.collections if band.get_facecolor()[0][:3].tolist() == list(to_rgb(COLOURS[0]))][
        :1
    ]
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (5.0, 7.0)
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["none", "product", "train", "test"]


def test_a_seed_that_has_come_less_far_counts_as_far_as_it_has(tmp_path):
    write(tmp_path / "log_a_seed0.txt", [deit(e) | {"train_loss": 4.0} for e in range(3)])
    write(tmp_path / "log_a_seed1.txt", [deit(0) | {"train_loss": 2.0}])
    (line, *_) = plot_runs(sorted(tmp_path.glob("*.txt"))).axes[0].lines
    assert list(line.get_xdata()) == [0, 1, 2] and list(line.get_ydata()) == [3.0, 4.0, 4.0]


def test_runs_of_one_name_in_two_folders_are_two_runs(tmp_path):
    runs = [write(tmp_path / f / f"log_x_seed{i}.txt", map(deit, range(3))) for f in "abcdefgh" for i in (0, 1)]
    drawn = plot_runs(runs)
    texts = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert texts == [*(f"{f}/x" for f in "abcdefgh"), "train", "test"]
    first, *others, last = drawn.axes[0].lines[::2]  # more runs than colours: a marker tells two of one colour apart
    assert (first.get_color(), last.get_color()) == (COLOURS[0],) * 2 and len({x.get_color() for x in others}) == 6
    assert len({x.get_marker() for x in (first, *others)}) == 7 and last.get_marker() != first.get_marker()
    assert all(tick == round(tick) for tick in drawn.axes[0].get_xticks())


@pytest.mark.parametrize("runs", [1, 2])
def test_a_run_of_one_epoch_is_dots(tmp_path, runs):
    drawn = plot_runs([write(tmp_path / f"log_{i}.txt", [deit(0)]) for i in range(runs)])
    drawn.legends.clear()
    drawn.set_dpi(30)
    FigureCanvasAgg(drawn).draw()
    picture = np.asarray(drawn.canvas.buffer_rgba())[..., :3]
    colour = np.round(255 * np.array(to_rgb(COLOURS[runs - 1])))
    assert (abs(picture - colour).max(-1) < 60).any()


def test_a_figure_of_ones_own_in_the_format_of_the_suffix(tmp_path):
    """No global state: pyplot holds none of our figures, and its backend is unchanged."""
    before = matplotlib.get_backend()
    run = write(tmp_path / "log_$x_$.txt", map(deit, range(2)))
    for suffix, begins in (("pdf", b"%PDF"), ("svg", b"<?xml"), ("PNG", b"\x89PNG")):
        plot_runs([run], tmp_path / f"x.{suffix}")
        assert (tmp_path / f"x.{suffix}").read_bytes().startswith(begins)
    assert matplotlib.get_backend() == before and pyplot.get_fignums() == []
    with pytest.raises(ValueError, match="x.nope: expected a picture's suffix, one of .*pdf.*png"):
        plot_runs([run], tmp_path / "x.nope")


# How light reaches people without red, green or blue cones (Machado et al., IEEE TVCG 2009, severity 1).
BLIND = np.array(
    [
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ]
)


def distance(first, second):
    """Distance of two colours under the worst kind of colour blindness; black to white is 1.7."""
    seen = [np.clip(BLIND @ np.array(to_rgb(colour)) ** 2.2, 0, 1) ** (1 / 2.2) for colour in (first, second)]
    return np.linalg.norm(seen[0] - seen[1], axis=1).min()


def test_colours_are_distinct_for_colour_blind_readers():
    assert min(distance(a, b) for a, b in itertools.combinations(COLOURS, 2)) > 0.1
    assert distance("#00aa00", "#bb7700") < 0.1  # a green and an orange that many cannot distinguish


def test_intervals_show_every_seed_the_published_figure_and_the_difference():
    done = {seed: Outcome("done", 2, value, value) for seed, value in ((0, 80.0), (1, 82.0))}
    more = {seed: Outcome("done", 2, value, value) for seed, value in ((0, 81.0), (1, 84.0))}
    none = Row("none", "", done)
    rows = [
        none,
        Row("irpe", "", more, 81.5, none),
        Row("bad", "", {0: Outcome("failed", reason="x"), 1: Outcome("waiting")}, baseline=none),
    ]
    drawn = plot_intervals(rows, title="a_b$c$", figure=TASKS["deit_irpe"].figure)
    left, right = drawn.axes
    assert [text.get_text() for text in left.get_yticklabels()] == ["none", "irpe", "bad (failed)"]
    points = [list(line.get_xdata()) for line in left.lines]
    assert [80.0, 82.0] in points and [81.0, 84.0] in points and [82.5] in points and [81.5] in points
    assert [1.0, 2.0] in [list(line.get_xdata()) for line in right.lines]
    assert not right.collections and "minus none, by seed: mean, 95% interval from 5 seeds on" in right.get_xlabel()
    assert left.get_legend().get_texts()[0].get_text() == "published"
    alone = plot_intervals(rows[:1], title="", figure=TASKS["deit_irpe"].figure)
    assert len(alone.axes) == 1 and alone.axes[0].get_legend() is None
    both = plot_intervals(rows, title="", figure=TASKS["deit_irpe"].figure, evaluations=("at 48",))
    assert ["at 48" in axis.get_xlabel() for axis in both.axes] == [False, False, True, True]


FIVE = [1.0, 2.0, 1.0, 2.0, 14.0]  # their mean is 4


def test_an_interval_reaches_as_far_as_it_is_on_either_side():
    none, irpe = ({seed: Outcome("done", 1, x, x) for seed, x in enumerate(xs)} for xs in ([0.0] * 5, FIVE))
    rows = [baseline := Row("none", "", none), Row("irpe", "", irpe, None, baseline)]
    _, right = plot_intervals(rows, title="", figure=TASKS["deit_irpe"].figure).axes
    (interval,) = (segment for bar in right.collections for segment in bar.get_segments())
    assert [x for x, _ in interval] == pytest.approx(bootstrap_interval(FIVE))
    assert interval[0][0] < 4 - 2 < 4 + 2 < interval[1][0] and interval[0][0] + interval[1][0] != pytest.approx(8)


def test_each_figure_of_a_list_has_its_place():
    figures = {figure.name: figure for figure in TASKS["detr_irpe"].figures}
    line = {"test_coco_eval_bbox": [0.5, 0.7, 0.6, 0.2, 0.4, 0.8, 0.9]}
    assert [figures[name].of(line) for name in ("AP", "AP50", "AP75", "AP_large")] == [0.5, 0.7, 0.6, 0.8]
    assert figures["AP50"].of({"test_coco_eval_bbox": [0.5]}) is None


def test_curve_takes_ap_from_the_list():
    assert curve([detr(0), detr(2), {"epoch": 3}], "test_coco_eval_bbox") == ([0, 2], [0.0, 0.2])
    assert curve([{"epoch": 0, "x": 10**400}, {"epoch": 1, "x": -(10**400)}], "x")[1] == [float("inf"), -float("inf")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no epoch logged yet"),
        ('{"epoch": 0}\nnot json\n', "line 2 is not a JSON object with 'epoch'"),
        ('{"a": 1}\n', "line 1 is not"),
        ("[1]\n", "line 1 is not"),
        ('{"epoch": "1"}\n', "line 1: 'epoch' is '1', not a whole number"),
        ('{"epoch": 1' + "0" * 400 + "}\n", "line 1: 'epoch' is 1000"),
        ("[" * 100_000, "line 1 is not"),
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
        plot_runs([write(tmp_path / "log.txt", [{"epoch": 0, "train_loss": "x", "test_acc1": [], "train_lr": True}])])


def test_script(tmp_path):
    write(tmp_path / "log.txt", map(deit, range(2)))
    command = [quick_programs() / "python", SCRIPT, "-o", tmp_path / "x"]  # named by the file that is written, x.png
    (tmp_path / "table.csv").write_text("run,flags\n")  # as among the runs of an ablation
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed" / "flags.yaml").touch()
    done = subprocess.run(
        [*command, tmp_path, tmp_path / "table.csv", tmp_path / "failed"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "x.png: loss, top-1 accuracy (%), learning rate" in done.stdout, done.stderr
    done = subprocess.run([*command, tmp_path / "none"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("python -m irpe_lab.plots: ")


def test_a_run_that_diverged_is_drawn_as_far_as_it_is_finite(tmp_path):
    lines = [deit(0), deit(1) | {"train_loss": float("nan")}, deit(2) | {"train_loss": float("inf")}]
    path = write(tmp_path / "a" / "log.txt", lines)
    (line,) = [line for line in plot_runs([path], tmp_path / "x.png").axes[0].lines if line.get_linestyle() == "-"]
    assert list(line.get_xdata()) == [0]
    lost = write(tmp_path / "b" / "log.txt", [{"epoch": 0, "train_loss": float("nan")}])
    plot_runs([path, lost], tmp_path / "x.png")
    plot_runs([lost], tmp_path / "x.png")
    huge = [write(tmp_path / f"c_seed{i}" / "log.txt", [{"epoch": 0, "train_loss": (-10) ** 30}]) for i in range(2)]
    plot_runs(huge, tmp_path / "x.png")
