"""The project as a package: types for users, console commands, and a wheel that works outside the checkout."""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.test_documented_commands import PROJECT
from tests.helpers.quick_python import quick_programs
from tests.helpers.smaller import DEIT, DETR, TINY_DETR
from tests.helpers.snippets import REPOSITORY
from tests.helpers.tiny_coco import write_tiny_coco
from tests.helpers.tiny_images import write_images

PACKAGES = ("irpe", "irpe_ops", "irpe_train", "irpe_lab", "deit_irpe", "detr_irpe")
OTHERS = ("torch", "torchvision", "timm", "numpy", "PIL", "scipy", "triton", "matplotlib", "pycocotools")


def ran(*command, **options) -> str:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="needs mypy: pip install mypy")
def test_a_type_checker_accepts_what_users_write_and_refuses_mistakes(tmp_path):
    config = tmp_path / "mypy.ini"  # our signatures alone: reading those of torch takes minutes
    config.write_text(
        f"[mypy]\nfollow_imports = silent\ncache_dir = {tmp_path}\n"
        f"[mypy-{','.join(f'{name}.*' for name in OTHERS)}]\nfollow_imports = skip\n"
        "ignore_missing_imports = True\n"
    )
    good = REPOSITORY / "tests" / "typed_user.py"
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "from irpe_ops import get_rpe_config, equip\n"
        "get_rpe_config(ratio='1.9')\n"
        "equip()\n"
        "from deit_irpe import no_such_name\n"
    )
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", config, good, wrong],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    errors = [line.partition("error: ")[2] for line in checked.stdout.splitlines() if "error:" in line]
    assert "typed_user.py" not in checked.stdout, checked.stdout
    assert (
        len(errors) == 3
        and 'Argument "ratio"' in errors[0]
        and "Missing positional arguments" in errors[1]
        and "no_such_name" in errors[2]
    ), checked.stdout + checked.stderr


def test_every_package_says_that_it_is_typed():
    assert all((REPOSITORY / name / "py.typed").is_file() for name in PACKAGES)


def test_console_commands_lead_to_functions():
    assert set(PROJECT["scripts"]) == {"irpe"}
    for target in PROJECT["scripts"].values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_extras_are_those_that_messages_and_pages_name():
    assert {
        "tensorboard",
        "submitit",
        "export",
        "fast-eval",
        "hugging-face",
        "wandb",
        "demo",
        "completion",
        "dev",
    } <= set(PROJECT["optional-dependencies"])


def test_a_wheel_trains_two_steps_in_another_folder(tmp_path):
    source, home, work = tmp_path / "source", tmp_path / "home", tmp_path / "work"
    work.mkdir()
    for name in (*PACKAGES, "configs"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    ran(*pip, "wheel", source, "--no-deps", "--no-build-isolation", "-w", tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    ran(*pip, "install", "--no-deps", "--no-index", "--target", home, wheel)

    env = {**os.environ, "PYTHONPATH": str(home)}
    code = f"import {', '.join(PACKAGES)}; print({', '.join(f'{name}.__file__' for name in PACKAGES)})"
    python = quick_programs() / "python"
    files = ran(python, "-c", code, cwd=work, env=env).split()
    assert all(Path(file).is_relative_to(home) and Path(file).with_name("py.typed").is_file() for file in files)

    def irpe(command: str, flags: str = "") -> str:
        words = [python, home / "bin" / "irpe", *command.split()]
        return ran(*words, cwd=work, env=env | {"IRPE_EXTRA_FLAGS": flags})

    assert "deit_small_patch16_224_ctx_product_50_shared_k" in irpe("zoo")
    assert "plain PyTorch" in irpe("info")
    for split in ("train", "val"):
        write_images(work / "data" / split, {"ant": 8, "bee": 8})
    write_tiny_coco(work / "coco", train=4, val=2)
    tiny = f"{DEIT} --model-kwargs depth=1"
    command = "classify train --config configs/deit/demo.yaml --data-path data --output_dir deit"
    printed = irpe(command, tiny)
    assert "an epoch" in printed and "2 steps" in printed and "* Acc@1" in printed
    assert (work / "deit" / "checkpoint.pth").is_file()
    command = "detect train --config configs/detr/demo.yaml --coco_path coco --output_dir detr"
    assert "AP" in irpe(command, f"{DETR} {TINY_DETR} --backbone_weights none")
    assert (work / "detr" / "checkpoint.pth").is_file()
    command = "ablate configs/ablation/demo.yaml --only none --seeds 0 --gpus-per-run 1 --set data-path=data --out grid"
    irpe(command, tiny)
    assert "| none |" in (work / "grid" / "table.md").read_text()
    assert "--enc_rpe2d" in irpe("detect train --help")
