"""Random flags on existing data and checkpoints: every command gives its result or one message."""

import shutil
import signal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import deit_irpe.args
import deit_irpe.check_data
import deit_irpe.export
import deit_irpe.predict
import deit_irpe.train
import detr_irpe.args
import detr_irpe.check_data
import detr_irpe.export
import detr_irpe.predict
import detr_irpe.train
from irpe_train.launch import launch
from tests.helpers import deit_runs, detr_runs
from tests.helpers.tiny_coco import CATEGORIES, write_tiny_coco
from tests.helpers.tiny_images import write_images

TREES = {"deit": deit_irpe, "detr": detr_irpe}
EXAMPLES = {"eval": (6, 300), "predict": (8, 400), "export": (3, 100), "check": (6, 200)}  # 1,000 long ones per tree
LEFT_OUT = {"help", "help_all", "config", "print_config", "wandb", "pretrained", "compile", "dist_url", "dist_timeout"}
# Of a model: large ones take memory, and other ones than the checkpoint's are refused alike.
SIZES = {"model", "model_kwargs", "input_size", "image_size", "hidden_dim", "dim_feedforward", "enc_layers", "nheads"}
SIZES |= {"dec_layers", "num_queries", "num_classes", "teacher_model", "backbone", "height", "width"}
TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12)
NUMBERS = st.integers().map(str) | st.floats().map(str) | st.sampled_from(["-1", "0", "1", "2", "0.5", "1e999", "3,4"])
PLACES = ["x.pth", "x.onnx", "photo.jpg", "empty", "data", "photos", "photos/*.png", "missing", "new/one", "table.json"]
WORDS = ["", "auto", "none", "cpu", "cuda:7", "step", "train2017", "rpe-1.9-product-ctx-1-k", "rpe-2-cross-bias-0-qk"]


@pytest.fixture(scope="module", params=TREES)
def place(request, tmp_path_factory):
    """A folder with data, a checkpoint ``x.pth``, photographs, and files that are none of these; and the tree."""
    tree, root = request.param, tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    if tree == "deit":
        write_images(root / "data/train", {"ant": 6, "bee": 6}, seed=1)
        write_images(root / "data/val", {"ant": 3, "bee": 3}, seed=2)
        argv = ["--data-path", "data", *deit_runs.QUICK, *deit_runs.MODEL]
        classes = {"classes": ["ant", "bee"]}
    else:
        write_tiny_coco(root / "data", train=6, val=5)
        argv = ["--coco_path", "data", *detr_runs.QUICK, *detr_runs.TINY, "--num_classes", "10"]
        classes = {"categories": CATEGORIES}
    args = TREES[tree].args.get_args_parser().parse_args(argv)
    if tree == "deit":
        model = deit_irpe.create_model(
            args.model, args.rpe, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=2
        )
        args.nb_classes = 2
    else:
        model = detr_irpe.build_model(args)[0]
    torch.save({"model": model.state_dict(), "args": args, "epoch": 1} | classes, root / "x.pth")
    photo = next((root / "data").rglob("*.jpg" if tree == "detr" else "*.*g"))
    (root / "photo.jpg").write_bytes(photo.read_bytes())
    (root / "photos/inner").mkdir(parents=True)
    for name in ("a.png", "inner/b.PNG", "bad.png"):
        (root / "photos" / name).write_bytes(photo.read_bytes() if name != "bad.png" else b"no image")
    (root / "empty").touch()
    (root / "x.onnx").write_bytes(b"no network")
    (root / "table.json").write_text('{"images": [], "annotations": null, "categories": [{"id": 3}]}')
    return tree, root, argv


def command_of(tree: str, command: str, argv: list[str]):
    """``main``, the parser's maker, and flags that succeed."""
    package = TREES[tree]
    base = {
        "eval": [*argv, "--eval", "--resume", "x.pth"],
        "predict": ["photo.jpg", "--resume", "x.pth", "--device", "cpu"],
        "export": ["--resume", "x.pth", "--out", "made/m", "--formats", "safetensors"],
        "check": [*argv[:2], "--num_workers", "0"],
    }[command]
    module = {"eval": "train", "check": "check_data"}.get(command, command)
    parser = getattr(package.args, "get_args_parser" if command == "eval" else f"get_{command}_parser")
    return getattr(package, module).main, parser, base


@pytest.mark.parametrize("length", [0, pytest.param(1, marks=pytest.mark.slow)], ids=["short", "long"])
@pytest.mark.parametrize("command", EXAMPLES)
def test_any_flags_of_any_command_end_in_a_result_or_a_message(place, command, length, capsys, monkeypatch, tmp_path):
    tree, root, argv = place
    monkeypatch.chdir(root)
    main, parser, base = command_of(tree, command, argv)
    actions = [action for action in parser()._actions if action.dest not in LEFT_OUT | SIZES]
    values = st.sampled_from(PLACES + WORDS) | NUMBERS | TEXT

    def flag(action) -> st.SearchStrategy:
        if action.nargs == 0:
            return st.sampled_from([[name] for name in action.option_strings])
        own = values | st.sampled_from([str(choice) for choice in action.choices]) if action.choices else values
        least, most = {None: (1, 1)}.get(action.nargs, (action.nargs,) * 2 if isinstance(action.nargs, int) else (1, 3))
        words = st.lists(own, min_size=least, max_size=most)
        if not action.option_strings:
            return words
        return words.map(lambda given: [f"{action.option_strings[0]}={given[0]}", *given[1:]])

    outcomes = []

    @settings(max_examples=EXAMPLES[command][length], deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.sampled_from(actions).flatmap(flag), min_size=1, max_size=3))
    def fuzz(chosen):
        words, code = [word for group in chosen for word in group], 0
        shutil.rmtree("made", ignore_errors=True)
        try:
            launch(main, parser(), [*base, *words])
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        error = said.err + said.out if code in (0, 1, 2) else code  # 1: check found mistakes, and has printed them
        assert code == 0 or "rror: " in error or isinstance(code, str) and "Bad" in code, (words, error)
        outcomes.append(code)
        assert {path: path.read_bytes() for path in mine} == mine, f"{words} changed what was there"
        torch.use_deterministic_algorithms(False)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as in a notebook, before the next run

    shutil.rmtree("made", ignore_errors=True)  # by another command
    mine = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    fuzz()
    assert length == 0 or 0 in outcomes and set(outcomes) - {0}
