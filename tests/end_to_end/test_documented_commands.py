"""Every command in README.md, docs/ and examples/ is accepted by its own parser, and names files that exist.

Nothing is trained: a program is started in this process and stopped after parsing its arguments, scripts are
started with DRY_RUN=1. Python snippets of the pages run unchanged.
"""

import argparse
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser as torchrun_parser

from tests.helpers.quick_python import quick_programs
from tests.helpers.snippets import REPOSITORY, python_blocks, run_python_blocks

try:
    import tomllib
except ImportError:  # Python 3.10; pytest brings this
    import tomli as tomllib

PAGES = sorted([REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md"), REPOSITORY / "examples" / "README.md"])
RUN_BY_THEIR_OWN_TEST = ("equip", "extend")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
# These make or need an environment of their own; scripts/test.sh and the quickstart are what CI runs anyway.
STARTED_BY_CI = {"scripts/quickstart.sh": ("classification", "detection", "all"), "scripts/test.sh": ("--all",)}
ROOMS = ("irpe_ops", "irpe_train", "irpe_lab", "deit_irpe", "detr_irpe", "pytest")
KEPT_FOLDERS = ("configs/", "scripts/", "examples/", "docs/", "irpe_", "deit_irpe/", "detr_irpe/", "rpe_ops_cuda")

# of runpy: a program that is a module which an earlier command imported
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


class Parsed(BaseException):
    """Carries the parsed arguments out of a program."""


def documented_commands(page: Path) -> list[tuple[int, str]]:
    """(line, command) of each command in the page's ``bash`` blocks; comments and line continuations resolved."""
    found = []
    text = page.read_text()
    for block in re.finditer(r"^```bash\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, block.start(1)) + 1
        for command in re.sub(r" *\\\n *", "\0", block[1]).split("\n"):  # \0: a continued line
            if command and not command.lstrip().startswith("#"):
                found.append((line, command.replace("\0", " ")))
            line += 1 + command.count("\0")
    return found


def parse_program(start, argv: list[str], monkeypatch) -> None:
    """Run ``start()`` until its arguments are parsed. An unknown flag is a failure."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        raise Parsed(original(self, args, namespace))

    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patched.setattr(sys, "argv", argv)
        try:
            start()
        except Parsed:
            return
        except SystemExit as end:
            if not end.code and {"-h", "--help"} & set(argv):
                return
            raise AssertionError(f"{shlex.join(argv)} ends with {end.code!r}") from end
    if {"-h", "--help"} & set(argv):
        return
    raise AssertionError(f"{shlex.join(argv)}: never parsed its arguments")


def check_python(words: list[str], monkeypatch) -> None:
    """Check the words after ``python``: ``-m MODULE``, ``-c CODE`` or a file."""
    if words[0] == "-m":
        module, argv = words[1], words[1:]
        assert module == "pytest" or (REPOSITORY / module.split(".")[0]).is_dir(), module
        if module != "pytest":
            parse_program(lambda: runpy.run_module(module, run_name="__main__", alter_sys=False), argv, monkeypatch)
    elif words[0] == "-c":
        compile(words[1], "documented", "exec")
    elif "argparse" in (REPOSITORY / words[0]).read_text():
        monkeypatch.syspath_prepend((REPOSITORY / words[0]).parent)  # as `python FILE` does
        parse_program(lambda: runpy.run_path(str(REPOSITORY / words[0]), run_name="__main__"), words, monkeypatch)
    else:
        assert len(words) == 1, f"{words[0]} takes no arguments"


def check_command(command: str, monkeypatch) -> None:
    words = shlex.split(command, comments=True)
    settings = {}
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        key, _, value = words.pop(0).partition("=")
        settings[key] = value
    for before, word in zip(words, words[1:], strict=False):
        if word.startswith(KEPT_FOLDERS) and "/" in word and before != "-o":
            assert (REPOSITORY / word).exists(), f"{word} is not there"
    program, rest = words[0], words[1:]
    if program == "python":
        check_python(rest, monkeypatch)
    elif program == "torchrun":
        launched = torchrun_parser().parse_args(rest)
        assert launched.module, "expected torchrun ... -m MODULE"
        check_python(["-m", launched.training_script, *launched.training_script_args], monkeypatch)
    elif program in PROJECT["scripts"]:
        check_python(["-m", PROJECT["scripts"][program].partition(":")[0], *rest], monkeypatch)
    elif program in STARTED_BY_CI:
        assert os.access(REPOSITORY / program, os.X_OK) and set(rest) <= set(STARTED_BY_CI[program]), rest
    elif program.endswith(".sh"):
        check_script(program, rest, settings, monkeypatch)
    elif program.startswith("scripts/"):
        assert os.access(REPOSITORY / program, os.X_OK), f"{program} is not executable"
        check_python(words, monkeypatch)
    elif words[:2] == ["pip", "install"]:
        check_pip(words[2:])
    else:
        assert program in ("tensorboard", "git", "cd"), f"nobody checks {program!r}: teach this test"


def check_script(program: str, rest: list[str], settings: dict[str, str], monkeypatch) -> None:
    """Run a script with DRY_RUN=1, then check what it would have started."""
    python = str(quick_programs() / "python")
    environment = {**os.environ, **settings, "DRY_RUN": "1", "PYTHON": python}
    environment.setdefault("GPUS", "1")
    ran = subprocess.run([REPOSITORY / program, *rest], env=environment, capture_output=True, text=True, cwd=REPOSITORY)
    assert ran.returncode == 0, ran.stderr
    for line in ran.stdout.splitlines():
        started = shlex.split(line)
        if started and started[0] == python:
            launcher = started[1:3] == ["-m", "torch.distributed.run"]
            check_command(shlex.join(["torchrun", *started[3:]] if launcher else ["python", *started[1:]]), monkeypatch)


def check_pip(words: list[str]) -> None:
    for word in words:
        if extras := re.fullmatch(r"\.\[(.*)\]", word):
            assert set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"]), word
        elif word.startswith("."):
            assert (REPOSITORY / word / "pyproject.toml").is_file(), word


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.stem not in RUN_BY_THEIR_OWN_TEST],
    ids=lambda page: str(page.relative_to(REPOSITORY)),
)
def test_every_documented_command_parses(page, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    generated = re.compile(r"--config (outputs|logs)/\S+")  # written by a run: its flags are tested where they are made
    wrong = []
    for line, command in documented_commands(page):
        try:
            check_command(generated.sub("", command), monkeypatch)
        except (AssertionError, ValueError, OSError) as error:
            wrong.append(f"{page.name}:{line}: {command}\n    {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if python_blocks(page) and page.stem not in RUN_BY_THEIR_OWN_TEST],
    ids=lambda page: str(page.relative_to(REPOSITORY)),
)
def test_every_snippet_runs(page):
    run_python_blocks(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_link_between_pages_leads_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
        file = (page.parent / target) if target else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, anchor


@pytest.mark.parametrize(
    "command, message",
    [
        ("python -m deit_irpe --modle x", "ends with 2"),
        ("torchrun --nproc_per_node=8 -m detr_irpe --backbone", "ends with 2"),
        ("python -m deit_irpe --config configs/deit/none.yaml", "configs/deit/none.yaml"),
        ("DATA=x scripts/train_deit.sh no_such_config", "no config no_such_config"),
        ("pip install .[no-such-extra]", "no-such-extra"),
        ("frobnicate --all", "nobody checks"),
    ],
)
def test_a_wrong_command_is_seen(command, message, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(AssertionError, match=re.escape(message)):
        check_command(command, monkeypatch)


def test_commands_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```bash\n# a comment\none --flag \\\n    value\ntwo  # comment\n```\n\n```\n3\n```\n")
    assert documented_commands(page) == [(5, "one --flag value"), (7, "two  # comment")]
