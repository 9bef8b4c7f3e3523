"""The commands of README.md, docs/ and examples/ run unchanged, page by page, in a copy of the repository.

The data sets and checkpoints they name are there, tiny and of the right layout; ``tests/helpers/smaller.py`` makes the
runs small, ``tests/helpers/quick_python.py`` their start.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from deit_irpe import create_model
from irpe_train.download import cache_folder, sha256
from irpe_train.zoo import read_zoo
from tests.deit.test_data_at_scale import write_parquet, write_shards
from tests.end_to_end.test_documented_commands import PAGES, RUN_BY_THEIR_OWN_TEST, documented_commands
from tests.helpers.deit_runs import deit_ok
from tests.helpers.detr_runs import detr_ok
from tests.helpers.quick_python import quick_programs
from tests.helpers.smaller import TINY_VIT, extra_flags, smaller
from tests.helpers.snippets import REPOSITORY
from tests.helpers.tiny_coco import write_tiny_coco
from tests.helpers.tiny_images import write_images

COPIED = (
    "configs",
    "deit_irpe",
    "detr_irpe",
    "docs",
    "examples",
    "irpe",
    "irpe_lab",
    "irpe_ops",
    "irpe_train",
    "logs",
    "scripts",
)
ELSEWHERE = {  # a command that is not run here, and what runs it
    r"scripts/quickstart\.sh": "sets up an environment: by hand, in a fresh clone",
    r"scripts/test\.sh": "is what runs this",
    r"python -m pytest": "runs these tests",
    r"python -m tests\.evidence": "test_same_numbers.py does what it does",
    r"git clone|pip install": "CI, and test_packaging.py",
    r".*make_demo_data\.py --out demo_data --task classification$": "test_demo_data.py; detect.md's does more",
    r".*(--slurm|run_with_submitit)": "needs SLURM: test_distributed.py and test_launch.py imitate it",
    r"scripts/gpu_report\.sh": "needs a GPU",
    r"irpe info --check": "scripts/test.sh and test_info.py",
    r".*benchmark_models\.py --model detr": "minutes on a processor: by hand",
    r".*timm/validate\.py": "timm's package does not have it: a stand-in in test_timm.py",
}
# Eight processes become two, other machines this one.
FEWER = [
    (r"(GPUS=|nproc_per_node=)8\b", r"\g<1>2"),
    (r"GPUS=4\b", "GPUS=2"),
    (r"\bhost0\b", "127.0.0.1"),
    (r"(NNODES=2 .*GPUS=)2\b", r"\g<1>1"),
]
SMALL_K = "deit_small_patch16_224_ctx_product_50_shared_k"
COMPARED = "--expect"  # with the published row, which a tiny model does not reach


@pytest.fixture(scope="session")
def things(tmp_path_factory) -> Path:
    """Everything that the pages assume: data sets, checkpoints, finished runs, pictures."""
    root = tmp_path_factory.mktemp("things")
    for split, count in (("train", 16), ("val", 4)):
        write_images(root / "ImageNet" / split, {"ant": count, "bee": count})
    write_shards(root / "ImageNet", root / "imagenet_shards")
    write_parquet(root / "ImageNet", root / "imagenet_parquet")
    for split in ("train", "val"):
        subprocess.run(["tar", "-cf", root / "ImageNet" / f"{split}.tar", "-C", root / "ImageNet", split], check=True)
    for name in ("coco_data", "my_data"):
        write_tiny_coco(root / name, train=4, val=3, panoptic=name == "coco_data")
    shutil.copytree(root / "coco_data", root / "coco_panoptic")
    write_tiny_coco(root / "demo_data/coco_digits", train=4, val=3, first_id=1)  # the quickstart has made these
    for name in ("digits", "digits_on_photos"):
        shutil.copytree(root / "ImageNet", root / "demo_data" / name)
    write_tiny_coco(root / "large", train=0, val=1, size=(120, 160))
    (picture,) = (root / "large/val2017").iterdir()
    for name in ("a", "b", "cat", "street"):
        shutil.copy(picture, root / f"{name}.jpg")

    write_images(root / "photos", {"cat": 16, "dog": 16})
    shutil.copytree(root / "ImageNet/val/ant", root / "new")
    shutil.copytree(root / "ImageNet/val/ant", root / "some_classes/val/ant")
    for number, file in enumerate(sorted((root / "new").iterdir())):
        Image.open(file).save(root / f"new/{number}.jpg")
    shutil.copy(file, root / "more.png")

    for name, model in (("small_k", SMALL_K), ("small", "deit_small_patch16_224")):
        deit_ok(root / "ImageNet", root / "outputs" / name, "--epochs", "1", model=["--model", model, *TINY_VIT])
    detr_ok(root / "my_data", root / "outputs/mine", "--epochs", "1")
    for name in ("a", "b"):
        shutil.copytree(root / "outputs/small_k", root / "outputs" / name)
    for name in ("detr", "boxes"):
        shutil.copytree(root / "outputs/mine", root / "outputs" / name)
    shutil.copy(root / "outputs/small_k/best.pth", root / "small_k.pth")
    shutil.copy(root / "outputs/small/best.pth", root / "deit_small_patch16_224.pth")
    for name in ("detr.pth", "detr-r50-e632da11.pth"):
        shutil.copy(root / "outputs/mine/best.pth", root / name)
    theirs = create_model("deit_tiny_patch16_224", rpe="rpe-1.9-product-ctx-1-k").state_dict()
    torch.save({f"backbone.{key}": value for key, value in theirs.items()}, root / "theirs.pth")

    hub = root / "torch" / cache_folder().relative_to(cache_folder().parents[1])
    hub.mkdir(parents=True)
    tiny_k = SMALL_K.replace("small", "tiny")  # made small by the same flags
    for name, weights in ((SMALL_K, "small_k.pth"), (tiny_k, "small_k.pth"), ("rpe-2.0-product-ctx-1-k", "detr.pth")):
        file = read_zoo().find(name).file
        shutil.copy(root / weights, hub / file)
        (hub / f"{file}.sha256").write_text(sha256(hub / file))  # as if this had been the first download
    return root


@pytest.fixture
def copy(things, tmp_path) -> Path:
    """A copy of the repository with the ``things`` beside it."""
    shutil.copytree(things, tmp_path, dirs_exist_ok=True)
    for name in COPIED:
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    return tmp_path


class Command:
    """A documented command that has been started in ``folder``."""

    def __init__(self, text: str, folder: Path):
        for pattern, replacement in FEWER:
            text = re.sub(pattern, replacement, text)
        text = smaller(text)
        self.output = folder / "output.txt"
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("CUDA", "PYTEST"))}
        environment |= {
            "PYTHONPATH": str(folder),
            "IRPE_EXTRA_FLAGS": extra_flags(text),
            "OMP_NUM_THREADS": "1",
            "TORCH_HOME": str(folder / "torch"),
            "PYTHON": str(quick_programs() / "python"),
            "PATH": f"{quick_programs()}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_DATASETS_CACHE": str(folder / "hf"),
            "HF_DATASETS_OFFLINE": "1",
        }
        ends = " --inspect" if text.startswith("tensorboard") else ""
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(
                ["bash", "-c", text + ends], cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
            )

    def ended(self, timeout: float = 180) -> tuple[int, str]:
        """Exit status and output; a command that does not end is killed, and so fails."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
        return self.process.wait(), self.output.read_text()


def trained_into(text: str) -> str | None:
    """The folder of a command that starts a new run, None for any other command."""
    if "--eval" in text or "--resume" in text:
        return None
    if found := re.search(r"scripts/train_\w+\.sh (\S+)", text):
        return f"outputs/{Path(found[1]).name.removesuffix('.yaml')}"
    if re.search(r"-m (?:deit|detr)_irpe |irpe (?:classify|detect) train ", text):
        found = re.search(r"--output_dir (\S+)", text)
        return found and found[1]
    return None


def run_page(page: Path, folder: Path) -> list[str]:
    """Run a page's commands in order; returns the failures."""
    wrong, first_node = [], None
    for line, text in documented_commands(page):
        if any(re.match(pattern, text) for pattern in ELSEWHERE):
            continue
        if "NODE_RANK=1" not in text and (trained := trained_into(text)):
            shutil.rmtree(folder / trained, ignore_errors=True)  # `things` made a run there; a reader's folder is new
        command = Command(text, folder)
        if "NODE_RANK=0" in text:
            first_node = command
            continue
        code, printed = command.ended()
        if "NODE_RANK=1" in text:
            code = code or first_node.ended()[0]
        failed_honestly = code == 1 and COMPARED in text and re.search(r"^# .*: FAIL", printed, flags=re.MULTILINE)
        if code and not failed_honestly:
            wrong.append(f"{page.name}:{line}: {text}\n    ended with {code}: {printed[-1500:]}")
    return wrong


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if documented_commands(page) and page.stem not in RUN_BY_THEIR_OWN_TEST],
    ids=lambda page: str(page.relative_to(REPOSITORY)),
)
def test_every_documented_command_runs(page, copy):
    wrong = run_page(page, copy)
    assert not wrong, "\n".join(wrong)


def test_a_command_that_fails_is_seen(copy):
    page = copy / "page.md"
    page.write_text(
        "```bash\npython -m irpe_ops.visualize no-such-spec -o a.png\nDATA=none scripts/train_deit.sh small_k\n```\n"
    )
    wrong = run_page(page, copy)
    assert len(wrong) == 2 and "no-such-spec" in wrong[0] and "no such folder" in wrong[1]


@pytest.mark.parametrize("text", ["sleep 60", "python sleep.py"])
def test_a_command_that_does_not_end_has_failed(text, tmp_path):
    (tmp_path / "sleep.py").write_text("import time\ntime.sleep(60)\n")
    code, _ = Command(text, tmp_path).ended(timeout=0.5)
    assert code == -9
