"""The promises of docs/reliability.md that both trees make together; the runtime's own tests are in tests/train."""

import json
import signal
import time
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import deit_irpe.args
import deit_irpe.train
import detr_irpe.args
import detr_irpe.train
from irpe_train.checkpoint import read_checkpoint
from irpe_train.errors import Preempted
from irpe_train.launch import launch
from tests.helpers import deit_runs, detr_runs
from tests.helpers.processes import Ranks, run_ranks
from tests.helpers.sabotage import be_stopped, change_a_loss, make_infinite
from tests.helpers.tiny_coco import write_tiny_coco
from tests.helpers.tiny_images import write_images

TREES = {"deit": deit_irpe, "detr": detr_irpe}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Where each tree finds its images: 22 and 5 for evaluation, which divide evenly over neither 2 nor 3 processes."""
    folder = tmp_path_factory.mktemp("data")
    write_images(folder / "deit" / "train", {"ant": 20, "bee": 20}, seed=1)
    write_images(folder / "deit" / "val", {"ant": 12, "bee": 10}, seed=2)
    write_tiny_coco(folder / "detr", train=8, val=5)
    return folder


def starting(tree, data, output_dir, *flags, at_step=(), **options):
    """The tree's command in fresh processes; ``at_step``: see `change_a_loss`."""
    base = {
        "deit": ["--data-path", str(data / "deit"), *deit_runs.QUICK, *deit_runs.MODEL, "--epochs=2", "--batch-size=4"],
        "detr": ["--coco_path", str(data / "detr"), *detr_runs.QUICK, *detr_runs.TINY, "--batch_size", "1"],
    }[tree]
    main = TREES[tree].train.main
    return Ranks(
        partial(change_a_loss, main, *at_step) if at_step else main,
        TREES[tree].args.get_args_parser,
        [*base, "--output_dir", str(output_dir), *map(str, flags)],
        output_dir.parent / "outputs",
        **options,
    )


def run(*arguments, **options):
    """The same, to its end."""
    return starting(*arguments, **options).wait(120)


def leaves(folder):
    checkpoint = read_checkpoint(folder / "checkpoint.pth")
    return torch.utils._pytree.tree_leaves({name: value for name, value in checkpoint.items() if name != "args"})


def assert_same_run(one, other):
    assert (one / "log.txt").read_text() == (other / "log.txt").read_text()
    ours, theirs = leaves(one), leaves(other)
    assert len(ours) == len(theirs) > 100
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.distributed
@pytest.mark.parametrize("tree", TREES)
def test_stopped_in_mid_epoch_equals_uninterrupted_on_two_ranks(tree, data, tmp_path):
    for ended in run(tree, data, tmp_path / "whole", "--deterministic", world_size=2):
        assert ended.code == 0, ended.text
    for ended in run(tree, data, tmp_path / "cut", "--deterministic", world_size=2, at_step=(2, 1, be_stopped)):
        assert ended.code == Preempted.EXIT_CODE, ended.text
    for ended in run(tree, data, tmp_path / "cut", "--deterministic", "--resume", "auto", world_size=2):
        assert ended.code == 0, ended.text
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.distributed
@pytest.mark.parametrize("tree", TREES)
def test_loss_not_finite_on_one_rank_stops_both_before_the_update(tree, data, tmp_path):
    results = run(tree, data, tmp_path / "run", "--save-interval", "1", world_size=2, at_step=(2, 1, make_infinite))
    assert time.time() - (tmp_path / "run" / "nonfinite_loss.json").stat().st_mtime < 10  # since it was found
    for ended in results:
        assert ended.code == 1, ended.text
        assert "NonFiniteLoss: loss is not finite on rank 1 at epoch 0, step 2: loss inf" in ended.text
    (report,) = json.loads((tmp_path / "run" / "nonfinite_loss.json").read_text())
    assert report["rank"] == 1 and report["samples"] and all("train" in name for name in report["samples"])
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pth")["progress"]["step"] == 2


@pytest.mark.distributed
@pytest.mark.parametrize("tree", TREES)
def test_figures_are_the_same_for_one_two_and_three_ranks(tree, data, tmp_path):
    run(tree, data, tmp_path / "run", "--epochs", "1")
    figures = []
    for world_size in (1, 2, 3):
        results = run(
            tree,
            data,
            tmp_path / "eval",
            "--eval",
            "--resume",
            tmp_path / "run" / "checkpoint.pth",
            world_size=world_size,
        )
        assert all(ended.code == 0 for ended in results), results
        text = results[0].text
        assert "other flags" not in text
        figures.append([line.partition(" loss ")[0] for line in text.splitlines() if "Acc@1" in line or "AP" in line])
    assert figures[0] and figures[0] == figures[1] == figures[2]
    one_more = {"deit": ["--rpe", "rpe-1.8-product-ctx-1-qkv"], "detr": ["--enc_rpe2d", "rpe-2.1-product-ctx-1-k"]}[
        tree
    ]  # weights of one shape
    (ended,) = run(tree, data, tmp_path / "eval", "--eval", "--resume", tmp_path / "run" / "checkpoint.pth", *one_more)
    told = f"flags differ from the checkpoint's: {one_more[0].lstrip('-')}={one_more[1]} (stored: "
    assert ended.code == 0 and told in ended.text, ended.text


@pytest.mark.parametrize("tree", TREES)
def test_written_config_repeats_the_run(tree, data, tmp_path):
    assert run(tree, data, tmp_path / "one", "--epochs", "1", "--lr", "0.01")[0].code == 0
    argv = ["--config", str(tmp_path / "one" / "config.yaml"), "--output_dir", str(tmp_path / "two")]
    (ended,) = run_ranks(TREES[tree].train.main, TREES[tree].args.get_args_parser, argv, tmp_path / "outputs")
    assert ended.code == 0, ended.text
    assert (tmp_path / "two" / "log.txt").read_text() == (tmp_path / "one" / "log.txt").read_text()


# Nothing that writes, and no surrogates or zero bytes, which no command line can carry.
TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12)
VALUE = st.one_of(TEXT, st.integers().map(str), st.floats().map(str), st.sampled_from(["", "-1", "0", "1e999", "auto"]))


@pytest.mark.parametrize("tree", TREES)
def test_any_command_line_ends_in_a_message(tree, tmp_path, capsys, monkeypatch):
    """Data never exists here: whatever the other flags, a run ends before training with its own message."""
    monkeypatch.chdir(tmp_path)
    left_out = ("help", "help_all", "output_dir", "config", "print_config")
    flags = [
        (action.option_strings[-1], action.nargs != 0)
        for action in TREES[tree].args.get_args_parser()._actions
        if action.dest not in left_out
    ]

    @settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(st.tuples(st.sampled_from(flags), VALUE), max_size=4))
    def fuzz(chosen):
        argv = [word for (flag, takes), value in chosen for word in ([f"{flag}={value}"] if takes else [flag])]
        where = ["--data-path" if tree == "deit" else "--coco_path", str(tmp_path / "none"), "--device", "cpu"]
        with pytest.raises(SystemExit) as end:
            launch(TREES[tree].train.main, TREES[tree].args.get_args_parser(), [*where, *argv])
        error = capsys.readouterr().err if end.value.code == 2 else end.value.code
        assert "error: " in error or "Error: " in error or "Bad" in error, error
        torch.use_deterministic_algorithms(False)

    fuzz()


@pytest.mark.parametrize("examples", [25, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("tree", TREES)
def test_any_command_line_on_data_that_is_there_is_run_or_ends_in_a_message(
    tree, examples, data, tmp_path, capsys, monkeypatch
):
    """No epoch is trained: everything before the first step is made from the flags, or they are refused."""
    parser = TREES[tree].args.get_args_parser
    monkeypatch.chdir(tmp_path)
    left_out = {
        "help",
        "help_all",
        "output_dir",
        "config",
        "print_config",
        "wandb",
        "pretrained",
        "compile",
        *("epochs", "start_epoch"),
    }
    sizes = {"model", "model_kwargs", "input_size", "image_size", "hidden_dim", "dim_feedforward", "enc_layers"}
    sizes |= {"dec_layers", "num_queries", "num_classes", "teacher_model", "nheads", "data_path", "coco_path"}
    flags = [
        (action.option_strings[-1], action.nargs != 0)
        for action in parser()._actions
        if action.dest not in left_out | sizes
    ]
    base = {
        "deit": ["--data-path", str(data / "deit"), *deit_runs.QUICK, *deit_runs.MODEL],
        "detr": ["--coco_path", str(data / "detr"), *detr_runs.QUICK, *detr_runs.TINY],
    }[tree]
    trained, nothing_to_do = [], ["--epochs", "1", "--start_epoch", "1"]
    value = st.sampled_from(["1", "2", "0.5", "0.001", "none", "adamw", "sgd", "step"]) | VALUE

    @settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @example([(("--seed", True), "1")])  # runs, whatever is drawn
    @given(st.lists(st.tuples(st.sampled_from(flags), value), min_size=1, max_size=3))
    def fuzz(chosen):
        argv = [word for (flag, takes), value in chosen for word in ([f"{flag}={value}"] if takes else [flag])]
        code = 0
        try:
            launch(TREES[tree].train.main, parser(), [*base, *nothing_to_do, *argv])
        except SystemExit as end:
            code = end.code
        error = capsys.readouterr().err if code in (0, 2) else code
        assert code == 0 or "rror: " in error or "Bad" in error, (argv, error)
        trained.append(code == 0)
        torch.use_deterministic_algorithms(False)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as in a notebook, before the next run

    fuzz()
    assert any(trained) and not all(trained)
