"""Counts of the model that a command line builds; the published counts are in tests/end_to_end/test_configs.py."""

import pytest

from detr_irpe.model_stats import stats_of_flags


def test_the_published_detector():
    assert stats_of_flags(["--enc_rpe2d", "rpe-2.0-product-ctx-1-k"]) == {"n_parameters": 41317920, "buckets": 81}
    assert stats_of_flags(["--enc_rpe2d", "none"]) == stats_of_flags([])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--enc_rpe2d", "rpe-x"], "rpe spec 'rpe-x'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--backbone", "resnet999"], "resnet999"),
    ],
)
def test_mistakes_are_named(flags, words):
    with pytest.raises(ValueError, match=words):
        stats_of_flags(flags)
