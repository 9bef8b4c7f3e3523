# SPDX-License-Identifier: Apache-2.0
"""The parser of every command: short help first, one-line errors, ``-`` and ``_`` alike in a flag's name."""

import argparse
import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from irpe_train.config import same_name, with_home
from irpe_train.errors import reported_by


class FlagParser(argparse.ArgumentParser):
    """``ArgumentParser`` with a short and a long help, and one-line errors.

    Args: first: the most common flags, without dashes. ``--help`` shows these and ``--help-all`` all of them; without
        ``first`` there is only one help, with everything.
    Attributes: others: parsers of other commands by name, to say which of them has an unknown flag.
    """

    def __init__(self, prog: str | None = None, *, first: Sequence[str] = (), description: str = "", **kwargs) -> None:
        if sys.argv[0].startswith("irpe "):  # set by the front door
            prog = sys.argv[0]
        kwargs["formatter_class"] = _Defaults if first else argparse.RawDescriptionHelpFormatter
        usage = "%(prog)s [flags]" if first else None
        description = (description or "").replace("``", "")  # None: a docstring under python -OO
        super().__init__(prog, usage, description, add_help=False, **kwargs)
        self.first = first
        self.others: Mapping[str, argparse.ArgumentParser] = {}
        if first:
            self.add_argument("-h", "--help", action=_ShortHelp, help="show the most common flags")
        names = ["--help-all"] if first else ["-h", "--help"]
        self.add_argument(*names, action="help", help="show every flag")

    def parse_known_args(self, args=None, namespace=None):
        if hasattr(sys.stdout, "reconfigure"):  # escape what the console lacks, such as letters of a file's name
            sys.stdout.reconfigure(errors="backslashreplace")
        words = with_home(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)  # what follows is not a flag, whatever it looks like
        return super().parse_known_args([*map(self._known_spelling, words[:end]), *words[end:]], namespace)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        with reported_by(self.prog):
            super().exit(status, message)

    def error(self, message: str) -> NoReturn:
        message = message.replace("unrecognized arguments", "unexpected argument")
        # argparse says "invalid positive_int value: ", with the name of the type.
        message = re.sub(r"invalid \w*int value: ", "expected a whole number, got ", message)
        message = re.sub(r"invalid \w+ value: ", "expected a number, got ", message)
        self.exit(2, f"{self.prog}: error: {message}\n")

    def format_short_help(self) -> str:
        """The description and the flags of ``first``, in that order."""
        actions = [find_flag(self, f"--{name}") for name in self.first]
        count = sum(bool(action.option_strings) for action in self._actions)
        formatter = self._get_formatter()
        formatter.add_usage(f"%(prog)s [flags]   ({count} flags; all of them: --help-all)", (), ())
        formatter.add_text(self.description)
        formatter.start_section("most common flags")
        formatter.add_arguments(actions)
        formatter.end_section()
        return formatter.format_help()

    def _known_spelling(self, word: str) -> str:
        name, equals, value = word.partition("=")
        options = self._option_string_actions
        if not name.startswith("--") or name == "--" or name in options:
            return word
        if alike := [option for option in options if same_name(option) == same_name(name)]:
            return alike[0] + equals + value
        if self.allow_abbrev and any(option.startswith(name) for option in options):
            return word
        for command, other in self.others.items():
            if find_flag(other, name):
                self.error(f"{name} is a flag of `{command}`, not of this command")
        known = {same_name(option): option for option in options if option.startswith("--")}
        close = difflib.get_close_matches(same_name(name), known, n=1)
        everything = "--help-all" if self.first else "--help"
        hint = f"did you mean {known[close[0]]}?" if close else f"{everything} lists all"
        self.error(f"unknown flag {name}; {hint}")


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default if there is one; a ``--no-x`` has the default of its ``--x``, which would read as its own."""

    def _get_help_string(self, action):
        nothing = action.default is None or action.default is False or action.default in ("", [])
        return action.help if nothing or action.const is False else super()._get_help_string(action)


class _ShortHelp(argparse._HelpAction):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        print(parser.format_short_help(), end="")
        parser.exit()


def find_flag(parser: argparse.ArgumentParser, name: str) -> argparse.Action | None:
    """The action of the flag ``name``, ``-`` and ``_`` alike; None if there is none."""
    options = parser._option_string_actions.items()
    return next((action for option, action in options if same_name(option) == same_name(name)), None)
