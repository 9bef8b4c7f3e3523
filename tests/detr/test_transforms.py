import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from detr_irpe.data.transforms import (
    RandomShortSide,
    RandomSizeCrop,
    eval_transforms,
    prepare_image,
    resized_size,
    train_transforms,
)


def sample(height=60, width=90, boxes=((10.0, 20.0, 40.0, 50.0),)):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))
    boxes = torch.tensor(boxes).reshape(-1, 4)
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = 1
    return image, {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        "masks": tv_tensors.Mask(masks),
        "labels": torch.arange(len(boxes)),
        "area": (boxes[:, 2:] - boxes[:, :2]).prod(1),
        "iscrowd": torch.zeros(len(boxes), dtype=torch.int64),
    }


@pytest.mark.parametrize(
    "size, short, longest, wanted",
    [
        ((480, 640), 800, 1333, (800, 1066)),  # 1066.67 is cut, not rounded
        ((640, 480), 800, 1333, (1066, 800)),
        ((427, 640), 800, 1333, (800, 1199)),
        ((333, 500), 800, 1333, (800, 1201)),
        ((300, 640), 800, 1333, (625, 1333)),  # 624.84 is rounded, since the long side would be 1706
        ((612, 612), 800, 1333, (800, 800)),
        ((375, 500), 480, None, (480, 640)),
        ((1, 60_000), 800, 1333, (1, 1333)),  # there 0 x 0
    ],
)
def test_sizes_follow_the_published_rounding(size, short, longest, wanted):
    assert resized_size(*size, short, longest) == wanted


def test_evaluation_is_the_short_side_800_and_normalised():
    image, target = eval_transforms()(*sample(480, 640))
    assert image.shape == (3, 800, 1066) and target["size"].tolist() == [800, 1066]
    wanted = torch.tensor([[25 / 640, 35 / 480, 30 / 640, 30 / 480]])
    torch.testing.assert_close(target["boxes"], wanted, rtol=1e-3, atol=0)
    assert type(target["boxes"]) is torch.Tensor and type(target["masks"]) is torch.Tensor
    assert target["masks"].dtype == torch.bool and target["masks"].shape == (1, 800, 1066)
    assert torch.equal(image, prepare_image(sample(480, 640)[0]))
    torch.set_default_dtype(torch.float64)  # as a notebook may: the model's type, as with torchvision's ToTensor
    try:
        torch.testing.assert_close(prepare_image(sample(480, 640)[0]), image.double(), rtol=0, atol=1e-6)
    finally:
        torch.set_default_dtype(torch.float32)
    assert eval_transforms(80)(*sample(40, 100))[0].shape == (3, 53, 132)  # not 80 x 200
    white, _ = eval_transforms(32)(Image.new("RGB", (32, 32), (255, 255, 255)), sample(32, 32, [])[1])
    wanted = torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    torch.testing.assert_close(white[:, 0, 0], wanted)


def test_published_sizes_are_the_default():
    _, choice, _ = train_transforms().transforms
    plain, cropped = choice.transforms
    assert plain.sizes == [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800] and plain.max_size == 1333
    first, crop, last = cropped.transforms
    assert (first.sizes, first.max_size) == ([400, 500, 600], 32 * 600)
    assert (crop.min_size, crop.max_size) == (384, 600)
    assert (last.sizes, last.max_size) == (plain.sizes, 1333)
    assert train_transforms(80).transforms[1].transforms[0].sizes[0] == 48


def test_a_thin_image_stays_small(monkeypatch):
    pixels, resize = [], v2.functional.resize
    monkeypatch.setattr(v2.functional, "resize", lambda x, size: pixels.append(size[0] * size[1]) or resize(x, size))
    for height, width in ((1, 3000), (20_000, 1)) * 4:
        image, _ = train_transforms(80)(*sample(height, width, []))
        assert min(image.shape[1:]) >= 1 and max(image.shape[1:]) < 2 * 133  # rounding up 0.5 doubles the long side
    assert len(pixels) > 12 and max(pixels) <= 60 * 1920


def test_no_size_shrinks_to_nothing():
    for _ in range(9):
        image, _ = train_transforms(1)(*sample())
        assert min(image.shape) >= 1


def test_resizing_scales_boxes_masks_and_area():
    image, target = RandomShortSide([120])(*sample())
    assert image.size == (180, 120) and target["boxes"].tolist() == [[20, 40, 80, 100]]
    assert target["masks"].shape == (1, 120, 180) and target["masks"].sum() == 60 * 60
    assert target["area"].tolist() == [3600]


def test_crops_are_within_bounds_and_drop_what_is_outside():
    boxes = ((0.0, 0.0, 20.0, 15.0), (70.0, 45.0, 90.0, 60.0), (30.0, 20.0, 60.0, 40.0))
    seen = set()
    for seed in range(60):
        torch.manual_seed(seed)
        image, target = RandomSizeCrop(30, 50)(*sample(boxes=boxes))
        assert 30 <= image.width <= 50 and 30 <= image.height <= 50
        assert target["masks"].shape[1:] == (image.height, image.width)
        corners = target["boxes"]
        assert (corners[:, 2:] > corners[:, :2]).all() and (corners >= 0).all()
        assert (corners[:, 2] <= image.width).all() and (corners[:, 3] <= image.height).all()
        assert torch.equal(target["area"], target["masks"].flatten(1).sum(1).float())
        seen |= {tuple(target["labels"].tolist())}
    assert len(seen) > 2 and max(map(len, seen)) > 1  # some crops have several objects, so the lines above saw some
    for seed in range(30):
        torch.manual_seed(seed)
        image, _ = RandomSizeCrop(3, 4)(Image.new("RGB", (6, 5), "white"), sample(5, 6, [])[1])
        assert np.asarray(image).min() == 255  # outside the image it would be black
    small, _ = RandomSizeCrop(300, 500)(*sample())
    assert small.size == (90, 60)  # a side shorter than the least crop is kept whole


def test_flipping_mirrors_boxes_and_masks():
    flip = train_transforms().transforms[0]
    flip.p = 1.0
    image, target = flip(*sample())
    assert target["boxes"].tolist() == [[50, 20, 80, 50]]
    assert target["masks"][0, 20:50, 50:80].all()
    assert np.array_equal(np.asarray(image), np.asarray(sample()[0])[:, ::-1])
