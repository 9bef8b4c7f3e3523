import argparse
import json
import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch

from detr_irpe import build_model, create_model
from detr_irpe.nested_tensor import NestedTensor, Targets, collate
from irpe_train.checkpoint import load_matching
from tests.helpers.tiny_detr import SPECS, published_flags, random_targets, tiny_model

PUBLISHED = json.loads(Path(__file__).with_name("published_state_dict.json").read_text())


def published_shapes(enc_rpe2d: str, masks: bool = False) -> list[tuple[str, list[int]]]:
    entries = []
    for key, shape in PUBLISHED["detr_resnet50"].items():
        entries.append((key, shape))
        if key.startswith("transformer.encoder") and key.endswith("self_attn.out_proj.bias"):
            attention = key.removesuffix("out_proj.bias")
            entries += [(attention + name, shape) for name, shape in PUBLISHED["models"][enc_rpe2d]["rpe"].items()]
    if masks:
        entries = [("detr." + key, shape) for key, shape in entries] + list(PUBLISHED["masks_extra"].items())
    return entries


@pytest.mark.parametrize("enc_rpe2d", PUBLISHED["models"])
def test_state_dict_and_number_of_parameters_as_published(enc_rpe2d):
    with torch.device("meta"):
        model = create_model(enc_rpe2d=enc_rpe2d)
    state = model.state_dict()
    assert [(key, list(value.shape)) for key, value in state.items()] == published_shapes(enc_rpe2d)
    assert {value.dtype for value in state.values()} == {torch.float32}
    published = PUBLISHED["models"][enc_rpe2d]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == published["n_parameters"]
    assert sum(p.numel() for p in model.parameters()) == published["n_parameters_with_frozen"]


def test_none_is_no_encoding():
    with torch.device("meta"):
        assert create_model(enc_rpe2d="none").state_dict().keys() == create_model().state_dict().keys()


def test_state_dict_with_masks_as_published():
    with torch.device("meta"):
        model = create_model(masks=True)
    assert [(key, list(value.shape)) for key, value in model.state_dict().items()] == published_shapes("", masks=True)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == PUBLISHED["n_parameters_masks"]


def test_a_published_checkpoint_loads_strictly_and_detects():
    model = create_model(enc_rpe2d="rpe-2.0-product-ctx-1-k")
    weights = {key: torch.full(shape, 1e-3) for key, shape in published_shapes("rpe-2.0-product-ctx-1-k")}
    weights["backbone.0.body.bn1.num_batches_tracked"] = torch.tensor(1)  # of a foreign backbone: dropped
    model.load_state_dict(weights, strict=True)
    with torch.no_grad():
        outputs = model.eval()([torch.rand(3, 64, 96), torch.rand(3, 80, 64)])
    assert outputs["pred_logits"].shape == (2, 100, 92) and outputs["pred_boxes"].shape == (2, 100, 4)
    assert [o["pred_boxes"].shape for o in outputs["aux_outputs"]] == [(2, 100, 4)] * 5


def test_counters_of_batch_norm_are_dropped():
    model, weights = tiny_model(), tiny_model(seed=1).state_dict()
    load_matching(model, weights | {"backbone.0.body.bn1.num_batches_tracked": torch.tensor(1)}, source="x.pth")
    assert torch.equal(model.class_embed.weight, weights["class_embed.weight"])
    with pytest.raises(ValueError, match="x.pth does not fit this DETR; unexpected: .*fc.bias"):
        load_matching(model, weights | {"backbone.0.body.fc.bias": torch.tensor(1)}, source="x.pth")


def test_dc5_doubles_the_last_map_and_keeps_the_keys():
    image = NestedTensor.from_images([torch.rand(3, 64, 96)])
    plain = create_model("resnet50").backbone
    dilated = create_model("resnet50", dilation=True).backbone
    dilated.load_state_dict(plain.state_dict())
    assert plain(image)[0][-1].tensors.shape == (1, 2048, 2, 3)
    assert dilated(image)[0][-1].tensors.shape == (1, 2048, 4, 6)


def test_optimizer_sees_the_published_numbers_of_tensors():
    """199 and 42 tensors for ResNet-50 with one encoding."""
    with torch.device("meta"):
        model = create_model(enc_rpe2d="rpe-2.0-product-ctx-1-k")
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert (sum("backbone" not in n for n in names), sum("backbone" in n for n in names)) == (199, 42)


def test_frozen_backbone():
    model = tiny_model(train_backbone=False)
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert all(p.requires_grad for name, p in model.named_parameters() if "backbone" not in name)


@pytest.mark.parametrize("enc_rpe2d", SPECS)
def test_a_batch_equals_its_rows(enc_rpe2d):
    """An image with the same padding gives the same detections, whatever else is in the batch."""
    model = tiny_model(enc_rpe2d).double()
    sizes = ((96, 48), (50, 120), (30, 30))
    batch = NestedTensor.from_images([torch.rand(3, h, w, dtype=torch.float64) for h, w in sizes])
    together = model(batch)
    for row in range(3):
        alone = model(NestedTensor(batch.tensors[row : row + 1], batch.mask[row : row + 1]))
        for key in ("pred_logits", "pred_boxes"):
            torch.testing.assert_close(together[key][row], alone[key][0], rtol=1e-9, atol=1e-9)


def test_an_image_that_is_all_padding_stays_finite():
    model = tiny_model("rpe-1.9-product-ctx-0-qkv", masks=True).train()
    batch = NestedTensor(torch.rand(2, 3, 64, 64), torch.tensor([False, True])[:, None, None].expand(2, 64, 64))
    outputs = model(batch)
    sum(outputs[key].sum() for key in ("pred_logits", "pred_boxes", "pred_masks")).backward()
    assert all(outputs[key].isfinite().all() for key in ("pred_logits", "pred_boxes", "pred_masks"))
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_flags_that_a_namespace_lacks_take_their_defaults():
    class Flags:
        backbone, backbone_weights, hidden_dim, num_classes = "resnet_micro", "none", 32, None

    for flags in (Flags, argparse.Namespace(**{k: v for k, v in vars(Flags).items() if k[0] != "_"})):
        model = build_model(flags)[0]
        assert model.class_embed.weight.shape == (92, 32) and len(model.transformer.encoder.layers) == 6


@pytest.mark.parametrize("options", [{}, {"pre_norm": True, "position_embedding": "learned"}, {"masks": True}])
def test_every_trainable_parameter_gets_a_gradient(options):
    args = published_flags(enc_rpe2d="rpe-2.0-product-ctx-1-qkv", lr_backbone=1e-4, **options)
    model, criterion, _ = build_model(args)
    outputs = model([torch.rand(3, 64, 64), torch.rand(3, 48, 64)])
    losses = criterion(outputs, random_targets([2, 1], size=(64, 64)))
    sum(losses[name] * weight for name, weight in criterion.weight_dict.items() if name in losses).backward()
    missing = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not missing


def test_autocast_gives_fp32_losses():
    model, criterion, postprocessors = build_model(published_flags(enc_rpe2d="rpe-2.0-product-ctx-1-qkv", masks=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model([torch.rand(3, 64, 64)])
        losses = criterion(outputs, random_targets([2], size=(64, 64)))
    assert outputs["pred_logits"].dtype == torch.bfloat16
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    results = postprocessors["bbox"](outputs, torch.tensor([[64, 64]]))
    assert results[0]["boxes"].dtype == torch.float32


def test_aux_loss_off():
    assert "aux_outputs" not in tiny_model(aux_loss=False)([torch.rand(3, 32, 32)])


@pytest.mark.parametrize("dataset_file, classes", [("coco", 91), ("coco_panoptic", 250), ("own", 20)])
def test_number_of_classes_of_a_published_namespace(dataset_file, classes):
    model, criterion, postprocessors = build_model(published_flags(dataset_file=dataset_file, resume="x.pth"))
    assert model.class_embed.out_features == classes + 1 and criterion.num_classes == classes
    assert set(postprocessors) == {"bbox"}
    assert build_model(published_flags(num_classes=12, eval=True))[0].class_embed.out_features == 13


def test_build_model_with_masks():
    model, criterion, postprocessors = build_model(
        published_flags(masks=True, dataset_file="coco_panoptic", frozen_weights="detr.pth")
    )
    assert set(postprocessors) == {"bbox", "segm", "panoptic"}
    is_thing = postprocessors["panoptic"].is_thing_map
    assert len(is_thing) == 250 and is_thing[1] and not is_thing[249]
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"bbox_attention", "mask_head"}
    assert {name: w for name, w in criterion.weight_dict.items() if "_0" not in name} == {
        "loss_ce": 1,
        "loss_bbox": 5,
        "loss_giou": 2,
        "loss_mask": 1,
        "loss_dice": 1,
    }


@pytest.mark.parametrize(("aux_loss", "layers"), [(True, ("", "_0", "_1")), (False, ("",))])
def test_each_cost_and_weight_is_that_of_its_flag(aux_loss, layers):
    costs = {"set_cost_class": 2, "set_cost_bbox": 3, "set_cost_giou": 4, "eos_coef": 0.3}
    weights = {"bbox_loss_coef": 6, "giou_loss_coef": 7, "mask_loss_coef": 8, "dice_loss_coef": 9}
    args = published_flags(masks=True, aux_loss=aux_loss, dec_layers=3, **costs, **weights)
    _, criterion, _ = build_model(args)
    matcher = criterion.matcher
    assert (matcher.cost_class, matcher.cost_bbox, matcher.cost_giou, criterion.eos_coef) == (2, 3, 4, 0.3)
    expected = {"loss_ce": 1, "loss_bbox": 6, "loss_giou": 7, "loss_mask": 8, "loss_dice": 9}
    assert criterion.weight_dict == {name + layer: weight for layer in layers for name, weight in expected.items()}


def test_targets_leave_a_worker_unchanged():
    targets = Targets(
        [
            {
                "boxes": torch.rand(3, 4),
                "labels": torch.tensor([1, 2, 3]),
                "name": "a.jpg",
                "masks": torch.rand(3, 200, 300) < 0.5,
            },
            {"boxes": torch.zeros(0, 4), "orig_size": 7},
        ]
    )
    received = pickle.loads(ForkingPickler.dumps(targets))
    assert type(received) is Targets and [list(t) for t in received] == [list(t) for t in targets]
    for ours, theirs in zip(received, targets, strict=True):
        for name, value in theirs.items():
            same = torch.equal(ours[name], value) if torch.is_tensor(value) else ours[name] == value
            assert same and type(ours[name]) is type(value)
    small = Targets([{"boxes": torch.rand(3, 4)}])
    assert b"rebuild_storage" not in bytes(ForkingPickler.dumps(small))  # by value


def test_collate_pads_below_and_to_the_right():
    images = [torch.ones(3, 2, 4), torch.ones(3, 3, 1)]
    batch, targets = collate([(image, {"image_id": index}) for index, image in enumerate(images)])
    assert batch.tensors.shape == (2, 3, 3, 4) and [t["image_id"] for t in targets] == [0, 1]
    assert torch.equal(batch.mask[0], torch.tensor([[False] * 4, [False] * 4, [True] * 4]))
    assert torch.equal(batch.mask[1], torch.tensor([[False, True, True, True]] * 3))
    assert torch.equal(batch.tensors[:, 0] == 0, batch.mask)
    moved = batch.to("cpu")
    assert torch.equal(moved.decompose()[0], batch.tensors) and torch.equal(moved.mask, batch.mask)


def test_images_of_one_size_may_come_as_one_tensor():
    images = torch.rand(2, 3, 40, 56)
    batch = NestedTensor.from_images(images)
    assert torch.equal(batch.tensors, images) and not batch.mask.any()
    model = tiny_model()
    with torch.no_grad():
        for ours, wanted in zip(model(images).values(), model(list(images)).values(), strict=True):
            assert isinstance(ours, list) or torch.equal(ours, wanted)


@pytest.mark.parametrize("shapes", [[], [(2, 4)], [(3, 2, 4), (1, 2, 4)], [(1, 3, 2, 4)]])
def test_a_batch_is_images(shapes):
    with pytest.raises(ValueError) as error:
        NestedTensor.from_images([torch.ones(shape) for shape in shapes])
    assert str(error.value) == f"a batch is one or more images (C, h, w) with the same C; got shapes {shapes}."


def test_a_mask_of_numbers_is_refused():
    with pytest.raises(ValueError, match="bool, True = padding; got torch.int64"):
        NestedTensor(torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.int64))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="--hidden_dim 16 is not a multiple of --nheads 3"):
        tiny_model(nheads=3)


def test_other_queries_are_counted():
    model = tiny_model()
    model.query_embed = torch.nn.Embedding(7, model.query_embed.embedding_dim)
    assert model.num_queries == 7
