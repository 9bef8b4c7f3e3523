"""A command line that is friendly: short help first, one line for a mistake, ``-`` and ``_`` alike in a flag's name."""

import argparse
import difflib
from collections.abc import Mapping, Sequence
from typing import NoReturn

from irpe_train.config import same_name


class FlagParser(argparse.ArgumentParser):
    """``ArgumentParser`` with two kinds of help, ending in one line where it does not understand.

    Args:
        first: the flags that people use first, without dashes. ``--help`` shows these and ``--help-all`` all of them;
            without ``first`` there is one help, with everything.
    Attributes:
        others: parsers of other commands by name; a flag that one of them knows is named as such.
    """

    def __init__(self, *args, first: Sequence[str] = (), **kwargs) -> None:
        super().__init__(*args, add_help=False, **kwargs)
        self.first = first
        self.others: Mapping[str, argparse.ArgumentParser] = {}
        if first:
            self.add_argument("-h", "--help", action=_ShortHelp, help="show the flags that people use first")
        self.add_argument(
            "--help-all" if first else "-h", *([] if first else ["--help"]), action="help", help="show every flag"
        )

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args(args and [self._spelt_as_known(word) for word in args], namespace)

    def error(self, message: str) -> NoReturn:
        kind, _, rest = message.partition("unrecognized arguments: ")
        if not kind and rest:
            message = self._unknown(rest.split()[0].partition("=")[0])
        self.exit(2, f"{self.prog}: error: {message}\n")

    def format_short_help(self) -> str:
        """The description and the flags of ``first``, in that order."""
        actions = [action for name in self.first for action in [find_flag(self, name)] if action]
        count = sum(bool(action.option_strings) for action in self._actions)
        formatter = self._get_formatter()
        formatter.add_usage(f"%(prog)s [flags]   ({count} flags; all of them: --help-all)", (), ())
        formatter.add_text(self.description)
        formatter.start_section("used first")
        formatter.add_arguments(actions)
        formatter.end_section()
        return formatter.format_help()

    def _spelt_as_known(self, word: str) -> str:
        name, equals, value = word.partition("=")
        if not name.startswith("--") or name in self._option_string_actions:
            return word
        alike = [option for option in self._option_string_actions if same_name(option[2:]) == same_name(name[2:])]
        return alike[0] + equals + value if alike else word

    def _unknown(self, word: str) -> str:
        if not word.startswith("-"):
            return f"{word!r} is no flag, and this command takes flags only"
        for command, other in self.others.items():
            if find_flag(other, word.lstrip("-")):
                return f"{word} is a flag of `{command}`, not of this command"
        known = {same_name(option[2:]): option for option in self._option_string_actions if option.startswith("--")}
        close = difflib.get_close_matches(same_name(word.lstrip("-")), known, n=1)
        everything = "--help-all" if self.first else "--help"
        return f"unknown flag {word}; " + (f"did you mean {known[close[0]]}?" if close else f"{everything} lists all")


class _ShortHelp(argparse._HelpAction):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        print(parser.format_short_help(), end="")
        parser.exit()


def find_flag(parser: argparse.ArgumentParser, name: str) -> argparse.Action | None:
    """The action of the flag called ``name``, without dashes, ``-`` and ``_`` alike; None if there is none."""
    for option, action in parser._option_string_actions.items():
        if option.startswith("--") and same_name(option[2:]) == same_name(name):
            return action
    return None
