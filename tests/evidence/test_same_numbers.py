"""Runs of the published code, step by step: ours give the same numbers, and docs/same_numbers.md is up to date."""

import copy
from pathlib import Path

import pytest

from tests.evidence import same_numbers
from tests.evidence.same_numbers import CASES, CHANGES, HEAD, TAIL, TOLERANCES
from tests.helpers.trajectories import Recorded, differences

PAGE = (Path(__file__).parents[2] / "docs" / "same_numbers.md").read_text()
AGAIN = "stale: python -m tests.evidence.same_numbers -o docs/same_numbers.md"


def row(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


ROWS = [row(line) for line in PAGE.splitlines() if line.startswith("| ")]


@pytest.mark.parametrize("name", CASES)
def test_the_run_is_the_published_one(name):
    found = same_numbers.run_case(name)
    assert all(d.within for d in found), [d for d in found if not d.within]
    stated = [cells for cells in ROWS if cells[0] == name and len(cells) == 5]
    for line, cells, difference in zip(same_numbers.case_lines(name, found), stated, found, strict=True):
        assert row(line)[:3] == cells[:3] and row(line)[4] == cells[4], AGAIN
        if difference.tolerance:  # another machine rounds differently
            assert difference.largest <= 10 * float(cells[3]) + difference.tolerance / 100, AGAIN
        else:
            assert cells[3] == "none", AGAIN


@pytest.mark.slow
@pytest.mark.parametrize("title", CHANGES)
def test_a_change_of_the_recipe_is_seen(title):
    found = same_numbers.run_case(*CHANGES[title])
    assert not all(d.within for d in found)
    (cells,) = (cells for cells in ROWS if cells[0] == title)
    assert row(same_numbers.change_line(title, found))[:3] == cells[:3], AGAIN


def test_the_page_has_every_case_and_every_change():
    for part in (HEAD, TOLERANCES, TAIL):
        assert part in PAGE, AGAIN
    assert list(dict.fromkeys(cells[0] for cells in ROWS if cells[0] in CASES)) == list(CASES), AGAIN
    assert [cells[0] for cells in ROWS if len(cells) == 4 and cells[0] != "change"] == list(CHANGES), AGAIN


def as_published(case: dict) -> Recorded:
    published = copy.deepcopy(case["published"])
    epochs = range(len(published["log"]["epoch"]))
    published["log"] = [{key: values[epoch] for key, values in published["log"].items()} for epoch in epochs]
    return Recorded(**{"model_ema": None} | published)


def test_the_comparison_finds_nothing_between_equals():
    for case in CASES.values():
        assert {d.largest for d in differences(case, as_published(case))} == {0.0}


def drop_a_key(run):
    del run.log[0]["n_parameters"]


def move_a_sum(run):
    total, _, change, elements = run.model["cls_token"]
    run.model["cls_token"][0] = total + 1.1e-3 * change * elements**0.5 + 2e-7 * abs(total)


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("keys and counts", drop_a_key),
        ("keys and counts", lambda run: setattr(run, "epoch", 4)),
        ("keys and counts", lambda run: run.loss.pop()),
        ("keys and counts", lambda run: run.model.pop("cls_token")),
        ("keys and counts", lambda run: run.groups[0].__setitem__(0, 18)),
        ("keys and counts", lambda run: run.model_ema["cls_token"].__setitem__(3, 65)),
        ("loss of each step", lambda run: run.loss.__setitem__(7, run.loss[7] + 4.1e-5 * run.loss[7])),
        ("loss of each step", lambda run: run.loss.__setitem__(17, float("nan"))),
        ("log.txt", lambda run: run.log[3].update(test_acc1=run.log[3]["test_acc1"] + 3.5)),
        (
            "learning rates and weight decay",
            lambda run: run.log[2].update(train_lr=run.log[2]["train_lr"] * (1 + 2e-7)),
        ),
        ("learning rates and weight decay", lambda run: run.groups[1].__setitem__(2, 1e-9)),
        ("weights", move_a_sum),
        ("weights", lambda run: run.model["cls_token"].__setitem__(2, run.model["cls_token"][2] * 1.0011)),
        ("weights", lambda run: run.model["cls_token"].__setitem__(1, float("nan"))),
        ("moving average", lambda run: run.model_ema["pos_embed"].__setitem__(1, 10.13538)),
        ("moving average", lambda run: run.model_ema["pos_embed"].__setitem__(2, float("nan"))),
    ],
)
def test_the_comparison_sees_one_wrong_number(kind, fault):
    case = CASES["deit k, smoothing, clipping, EMA"]
    run = as_published(case)
    fault(run)
    assert [d.kind for d in differences(case, run) if not d.within] == [kind]
