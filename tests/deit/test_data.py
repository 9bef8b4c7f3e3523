"""Folders, tar files, iNaturalist, CIFAR: what is read, in which order, and the messages for mistakes."""

import inspect
import io
import json
import random
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms

from deit_irpe.data import build_dataset, datasets, images
from deit_irpe.data.classes import check_same_classes
from deit_irpe.data.tar_files import TarImages
from deit_irpe.data.transforms import _posterize, build_transform
from irpe_train.pixels import UnreadableImage
from tests.helpers.tiny_images import write_images


def pack(folder, tar_file, nested=False):
    """``folder/<class>/*`` as one tar: plain members, or an inner tar for each class, as ImageNet is distributed."""
    with tarfile.open(tar_file, "w") as tar:
        for class_folder in sorted(folder.iterdir(), reverse=True):  # the order in the tar must not matter
            if not nested:
                tar.add(class_folder, class_folder.name)
                continue
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for image in class_folder.iterdir():
                    inner.add(image, image.name)
            member = tarfile.TarInfo(f"{class_folder.name}.tar")
            member.size = len(buffer.getvalue())
            tar.addfile(member, io.BytesIO(buffer.getvalue()))
    return tar_file


@pytest.mark.parametrize("nested", [False, True])
def test_a_tar_is_the_same_data_set_as_its_folder(colours, tmp_path, nested):
    folder = images.FolderImages(colours / "val")
    tar = TarImages(pack(colours / "val", tmp_path / "val.tar", nested))
    assert tar.classes == folder.classes == ["ant", "bee", "cat", "dog"]
    assert tar.labels.tolist() == folder.labels.tolist() and len(tar) == 22
    for index in (0, 7, 21):
        assert np.array_equal(np.asarray(tar[index][0]), np.asarray(folder[index][0]))


def test_grey_images_become_rgb_and_nested_folders_count(tmp_path):
    (tmp_path / "a" / "deep").mkdir(parents=True)
    Image.new("L", (5, 4), 7).save(tmp_path / "a" / "deep" / "x.PNG")
    image, label = images.FolderImages(tmp_path)[0]
    assert (image.mode, image.size, label) == ("RGB", (5, 4), 0)


def test_folders_may_lie_deeper_than_python_calls(tmp_path):
    deepest = tmp_path / "a" / "/".join("d" * 200)
    deepest.mkdir(parents=True)
    Image.new("L", (5, 4), 7).save(deepest / "x.png")
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 150)
    try:
        assert len(images.FolderImages(tmp_path)) == 1
    finally:
        sys.setrecursionlimit(before)


def test_number_of_classes_comes_from_the_data_for_tar_too(colours, tmp_path):
    pack(colours / "train", tmp_path / "train.tar")
    assert len(build_dataset(tmp_path, True, load_tar=True).classes) == 4


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (lambda root: None, FileNotFoundError, "--data-path .*nowhere: no such folder"),
        (lambda root: root.mkdir(), FileNotFoundError, "val: no such folder.* or --val-split to hold"),
        (
            lambda root: write_images(root / "val", {"a": 1, "b": 0}),
            ValueError,
            r"val/b: no images in this class folder",
        ),
        (lambda root: write_images(root, {"val": 2}), ValueError, "class folders.*images here are in no class folder"),
    ],
)
def test_a_wrong_folder_is_named(tmp_path, damage, error, words):
    root = tmp_path / "nowhere"
    damage(root)
    with pytest.raises(error, match=words):
        build_dataset(root, train=False)


def test_images_beside_the_classes_are_reported(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("deit_irpe.data.images.logger.warning", said.append)
    write_images(tmp_path, {"val/a": 1, "val/b": 1, "val": 2})
    assert len(build_dataset(tmp_path, train=False)) == 2
    assert said == [f"{tmp_path}/val/0.png: beside the class folders; 2 images without a class are left out"]


def test_a_wrong_tar_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"val\.tar: no such file \(--load-tar"):
        build_dataset(tmp_path, False, load_tar=True)
    (tmp_path / "val.tar").write_bytes(b"no tar" * 500)
    with pytest.raises(ValueError, match="not an uncompressed tar file"):
        build_dataset(tmp_path, False, load_tar=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        tar.add(tmp_path / "x.png", "x.png")
    with pytest.raises(ValueError, match="x.png is not in a class folder"):
        build_dataset(tmp_path, False, load_tar=True)
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        tar.add(tmp_path / "x.png", "a/../../x.png")
    with pytest.raises(ValueError, match="x.png. points outside the archive"):
        build_dataset(tmp_path, False, load_tar=True)
    tarfile.open(tmp_path / "val.tar", "w").close()
    with pytest.raises(ValueError, match="no images in it"):
        build_dataset(tmp_path, False, load_tar=True)


def test_a_tar_member_that_claims_to_be_huge_is_refused(tmp_path):
    member = tarfile.TarInfo("a/x.png")
    member.size = 2**40
    (tmp_path / "val.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + b"x" * 5000)
    with pytest.raises(ValueError, match="val.tar: not an uncompressed tar file"):
        build_dataset(tmp_path, False, load_tar=True)


def test_different_classes_are_named():
    with pytest.raises(ValueError, match="train and val have different classes; only in train: dog; only in val: fox"):
        check_same_classes(["cat", "dog"], ["cat", "fox"])


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_a_damaged_image_is_named(tmp_path, content):
    write_images(tmp_path, {"a": 1})
    file = tmp_path / "a" / "0.png"
    file.write_bytes(file.read_bytes()[:200] if content is None else content)
    with pytest.raises(UnreadableImage, match=r"a/0.png: this image cannot be read"):
        images.FolderImages(tmp_path)[0]


def test_inaturalist_numbers_classes_by_first_appearance_in_training(tmp_path):
    ranks = [{"name": f"species{i}", "genus": "g1" if i < 2 else "g0"} for i in range(3)]
    image = lambda i: {"file_name": f"train_val2018/Birds/{i}/x{i}.jpg"}  # noqa: E731
    (tmp_path / "categories.json").write_text(json.dumps(ranks))
    (tmp_path / "train2018.json").write_text(
        json.dumps({"annotations": [{"category_id": i} for i in (2, 0, 1)], "images": [image(i) for i in (2, 0, 1)]})
    )
    (tmp_path / "val2018.json").write_text(json.dumps({"annotations": [], "images": [image(0)]}))
    (tmp_path / "train_val2018" / "0").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "train_val2018" / "0" / "x0.jpg")
    val = build_dataset(tmp_path, False, data_set="INAT")
    assert val.classes == ["species2", "species0", "species1"] and val[0][1] == 1
    assert build_dataset(tmp_path, True, data_set="INAT", inat_category="genus").classes == ["g0", "g1"]
    with pytest.raises(FileNotFoundError, match="train2019.json: no such file"):
        build_dataset(tmp_path, True, data_set="INAT19")


def test_missing_cifar_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no cifar-100-python/ there"):
        build_dataset(tmp_path, True, data_set="CIFAR")


@pytest.mark.parametrize("interpolation", ["random", "bilinear", "bicubic", "lanczos", "hamming"])
def test_every_interpolation_of_crops_works_with_the_augmentation(interpolation):
    augmentation = build_transform(True, 40, interpolation=interpolation)
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (60, 50, 3)).astype(np.uint8))
    for _ in range(30):  # rotations and shears are among the draws
        assert augmentation(image).shape == (3, 40, 40)
    if interpolation != "random":
        assert augmentation.transforms[0].interpolation == transforms.InterpolationMode(interpolation)


def test_evaluation_transform_is_the_published_one():
    """Short side to int(256 / 224 * size), bicubic, centre crop, ImageNet's mean and standard deviation."""
    resize, crop, _, normalise = build_transform(False, 224).transforms
    assert (resize.size, resize.interpolation, crop.size) == (256, transforms.InterpolationMode.BICUBIC, (224, 224))
    assert build_transform(False, 384).transforms[0].size == 438
    assert (tuple(normalise.mean), tuple(normalise.std)) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    image = Image.new("RGB", (300, 500))
    assert build_transform(False, (96, 160))(image).shape == (3, 96, 160)


@pytest.mark.parametrize(("height", "width"), [(40, 61), (61, 40), (37, 37)])
@pytest.mark.parametrize("size", [35, (35, 48), (48, 35)])
def test_the_centre_is_cut_out_to_the_pixel(height, width, size):
    """The short side becomes 256/224 of the longer requested side; the crop is centred."""
    pixels = np.random.RandomState(0).randint(0, 256, (height, width, 3), dtype=np.uint8)
    want_h, want_w = (size, size) if isinstance(size, int) else size
    short = int(256 / 224 * max(want_h, want_w))
    scaled_h, scaled_w = (
        (short, int(short * width / height)) if height <= width else (int(short * height / width), short)
    )
    scaled = np.asarray(Image.fromarray(pixels).resize((scaled_w, scaled_h), Image.Resampling.BICUBIC))
    top, left = round((scaled_h - want_h) / 2), round((scaled_w - want_w) / 2)
    wanted = scaled[top : top + want_h, left : left + want_w].astype(np.float32) / 255
    wanted = (wanted - IMAGENET_DEFAULT_MEAN) / IMAGENET_DEFAULT_STD
    seen = build_transform(False, size)(Image.fromarray(pixels)).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(seen, wanted, atol=1e-5)


def test_an_image_one_pixel_wide_takes_no_memory():
    """Its ends would be cut off anyway; scaled whole, this one would have 256 x 2,560,000 pixels."""
    image = Image.new("RGB", (10_000, 1), (9, 9, 9))
    assert build_transform(False, 224)(image).shape == (3, 224, 224)
    resize = build_transform(False, 224).transforms[0]
    assert resize(image).size == (64 * 256, 256) and resize(Image.new("RGB", (64, 1))).size == (64 * 256, 256)


def test_training_transform_is_the_published_one():
    names = [type(step).__name__ for step in build_transform(True, 224).transforms]
    assert names == [
        "RandomResizedCropAndInterpolation",
        "RandomHorizontalFlip",
        "RandAugment",
        "MaybeToTensor",
        "Normalize",
        "RandomErasing",
    ]
    crop = build_transform(True, 224).transforms[0]
    assert (tuple(crop.size), tuple(crop.scale)) == ((224, 224), (0.08, 1.0))
    assert build_transform(True, (96, 160))(Image.new("RGB", (300, 500))).shape == (3, 96, 160)


def test_each_flag_reaches_its_step_of_the_augmentation():
    steps = build_transform(
        True,
        64,
        aa=None,
        color_jitter=0.3,
        hflip=0.25,
        reprob=0.75,
        remode="const",
        recount=2,
        interpolation="bilinear",
    ).transforms
    crop, flip, jitter, *_, erasing = steps
    assert crop.interpolation == transforms.InterpolationMode.BILINEAR and flip.p == 0.25
    np.testing.assert_allclose((jitter.brightness, jitter.contrast, jitter.saturation), [(0.7, 1.3)] * 3)
    assert (erasing.probability, erasing.min_count, erasing.max_count) == (0.75, 1, 2)
    assert not erasing.rand_color and not erasing.per_pixel  # const
    pixel = build_transform(True, 64, remode="pixel").transforms[-1]
    assert pixel.per_pixel and (pixel.probability, pixel.max_count) == (0.25, 1)


@pytest.mark.parametrize("policy", ["rand-m10-n15-inc1", "original", "v0"])
def test_every_augmentation_works_at_its_extreme(policy):
    """Posterize to 0 bits, which newer Pillow refuses, is part of the published policy (magnitude 9, deviation 0.5)."""
    transform = build_transform(True, 32, aa=policy)
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (32, 32, 3), dtype=np.uint8))
    random.seed(0)
    for _ in range(30):
        assert transform(image).shape == (3, 32, 32)
    assert _posterize(image, 0).getextrema() == ((0, 0),) * 3


def test_a_failing_augmentation_is_not_taken_for_an_unreadable_image(colours):
    def broken(image):
        raise ValueError("bits")

    with pytest.raises(RuntimeError, match="the augmentation failed on this image"):
        images.FolderImages(colours / "val", broken)[0]


def test_small_images_are_shifted_and_not_scaled():
    _, shift, *others = build_transform(True, 32).transforms
    assert isinstance(shift, transforms.RandomCrop) and (shift.size, shift.padding) == ((32, 32), 4)
    large = build_transform(True, 33).transforms  # the same but for the crop
    assert [type(step) for step in others] == [type(step) for step in large[1:]]
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (32, 32, 3), dtype=np.uint8))
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    evaluated = build_transform(False, 32)(image) * std + mean
    assert torch.allclose(evaluated, transforms.functional.to_tensor(image), atol=1e-6)


def published_order(count, world_size, rank, epoch):
    """Repeated augmentation by the book: shuffle, three of each, pad, every world_size-th, cut to a multiple of 256."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch)).tolist()
    order = [index for index in order for _ in range(3)]
    order += order[: -len(order) % world_size]
    return order[rank::world_size][: count // 256 * 256 // world_size]


@pytest.mark.parametrize(("count", "world_size"), [(256, 1), (700, 1), (700, 4), (1000, 8), (515, 2)])
def test_repeated_augmentation_visits_images_in_the_published_order(count, world_size):
    dataset = images.LabelledImages(["a"], [""] * count, [0] * count)
    for rank in range(world_size):
        sampler = datasets.repeated_augmentation_sampler(dataset, world_size, rank)
        sampler.set_epoch(3)
        assert list(sampler) == published_order(count, world_size, rank, 3)
        assert len(sampler) == count // 256 * 256 // world_size


def test_fewer_than_256_images_are_still_visited():
    dataset = images.LabelledImages(["a"], [""] * 100, [0] * 100)
    sampler = datasets.repeated_augmentation_sampler(dataset, 2, 0)
    assert len(sampler) == len(list(sampler)) == 50


@pytest.mark.parametrize(("count", "read"), [(0, []), (3, [0, 1, 2]), (50_000, list(range(0, 50_000, 3_125)))])
def test_images_spread_over_a_validation_set_are_read_at_the_start(count, read):
    class ValSet:
        seen = []

        def __len__(self):
            return count

        def __getitem__(self, index):
            self.seen.append(index)

    val_set = ValSet()
    images.read_a_sample(val_set)
    assert val_set.seen == read


def test_an_unknown_kind_of_data_is_not_taken_for_folders(colours):
    with pytest.raises(ValueError, match="build_dataset: unknown data_set 'imagenet'; expected one of CIFAR, IMNET"):
        build_dataset(colours, True, data_set="imagenet")
