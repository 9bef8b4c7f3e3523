import math

import pytest
import torch
import torch.nn.functional as F

from detr_irpe import create_model
from detr_irpe.models.segmentation import MaskHeadSmallConv, MHAttentionMap
from tests.helpers.tiny_detr import tiny_model


def test_masks_have_the_size_of_the_first_map():
    model = tiny_model(masks=True, dilation=False)
    outputs = model([torch.rand(3, 64, 96), torch.rand(3, 70, 33)])
    assert outputs["pred_masks"].shape == (2, 5, 18, 24)  # 70 x 96 at stride 4
    without = tiny_model(dilation=False)
    without.load_state_dict(
        {key.removeprefix("detr."): value for key, value in model.state_dict().items() if key.startswith("detr.")}
    )
    images = [torch.rand(3, 64, 96)]
    torch.testing.assert_close(model(images)["pred_boxes"], without(images)["pred_boxes"])


def test_attention_map_is_the_formula():
    """A softmax over heads and visible cells together."""
    torch.manual_seed(0)
    module = MHAttentionMap(8, 2)
    queries, memory = torch.randn(1, 3, 8), torch.randn(1, 8, 2, 2)
    mask = torch.tensor([[[False, False], [False, True]]])
    maps = module(queries, memory, mask)
    assert maps.shape == (1, 3, 2, 2, 2)
    torch.testing.assert_close(maps.sum((2, 3, 4)), torch.ones(1, 3))
    assert (maps[..., 1, 1] == 0).all()
    q, k = module.q_linear(queries), module.k_linear(memory.permute(0, 2, 3, 1))
    for query in range(3):
        scores = {}
        for head in range(2):
            for row, column in ((0, 0), (0, 1), (1, 0)):
                part = slice(4 * head, 4 * head + 4)
                scores[head, row, column] = (q[0, query, part] * 4**-0.5 * k[0, row, column, part]).sum().exp()
        for (head, row, column), score in scores.items():
            torch.testing.assert_close(maps[0, query, head, row, column], score / sum(scores.values()))


def test_mask_head_is_the_published_stack_for_each_query():
    torch.manual_seed(0)
    head = MaskHeadSmallConv(16 + 8, [12, 10, 6], 128)
    projected, attention = torch.randn(2, 16, 2, 3), torch.rand(2, 4, 8, 2, 3)
    maps = [torch.randn(2, c, h, w) for c, h, w in ((12, 4, 6), (10, 8, 11), (6, 15, 22))]
    masks = head(projected, attention, maps)
    assert masks.shape == (2, 4, 15, 22)
    x = torch.cat([projected[1:], attention[1:, 2]], dim=1)
    x = F.relu(F.group_norm(head.lay1(x), 8, head.gn1.weight, head.gn1.bias))
    x = F.relu(F.group_norm(head.lay2(x), 8, head.gn2.weight, head.gn2.bias))
    for adapter, layer, norm, finer in (
        (head.adapter1, head.lay3, head.gn3, maps[0]),
        (head.adapter2, head.lay4, head.gn4, maps[1]),
        (head.adapter3, head.lay5, head.gn5, maps[2]),
    ):
        x = adapter(finer[1:]) + F.interpolate(x, size=finer.shape[-2:], mode="nearest")
        x = F.relu(F.group_norm(layer(x), 8, norm.weight, norm.bias))
    torch.testing.assert_close(masks[1, 2], head.out_lay(x)[0, 0])


def test_the_head_starts_as_published():
    torch.manual_seed(0)
    head, attention = MaskHeadSmallConv(16 + 8, [12, 10, 6], 128), MHAttentionMap(8, 2)
    for conv in (head.lay1, head.lay5, head.adapter2):
        bound = math.sqrt(3 / conv.weight[0].numel())  # Kaiming with a slope of 1
        assert 0.97 * bound < conv.weight.abs().max() <= bound and not conv.bias.any()
    assert not attention.q_linear.bias.any() and not attention.k_linear.bias.any()


@pytest.mark.parametrize("freeze_detr", [False, True])
def test_freezing(freeze_detr):
    model = tiny_model(masks=True, freeze_detr=freeze_detr)
    assert model.detr.class_embed.weight.requires_grad is not freeze_detr
    assert model.mask_head.lay1.weight.requires_grad and model.bbox_attention.q_linear.weight.requires_grad


def test_a_width_without_channels_for_the_last_layer_is_refused():
    with pytest.raises(ValueError, match="--hidden_dim 12: --masks needs 16 or more"):
        create_model("resnet_micro", hidden_dim=12, nheads=2, masks=True)
