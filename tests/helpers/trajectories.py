"""Whole tiny training runs from inputs made by NumPy alone, for comparison with the published code.

Pictures, labels, weights and the order of the samples follow from names and numbers, so the published code and this one
start from the same bits. ``tests/evidence/trajectories.json`` has the published code's results.
"""

import argparse
import json
import math
import shlex
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.models import register_model
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

import deit_irpe.args
import deit_irpe.train
import detr_irpe.args
import detr_irpe.train
from deit_irpe.args import keywords
from detr_irpe.models import build_model
from irpe_train.checkpoint import read_checkpoint
from tests.helpers.processes import run_ranks

DEIT = shlex.split(
    "--batch-size 8 --epochs 6 --input-size 64 --lr 0.1 --warmup-epochs 2 --warmup-lr 1e-4 --model-ema-decay 0.9 "
    "--mixup 0 --cutmix 0 --drop-path 0 --no-repeated-aug --no-aug --model-kwargs embed_dim=64 depth=3 num_heads=2"
)
DETR = shlex.split(
    "--epochs 4 --lr_drop 2 --batch_size 2 --hidden_dim 64 --nheads 4 --enc_layers 2 --dec_layers 3 "
    "--dim_feedforward 128 --num_queries 12 --dropout 0 --backbone resnet18 --backbone_weights none --image_size 128 "
    "--augment none --eval_batch_size 2"
)
RUN = ["--num_workers", "0", "--device", "cpu", "--no-tensorboard"]
TOLERANCES = {
    "deit": {"loss": 2e-5, "rate": 1e-7, "weight": 1e-3},
    "detr": {"loss": 1e-4, "rate": 1e-7, "weight": 5e-3},
}


# --- inputs


def rng(label: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(label.encode()))


def picture(label: str, height: int, width: int, cells: int) -> Image.Image:
    """Noise over a coarse pattern; pictures whose labels begin with the same word share the pattern."""
    coarse = rng(label.split()[0]).randint(0, 256, (cells, cells, 3))
    noise = rng(label).randint(0, 256, (height, width, 3))
    rows, columns = np.arange(height) * cells // height, np.arange(width) * cells // width
    return Image.fromarray(((3 * coarse[rows][:, columns] + noise) // 4).astype(np.uint8))


def write_classes(root: Path) -> Path:
    """26 training and 29 validation pictures of 10 classes, some of another shape, some grey."""
    for split, count in (("train", 26), ("val", 29)):
        for i in range(count):
            height, width = (97, 80) if i % 7 == 3 else (73, 73)
            image = picture(f"class{i % 10} {split} {i}", height, width, 4)
            path = root / split / f"c{i % 10}" / f"{i:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            (image.convert("L") if i % 9 == 4 else image).save(path)
    return root


def write_objects(root: Path) -> Path:
    """8 training and 5 validation pictures with up to 4 boxes; one has none, one a crowd, one a box of no width."""
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train2017", 8), ("val2017", 5)):
        content = {"images": [], "annotations": [], "categories": [{"id": i, "name": f"c{i}"} for i in (1, 3, 17, 90)]}
        (root / split).mkdir()
        for i in range(count):
            r = rng(f"{split} {i}")
            height, width = (int(side) for side in r.randint(100, 201, 2))
            picture(f"scene{i} {split}", height, width, 6).save(root / split / f"{i:012}.png")
            content["images"].append({"id": 100 - i, "file_name": f"{i:012}.png", "height": height, "width": width})
            for k in range(0 if i == 2 else r.randint(1, 5)):
                w, h = np.round(r.uniform(0.3, 0.8, 2) * (width, height), 2).tolist()
                x, y = np.round(r.uniform(0, 1, 2) * (width - w, height - h), 2).tolist()
                category = (1, 3, 17, 90)[r.randint(4)]
                w = 0 if (split, i, k) == ("train2017", 4, 0) else w
                crowd = (i, k) == (3, 0)
                corners = [x, y, x + w, y, x + w, y + h, x, y + h] if k % 2 == 0 else [x, y, x + w, y + h, x, y + h]
                a = height * width // 3
                runs = {"counts": [0, a, height * width - a], "size": [height, width]}
                content["annotations"].append(
                    {
                        "id": len(content["annotations"]) + 1,
                        "image_id": 100 - i,
                        "category_id": category,
                        "bbox": [x, y, w, h],
                        "area": w * h,
                        "iscrowd": int(crowd),
                        "segmentation": runs if crowd else [corners],
                    }
                )
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def starting_weight(name: str, shape: torch.Size) -> Tensor:
    """The value of a tensor from its name; the scales keep a random network's signals and gradients sane."""
    n = rng(name).standard_normal(tuple(shape))
    leaf, backbone = name.split(".")[-1], "backbone" in name
    layer = "encoder" if "transformer.encoder" in name else "decoder" if "transformer.decoder" in name else None
    if leaf.startswith("lookup_table"):
        value = n if layer == "encoder" else 0.5 * n
    elif leaf == "running_var":
        value = 1 + 0.2 * np.abs(n)
    elif leaf == "running_mean":
        value = 0.1 * n
    elif leaf in ("cls_token", "pos_embed", "dist_token"):
        value = 0.3 * n
    elif "query_embed" in name:
        value = 2 * n
    elif leaf.endswith("bias"):
        value = 0.05 * n
    elif len(shape) == 1:
        value = (1 + 0.1 * n) * (0.25 if backbone and ".bn3." in name else 1)
    else:
        gain = 1.0
        if backbone:
            gain = math.sqrt(2)
        elif "class_embed" in name or "input_proj" in name:
            gain = 2.0
        elif leaf == "in_proj_weight":
            gain = np.ones((shape[0], 1))
            gain[: shape[0] * 2 // 3] = 4.0 if "multihead_attn" in name else 2.0
        elif "out_proj" in name:
            gain = 1.0 if "multihead_attn" in name else {"encoder": 0.4, "decoder": 0.5}[layer]
        elif layer:
            gain = 0.7
        value = gain * n / math.sqrt(math.prod(shape[1:]))
    if name.endswith("bn2.weight"):
        value = 0.25 * value
    return torch.from_numpy(np.asarray(value)).float()


def starting_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: starting_weight(name, tensor.shape) for name, tensor in model.state_dict().items()}


class Teacher(nn.Module):
    """The teacher network."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.teacher_conv = nn.Conv2d(3, 16, 8, stride=8)
        self.teacher_fc = nn.Linear(16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return 20 * self.teacher_fc(self.teacher_conv(images).mean((2, 3)).relu())


@register_model
def trajectory_teacher(pretrained: bool = False, num_classes: int = 10, **unused) -> nn.Module:
    return Teacher(num_classes)


# --- a run


@dataclass
class Recorded:
    """The result of a run: the same fields as ``published`` of a case."""

    loss: list[float]
    log: list[dict]
    groups: list[list[float]]
    epoch: int
    model: dict[str, list[float]]
    model_ema: dict[str, list[float]] | None


def replay(case: dict, folder: Path, change: Callable[[], None] | None = None) -> Recorded:
    """Train as ``case`` says, in a process of its own.

    Args:
        folder: empty; data, weights and the run's output go there.
        change: called in that process before the run, to test a change of the recipe.
    """
    (folder / "out").mkdir(parents=True)
    module, write, data_flag = {
        "deit": (deit_irpe, write_classes, "--data-path"),
        "detr": (detr_irpe, write_objects, "--coco_path"),
    }[case["tree"]]
    argv = [data_flag, str(write(folder / "data")), "--output_dir", str(folder / "out"), *RUN]
    if case["tree"] == "deit":
        argv += [
            *DEIT,
            "--model",
            case["model"],
            "--rpe",
            case["rpe"] or "none",
            "--finetune",
            str(folder / "start.pth"),
        ]
    else:
        argv += [*DETR, "--resume", str(folder / "start.pth")]
    argv += case["flags"]
    if "--distillation-type" in case["flags"]:
        torch.save({"model": starting_weights(Teacher())}, folder / "teacher.pth")
        argv += ["--teacher-model", "trajectory_teacher", "--teacher-path", str(folder / "teacher.pth")]
    main = partial(_recorded_main, module.train.main, case["tree"], folder, change)
    (ended,) = run_ranks(main, module.args.get_args_parser, argv, folder / "printed", timeout=300)
    assert ended.code == 0, ended.text
    return _recorded(folder, case["tree"])


def _recorded_main(main, tree: str, folder: Path, change, args: argparse.Namespace) -> None:
    """In the child: fix weights and order, record each loss that ``backward`` is called on."""
    DistributedSampler.__iter__ = lambda self: iter(np.random.RandomState(self.epoch).permutation(len(self.dataset)))
    losses, backward = [], Tensor.backward

    def noted(loss, *rest, **options):
        losses.append(loss.item())
        return backward(loss, *rest, **options)

    Tensor.backward = noted
    if change is not None:
        change()
    torch.save({"model": starting_weights(_model(tree, args))}, folder / "start.pth")
    main(args)
    (folder / "losses.json").write_text(json.dumps(losses))


def _model(tree: str, args: argparse.Namespace) -> nn.Module:
    if tree == "detr":
        return build_model(argparse.Namespace(**vars(args) | {"num_classes": 91}))[0]
    options = dict(num_classes=10, img_size=args.input_size) | keywords(args.model_kwargs)
    return deit_irpe.create_model(args.model, args.rpe, **options)


def _recorded(folder: Path, tree: str) -> Recorded:
    checkpoint = read_checkpoint(folder / "out" / "checkpoint.pth")
    start = read_checkpoint(folder / "start.pth")["model"]
    groups: dict[tuple, int] = {}
    for group in checkpoint["optimizer"]["param_groups"]:
        kind = (group["lr"], group["weight_decay"])
        groups[kind] = groups.get(kind, 0) + len(group["params"])
    return Recorded(
        loss=json.loads((folder / "losses.json").read_text()),
        log=[json.loads(line) for line in (folder / "out" / "log.txt").read_text().splitlines()],
        groups=sorted([count, *kind] for kind, count in groups.items()),
        epoch=checkpoint["epoch"],
        model=_summary(checkpoint["model"], start, tree),
        model_ema=_summary(checkpoint["model_ema"], start, tree) if "model_ema" in checkpoint else None,
    )


def _summary(weights: dict[str, Tensor], start: dict[str, Tensor], tree: str) -> dict[str, list[float]]:
    """``[sum, norm, norm of the change, number of elements]`` of each tensor that changed."""
    summary = {}
    for name, tensor in weights.items():
        new, old = (meaningful(tree, name, value.double()) for value in (tensor, start[name]))
        if new.numel() and not torch.equal(new, old):
            summary[name] = [new.sum().item(), new.norm().item(), (new - old).norm().item(), new.numel()]
    return summary


def meaningful(tree: str, name: str, tensor: Tensor) -> Tensor:
    """The part of a parameter whose gradient is more than rounding, which AdamW would turn into whole steps.

    Softmax does not see a bias on the keys; the first decoder layer starts with equal values everywhere; in DeiT's last
    block only the class token's output counts, and all its keys are in one bucket.
    """
    third = len(tensor) // 3
    if name.startswith("transformer.decoder.layers.0.self_attn.in_proj"):
        return tensor[2 * third :]
    if name.endswith(("qkv.bias", "in_proj_bias")):
        return torch.cat([tensor[:third], tensor[2 * third :]])
    if tree == "deit" and name.startswith(("blocks.2.attn.rpe_k", "blocks.2.attn.rpe_q.lookup_table_bias")):
        return tensor[:0]
    return tensor


# --- comparison


@dataclass
class Difference:
    """The largest difference of one kind; it and the tolerance are in the kind's own unit.

    Losses and what is logged: of ``1 + abs(published)``. Rates: of the published one. Weights: of the published change
    since the start, for sum (over ``sqrt(elements)``), norm and change.
    """

    kind: str
    compared: int
    largest: float
    tolerance: float
    where: str

    @property
    def within(self) -> bool:
        return self.largest <= self.tolerance  # NaN is not


def differences(case: dict, ours: Recorded) -> list[Difference]:
    """Ours against the published run, one line for each kind of number."""
    published, tolerance = case["published"], TOLERANCES[case["tree"]]
    log = {key: [entry.get(key) for entry in ours.log] for key in ours.log[0]}
    averages = {key: (getattr(ours, key), published[key]) for key in ("model", "model_ema") if key in published}
    exact = [
        ("keys of log.txt and their order", list(log), list(published["log"])),
        ("epoch of the checkpoint", ours.epoch, published["epoch"]),
        ("steps", len(ours.loss), len(published["loss"])),
        ("tensors in each group", [group[0] for group in ours.groups], [group[0] for group in published["groups"]]),
    ]
    for key, (here, theirs) in averages.items():
        exact.append((f"tensors that moved, {key}", sorted(here), sorted(theirs)))
        exact += [(f"elements of {name}", here[name][3], theirs[name][3]) for name in here.keys() & theirs.keys()]
    found = [
        _largest("keys and counts", [(name, float(a != b)) for name, a, b in exact], 0.0),
        _largest("loss of each step", _pairs("step", ours.loss, published["loss"]), tolerance["loss"], _relative),
    ]
    logged = [
        pair for key in log.keys() & published["log"].keys() for pair in _pairs(key, log[key], published["log"][key])
    ]
    rates = [pair for pair in logged if pair[0].startswith("train_lr")]
    figures = [pair for pair in logged if not pair[0].startswith("train_lr")]
    for here, theirs in zip(ours.groups, published["groups"], strict=False):
        rates += _pairs("rate and decay of a group", here[1:], theirs[1:])
    found.append(_largest("log.txt", figures, tolerance["loss"], _relative))
    found.append(_largest("learning rates and weight decay", rates, tolerance["rate"], _of_rate))
    for key, (here, theirs) in averages.items():
        tensors = [(name, here[name], theirs[name]) for name in theirs if name in here]
        kind = {"model": "weights", "model_ema": "moving average"}[key]
        found.append(_largest(kind, tensors, tolerance["weight"], _of_change))
    return found


def _pairs(name: str, ours: list, published: list) -> list[tuple]:
    """``(name, ours, published)`` of each number; the entries of ``log.txt`` may be lists themselves."""
    pairs = []
    for number, (a, b) in enumerate(zip(ours, published, strict=False)):
        pairs += _pairs(f"{name}, epoch {number},", a, b) if isinstance(b, list) else [(f"{name} {number}", a, b)]
    return pairs


def _relative(ours: float, published: float) -> float:
    return abs(ours - published) / (1 + abs(published))


def _of_rate(ours: float, published: float) -> float:
    return abs(ours - published) / (published or 1e-30)


def _of_change(ours: list[float], published: list[float]) -> float:
    """The largest difference in sum, norm and change, as a part of the change; 2e-7 of the value is rounding.

    NaN if any is: Python's ``max`` keeps a NaN only if it comes first.
    """
    change, scales = published[2], (math.sqrt(published[3]), 1.0, 1.0)
    excess = [
        max(abs(a - b) - 2e-7 * abs(b), 0.0) / (scale * change)
        for a, b, scale in zip(ours[:3], published[:3], scales, strict=True)
    ]
    return max(excess, key=lambda part: (math.isnan(part), part))


def _largest(kind: str, named: list[tuple], tolerance: float, measure: Callable | None = None) -> Difference:
    measured = [(name, measure(*pair) if measure else pair[0]) for name, *pair in named]
    where, largest = max(measured, key=lambda pair: (math.isnan(pair[1]), pair[1]))
    return Difference(kind, len(named), largest, tolerance, where)
