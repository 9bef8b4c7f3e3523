"""A category id of a checkpoint must mean what the same id means in the data."""

import logging

import pytest
import torch

from detr_irpe.classes import categories_of, compare_for_evaluation, compare_for_resume, differences
from irpe_train.checkpoint import Checkpoint
from irpe_train.errors import BadCheckpoint

RGB = {3: "red", 4: "green", 9: "blue"}


def of(categories) -> Checkpoint:
    return Checkpoint("x.pth", {"categories": categories})


def warnings_of(trained, here, caplog) -> str:
    logging.getLogger("irpe").propagate = True
    compare_for_evaluation(of(trained), here)
    return caplog.text


@pytest.mark.parametrize("here", [RGB, {4: "green"}, {9: " Blue", 3: "RED"}, {}])
def test_the_same_classes_or_some_of_them_are_evaluated(here, caplog):
    caplog.set_level("INFO", logger="irpe")
    told = f"{len(here)} of the 3 categories of checkpoint x.pth are in this data; the others are not scored"
    assert told in warnings_of(RGB, here, caplog) if len(here) < 3 else warnings_of(RGB, here, caplog) == ""


def test_an_accent_in_two_spellings_of_unicode_is_one_name(caplog):
    assert warnings_of({1: "\u00e9t\u00e9"}, {1: "e\u0301te\u0301"}, caplog) == ""
    with pytest.raises(BadCheckpoint, match="numbers its categories differently"):
        compare_for_evaluation(of({1: "\u00e9t\u00e9"}), {2: "e\u0301te\u0301"})


@pytest.mark.parametrize("here", [{3: "green", 4: "red", 9: "blue"}, {1: "red"}, {9: "green"}])
def test_other_ids_for_the_same_names_are_refused(here):
    with pytest.raises(BadCheckpoint, match=r"x.pth numbers its categories differently .* here and \d there"):
        compare_for_evaluation(of(RGB), here)


def test_other_names_are_reported(caplog):
    text = warnings_of(RGB, {3: "pink", 5: "grey"}, caplog)
    assert "3 is 'pink' here and 'red' there; 5 'grey' is not there" in text


def test_a_checkpoint_without_names_is_reported(caplog):
    caplog.set_level("INFO", logger="irpe")
    assert "does not name its classes" in warnings_of({}, RGB, caplog)


@pytest.mark.parametrize("here", [{3: "red", 4: "green"}, RGB | {5: "grey"}, RGB | {3: "pink"}])
def test_a_run_does_not_resume_with_other_classes(here):
    with pytest.raises(BadCheckpoint, match="other categories than this data has: .*--finetune"):
        compare_for_resume(of(RGB), here)
    compare_for_resume(of(RGB), dict(reversed(RGB.items())))
    compare_for_resume(of({}), RGB)


def test_weights_alone_start_a_run_with_other_classes_after_a_warning(caplog):
    logging.getLogger("irpe").propagate = True
    compare_for_resume(of(RGB), {3: "green", 4: "red", 9: "blue"}, same_run=False)
    assert "x.pth was trained on other categories" in caplog.text and "--finetune" in caplog.text


def test_published_checkpoints_have_the_categories_of_coco():
    published = Checkpoint("x.pth", {"model": {"class_embed.bias": torch.zeros(92)}})
    coco = categories_of(published)
    assert (coco[1], coco[13], coco[90]) == ("person", "stop sign", "toothbrush")
    assert differences(coco, {17: "cat", 18: "dog"}) == []
    compare_for_resume(published, dict(coco))
    assert len(coco) == 80  # COCO's own file lists as many: no background, no gaps
    assert categories_of(Checkpoint("x.pth", {"model": {"detr.class_embed.bias": torch.zeros(12)}})) == {}
    with pytest.raises(BadCheckpoint, match="x.pth: its 'categories' are not names by category id"):
        categories_of(of(["red"]))
    for wrong in ({True: "red"}, {-3: "red"}, {10**30: "red"}):
        with pytest.raises(BadCheckpoint, match="x.pth: its 'categories' are not names by category id"):
            categories_of(of(wrong))
