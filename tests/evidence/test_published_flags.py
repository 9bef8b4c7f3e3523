"""Every flag of the two published commands: name, default, type, choices and abbreviations, against ours.

What differs on purpose is a table of docs/reproduce.md, and nothing else may.
"""

import argparse
import json
from pathlib import Path

import pytest

import deit_irpe.args
import detr_irpe.args
from irpe_train.config import parse_args

PUBLISHED = json.loads((Path(__file__).parent / "published_flags.json").read_text())
TREES = {"deit": deit_irpe.args.get_args_parser(), "detr": detr_irpe.args.get_args_parser()}
PAGE = (Path(__file__).parents[2] / "docs" / "reproduce.md").read_text()
FLAGS = [(tree, flag) for tree in TREES for flag in PUBLISHED[tree]]
NARROWER = {  # the numbers accepted by our types, of those accepted by the published int and float
    "positive_int": ("int", "1 or more"),
    "nonnegative_int": ("int", "0 or more"),
    "number_of_workers": ("int", "0 to 1000"),
    "positive_float": ("float", "above 0"),
    "nonnegative_float": ("float", "0 or more"),
    "clipping_norm": ("float", "above 0"),
    "fraction": ("float", "0 to 1"),
    "image_size_text": ("int", "N or HEIGHTxWIDTH"),
    "schedule": ("str", "cosine, tanh, step"),
    "_spec": ("str", None),
}


def documented() -> dict[tuple[str, str], str]:
    """(tree, flag) -> what it takes here, from the table."""
    table = PAGE.partition("| flags of the published command | takes here | why |\n|---|---|---|\n")[2].partition(
        "\n\n"
    )[0]
    rows = {}
    for line in table.splitlines():
        flags, takes, _ = (cell.strip() for cell in line.strip("|").split("|"))
        tree = flags.partition(" ")[0].lower()
        for flag in flags.split("`")[1::2]:
            assert (tree, flag) not in rows, f"{flag}: twice in the table"
            rows[tree, flag] = takes
    return rows


def test_every_deviation_states_its_effect():
    table = PAGE.partition("| here | there | effect |\n|---|---|---|\n")[2].partition("\n\n")[0]
    cells = [cell.strip() for line in table.splitlines() for cell in line.strip("|").split("|")]
    assert len(cells) > 30 and len(cells) % 3 == 0 and all(cells)


def action_of(tree: str, flag: str) -> argparse.Action:
    return next(action for action in TREES[tree]._actions if flag in action.option_strings)


def takes(action: argparse.Action, published: dict) -> str | None:
    """The values taken here, if they are not those of the published flag."""
    kind, here = NARROWER.get(getattr(action.type, "__name__", ""), (getattr(action.type, "__name__", "str"), None))
    assert action.nargs == 0 or kind == (published.get("type") or "str"), "another type"
    if action.choices and list(action.choices) != published.get("choices"):
        assert set(published.get("choices", ())) <= set(action.choices)
        return ", ".join(action.choices)
    if action.nargs and action.nargs != published.get("nargs"):
        assert isinstance(action.nargs, int)
        return f"{action.nargs} numbers"
    return here


@pytest.mark.parametrize(("tree", "flag"), FLAGS, ids="".join)
def test_a_published_flag_is_here(tree, flag):
    action, published = action_of(tree, flag), PUBLISHED[tree][flag]
    assert action.dest == published["dest"]
    assert action.default == published["default"] and type(action.default) is type(published["default"])
    switch = {"store_true": True, "store_false": False}.get(published["action"])
    assert (action.nargs == 0) == (switch is not None)
    assert switch is None or getattr(TREES[tree].parse_args([flag]), action.dest) is switch
    assert set(published.get("also", ())) <= set(action.option_strings)
    assert takes(action, published) == documented().get((tree, flag))


@pytest.mark.parametrize("tree", TREES)
def test_the_table_names_published_flags_alone(tree):
    assert documented().keys() <= set(FLAGS)
    assert parse_args(TREES[tree], []) == TREES[tree].parse_args([])


@pytest.mark.parametrize("tree", TREES)
def test_a_published_abbreviation_means_the_same_or_is_refused(tree, capsys):
    """argparse took any unique prefix; one shared with a new flag is refused, and both are named."""
    published = [*PUBLISHED[tree], *(other for flag in PUBLISHED[tree].values() for other in flag.get("also", ()))]
    parser, kept = TREES[tree], 0
    for flag in published:
        for short in (flag[:length] for length in range(3, len(flag))):
            if [name for name in published if name.startswith(short)] != [flag]:
                continue
            meant = [option for option, *_ in (found[1:] for found in parser._get_option_tuples(short))]
            assert flag in meant, f"{short}: {meant}"
            kept += len(meant) == 1
            if len(meant) > 1:
                with pytest.raises(SystemExit):
                    parser.parse_args([short, "1"])
                assert flag in capsys.readouterr().err
    assert kept > 100


@pytest.mark.parametrize(
    ("tree", "flags", "value"),
    [
        ("deit", ["--lr", "0"], 0.0),
        ("deit", ["--train-interp", "lanczos"], "lanczos"),
        ("deit", ["--no-dist-eval"], False),
        ("detr", ["--enc_rpe", "rpe-2.0-product-ctx-1-k"], "rpe-2.0-product-ctx-1-k"),
        ("detr", ["--clip_max_norm", "0"], 0.0),
    ],
)
def test_values_that_the_published_commands_take(tree, flags, value):
    args = TREES[tree].parse_args(flags)
    default = TREES[tree].parse_args([])
    assert [v for name, v in vars(args).items() if v != getattr(default, name)] == [value]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--clip-grad", "0"], "0 made every gradient zero in the published code; leave --clip-grad out"),
        (["--clip-grad", "-1"], "expected a number above 0, at most 1e30, got -1"),
        (["--sched", "plateau"], "the published command gives it no metric and fails after warm-up"),
        (["--sched", "linear"], "expected cosine, tanh or step, got 'linear'"),
        (["--lr", "-1"], "expected a number from 0 to 1e30, got -1"),
        (["--lr", "nan"], "expected a number from 0 to 1e30, got nan"),
    ],
)
def test_values_whose_published_meaning_nobody_wants(flags, message, capsys):
    with pytest.raises(SystemExit):
        TREES["deit"].parse_args(flags)
    assert message in capsys.readouterr().err
