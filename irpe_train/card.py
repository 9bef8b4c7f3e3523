# SPDX-License-Identifier: Apache-2.0
"""The reproduction card: a figure measured here beside the published one, and PASS, partial or FAIL.

Both command lines make one with ``--eval --expect``: the figure, the published figure, the difference, the verdict
under the tolerance in ``configs/model_zoo.yaml``, the hashes of checkpoint and data set, versions, hardware.

    python -m irpe_train.card [NAME ...] [-o logs/cards]     only figures that need no data: parameters, MACs, buckets
"""

import hashlib
import importlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from irpe_train.config import ROOT
from irpe_train.download import local_file, sha256
from irpe_train.errors import RunError, reported_by
from irpe_train.flags import FlagParser
from irpe_train.logger import logger
from irpe_train.outputs import writable_folder
from irpe_train.pixels import walk
from irpe_train.run_log import PACKAGES, keep_aside, processor_name, surroundings
from irpe_train.text_files import read_text, write_text
from irpe_train.zoo import read_zoo

NOT_RUN = "not run"


def compare(name: str, measured: Mapping[str, float]) -> list[dict]:
    """One line for every published figure of the zoo entry ``name``, in the order of the file.

    Args: measured: ``acc1`` and ``acc5`` in percent, ``AP``, ``AP50``, ... as fractions, ``n_parameters``, ``macs_M``,
        ``buckets``; ``params_M`` is derived from ``n_parameters``.
    Returns: ``figure``, ``here`` (None: not measured), ``published``, ``tolerance``, ``difference``, and ``verdict``:
        ``PASS``, ``FAIL`` (also for NaN) or ``not run``.
    Raises: ValueError: unknown ``name``, or a measured figure without a published one (a misspelt one would not fail).
    """
    zoo = read_zoo()
    expect = zoo.find(name).expect
    measured = dict(measured)
    if "n_parameters" in measured and "params_M" in expect:
        measured.setdefault("params_M", measured["n_parameters"] / 1e6)
    if strange := measured.keys() - expect.keys():
        raise ValueError(f"card of {name}: no published {', '.join(sorted(strange))}; there are {', '.join(expect)}.")
    lines = []
    for figure, published in expect.items():
        here, tolerance, difference, judged = measured.get(figure), zoo.tolerance[figure], None, NOT_RUN
        if here is not None:
            difference = here - published
            # 1e-9: a difference of exactly the tolerance is a PASS, whatever the rounding.
            judged = "PASS" if abs(difference) <= tolerance + 1e-9 else "FAIL"
        line = dict(figure=figure, here=here, published=published, tolerance=tolerance)
        lines.append(line | dict(difference=difference, verdict=judged))
    return lines


def verdict(lines: Iterable[dict]) -> str:
    """``PASS`` if every figure passed, ``partial`` if some passed and the others were not run; else ``FAIL``."""
    verdicts = {line["verdict"] for line in lines}
    if "FAIL" in verdicts or "PASS" not in verdicts:
        return "FAIL"
    return "partial" if NOT_RUN in verdicts else "PASS"


def choose(wanted: str, candidates: Iterable[str]) -> str:
    """The zoo entry to compare a run with: ``wanted``, or for ``"auto"`` the first candidate in the zoo.

    Args: candidates: names that may be zoo names: stem of the checkpoint, model name or spec.
    Raises: ValueError: no such entry; lists the names.
    """
    zoo = read_zoo()
    if wanted != "auto":
        return zoo.find(wanted).name
    candidates = [name for name in candidates if name]
    for name in candidates:
        if name in zoo.models:
            return name
    remedy = f"name the row: --expect NAME, one of {', '.join(zoo.models)}."
    raise ValueError(f"--expect: nothing published is called {' or '.join(candidates) or '(no name)'}; {remedy}")


class Expected:
    """``--expect``: the published row for an evaluation. Built beforehand, so that a mistake shows at once.

    Args:
        wanted: the row, or ``auto``, see `choose`. source: path or address of the checkpoint, empty for none.
        name: of the model, perhaps also of a row.
        figure: what the evaluation measures, such as ``acc1``.
        data: the validation folder or file.
    Raises: ValueError: see `choose`, or the row has no such figure; FileNotFoundError: the checkpoint or data that the
        card will name do not exist.
    """

    def __init__(self, wanted: str, source: str, name: str, *, figure: str, data: Path):
        self.data, self.checkpoint = data, local_file(source) if source else None
        for path in filter(None, (self.checkpoint, data)):
            if not path.exists():
                raise FileNotFoundError(f"--expect: the card would name {path}, which does not exist")
        self.row = choose(wanted, [self.checkpoint.stem if self.checkpoint else "", name])
        if figure not in (published := read_zoo().find(self.row).expect):
            raise ValueError(
                f"--expect {self.row}: its figures are {', '.join(published)}; this evaluation measures {figure}"
            )

    def meet(self, measured: Mapping[str, float], output_dir: str | Path) -> int:
        """Print the card and save it as ``card.json`` and ``.md``.

        Args: measured: see `compare`. output_dir: if empty, nothing is saved.
        Returns: the exit status: 1 if a figure failed.
        """
        card = make_card(self.row, measured, checkpoint=self.checkpoint, data=[self.data])
        logger.info(to_markdown(card))
        if output_dir:
            write_card(card, Path(output_dir) / "card")
        return int(card["verdict"] == "FAIL")


def make_card(
    name: str, measured: Mapping[str, float], *, checkpoint: Path | None = None, data: Iterable[Path] = ()
) -> dict:
    """The card as plain data. See `Expected` for the arguments."""
    zoo, lines = read_zoo(), compare(name, measured)
    return {
        "name": name,
        "verdict": verdict(lines),
        "source": zoo.source,
        "config": zoo.find(name).config,
        "figures": lines,
        "checkpoint": checkpoint and {"file": checkpoint.name, "sha256": sha256(checkpoint)},
        "data": [fingerprint(path) for path in data],
        "versions": versions(),
        "hardware": hardware(),
    }


def to_markdown(card: Mapping) -> str:
    """The card as Markdown, to print and to keep."""
    rows = ["| figure | here | published | difference | tolerance | |", "|---|---|---|---|---|---|"]
    for line in card["figures"]:
        here, gap = NOT_RUN, ""
        if line["here"] is not None:
            here, gap = _number(line["here"]), f"{_rounded(line['difference']):+g}"
        shown = line["figure"], here, _number(line["published"]), gap, f"{line['tolerance']:g}", line["verdict"]
        rows.append(f"| {' | '.join(shown)} |")
    facts = [f"* published: {card['source']}; config: `{card['config']}`"]
    checkpoint = card["checkpoint"]
    facts.append("* checkpoint: " + (f"{checkpoint['file']}, sha256 {checkpoint['sha256']}" if checkpoint else "none"))
    facts += [
        f"* data: {item['path']}, {item['files']} files, {item['bytes']} bytes, {item['of']} {item['sha256']}"
        for item in card["data"]
    ]
    facts.append("* versions: " + ", ".join(f"{name} {version}" for name, version in card["versions"].items()))
    facts.append(f"* hardware: {card['hardware']}")
    missing = sum(line["here"] is None for line in card["figures"])
    rest = f" ({missing} of {len(card['figures'])} figures not run)" if missing else ""
    return "\n".join([f"# {card['name']}: {card['verdict']}{rest}", "", *rows, "", *facts, ""])


def write_card(card: Mapping, path: Path) -> None:
    """Write ``path`` + ``.json`` and ``path`` + ``.md``. Files there are renamed, unless ``card`` has their figures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = data, text = [path.with_name(path.name + kind) for kind in (".json", ".md")]
    try:
        old = json.loads(read_text(data))
        renewed = old["name"] == card["name"] and _figures_run(old) <= _figures_run(card)
    except (OSError, RunError, ValueError, KeyError, TypeError):  # there is none, or it is no card
        renewed = False
    for file in () if renewed else filter(os.path.lexists, files):
        keep_aside(file)
    write_text(data, json.dumps(card, indent=1) + "\n")
    write_text(text, to_markdown(card))


def _figures_run(card: Mapping) -> set[str]:
    return {line["figure"] for line in card["figures"] if line["here"] is not None}


def fingerprint(path: Path) -> dict:
    """The identity of a data set: a file by its bytes; a folder by the names and sizes of all its files.

    Returns: path (only the name), files, bytes, what is hashed, sha256.
    """
    if not path.exists():
        raise FileNotFoundError(f"card: no data set at {path}")
    if path.is_file():
        return {"path": path.name, "files": 1, "bytes": path.stat().st_size, "of": "sha256", "sha256": sha256(path)}
    digest, count, total = hashlib.sha256(), 0, 0
    for folder, files in walk(path):
        for file in sorted(files):
            file = os.path.join(folder, file)
            size = os.stat(file, follow_symlinks=os.path.exists(file)).st_size  # a broken link's own size
            digest.update(f"{Path(file).relative_to(path).as_posix()} {size}\n".encode())
            count, total = count + 1, total + size
    of = "sha256 of names and sizes"
    return {"path": path.name, "files": count, "bytes": total, "of": of, "sha256": digest.hexdigest()}


def versions() -> dict[str, str]:
    """Everything a figure may depend on: Python, the installed packages, CUDA and the commit of this repository."""
    facts = surroundings()
    return {name: facts[name] for name in ("python", *PACKAGES, "cuda", "git") if facts[name]}


def hardware() -> str:
    """The name of the GPU, or of the processor if there is none."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPUs, {processor_name()}"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{_rounded(value):g}" if abs(value) < 1e6 else f"{value:,.0f}"


def _rounded(value: float) -> float:
    return float(f"{value:.10g}") if abs(value) >= 1 else round(value, 6)


def main(argv: list[str] | None = None) -> int:
    """Make the cards that need no data. Returns: 1 if one fails."""
    parser = FlagParser("python -m irpe_train.card", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="rows of configs/model_zoo.yaml (default: all)")
    parser.add_argument("-o", "--output", type=Path, default=Path("logs/cards"), help="folder (default logs/cards)")
    with reported_by(parser.prog):
        args = parser.parse_args(argv)
        zoo, cards = read_zoo(), []
        writable_folder(args.output, "-o")
        for entry in [zoo.find(name) for name in args.names or zoo.models]:
            count = importlib.import_module(f"{entry.package}.model_stats").stats_of_flags
            counted = count(["--config", str(ROOT / entry.config)])
            cards.append(make_card(entry.name, {name: counted[name] for name in counted if name in entry.expect}))
        for card in cards:  # after all are made, as each says whether files differ from the commit
            write_card(card, args.output / card["name"])
            print(to_markdown(card))
    return int(any(card["verdict"] == "FAIL" for card in cards))


if __name__ == "__main__":
    sys.exit(main())
