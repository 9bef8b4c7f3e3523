"""What a run printed, read back: ``detail_<name>.log``, ours and the published ones (plain text lines)."""

import re
import statistics
from pathlib import Path

EPOCH = re.compile(r"Epoch: \[(\d+)\]")
ACCURACY = re.compile(r"\* Acc@1 ([\d.]+) Acc@5 ([\d.]+)(?: loss ([\d.]+))?")
BOX_AP = re.compile(r"Average Precision +\(AP\) @\[ IoU=0\.50:0\.95 \| area= +all \| maxDets=100 \] = (-?[\d.]+)")
PARAMETERS = re.compile(r"number of params(?:eters)?: *([\d,]+)")
SPEED = re.compile(r"([\d.]+) img/s")


def read_detail(path: str | Path) -> list[dict]:
    """The evaluations of a console log, in the keys of ``log.txt``: ``epoch``, ``test_acc1``, ``test_acc5``,
    ``test_loss``, or ``test_coco_eval_bbox`` (its first figure alone), and ``n_parameters`` where it was printed.

    An evaluation belongs to the epoch announced before it; of an epoch that was run twice, the last one counts.
    """
    epochs: dict[int, dict] = {}
    epoch, parameters = 0, None
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        if found := EPOCH.search(line):
            epoch = int(found[1])
        elif found := PARAMETERS.search(line):
            parameters = int(found[1].replace(",", ""))
        elif found := ACCURACY.search(line):
            entry = {"test_acc1": float(found[1]), "test_acc5": float(found[2])}
            epochs[epoch] = entry | ({"test_loss": float(found[3])} if found[3] else {}) | {"epoch": epoch}
        elif found := BOX_AP.search(line):
            epochs[epoch] = {"test_coco_eval_bbox": [float(found[1])], "epoch": epoch}
    return [entry | ({"n_parameters": parameters} if parameters else {}) for _, entry in sorted(epochs.items())]


def images_per_second(path: str | Path) -> float | None:
    """The median speed of training that the run printed; None where it printed none (the published logs)."""
    speeds = [
        float(found[1])
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
        if EPOCH.search(line) and (found := SPEED.search(line))
    ]
    return statistics.median(speeds) if speeds else None


def last_words(path: str | Path) -> str:
    """The last line that says something: why a run failed."""
    path = Path(path)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
