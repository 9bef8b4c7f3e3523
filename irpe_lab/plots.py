"""Curves of ``log.txt`` files, the published DeiT and DETR ones and ours: solid for training, dashed for test."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from irpe_train.errors import BadData

# Title of a panel, and the log keys that may fill it: training, test. A panel without data is left out.
PANELS = (
    ("loss", "train_loss", "test_loss"),
    ("top-1 accuracy (%)", None, "test_acc1"),
    ("box AP", None, "test_coco_eval_bbox"),
    ("mask AP", None, "test_coco_eval_masks"),
    ("class error (%)", "train_class_error", "test_class_error"),
    ("box L1 loss", "train_loss_bbox", "test_loss_bbox"),
    ("GIoU loss", "train_loss_giou", "test_loss_giou"),
    ("learning rate", "train_lr", None),
)


def read_log(run: str | Path) -> list[dict]:
    """The epochs of a run.

    Args:
        run: a ``log.txt``, or the folder that has one.
    Raises: BadData: no such file, no epochs, or a line that is not a JSON object with ``epoch`` (its number is named).
    """
    path = Path(run)
    path = path / "log.txt" if path.is_dir() else path
    if not path.is_file():
        raise BadData(f"{path}: no such log; give a run's folder or its log.txt")
    epochs = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            epoch = json.loads(line)
            epoch["epoch"]
        except (ValueError, KeyError, TypeError) as error:
            raise BadData(f"{path}: line {number} is not a JSON object with 'epoch'") from error
        epochs.append(epoch)
    if not epochs:
        raise BadData(f"{path}: no epoch in it yet")
    return epochs


def curve(epochs: list[dict], key: str | None) -> tuple[list[int], list[float]]:
    """Epoch numbers and values of ``key``; the first figure (AP) where the value is a list."""
    points = [
        (e["epoch"], e[key][0] if isinstance(e[key], list) else e[key])
        for e in epochs
        if key and e.get(key) not in (None, [])
    ]
    return [x for x, _ in points], [y for _, y in points]


def plot_runs(runs: Sequence[str | Path], out: str | Path) -> list[str]:
    """Draw the runs over each other into an image file, one colour a run; seeds of one run (``x_seed0``) share theirs.

    Returns: the titles of the panels drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    logs = {_label(run, runs): read_log(run) for run in runs}
    panels = [panel for panel in PANELS if any(curve(log, key)[0] for log in logs.values() for key in panel[1:])]
    if not panels:
        raise BadData(f"none of {', '.join(map(str, runs))} has a figure that can be drawn")
    colours = {
        name: f"C{number}" if number < 10 else pyplot.get_cmap("tab20b")(number % 20)
        for number, name in enumerate(dict.fromkeys(_without_seed(label) for label in logs))
    }
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    entries = min(3, len(colours))  # of the legend, side by side
    height = 3.6 * rows + 0.25 * -(-(len(colours) + 2) // entries)
    figure, axes = pyplot.subplots(rows, columns, figsize=(5 * columns, height), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, train, test) in zip(axes.flat, panels, strict=False):
        for label, log in logs.items():
            for key, style in ((train, "-"), (test, "--")):
                x, y = curve(log, key)
                if x:
                    axis.plot(x, y, style, color=colours[_without_seed(label)], marker="." if len(x) < 3 else None)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
    keys = [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    keys += [
        Line2D([], [], color="black", linestyle="-", label="train"),
        Line2D([], [], color="black", linestyle="--", label="test"),
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=entries, fontsize="small")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)
    return [title for title, _, _ in panels]


def _without_seed(label: str) -> str:
    return re.sub(r"_seed\d+$", "", label.removesuffix(".txt").removeprefix("log_"))


def _label(run: str | Path, runs: Sequence[str | Path]) -> str:
    """The shortest end of the path that tells the runs apart."""
    path = Path(run)
    parts = (path if path.name != "log.txt" else path.parent).resolve().parts
    ends = [(Path(r) if Path(r).name != "log.txt" else Path(r).parent).resolve().parts for r in runs]
    for length in range(1, len(parts) + 1):
        if sum(end[-length:] == parts[-length:] for end in ends) == 1:
            return "/".join(parts[-length:])
    return "/".join(parts)
