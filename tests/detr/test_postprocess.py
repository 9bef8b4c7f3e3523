import numpy as np
import pytest
import torch

from detr_irpe.models.postprocess import PostProcess, PostProcessPanoptic, PostProcessSegm
from detr_irpe.segment_ids import decode_ids, encode_ids

NO_OBJECT = 3  # of the classes 0, 1, 2 only the first is countable
THINGS = {0: True, 1: False, 2: False}


def confident(*classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor([classes]), NO_OBJECT + 1).float() * 20


def test_boxes_in_pixels_of_the_original_image():
    logits = torch.tensor([[[0.0, 2.0, 0.0, 9.0], [5.0, 1.0, 0.0, 0.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 1.0], [0.25, 0.5, 0.1, 0.2]]])
    (result,) = PostProcess()({"pred_logits": logits, "pred_boxes": boxes}, torch.tensor([[100, 200]]))
    assert result["labels"].tolist() == [1, 0]  # "no object" is never the answer
    torch.testing.assert_close(result["scores"], torch.stack([logits[0, 0].softmax(0)[1], logits[0, 1].softmax(0)[0]]))
    torch.testing.assert_close(result["boxes"], torch.tensor([[0.0, 0, 200, 100], [40, 40, 60, 60]]))


def test_one_size_for_each_image():
    outputs = {"pred_logits": torch.rand(2, 3, 4), "pred_boxes": torch.rand(2, 3, 4)}
    with pytest.raises(ValueError, match=r"\(height, width\) of each of 2 images; got shape \(1, 2\)"):
        PostProcess()(outputs, torch.tensor([[10, 20]]))


@pytest.mark.parametrize("name", ["pred_logits", "pred_boxes"])
def test_what_overflows_is_not_scored(name):
    outputs = {"pred_logits": torch.rand(2, 3, 4), "pred_boxes": torch.rand(2, 3, 4)}
    outputs["pred_logits"][..., 0] = -torch.inf  # a class that is left out
    PostProcess()(outputs, torch.tensor([[10, 20]] * 2))
    outputs[name][1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="scores or boxes are not finite: use an earlier checkpoint, or --amp none"):
        PostProcess()(outputs, torch.tensor([[10, 20]] * 2))


def test_boxes_can_be_part_of_an_exported_graph():
    outputs, sizes = {"pred_logits": torch.rand(2, 3, 4), "pred_boxes": torch.rand(2, 3, 4)}, torch.tensor([[9, 9]] * 2)
    graph = torch.export.export(PostProcess(), (outputs, sizes)).module()
    torch.testing.assert_close(graph(outputs, sizes), PostProcess()(outputs, sizes))


def test_masks_lose_the_padding_and_take_the_original_size():
    masks = torch.full((2, 1, 4, 4), -5.0)
    masks[0, 0, :2] = 5.0  # the upper half of the padded batch, which the first image fills
    masks[1, 0, :, :2] = 5.0  # the left half: all of the second image, which is half as wide
    results = PostProcessSegm()(
        [{}, {}], {"pred_masks": masks}, torch.tensor([[20, 10], [30, 30]]), torch.tensor([[8, 8], [8, 4]])
    )
    assert results[0]["masks"].shape == (1, 1, 20, 10) and results[0]["masks"].dtype == torch.uint8
    assert (results[0]["masks"][..., :10, :] == 1).all() and (results[0]["masks"][..., 10:, :] == 0).all()
    assert (results[1]["masks"][..., :22] == 1).all()


def test_ids_survive_their_colours():
    ids = np.array([[0, 1, 255], [256, 65536, 2**24 - 1]])
    assert np.array_equal(decode_ids(encode_ids(ids)), ids)


def test_panoptic_shares_the_pixels_out():
    masks = torch.full((1, 4, 8, 8), -9.0)
    masks[0, 0, :, :4] = 9.0
    masks[0, 1, :4, 4:] = 9.0
    masks[0, 2, 4:, 4:] = 9.0
    masks[0, 3] = 20.0  # not an object: its mask takes no part
    outputs = {"pred_logits": confident(0, 0, 1, NO_OBJECT), "pred_masks": masks}
    (result,) = PostProcessPanoptic(THINGS)(outputs, [(8, 8)], torch.tensor([[16, 8]]))
    ids = decode_ids(result["png_string"])
    assert ids.shape == (16, 8)
    assert (ids[:, :4] == 0).all() and (ids[:8, 4:] == 1).all() and (ids[8:, 4:] == 2).all()
    assert result["segments_info"] == [
        {"id": 0, "isthing": True, "category_id": 0, "area": 64},
        {"id": 1, "isthing": True, "category_id": 0, "area": 32},
        {"id": 2, "isthing": False, "category_id": 1, "area": 32},
    ]


def test_panoptic_merges_stuff_and_drops_specks():
    masks = torch.full((1, 4, 8, 8), -9.0)
    masks[0, 0, :, :4] = 9.0  # stuff
    masks[0, 1, :, 4:] = 8.0  # another class of stuff
    masks[0, 2, :, 4:6] = 9.0  # the first stuff again
    masks[0, 3, 0, 6:8] = 9.0  # a thing of two pixels
    outputs = {"pred_logits": confident(1, 2, 1, 0), "pred_masks": masks}
    (result,) = PostProcessPanoptic(THINGS)(outputs, [(8, 8)])
    ids = decode_ids(result["png_string"])
    # As published: the merged segment and the speck are gone, then the pixels are shared out among those that are left.
    assert [(s["category_id"], s["area"]) for s in result["segments_info"]] == [(1, 32), (2, 32)]
    assert (ids[:, :4] == 0).all() and (ids[:, 4:] == 1).all()


def test_panoptic_merges_stuff_where_nothing_is_small(monkeypatch):
    """Without the limit on small areas, the merged number shows in the map."""
    monkeypatch.setattr(PostProcessPanoptic, "smallest_area", -1)
    masks = torch.full((1, 2, 4, 4), -9.0)
    masks[0, 0, :, :2], masks[0, 1, :, 2:] = 9.0, 9.0
    stuff = PostProcessPanoptic(THINGS)({"pred_logits": confident(1, 1), "pred_masks": masks}, [(4, 4)])
    things = PostProcessPanoptic(THINGS)({"pred_logits": confident(0, 0), "pred_masks": masks}, [(4, 4)])
    assert [s["area"] for s in stuff[0]["segments_info"]] == [16, 0]
    assert [s["area"] for s in things[0]["segments_info"]] == [8, 8]


def test_panoptic_without_a_segment():
    outputs = {"pred_logits": confident(NO_OBJECT), "pred_masks": torch.rand(1, 1, 4, 4)}
    (result,) = PostProcessPanoptic(THINGS)(outputs, [(8, 8)], [(5, 6)])
    assert result["segments_info"] == [] and (decode_ids(result["png_string"]) == np.zeros((5, 6))).all()
    with pytest.raises(ValueError, match="expected a size for each of 1 images; got 2 processed_sizes"):
        PostProcessPanoptic(THINGS)(outputs, [(8, 8), (8, 8)])


@pytest.mark.parametrize("pixels, segments", [(4, 1), (5, 2)])
def test_a_segment_of_four_pixels_is_a_speck_and_one_of_five_is_not(pixels, segments):
    masks = torch.full((1, 2, 8, 8), -9.0)
    masks[0, 0] = 5.0
    masks[0, 1].view(-1)[:pixels] = 9.0
    (result,) = PostProcessPanoptic(THINGS)({"pred_logits": confident(0, 0), "pred_masks": masks}, [(8, 8)])
    assert [s["area"] for s in result["segments_info"]] == ([64 - pixels, pixels] if segments == 2 else [64])


def test_a_query_that_is_not_sure_has_no_segment():
    masks = torch.full((1, 2, 8, 8), -9.0)
    masks[0, 0, :, :4], masks[0, 1, :, 4:] = 9.0, 9.0
    logits = confident(0, 0)
    logits[0, 1] = torch.tensor([2.0, 0.5, 0.0, 0.0])  # a probability of 0.68
    outputs = {"pred_logits": logits, "pred_masks": masks}
    assert [s["area"] for s in PostProcessPanoptic(THINGS)(outputs, [(8, 8)])[0]["segments_info"]] == [64]
    assert len(PostProcessPanoptic(THINGS, threshold=0.6)(outputs, [(8, 8)])[0]["segments_info"]) == 2
