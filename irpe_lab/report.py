"""Tables from logs: what is published and what was measured here, side by side.

    python -m irpe_lab.report logs/ -o docs/results.md       the page, beside it results.png (curves) and results.html
    python -m irpe_lab.report logs/ --readme README.md       the same tables between the markers of another file

A marker pair is ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``, NAME one of ``results`` (both published tables),
``imagenet``, ``coco``, ``demo`` (what was measured here on small data: the ablations and other runs of the folder).
Logs are called as in the published zoo: ``log_<name>.txt``, ``detail_<name>.log``.
"""

import argparse
import base64
import html
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from irpe_lab.console_log import read_detail
from irpe_lab.plots import curve, plot_runs, read_log
from irpe_lab.tables import markdown
from irpe_train.errors import RunError
from irpe_train.zoo import ROOT, Zoo, read_zoo

NOT_RUN = "not run"
MARKER = re.compile(r"(<!-- (?P<name>[\w-]+):begin -->\n).*?(<!-- (?P=name):end -->)", re.DOTALL)
# The figures of each table: name in the zoo and on cards, title, key of log.txt, place in its list.
COLUMNS = {
    "deit_irpe": (
        ("params_M", "parameters (M)", None, 0),
        ("macs_M", "MACs (M)", None, 0),
        ("buckets", "buckets", None, 0),
        ("acc1", "top-1", "test_acc1", 0),
        ("acc5", "top-5", "test_acc5", 0),
    ),
    "detr_irpe": (
        ("buckets", "buckets", None, 0),
        ("n_parameters", "parameters", None, 0),
        *(
            (name, name.replace("_", " "), "test_coco_eval_bbox", i)
            for i, name in enumerate(("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"))
        ),
    ),
}
TITLES = {"deit_irpe": "ImageNet-1K, 224 x 224, 300 epochs", "detr_irpe": "COCO 2017 val, boxes"}
NAMES = {"imagenet": "deit_irpe", "coco": "detr_irpe"}


@dataclass(frozen=True)
class Run:
    """A log under the folder: ``epochs`` in the keys of log.txt, whichever of the two files it was read from."""

    name: str
    log: Path
    epochs: list[dict]

    def figure(self) -> str:
        """Its last figure, in words."""
        for key, title in (("test_acc1", "top-1"), ("test_coco_eval_bbox", "AP")):
            if values := curve(self.epochs, key)[1]:
                return f"{values[-1]:.2f} {title}" if key == "test_acc1" else f"{values[-1]:.3f} {title}"
        return "-"


def find_runs(folder: Path) -> dict[str, Run]:
    """The runs in ``folder`` by name: ``log_<name>.txt``, and where there is none ``detail_<name>.log``.

    Raises: BadData: a log that is none (names file and line).
    """
    runs = {}
    for path in sorted(folder.glob("log_*.txt")):
        name = path.stem.removeprefix("log_")
        runs[name] = Run(name, path, read_log(path))
    for path in sorted(folder.glob("detail_*.log")):
        name = path.stem.removeprefix("detail_")
        if name not in runs:
            runs[name] = Run(name, path, read_detail(path))
    return runs


class Report:
    """Everything below one logs folder, as Markdown with links relative to where the page will be."""

    def __init__(self, logs: Path, page: Path, zoo: Zoo | None = None):
        if not logs.is_dir():
            raise RunError(f"report: no folder {logs}; give the one with log_<name>.txt in it")
        self.logs, self.page, self.zoo = logs, page, zoo or read_zoo()
        self.runs = find_runs(logs)

    def block(self, name: str) -> str:
        """The Markdown between one pair of markers. Raises: RunError: an unknown name."""
        if name in NAMES:
            return self.published_and_here(NAMES[name])
        if name == "results":
            return "\n".join(f"**{TITLES[package]}**\n\n{self.published_and_here(package)}" for package in TITLES)
        if name == "demo":
            return "\n".join(part for folder in self.ablations() for part in self._ablation(folder)) + self.other_runs()
        raise RunError(f"report: nothing to put at {name}:begin; expected results, {', '.join(NAMES)} or demo")

    def _ablation(self, folder: Path) -> list[str]:
        about = folder / "README.md"
        return [*([about.read_text()] if about.is_file() else []), (folder / "table.md").read_text()]

    def ablations(self) -> list[Path]:
        """Folders of logs that an ablation left its table in."""
        return sorted(path.parent for path in self.logs.glob("*/table.md"))

    def curves_of(self, folder: Path) -> Path:
        """Where the curves of an ablation's runs are drawn."""
        return self.page.with_name(f"{self.page.stem}_{folder.name}.png")

    def published_and_here(self, package: str) -> str:
        """One row a published model; each figure "published / here", a measured one linked to where it comes from."""
        columns = COLUMNS[package]
        body = []
        for entry in self.zoo.models.values():
            if entry.package != package:
                continue
            figures = [
                f"{entry.expect[name]:,} / {self._here(entry.name, name, key, place)}"
                for name, _, key, place in columns
            ]
            body.append([self._link(entry.name, ROOT / entry.config), *figures])
        titles = ["model (links to its config)", *(f"{title}: published / here" for _, title, *_ in columns)]
        return markdown(titles, body)

    def _here(self, model: str, figure: str, key: str | None, place: int) -> str:
        run = self.runs.get(model) or self.runs.get(Path(self.zoo.models[model].config).stem)
        if run is not None and key is not None and run.epochs and run.epochs[-1].get(key) is not None:
            value = run.epochs[-1][key]
            return self._link(f"{value[place] if isinstance(value, list) else value:.4g}", run.log)
        card = self.logs / "cards" / f"{model}.json"
        if card.is_file():
            for line in json.loads(card.read_text())["figures"]:
                if line["figure"] == figure and line["here"] is not None:
                    shown = f"{line['here']:,}" if isinstance(line["here"], int) else f"{line['here']:.2f}"
                    return self._link(f"{shown} {line['verdict']}", card.with_suffix(".md"))
        return NOT_RUN

    def other_runs(self) -> str:
        """The runs that are not rows of the published tables, with their last figure."""
        known = set(self.zoo.models) | {Path(entry.config).stem for entry in self.zoo.models.values()}
        body = []
        for run in self.runs.values():
            if run.name in known:
                continue
            config = self.logs / f"{run.name}.yaml"
            parameters = next((epoch["n_parameters"] for epoch in run.epochs if "n_parameters" in epoch), None)
            body.append(
                [
                    run.name,
                    self._link("flags", config) if config.is_file() else "-",
                    len(run.epochs),
                    f"{parameters:,}" if parameters else "-",
                    self._link(run.figure(), run.log),
                ]
            )
        return markdown(["run", "flags", "epochs", "parameters", "last figure"], body) if body else ""

    def markdown(self, curves: Path | None) -> str:
        """The whole page."""
        parts = [
            "# Results\n",
            'Made by `python -m irpe_lab.report`; edit nothing here. "Published" is what the '
            f'authors printed ({self.zoo.source}); "here" was measured by this repository, and links to its '
            "log or reproduction card. The two are never mixed.\n",
        ]
        for package in TITLES:
            parts += [f"## {TITLES[package]}\n", self.published_and_here(package)]
        for folder in self.ablations():
            parts += [f"## {folder.name.replace('_', ' ')}, measured here\n", *self._ablation(folder)]
            pictures = (folder / "table.png", self.curves_of(folder))
            parts += [f"![{folder.name}]({self._path(picture)})\n" for picture in pictures if picture.is_file()]
        if others := self.other_runs():
            parts += ["## Other runs, measured here\n", others]
        if curves is not None:
            parts += [f"![curves]({self._path(curves)})\n"]
        return "\n".join(parts)

    def fill(self, text: str) -> str:
        """``text`` with what is between its markers made anew."""
        return MARKER.sub(lambda found: found[1] + self.block(found["name"]) + found[3], text)

    def _path(self, target: Path) -> str:
        return Path(os.path.relpath(target.resolve(), self.page.resolve().parent)).as_posix()

    def _link(self, text: str, target: Path) -> str:
        return f"[{text}]({self._path(target)})"


def to_html(text: str, read: Callable[[str], bytes]) -> str:
    """Our own Markdown (headings, tables, links, images, code) as one HTML page that needs nothing else.

    Args:
        read: the bytes of an image that the page names.
    """
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.split("\n")
        if lines[0].startswith("#"):
            level = len(lines[0]) - len(lines[0].lstrip("#"))
            blocks.append(f"<h{level}>{_inline(lines[0].lstrip('# '), read)}</h{level}>")
        elif lines[0].startswith("|"):
            rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
            cells = [
                ["".join(f"<{tag}>{_inline(cell, read)}</{tag}>" for cell in row)]
                for tag, row in [("th", rows[0]), *(("td", row) for row in rows[2:])]
            ]
            blocks.append("<table>" + "".join(f"<tr>{''.join(row)}</tr>" for row in cells) + "</table>")
        else:
            blocks.append(f"<p>{_inline(' '.join(lines), read)}</p>")
    style = (
        "body{font:15px sans-serif;max-width:75em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse;display:block;overflow-x:auto}"
        "td,th{border:1px solid #bbb;padding:.2em .5em;text-align:left}img{max-width:100%}"
    )
    return (
        "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>Results</title><style>{style}</style>\n" + "\n".join(blocks) + "\n"
    )


def _inline(text: str, read: Callable[[str], bytes]) -> str:
    def image(found: re.Match) -> str:
        data = base64.b64encode(read(html.unescape(found[2]))).decode()
        return f'<img alt="{found[1]}" src="data:image/png;base64,{data}">'

    text = html.escape(text.replace("\\|", "|"), quote=False)
    text = re.sub(r"!\[([^]]*)\]\(([^)]*)\)", image, text)
    text = re.sub(r"\[([^]]*)\]\(([^)]*)\)", r'<a href="\2">\1</a>', text)
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", text)


def write_page(report: Report, curves: list[str]) -> list[Path]:
    """The page, its curves (if there is a run to draw) and its HTML twin; returns their paths."""
    page = report.page
    page.parent.mkdir(parents=True, exist_ok=True)
    picture = page.with_suffix(".png")
    drawn = [report.runs[name].log for name in curves or report.runs if report.runs[name].log.suffix == ".txt"]
    if drawn:
        plot_runs(drawn, picture)
    pictures = [picture] if drawn else []
    for folder in report.ablations():  # the first seed alone: a dozen lines can be told apart, three dozen cannot
        if runs := sorted(folder.glob("log_*_seed0.txt")):
            plot_runs(runs, report.curves_of(folder))
            pictures.append(report.curves_of(folder))
    text = report.markdown(picture if drawn else None)
    page.write_text(text)
    page.with_suffix(".html").write_text(to_html(text, lambda name: (page.parent / name).read_bytes()))
    return [page, page.with_suffix(".html"), *pictures]


def main(argv: list[str] | None = None) -> int:
    """Returns: 1 when ``--check`` finds a file that is stale."""
    parser = argparse.ArgumentParser(
        "python -m irpe_lab.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("logs", nargs="?", type=Path, default=Path("logs"), help="folder (default logs)")
    add("-o", "--output", type=Path, help="write the page, its picture and HTML here, e.g. docs/results.md")
    add("--curves", nargs="+", default=[], metavar="NAME", help="the runs to draw (default: all in the folder itself)")
    add("--readme", type=Path, metavar="FILE.md", help="make the tables between the markers of this file anew")
    add("--check", action="store_true", help="write nothing; fail if --output or --readme is stale")
    args = parser.parse_args(argv)
    if not (args.output or args.readme):
        parser.error("say what to write: -o FILE.md, --readme FILE.md or both")
    try:
        stale = []
        if args.output:
            report = Report(args.logs, args.output)
            if unknown := [name for name in args.curves if name not in report.runs]:
                raise RunError(f"report: no run {unknown[0]!r} in {args.logs}; there are {', '.join(report.runs)}")
            if args.check:
                drawn = args.output.with_suffix(".png")
                fresh = report.markdown(drawn if drawn.is_file() else None)
                stale += [args.output] * (not args.output.is_file() or args.output.read_text() != fresh)
            else:
                print("\n".join(map(str, write_page(report, args.curves))))
        if args.readme:
            text = args.readme.read_text()
            fresh = Report(args.logs, args.readme).fill(text)
            if args.check:
                stale += [args.readme] * (fresh != text)
            else:
                args.readme.write_text(fresh)
                print(args.readme)
    except (RunError, OSError, ValueError) as error:
        sys.exit(f"irpe_lab.report: {error}")
    for path in stale:
        print(f"{path} is stale: make it anew with python -m irpe_lab.report", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
