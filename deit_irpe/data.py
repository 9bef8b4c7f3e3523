"""The data sets of DeiT by name, their transforms, and repeated augmentation."""

import itertools
from pathlib import Path

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, auto_augment, create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Dataset, Sampler
from torchvision import datasets, transforms

from deit_irpe.hugging_face import HuggingFaceImages
from deit_irpe.images import FolderImages, INatImages, TarImages
from deit_irpe.shards import ShardImages

INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")


def _cifar100(root: Path, train: bool, transform=None) -> Dataset:
    try:
        return datasets.CIFAR100(root, train=train, transform=transform)
    except RuntimeError as error:
        raise FileNotFoundError(f"{root}: no cifar-100-python/ there ({error}). Unpack cifar-100-python.tar.gz "
                                "there") from error


def build_dataset(data_path: str | Path, train: bool, *, data_set: str = "IMNET", load_tar: bool = False,
                  inat_category: str = "name", transform=None) -> Dataset:
    """The training or validation set, with ``classes`` (their names, in order).

    Raises: FileNotFoundError, ValueError: something is missing or empty; the message says what was looked for.
        ImportError: ``HFDS`` without Hugging Face ``datasets``.
    """
    root, split = Path(data_path), "train" if train else "val"
    if not root.is_dir():
        raise FileNotFoundError(f"--data-path {data_path}: no such folder. See README, \"Data\"")
    if data_set == "CIFAR":
        return _cifar100(root, train, transform)
    if data_set in ("INAT", "INAT19"):
        return INatImages(root, train, 2018 if data_set == "INAT" else 2019, inat_category, transform)
    if data_set == "WDS":
        return ShardImages(root, train, transform)
    if data_set == "HFDS":
        return HuggingFaceImages(root, train, transform)
    if load_tar:
        return TarImages(root / f"{split}.tar", transform)
    return FolderImages(root / split, transform)


def check_same_classes(one: list[str], other: list[str], names: tuple[str, str] = ("train", "val")) -> None:
    """Raises ValueError, naming the classes, unless both lists (of the two data sets ``names``) have the same ones."""
    only = []
    for name, missing in ((names[0], set(one) - set(other)), (names[1], set(other) - set(one))):
        if missing:
            some = ", ".join(sorted(missing)[:5]) + (f", ... ({len(missing)} in all)" if len(missing) > 5 else "")
            only.append(f"only in {name}: {some}")
    if only:
        raise ValueError(f"{names[0]} and {names[1]} have different classes; {'; '.join(only)}")


def build_transform(train: bool, input_size: int | tuple[int, int] = 224, *, color_jitter: float = 0.4,
                    aa: str | None = "rand-m9-mstd0.5-inc1", interpolation: str = "bicubic", reprob: float = 0.25,
                    remode: str = "pixel", recount: int = 1, hflip: float = 0.5) -> transforms.Compose:
    """The augmentation of DeiT, or its evaluation transform.

    Images of up to 32 pixels are shifted in training, neither cropped nor scaled, as published.

    Args:
        input_size: pixels, one number or (height, width). Evaluation resizes the short side to 256/224 of it (of its
            longer side when it is not square), then cuts the centre.
    """
    size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    small = max(size) <= 32
    to_size = transforms.Resize(size, transforms.InterpolationMode.BICUBIC)  # leaves images of that very size alone
    if train:
        steps = create_transform(size, is_training=True, color_jitter=color_jitter, auto_augment=aa or None,
                                 interpolation=interpolation, re_prob=reprob, re_mode=remode, re_count=recount,
                                 hflip=hflip).transforms
        for step in steps:
            _let_posterize_keep_no_bits(step)
        return transforms.Compose([to_size, transforms.RandomCrop(size, padding=4), *steps[1:]] if small else steps)
    cut = [transforms.Resize(int(256 / 224 * max(size)), transforms.InterpolationMode.BICUBIC),
           transforms.CenterCrop(size)]
    return transforms.Compose([*([to_size] if small else cut), transforms.ToTensor(),
                               transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)])


def _let_posterize_keep_no_bits(policy) -> None:
    """timm's policies ask for 0 bits at magnitude 10, which blackened the image until Pillow began to refuse it."""
    subpolicies = getattr(policy, "policy", [getattr(policy, "ops", [])])
    for op in itertools.chain.from_iterable(subpolicies):
        if getattr(op, "aug_fn", None) is auto_augment.posterize:
            op.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **_) -> Image.Image:
    return image.point(lambda _: 0) if bits_to_keep < 1 else auto_augment.posterize(image, bits_to_keep)


def repeated_augmentation_sampler(dataset: Dataset, world_size: int, rank: int) -> Sampler:
    """Three differently augmented copies of an image in one global batch; an epoch is as long as without them.

    As published, the length is cut to a multiple of 256 images; sets smaller than that, which this would leave empty,
    are used whole. Source: Hoffer et al., "Augment your batch"; Berman et al., "MultiGrain".
    """
    return RepeatAugSampler(dataset, num_replicas=world_size, rank=rank, shuffle=True, num_repeats=3,
                            selected_round=256 if len(dataset) >= 256 else 0)
