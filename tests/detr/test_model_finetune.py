import pytest
import torch

from detr_irpe.models.finetune import load_for_finetuning
from tests.helpers.tiny_detr import tiny_model


def taken(model, key: str, weights: dict) -> bool:
    return torch.equal(model.state_dict()[key], weights[key])


def test_the_same_model_is_copied_whole():
    weights = tiny_model(seed=1).state_dict()
    model = tiny_model()
    assert load_for_finetuning(model, weights, source="a.pth") == {}
    assert all(taken(model, key, weights) for key in weights)


@pytest.mark.parametrize("queries", [3, 8])
def test_class_head_is_dropped_and_queries_are_cut_or_filled_up(queries):
    weights = tiny_model(seed=1).state_dict()
    model = tiny_model()
    model.class_embed = torch.nn.Linear(16, 4)
    model.query_embed = torch.nn.Embedding(queries, 16)
    fresh = model.query_embed.weight.clone()
    report = load_for_finetuning(model, weights, source="a.pth")
    kept = min(queries, 5)
    assert torch.equal(model.query_embed.weight[:kept], weights["query_embed.weight"][:kept])
    assert torch.equal(model.query_embed.weight[kept:], fresh[kept:])
    assert report == {
        "query_embed.weight": f"keeps the first {kept} of 5 queries there, {queries} here"
        + ", others start fresh" * (queries > 5),
        "class_embed.weight": "starts fresh: (8, 16) there, (4, 16) here",
        "class_embed.bias": "starts fresh: (8,) there, (4,) here",
    }


def test_new_tables_start_at_zero_so_that_nothing_changes():
    plain = tiny_model("", seed=1)
    model = tiny_model("rpe-2.0-product-ctx-1-qkv")
    report = load_for_finetuning(model, plain.state_dict(), source="a.pth")
    assert len(report) == 6 and set(report.values()) == {"starts at zero: not in the checkpoint"}
    assert all(key.endswith("lookup_table_weight") for key in report)
    images = [torch.rand(3, 64, 96)]
    torch.testing.assert_close(model(images)["pred_logits"], plain(images)["pred_logits"], rtol=1e-4, atol=1e-5)


def test_to_and_from_a_model_with_masks():
    weights = tiny_model(seed=1).state_dict()
    with_masks = tiny_model(masks=True)
    report = load_for_finetuning(with_masks, weights, source="a.pth")
    assert torch.equal(with_masks.detr.class_embed.weight, weights["class_embed.weight"])
    assert report["mask_head.lay1.weight"] == "starts fresh: not in the checkpoint"
    model = tiny_model()
    report = load_for_finetuning(model, with_masks.state_dict(), source="a.pth")
    assert taken(model, "class_embed.weight", weights)
    assert report["mask_head.lay1.weight"] == "is not used"


def test_anything_else_must_fit_and_nothing_is_loaded_before_that_is_known():
    weights = tiny_model("rpe-2.0-product-ctx-1-k").state_dict()
    model = tiny_model("rpe-1.9-product-ctx-1-k", seed=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"other shapes: .*lookup_table_weight \(1, 8, 81\), not \(1, 8, 49\)"):
        load_for_finetuning(model, weights, source="x.pth")
    assert all(taken(model, key, before) for key in before)
    del weights["input_proj.bias"]
    with pytest.raises(ValueError, match="missing: input_proj.bias"):
        load_for_finetuning(model, weights, source="x.pth")


def test_a_class_head_of_other_classes_starts_fresh():
    weights = tiny_model(seed=1).state_dict()
    model = tiny_model()
    before = model.class_embed.weight.clone()
    report = load_for_finetuning(model, weights, source="a.pth", same_classes=False)
    assert report == dict.fromkeys(["class_embed.weight", "class_embed.bias"], "starts fresh: different classes there")
    assert torch.equal(model.class_embed.weight, before) and taken(model, "query_embed.weight", weights)
