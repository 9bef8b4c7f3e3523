import torch
import torch._dynamo
from torch._dynamo.utils import counters

from detr_irpe.nested_tensor import NestedTensor
from tests.helpers.tiny_detr import tiny_model


def test_the_whole_model_compiles_twice_at_most_whatever_the_image_sizes():
    """Once for the first size, once for any size; no graph break. (``backend="eager"``: capture without code.)"""
    torch._dynamo.reset()
    counters.clear()
    model = tiny_model(enc_layers=1, dec_layers=1, aux_loss=False).train()
    compiled = torch.compile(model, backend="eager")
    for height, width in ((60, 90), (90, 60), (75, 41), (33, 120)):
        images = NestedTensor.from_images([torch.randn(3, height, width), torch.randn(3, height - 7, width - 5)])
        ours, expected = compiled(images), model(images)
        torch.testing.assert_close(ours["pred_boxes"], expected["pred_boxes"])
        (ours["pred_logits"].sum() + ours["pred_boxes"].sum()).backward()
    assert counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"]
    torch._dynamo.reset()
