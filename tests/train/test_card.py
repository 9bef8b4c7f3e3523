"""Reproduction cards: verdicts, the row to compare with, the identity of a run."""

import json
import os

import pytest

from irpe_train import card
from irpe_train.zoo import Entry, Zoo

ZOO = Zoo(
    {
        "net": Entry(
            "net",
            "deit_irpe",
            "configs/x.yaml",
            "net.pth",
            "http://x/net.pth",
            2,
            {"acc1": 73.7, "params_M": 5.76, "n_parameters": 5755816},
        )
    },
    {"acc1": 0.15, "params_M": 0.005, "n_parameters": 0},
    "a test",
)


def verdicts(**measured):
    return {line["figure"]: line["verdict"] for line in card.compare("net", measured)}


@pytest.fixture
def zoo(monkeypatch):
    monkeypatch.setattr(card, "read_zoo", lambda: ZOO)


@pytest.mark.usefixtures("zoo")
def test_verdicts():
    assert verdicts(acc1=73.7, n_parameters=5755816) == {"acc1": "PASS", "params_M": "PASS", "n_parameters": "PASS"}
    assert verdicts(acc1=73.85)["acc1"] == "PASS" and verdicts(acc1=73.55)["acc1"] == "PASS"
    assert verdicts(acc1=73.86)["acc1"] == "FAIL" and verdicts(acc1=73.54)["acc1"] == "FAIL"
    assert verdicts(acc1=float("nan"))["acc1"] == "FAIL"
    assert verdicts(n_parameters=5755817) == {"acc1": "not run", "params_M": "PASS", "n_parameters": "FAIL"}


@pytest.mark.parametrize(
    "measured, verdict",
    [
        ({}, "FAIL"),
        ({"acc1": 73.7}, "partial"),
        ({"acc1": 73.7, "n_parameters": 5755816}, "PASS"),
        ({"acc1": 73.7, "n_parameters": 5755817}, "FAIL"),
        ({"acc1": 70.0}, "FAIL"),
    ],
)
@pytest.mark.usefixtures("zoo")
def test_the_verdict_of_a_card(measured, verdict):
    """PASS needs every published figure; an empty card does not pass, and one with some figures is partial."""
    assert card.make_card("net", measured)["verdict"] == verdict


@pytest.mark.usefixtures("zoo")
def test_a_misspelt_figure_is_an_error():
    with pytest.raises(ValueError, match="no published acc_1; there are acc1, params_M, n_parameters"):
        card.compare("net", {"acc_1": 73.7})


@pytest.mark.usefixtures("zoo")
def test_which_row():
    assert card.choose("auto", ["checkpoint", "", "net"]) == "net"
    assert card.choose("net", []) == "net"
    with pytest.raises(ValueError, match="called checkpoint or deit_x; name the row: --expect NAME"):
        card.choose("auto", ["checkpoint", "deit_x"])
    with pytest.raises(ValueError, match="no published checkpoint 'nte'"):
        card.choose("nte", ["net"])


def test_fingerprint(tmp_path, monkeypatch):
    data = tmp_path / "val"
    (data / "a").mkdir(parents=True)
    (data / "a" / "1.png").write_bytes(b"123")
    first = card.fingerprint(data)
    assert (first["path"], first["files"], first["bytes"]) == ("val", 1, 3)
    (data / "a" / "2.png").write_bytes(b"")
    assert card.fingerprint(data)["sha256"] != first["sha256"]
    (data / "b").mkdir()
    (data / "b" / "3.png").write_bytes(b"4")
    told, walk = card.fingerprint(data), os.walk

    def backwards(*args, **kwargs):
        for folder, subfolders, files in walk(*args, **kwargs):
            subfolders.reverse()
            yield folder, subfolders, files[::-1]

    monkeypatch.setattr(card.os, "walk", backwards)
    assert card.fingerprint(data) == told  # in whatever order a file system lists them
    whole = card.fingerprint(data / "a" / "1.png")
    assert whole["sha256"].startswith("a665a459")  # sha256 of "123"
    for name, target in (("b/loop", data), ("b/again", data), ("b/gone", "nowhere"), ("b/itself", "itself")):
        (data / name).symlink_to(target)
    assert card.fingerprint(data)["files"] == told["files"] + 2  # the broken ones, by their names
    with pytest.raises(FileNotFoundError, match="no data set at"):
        card.fingerprint(tmp_path / "nowhere")


def test_expect_prints_and_saves(tmp_path, caplog, monkeypatch):
    printed = []
    monkeypatch.setattr(card.logger, "info", printed.append)
    (tmp_path / "x.pth").write_bytes(b"123")
    name = "deit_tiny_patch16_224_ctx_product_50_shared_k"
    measured = {"acc1": 73.68, "acc5": 92.04, "n_parameters": 5755816}
    about = dict(figure="acc1", data=tmp_path)
    assert card.Expected(name, str(tmp_path / "x.pth"), "", **about).meet(measured, tmp_path / "out") == 0
    saved = json.loads((tmp_path / "out" / "card.json").read_text())
    assert saved["verdict"] == "partial" and saved["checkpoint"]["sha256"].startswith("a665a459")
    assert saved["versions"]["torch"] and saved["hardware"]
    text = (tmp_path / "out" / "card.md").read_text()
    assert printed == [text]
    assert text.startswith(f"# {name}: partial (2 of 6 figures not run)")
    assert "| acc1 | 73.68 | 73.7 | -0.02 | 0.15 | PASS |" in text
    assert "| n_parameters | 5,755,816 | 5,755,816 | +0 | 0 | PASS |" in text
    assert card.Expected("auto", "", name, **about).meet(measured | {"acc1": 70.0}, "") == 1


def test_figures_that_a_new_card_lacks_are_kept(tmp_path):
    """The card of another row, one with figures that need data, and files of another program."""
    name, counted = "deit_tiny_patch16_224_ctx_product_50_shared_k", {"n_parameters": 5755816}
    for written in (counted, counted | {"acc1": 73.6}, counted | {"acc1": 73.7}):
        card.write_card(card.make_card(name, written), tmp_path / "card")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["card.json", "card.md"]
    best = (tmp_path / "card.md").read_text()
    card.write_card(card.make_card(name, counted), tmp_path / "card")
    card.write_card(card.make_card("rpe-1.9-product-ctx-1-k", {"AP": 0.4}), tmp_path / "card")
    assert (tmp_path / "card.1.md").read_text() == best and "5,755,816" in (tmp_path / "card.2.md").read_text()
    assert (tmp_path / "card.md").read_text().startswith("# rpe-1.9-product-ctx-1-k: ")
    (tmp_path / "card.json").write_text("[]")
    card.write_card(card.make_card(name, counted), tmp_path / "card")
    assert (tmp_path / "card.3.json").read_text() == "[]" and (tmp_path / "card.3.md").exists()


def test_what_the_card_will_name_is_looked_for_before_the_evaluation(tmp_path):
    name, file = "deit_tiny_patch16_224_ctx_product_50_shared_k", tmp_path / "x.pth"
    with pytest.raises(FileNotFoundError, match="--expect: the card would name .*x.pth, which does not exist"):
        card.Expected(name, str(file), "", figure="acc1", data=tmp_path)
    file.write_bytes(b"123")
    assert card.Expected("auto", str(file), name, figure="acc5", data=tmp_path).row == name
    with pytest.raises(FileNotFoundError, match="the card would name .*val, which does not exist"):
        card.Expected(name, str(file), "", figure="acc1", data=tmp_path / "val")


def test_a_row_of_the_other_task_is_refused_before_the_evaluation(tmp_path):
    with pytest.raises(ValueError, match="--expect deit_tiny.*: its figures are acc1, .*; this evaluation measures AP"):
        card.Expected("deit_tiny_patch16_224_ctx_product_50_shared_k", "", "", figure="AP", data=tmp_path)
    with pytest.raises(ValueError, match="--expect rpe-2.0-.*: its figures are AP.*; this evaluation measures acc1"):
        card.Expected("auto", "", "rpe-2.0-product-ctx-1-k", figure="acc1", data=tmp_path)


def test_rows_that_need_no_data_pass(tmp_path):
    """Two of the nine; the committed cards are checked against all nine in tests/end_to_end/test_configs.py."""
    names = ["deit_tiny_patch16_224_ctx_product_50_shared_k", "rpe-1.9-product-ctx-1-k"]
    assert card.main([*names, "-o", str(tmp_path)]) == 0
    deit, detr = (json.loads((tmp_path / f"{name}.json").read_text()) for name in names)
    assert [line["verdict"] for line in deit["figures"]] == ["not run"] * 2 + ["PASS"] * 4
    assert [line["verdict"] for line in detr["figures"]] == ["not run"] * 6 + ["PASS"] * 2
    with pytest.raises(SystemExit, match="no published checkpoint 'nope'"):
        card.main(["nope"])


def test_a_row_that_fails_is_the_exit_status(tmp_path, monkeypatch):
    failed = {**json.loads((card.ROOT / "logs/cards/rpe-2.0-product-ctx-1-k.json").read_text()), "verdict": "FAIL"}
    monkeypatch.setattr(card, "make_card", lambda name, measured: failed)
    assert card.main(["rpe-2.0-product-ctx-1-k", "-o", str(tmp_path)]) == 1


def test_numbers_are_short_and_whole_ones_exact():
    shown = {
        22050664: "22,050,664",
        80.9: "80.9",
        4.6e9: "4,600,000,000",
        0.1234567: "0.123457",
        73.70000000001: "73.7",
    }
    assert {value: card._number(value) for value in shown} == shown
