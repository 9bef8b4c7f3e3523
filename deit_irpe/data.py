"""Labelled images from a folder, a tar file or CIFAR, and the transforms of DeiT."""

import io
import itertools
import json
import os
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, auto_augment, create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Dataset, Sampler
from torchvision import datasets, transforms

IMAGE_SUFFIXES = datasets.folder.IMG_EXTENSIONS
INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")


class UnreadableImage(OSError):
    """An image file that is damaged, empty or no image at all; the message names it."""


class LabelledImages(Dataset):
    """(transformed RGB image, class number) pairs; subclasses say where the bytes are.

    Names and labels are arrays, not Python objects: the workers of a loader share them instead of copying them.
    """

    def __init__(self, classes: list[str], names: list[str], labels: list[int], transform=None):
        self.classes = classes
        self.names = np.array([os.fsencode(name) for name in names])
        self.labels = np.array(labels, dtype=np.int64)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return os.fsdecode(self.names[index])

    def read(self, index: int) -> bytes:
        return Path(self.name(index)).read_bytes()

    def __getitem__(self, index: int):
        try:
            image = Image.open(io.BytesIO(self.read(index))).convert("RGB")
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
            raise UnreadableImage(f"{self.name(index)}: this image cannot be read ({error})") from error
        try:
            return image if self.transform is None else self.transform(image), int(self.labels[index])
        except Exception as error:  # not the image's fault: it must not be skipped as an unreadable one
            raise RuntimeError(f"{self.name(index)}: the augmentation failed on this image ({error})") from error


class FolderImages(LabelledImages):
    """``root/<class>/**/*.jpg``: one folder a class, numbered in alphabetical order."""

    def __init__(self, root: Path, transform=None):
        _need(root.is_dir(), FileNotFoundError, f"{root}: no such folder. It should hold one folder for each class; "
              "see README, \"Data\"")
        classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        _need(classes, ValueError, f"{root}: no class folders in it. Images lie in one folder for each class "
              f"({root}/<class>/x.jpg)" + ("; the images here lie flat" if _images_below(root) else ""))
        names, labels = [], []
        for label, name in enumerate(classes):
            files = _images_below(root / name)
            _need(files, ValueError, f"{root / name}: no images in this class folder (looked for "
                  f"{', '.join(IMAGE_SUFFIXES)}); remove the folder or fill it")
            names += files
            labels += [label] * len(files)
        super().__init__(classes, names, labels, transform)


def _images_below(folder: Path) -> list[str]:
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        found += [os.path.join(parent, file) for file in sorted(files) if file.lower().endswith(IMAGE_SUFFIXES)]
    return found


class TarImages(LabelledImages):
    """An uncompressed tar file: ``<class>/x.jpg`` members, or (as ImageNet is handed out) one inner tar for each class.

    Only offsets are kept, and bytes are read at their place: nothing is unpacked, and workers share one file safely.
    Classes and images are in the order of ``FolderImages``, so a folder and its tar are the same data set.
    """

    def __init__(self, file: Path, transform=None):
        _need(file.is_file(), FileNotFoundError, f"{file}: no such file (--load-tar reads train.tar and val.tar)")
        try:
            members = sorted(_tar_members(file))
        except tarfile.TarError as error:
            raise ValueError(f"{file}: not an uncompressed tar file ({error})") from error
        _need(members, ValueError, f"{file}: no images in it (looked for {', '.join(IMAGE_SUFFIXES)})")
        flat = [name for label, name, _, _ in members if not label]
        _need(not flat, ValueError, f"{file}: {', '.join(flat[:1])} lies in no class folder; expected <class>/x.jpg")
        classes = sorted({label for label, *_ in members})
        number = {label: index for index, label in enumerate(classes)}
        super().__init__(classes, [f"{file}:{name}" for _, name, _, _ in members],
                         [number[label] for label, *_ in members], transform)
        self.file = file
        self.places = np.array([place for *_, place, _ in members], dtype=np.int64)
        self.sizes = np.array([size for *_, size in members], dtype=np.int64)

    def read(self, index: int) -> bytes:
        with open(self.file, "rb") as tar:
            tar.seek(self.places[index])
            return tar.read(self.sizes[index])


def _tar_members(file: Path):
    """Yields (class, name, offset in the file, bytes) of every image."""
    with tarfile.open(file, "r:") as tar:
        for member in tar:
            _need(".." not in Path(member.name).parts and not Path(member.name).is_absolute(), ValueError,
                  f"{file}: refused: {member.name!r} points outside of the archive")
            if not member.isreg() or member.issparse():
                continue
            if member.name.lower().endswith(".tar"):
                with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
                    for image in inner:
                        if image.isreg() and image.name.lower().endswith(IMAGE_SUFFIXES):
                            yield Path(member.name).stem, image.name, member.offset_data + image.offset_data, image.size
            elif member.name.lower().endswith(IMAGE_SUFFIXES):
                yield Path(member.name).parent.name, member.name, member.offset_data, member.size


class INatImages(LabelledImages):
    """iNaturalist 2018 or 2019: labels of one taxonomic rank, numbered as they appear in the training annotations."""

    def __init__(self, root: Path, train: bool, year: int, category: str, transform=None):
        ranks = _read_json(root / "categories.json")
        numbers: dict[str, int] = {}
        for annotation in _read_json(root / f"train{year}.json")["annotations"]:
            numbers.setdefault(ranks[annotation["category_id"]][category], len(numbers))
        names, labels = [], []
        for image in _read_json(root / f"{'train' if train else 'val'}{year}.json")["images"]:
            top, _, category_id, file = image["file_name"].split("/")  # train_val2018/Birds/1234/x.jpg
            names.append(str(root / top / category_id / file))  # the published layout has no folder for Birds
            labels.append(numbers[ranks[int(category_id)][category]])
        super().__init__(list(numbers), names, labels, transform)


def _read_json(file: Path):
    _need(file.is_file(), FileNotFoundError, f"{file}: no such file; the iNaturalist data sets bring it")
    return json.loads(file.read_text())


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
    _need(root.is_dir(), FileNotFoundError, f"--data-path {data_path}: no such folder. See README, \"Data\"")
    if data_set == "CIFAR":
        return _cifar100(root, train, transform)
    if data_set in ("INAT", "INAT19"):
        return INatImages(root, train, 2018 if data_set == "INAT" else 2019, inat_category, transform)
    if data_set == "WDS":
        from deit_irpe.shards import ShardImages  # not above: it is made of LabelledImages
        return ShardImages(root, train, transform)
    if data_set == "HFDS":
        from deit_irpe.hugging_face import HuggingFaceImages
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
    _need(not only, ValueError, f"{names[0]} and {names[1]} have different classes; {'; '.join(only)}")


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


def _need(condition, error: type[Exception], message: str) -> None:
    if not condition:
        raise error(message)
