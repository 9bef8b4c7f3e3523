"""Counts of the model that a command line builds; the published counts are in tests/end_to_end/test_configs.py."""

import json

import pytest

from detr_irpe import model_stats


def test_the_published_detector(capsys):
    model_stats.main(["--json", "--enc_rpe2d", "rpe-2.0-product-ctx-1-k"])
    assert json.loads(capsys.readouterr().out) == {"n_parameters": 41317920, "buckets": 81}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--enc_rpe2d", "rpe-x"], "rpe spec 'rpe-x'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--backbone", "resnet999"], "resnet999"),
    ],
)
def test_mistakes_end_in_one_line(flags, words):
    with pytest.raises(SystemExit) as ended:
        model_stats.main(["--json", *flags])
    assert words in ended.value.code and ended.value.code.count("\n") == 0
