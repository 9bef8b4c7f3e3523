# SPDX-License-Identifier: Apache-2.0
"""Tables from logs: published and measured figures side by side.

    python -m irpe_lab.report logs/ -o docs/results.md       the page, and results.html beside it
    python -m irpe_lab.report logs/ --readme README.md       shorter tables, between the markers of another file

The markers are ``<!-- results:begin -->`` and ``<!-- results:end -->``.
Logs are named as in the published zoo: ``log_<name>.txt``, ``detail_<name>.log``.
"""

import argparse
import base64
import html
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from irpe_lab.console_log import read_detail, read_log
from irpe_lab.figures import DETAILS, TASKS, Figure, Task
from irpe_lab.tables import markdown
from irpe_train.config import ROOT, read_yaml
from irpe_train.errors import BadData, RunError, reported_by
from irpe_train.flags import FlagParser
from irpe_train.outputs import writable_folder
from irpe_train.text_files import plain_file, read_text, write_text
from irpe_train.zoo import Entry, read_zoo

NOT_RUN = "not run"
TITLE = "# Results\n\nMade by `python -m irpe_lab.report`"  # opens every page, and marks it as ours
MARKED = re.compile(r"(<!-- results:begin -->\n).*?(<!-- results:end -->)", re.DOTALL)
PAGE = """<!doctype html><meta charset=utf-8><meta name=viewport content="width=device-width"><title>Results</title>
<style>body{{font:15px sans-serif;max-width:75em;margin:2em auto;padding:0 1em}}img{{max-width:100%}}
table{{border-collapse:collapse;display:block;overflow-x:auto}}td,th{{border:1px solid #bbb;padding:.2em .5em}}</style>
{body}"""


@dataclass(frozen=True)
class LoggedRun:
    """A log in the folder: ``epochs`` has the keys of log.txt, whichever of the two files it was read from."""

    name: str
    log: Path
    epochs: list[dict]

    def figure(self) -> str:
        """Its last figure, as text."""
        for task in TASKS.values():
            values = [value for epoch in self.epochs if (value := task.figure.of(epoch)) is not None]
            if values:
                return f"{task.figure.text(values[-1])} {task.figure.title}"
        return "-"


def find_runs(folder: Path) -> dict[str, LoggedRun]:
    """The runs in ``folder`` by name: ``log_<name>.txt``, or if missing ``detail_<name>.log``.

    Raises: BadData: a malformed log (names file and line).
    """
    runs = {path.stem.removeprefix("log_"): (path, read_log(path)) for path in sorted(folder.glob("log_*.txt"))}
    for path in sorted(folder.glob("detail_*.log")):
        if (name := path.stem.removeprefix("detail_")) not in runs and path.is_file():
            runs[name] = path, read_detail(path)
    return {name: LoggedRun(name, *read) for name, read in runs.items()}


class Report:
    """One logs folder as Markdown, with links relative to the page."""

    def __init__(self, logs: Path, page: Path):
        if not logs.is_dir():
            raise RunError(f"report: no folder {logs}; give the one with log_<name>.txt in it")
        self.logs, self.page, self.zoo = logs, page, read_zoo()
        self.runs = find_runs(logs)
        if not (self.runs or self.ablations() or (logs / "cards").is_dir()):
            hint = f"for an ablation, irpe ablate GRID --table --logs {logs / 'NAME'} puts its runs there"
            print(f"report: no log_<name>.txt in {logs}: only published figures are shown; {hint}", file=sys.stderr)

    def short_tables(self) -> str:
        """The tables of both tasks, for the README."""
        tables = {task.title: self.published_and_here(task, short=True) for task in TASKS.values()}
        return "\n".join(f"**{title}**\n\n{table}" for title, table in tables.items())

    def ablations(self) -> list[Path]:
        """Log folders with the table of an ablation."""
        return sorted(path.parent for path in self.logs.glob("*/table.md") if self.inside(path))

    def inside(self, path: Path) -> bool:
        """Whether it is a file inside the logs folder, and not a link out of it: logs may come from others."""
        return path.is_file() and path.resolve().is_relative_to(self.logs.resolve())

    def published_and_here(self, task: Task, short: bool = False) -> str:
        """One row per published model with its weights; each figure in two columns, "published" and "here".

        ``short``: models are named by their configs, and details are left out.
        """
        figures = [figure for figure in task.figures if not (short and figure.name in DETAILS)]
        titles = ["config" if short else "model (links to its config)", "weights"]
        titles += [f"{figure.title}, {whose}" for figure in figures for whose in ("published", "here")]
        body = []
        for entry in self.zoo.models.values():
            if entry.package == task.package:
                name = Path(entry.config).stem if short else entry.name
                row = [self._link(name, ROOT / entry.config), f"[{entry.file.rpartition('.')[2]}]({entry.url})"]
                for figure in figures:
                    published = entry.expect[figure.name]
                    row += [f"{published:,}" if figure.place is None else f"{published:.3f}", self._here(entry, figure)]
                body.append(row)
        return markdown(titles, body)

    def _here(self, entry: Entry, figure: Figure) -> str:
        """The figure measured here, linked to its log or card."""
        run = self.runs.get(entry.name) or self.runs.get(Path(entry.config).stem)
        if run is not None and run.epochs and (value := figure.of(run.epochs[-1])) is not None:
            epochs, ran = read_yaml(ROOT / entry.config, entry.name).get("epochs"), run.epochs[-1]["epoch"] + 1
            trained = run.log.suffix == ".txt" or ran > 1  # a console log of one epoch may be an evaluation's
            early = f" after {ran} of {epochs} epochs" if trained and ran < (epochs or 0) else ""
            return self._link(f"{value:.4g}{early}", run.log)
        card = self.logs / "cards" / f"{entry.name}.json"
        for line in _card(card)["figures"] if self.inside(card) else ():
            if line["figure"] == figure.name and line["here"] is not None:
                shown = f"{line['here']:,}" if isinstance(line["here"], int) else f"{line['here']:,.2f}"
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
            parameters = next((n for epoch in run.epochs if isinstance(n := epoch.get("n_parameters"), int)), None)
            flags = self._link("flags", config) if config.is_file() else "-"
            size = f"{parameters:,}" if parameters else "-"
            body.append([as_text(run.name), flags, len(run.epochs), size, self._link(run.figure(), run.log)])
        return markdown(["run", "flags", "epochs", "parameters", "last figure"], body) if body else ""

    def markdown(self) -> str:
        """The whole page."""
        parts = [
            f'{TITLE}; do not edit. "Published" is what the '
            f'authors printed ({self.zoo.source}); "here" was measured by this repository, and links to its '
            "log or reproduction card. The two are never mixed.\n"
        ]
        for task in TASKS.values():
            parts += [f"## {task.title}\n", self.published_and_here(task)]
        for folder in self.ablations():
            parts += [f"## {as_text(folder.name.replace('_', ' '))}, measured here\n"]
            parts += [read_text(path) for path in (folder / "README.md", folder / "table.md") if self.inside(path)]
            if self.inside(picture := folder / "table.png"):
                parts += [f"!{self._link(folder.name, picture)}\n"]
        if others := self.other_runs():
            parts += ["## Other runs, measured here\n", others]
        return "\n".join(parts)

    def fill(self, text: str) -> str:
        """``text`` with the short tables between its markers."""
        return MARKED.sub(lambda found: found[1] + self.short_tables() + found[2], text)

    def _link(self, text: str, target: Path) -> str:
        return f"[{as_text(text)}]({self.address(target)})"

    def address(self, target: Path) -> str:
        """The relative address of a file, for a link on the page."""
        return quote(os.fsencode(Path(os.path.relpath(target.resolve(), self.page.resolve().parent)).as_posix()))


def as_text(text: str) -> str:
    """``text`` escaped for Markdown: names of files and runs may contain anything."""
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    return re.sub(r"([\\`*{}\[\]<>&])", r"\\\1", text)


def _card(path: Path) -> dict:
    """A reproduction card."""
    try:
        card = json.loads(read_text(path))
        for line in card["figures"]:
            number = isinstance(line["here"], int | float | None)
            if not (number and line["verdict"] in ("PASS", "FAIL", NOT_RUN) and isinstance(line["figure"], str)):
                raise ValueError(f"figure {line!r:.80}")
        return card
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadData(f"{path}: not a reproduction card ({error!r:.120})") from error


def to_html(text: str, pictures: dict[str, Path]) -> str:
    """Markdown as one self-contained HTML page. HTML in it, and unsafe links, are shown as text.

    Args: pictures: the files that may be shown, by their address in the text; any other is left out.
    """
    from markdown_it import MarkdownIt

    def image(tokens, index, options, env):
        alt, address = html.escape(tokens[index].content), tokens[index].attrs["src"]
        if address not in pictures:
            return f"[{alt}]"
        data = base64.b64encode(pictures[address].read_bytes()).decode()
        return f'<img alt="{alt}" src="data:image/png;base64,{data}">'

    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    reader.renderer.rules["image"] = image
    return PAGE.format(body=reader.render(text))


def write_page(report: Report) -> list[Path]:
    """Write the page and its HTML twin; returns their paths.

    Raises: RunError: one of them would replace a file that is not ours.
    """
    page, twin = report.page, report.page.parent / f"{report.page.stem}.html"
    if page == twin:
        raise RunError(f"report: -o {page}: HTML is written beside the page; name the page, {page.with_suffix('.md')}")
    ours = page.is_file() and read_text(page).startswith(TITLE)
    if found := [] if ours else [path for path in (page, twin) if os.path.lexists(path)]:
        raise RunError(f"{found[0]}: already there, and not made by report; give another -o, or move it away")
    writable_folder(page.parent, "-o")
    text = report.markdown()
    write_text(page, text)  # first: it marks the HTML as ours, even if a kill comes between
    pictures = [path for folder in report.ablations() if report.inside(path := folder / "table.png")]
    write_text(twin, to_html(text, {report.address(path): path for path in pictures}))
    return [page, twin]


def get_parser() -> argparse.ArgumentParser:
    parser = FlagParser("python -m irpe_lab.report", description=__doc__)
    add = parser.add_argument
    add("logs", nargs="?", type=Path, default=Path("logs"), help="folder (default logs)")
    add("-o", "--output", type=Path, help="write the page and its HTML here, e.g. docs/results.md")
    add("--readme", type=Path, metavar="FILE.md", help="update the tables between the markers of this file")
    add("--check", action="store_true", help="write nothing; fail if --output or --readme is stale")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns: 1 if ``--check`` finds a stale file."""
    parser = get_parser()
    stale = []
    with reported_by(parser.prog):
        args = parser.parse_args(argv)
        if not (args.output or args.readme):
            parser.error("nothing to write: give -o FILE.md, --readme FILE.md or both")
        if args.output:
            report = Report(args.logs, args.output)
            if not args.check:
                print("\n".join(map(str, write_page(report))))
            elif not args.output.is_file() or read_text(args.output) != report.markdown():
                stale.append(args.output)
        if args.readme:
            try:
                text = plain_file(args.readme).read_bytes().decode()
            except UnicodeDecodeError as error:
                raise BadData(f"--readme {args.readme}: not UTF-8 text ({error})") from error
            if not MARKED.search(unix := text.replace("\r\n", "\n")):
                raise RunError(f"--readme {args.readme}: no <!-- results:begin --> with its <!-- results:end --> in it")
            end = "\r\n" if "\r\n" in text else "\n"
            filled = Report(args.logs, args.readme).fill(unix).replace("\n", end)
            if not args.check:
                write_text(args.readme.resolve(), filled)  # atomic; a symlink stays one
                print(args.readme)
            elif filled != text:
                stale.append(args.readme)
    for path in stale:
        print(f"{path} is stale: update it with irpe report", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
