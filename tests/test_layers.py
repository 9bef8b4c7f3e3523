"""Imports point down only: which package may import which (docs/design.md)."""

import ast
import importlib
import sys
from collections import Counter
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
ALLOWED = {
    "rpe_ops_cuda": set(),
    "irpe_ops": {"rpe_ops_cuda"},
    "irpe_train": set(),
    "deit_irpe": {"irpe_ops", "irpe_train"},
    "detr_irpe": {"irpe_ops", "irpe_train"},
    "irpe_lab": {"irpe_ops", "irpe_train", "deit_irpe", "detr_irpe"},
    "irpe": {"irpe_ops", "irpe_train", "deit_irpe", "detr_irpe", "irpe_lab"},
}


def first_party_imports(package: str) -> set[str]:
    """Every first-party package that any module of ``package`` imports, at the top or inside a function."""
    found = set()
    for path in sorted((REPO / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            else:
                continue
            found.update(name.split(".")[0] for name in names)
    return found & set(ALLOWED)


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_down(package):
    assert list((REPO / package).rglob("*.py")), f"{package}: no Python file found"
    assert first_party_imports(package) - {package} <= ALLOWED[package]


def test_the_torch_only_package_imports_nothing_else():
    """``irpe_ops`` stands alone: only torch at import time; triton only in the file of kernels, imported when used."""
    top_level = set()
    for path in set((REPO / "irpe_ops").rglob("*.py")) - {REPO / "irpe_ops" / "backends" / "triton_kernels.py"}:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                top_level.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                top_level.add(node.module.split(".")[0])
    assert top_level - set(sys.stdlib_module_names) <= {"torch", "irpe_ops"}


def test_no_two_classes_have_one_name():
    classes = [
        node.name
        for package in ALLOWED
        for path in (REPO / package).rglob("*.py")
        if "build" not in path.parts[len(REPO.parts) :]  # copies that pip makes for the extension
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef)
    ]
    assert len(classes) > 50 and [name for name, times in Counter(classes).items() if times > 1] == []


def test_nothing_imports_scripts():
    for package in ALLOWED:
        for path in (REPO / package).rglob("*.py"):
            assert "import scripts" not in path.read_text() and "from scripts" not in path.read_text(), path


def test_no_picture_touches_the_backend_of_a_notebook():
    assert not [path for package in ALLOWED for path in (REPO / package).rglob("*.py") if "pyplot" in path.read_text()]


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("irpe_ops", "build_rpe equip get_bucket_ids_2d get_rpe_config parse_rpe_spec rpe_attention rpe_index"),
        ("deit_irpe", "create_model"),
        ("deit_irpe.args", "get_args_parser"),
        ("deit_irpe.data", "build_dataset"),
        ("detr_irpe", "build_model create_model"),
        ("detr_irpe.args", "get_args_parser"),
        ("detr_irpe.data.coco", "CocoDetection"),
        ("detr_irpe.data.coco_eval", "CocoEvaluator"),
    ],
)
def test_the_names_that_scripts_import_stay(module, names):
    assert all(callable(getattr(importlib.import_module(module), name)) for name in names.split())
