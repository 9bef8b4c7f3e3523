# SPDX-License-Identifier: Apache-2.0
"""``--config FILE.yaml``: a command line written down, and the only reader of users' YAML.

The file's entries become flags placed before the typed ones, so argparse checks both alike and typed flags win.
"""

import argparse
import contextlib
import difflib
import importlib
import os
import re
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from irpe_train.errors import RunError, in_one_line, reported_by
from irpe_train.text_files import read_text

LARGEST_FILE = 1 << 18  # bytes; a config has hundreds
DEEPEST = 20  # nested lists and mappings; a grid has four


class ConfigError(RunError, ValueError):
    """An unusable YAML file; the message names the file, the key and the remedy."""


def _folder_of_configs() -> Path:
    """The checkout, or where the wheel put its configs: ``share/irpe`` in the environment."""
    checkout, *above = Path(__file__).resolve().parents[1:]
    places = [checkout, *(folder / "share" / "irpe" for folder in (checkout, *above))]
    return next((place for place in places if (place / "configs" / "model_zoo.yaml").is_file()), checkout)


ROOT = _folder_of_configs()


def find_config(name: str | Path, *folders: Path, source: str) -> Path:
    """The file ``name`` (``~/`` is the home): in ``folders``, in the working folder, or shipped with the package.

    Raises: ConfigError: it is in none of them; lists the folders. The message begins with ``source``.
    """
    places, name = [*folders, Path(), ROOT], os.path.expanduser(name)
    for folder in places:
        if os.path.exists(folder / name):  # Path.exists raises for a name that is too long
            return folder / name
    looked = ", ".join(dict.fromkeys(str(folder.absolute()) for folder in places))
    raise ConfigError(f"{source}: no file {' '.join(str(name).split()):.200} in {looked}")


def parse_args(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """``parser.parse_args`` with the flags of the ``--config`` file, if one is given, placed first.

    The flags in the environment variable ``IRPE_EXTRA_FLAGS`` come last, for every command that takes ``--config``, so
    they win. ``--print-config`` exits here, with status 0.

    Raises: ConfigError: no such file, not a plain YAML mapping, an unknown name or a value that no flag can have; or
        the variable has an unclosed quote. FileNotFoundError: the working folder is gone.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if any(action.dest == "config" for action in parser._actions):
        extra = os.environ.get("IRPE_EXTRA_FLAGS", "")
        try:
            argv += shlex.split(extra)
        except ValueError as error:
            raise ConfigError(f"IRPE_EXTRA_FLAGS={extra}: {error}; write it as in a shell") from error
    argv = with_home(argv)
    find = argparse.ArgumentParser(add_help=False)  # like argparse, it takes --conf for --config
    find.add_argument("--config", action="append", default=[])
    given = find.parse_known_args(argv)[0].config
    if len(given) > 1:
        raise ConfigError(f"--config {' --config '.join(given)}: give one file; typed flags change it")
    path = given[0] if given else None
    written = []
    if path:
        source = f"--config {path}"
        file = find_config(path, source=source)
        values = read_yaml(file, source)
        if "output_dir" in values and file.name == "config.yaml" and (file.parent / "starts.jsonl").exists():
            # A run's own flags: a moved or copied run must not write to its old folder.
            values["output_dir"] = str(file.parent)
        written = with_home(flags_of(parser, values, source))
    args = parser.parse_args(written + argv)
    if getattr(args, "config", path) != path:  # some commands have no --config
        raise ConfigError(f"--config {args.config}: write --config in lower case, so that it is read first")
    if getattr(args, "print_config", False):
        print(as_yaml(parser, args), end="")
        parser.exit()
    os.getcwd()  # raises if the folder is gone, where MKL would end the process as PyTorch is imported
    return args


def answer_early(package: str) -> None:
    """Print help and flag errors of a package's programs before PyTorch is imported, which takes seconds. Until
    ``launch``, Ctrl-C ends the process at once.

    Called by ``PACKAGE/__init__.py``; does nothing unless Python imports it for ``python -m PACKAGE`` or
    ``python -m PACKAGE.PROGRAM``. The parsers are those of ``PACKAGE/args.py``.
    """
    programs = {"": "args", ".train": "args", ".predict": "predict", ".export": "export", ".check_data": "check"}
    parsers = {package + program: f"get_{verb}_parser" for program, verb in programs.items()}
    if sys.argv[:1] != ["-m"]:  # Python has found the module already, or was not asked for one
        return
    program = (" ".join(sys.orig_argv).partition(" -m")[2].split() or [""])[0]
    if program in parsers:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # some imports swallow its exception
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        parser = getattr(importlib.import_module(f"{package}.args"), parsers[program])()
        with reported_by(parser.prog), contextlib.suppress(ConfigError):  # launch reports it
            parse_args(parser)


def with_home(argv: Sequence[str]) -> list[str]:
    """Expand ``~`` as shells do, and also after ``--flag=`` and in a file, where no shell does."""

    def expand(found: re.Match) -> str:
        return (found[1] or "") + os.path.expanduser(found[2])

    return [re.sub("(?s)^(--[^=]+=)?(~.*)", expand, word) for word in argv]


def read_yaml(path: Path, source: str) -> dict:
    """The mapping in a YAML file. Raises: ConfigError: begins with ``source``; see `parse_yaml`."""
    if not path.is_file():
        raise ConfigError(f"{source}: cannot be read: not a file")
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise ConfigError(f"{source}: {size} bytes; expected 'name: value' lines, {LARGEST_FILE} bytes at most")
    try:
        text = read_text(path, errors="strict")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: cannot be read ({error})") from error
    values = parse_yaml(text, source)
    if not isinstance(values, dict | None):
        raise ConfigError(f"{source}: expected 'name: value' lines, got a {type(values).__name__}")
    return values or {}


class _Written(float):
    """A number whose ``str`` is the text as written, for flags that take text; it is dumped that way too."""

    def __str__(self):
        return self.text


yaml.SafeDumper.add_representer(_Written, lambda dumper, x: dumper.represent_scalar("tag:yaml.org,2002:float", x.text))


class _Loader(yaml.SafeLoader):
    """Refuses what `parse_yaml` lists. Dates, and numbers that YAML 1.1 reads in its own way (``010`` as 8, ``1:30`` as
    90, ``2024_01`` without the underscore), stay text, as if typed.
    """

    source, depth = "", 0

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        event = self.peek_event()
        where = f"{self.source}: line {event.start_mark.line + 1}"
        if self.depth == DEEPEST and isinstance(event, yaml.CollectionStartEvent):  # thousands would take minutes
            raise ConfigError(f"{where}: more than {DEEPEST} nested lists")
        if getattr(event, "tag", None):
            raise ConfigError(f"{where}: the tag {event.tag!r} is refused: a config is plain names and values")
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{where}: aliases (*name) are refused")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        values = super().construct_mapping(node, deep)
        if len(values) < len(node.value):
            refuse_repeated([str(key.value) for key, _ in node.value], self.source)
            raise ConfigError(f"{self.source}: two names are equal in YAML, as 1 and 1.0, or yes and on: quote them")
        return values

    def as_typed(self, node: yaml.ScalarNode) -> int | float | str:
        if re.search(r"[:_xb]|^\+|^-?0\d", node.value):
            return node.value
        value = yaml.SafeLoader.yaml_constructors[node.tag](self, node)
        if str(value) != node.value:  # 1.10 would be 1.1
            value = _Written(value)
            value.text = node.value
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.as_typed)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.as_typed)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)


def parse_yaml(text: str, source: str) -> object:
    """Plain values from YAML without tags, aliases (which can expand a line to terabytes) or repeated names.

    Raises: ConfigError: anything else; names the line.
    """
    try:
        loader = _Loader(text)
        loader.source = source
        return loader.get_single_data()
    except ConfigError:
        raise
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{source}: not valid YAML: {in_one_line(error)}") from error


def refuse_repeated(names: Iterable[str], source: str) -> None:
    """Raises: ConfigError: a name appears twice; begins with ``source``."""
    for name, count in Counter(names).items():
        if count > 1:
            raise ConfigError(f"{source}: {name:.80} appears {count} times; keep one")


def flags_of(parser: argparse.ArgumentParser, values: dict, source: str) -> list[str]:
    """``{"batch-size": 64, "pin_mem": False}`` -> ``["--batch-size=64", "--no-pin-mem"]``.

    Raises: ConfigError: begins with ``source``; a name or value that no flag can have.
    """
    argv = []
    refuse_repeated(map(same_name, map(str, values)), source)
    for key, value in values.items():
        action, spelling = _find(parser, str(key), source)
        argv += _flags(action, spelling, str(key), value, source)
    return argv


def _find(parser: argparse.ArgumentParser, key: str, source: str) -> tuple[argparse.Action, str]:
    """The action for ``key``, by a flag's spelling (``-`` and ``_`` alike) or else by its dest."""
    actions = [a for a in parser._actions if not isinstance(a, argparse._HelpAction) and a.dest != "config"]
    known = {same_name(a.dest): (a, (a.option_strings or [""])[-1]) for a in reversed(actions)}
    known |= {same_name(o[2:]): (a, o) for a in actions for o in a.option_strings if o.startswith("--")}
    if same_name(key) in known:
        return known[same_name(key)]
    close = difflib.get_close_matches(same_name(key), known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(known[name][1].lstrip('-') or name for name in close)}?" if close else "see --help"
    raise ConfigError(f"{source}: unknown name {key!r}; {hint}")


def _flags(action, spelling: str, key: str, value, source: str) -> list[str]:
    def refuse(wanted: str):
        raise ConfigError(f"{source}: {key}: {value!r:.200}: {wanted}")

    if isinstance(value, dict):
        refuse("expected one value or a list, got nested names")
    if value is None:
        return [] if action.default is None else refuse(f"leave the line out for the default, {action.default!r}")
    if action.nargs == 0 and not isinstance(value, bool):
        refuse("this is a switch: expected true or false")
    if isinstance(action, argparse.BooleanOptionalAction):
        off = spelling.startswith("--no-") == value  # `no-x: true` means `--no-x`
        return [next(option for option in action.option_strings if option.startswith("--no-") == off)]
    if action.nargs == 0:
        is_dest = same_name(key) == same_name(action.dest) and same_name(spelling.lstrip("-")) != same_name(key)
        wanted = value if is_dest else (action.const if value else not action.const)
        if wanted == action.const:
            return [action.option_strings[-1]]
        return [] if wanted == action.default else refuse("no flag switches this off; leave it out")
    if isinstance(value, bool):
        refuse("expected a value, got true or false; quote it if you mean the word")
    if action.nargs not in ("+", "*") and not isinstance(action.nargs, int):
        return refuse("expected one value, got a list") if isinstance(value, list) else [f"{spelling}={value}"]
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, bool) or not isinstance(item, str | int | float) for item in items):
        refuse("expected plain values in the list")
    if any(str(item).startswith("--") for item in items):
        refuse("a value that starts with -- would be read as a flag")
    return [spelling, *map(str, items)]


def same_name(name: str) -> str:
    """The spelling for comparing flags: ``-`` and ``_`` alike, in lower case."""
    return name.replace("-", "_").lower()


def as_yaml(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """Every flag's value as the text of a file from which ``--config FILE`` restores ``args``."""
    values = {}
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if action.dest in ("help", "config", "print_config") or value is None:
            continue
        if action.nargs == 0 or isinstance(value, (bool, int, float)):
            values[action.dest] = value
        elif isinstance(value, (list, tuple)):
            values[action.dest] = [item if isinstance(item, (int, float)) else str(item) for item in value]
        else:
            values[action.dest] = str(value)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
