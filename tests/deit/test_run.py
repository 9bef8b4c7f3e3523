"""Runs from the command line: their files and output, evaluation, resuming, several processes."""

import argparse
import json
import os
import pathlib
import re
import shutil
from functools import partial

import pytest
import torch

from deit_irpe import create_model, train
from deit_irpe.train import main
from irpe_train.checkpoint import read_checkpoint
from irpe_train.errors import Preempted
from tests.deit.test_data import pack
from tests.helpers.deit_runs import MODEL, PLAIN, deit, deit_ok
from tests.helpers.sabotage import be_stopped, change_a_loss
from tests.helpers.tiny_images import write_images


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(colours, tmp_path_factory):
    """A run of 6 epochs that learns the colours: (folder, what it printed)."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    text = deit_ok(colours, folder, *PLAIN, "--epochs", "6", "--lr", "0.3", "--model-ema-decay", "0.9")
    return folder, text


def test_a_run_learns_and_writes_the_published_log(trained):
    folder, _ = trained
    lines = log_of(folder)
    assert [list(line) for line in lines] == [
        ["train_lr", "train_loss", "test_loss", "test_acc1", "test_acc5", "epoch", "n_parameters"]
    ] * 6
    assert [line["epoch"] for line in lines] == list(range(6))
    assert lines[-1]["test_acc1"] > 90 and lines[-1]["test_acc5"] == 100
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert lines[0]["train_lr"] == lines[1]["train_lr"] == pytest.approx(0.3 * 8 / 512)


def test_console_and_details_have_the_published_lines(trained):
    folder, text = trained
    details = (folder / f"detail_{folder.name}.log").read_text()
    last, best = log_of(folder)[-1], max(line["test_acc1"] for line in log_of(folder))
    assert f"number of params: {last['n_parameters']}\nnumber of buckets: 50\n" in text
    assert f"Averaged stats: lr: {last['train_lr']:.6f}  loss: " in text
    line = r"^Epoch: \[5\]  \[0/6\]  eta: \S+  lr: 0\.\d{6}  loss: \S+ \(\S+\)  time: \S+  data: \S+  max mem: \d+"
    assert re.search(line, details, flags=re.MULTILINE)
    assert f"Averaged stats: lr: {last['train_lr']:.6f}  loss: " in details and "Max accuracy: " in details
    _, where, *written = text.rpartition("Training time ")[2].splitlines()
    assert where == f"written to {folder}" and f"the best top-1 (%): {best:.4g}" in written[0]
    names = ["best.pth", "checkpoint.pth", "log.txt", f"detail_{folder.name}.log", "config.yaml"]
    assert [line.split()[0] for line in written] == names
    assert re.search(r"^Epoch: \[5\] Total time: \d:\d\d:\d\d \(\S+ s / it\)$", text, flags=re.MULTILINE)
    assert f"* Acc@1 {last['test_acc1']:.3f} Acc@5 100.000 loss {last['test_loss']:.3f}\n" in text
    assert f"Accuracy of the network on the 22 test images: {last['test_acc1']:.1f}%\n" in text
    assert f"Max accuracy: {best:.2f}%\n" in text


def test_the_start_says_what_will_happen(trained):
    _, text = trained
    for words in (
        "48 training and 22 validation images of 4 classes",
        "8 images per update: 8 x 1 process(es) x 1",
        "encoding rpe-1.9-product-ctx-1-qkv, 32 pixels, amp ",
        "effective lr        0.0046875\n",
        "that can run here)\n  effective batch",  # the backend of attention
        "6 steps, 48 samples",
        "run\n  other than default  batch_size=8 (default: 64)",
        "mixup=0.0 (default: 0.8)",
    ):
        assert words in text


def test_the_checkpoint_is_as_published(trained):
    folder, _ = trained
    checkpoint = read_checkpoint(folder / "checkpoint.pth")
    assert list(checkpoint)[:7] == ["model", "optimizer", "lr_scheduler", "epoch", "model_ema", "scaler", "args"]
    assert list(checkpoint["model"]) == list(checkpoint["model_ema"]) and checkpoint["epoch"] == 5
    assert checkpoint["args"].lr == 0.3 * 8 / 512 and checkpoint["args"].nb_classes == 4
    assert checkpoint["args"].distributed is False and checkpoint["classes"] == ["ant", "bee", "cat", "dog"]
    assert [group["weight_decay"] for group in checkpoint["optimizer"]["param_groups"]] == [0.0, 0.05]


def best_in_the_middle(args):
    figures = iter([(50.0, 90.0), (80.0, 91.0), (60.0, 99.0), (80.0, 99.0)])  # top-1, top-5
    train.evaluate = lambda *_: dict(zip(("acc1", "acc5"), next(figures), strict=True))
    main(args)


def test_the_weights_of_the_highest_top_1_are_kept(colours, tmp_path):
    """Of two epochs with equal figures, the first."""
    text = deit_ok(colours, tmp_path / "run", *PLAIN, "--epochs", "4", main=best_in_the_middle)
    assert re.findall(r"Max accuracy: (\S+)%", text) == ["50.00", "80.00", "80.00", "80.00"]
    best, last = (read_checkpoint(tmp_path / "run" / f"{name}.pth") for name in ("best", "checkpoint"))
    assert best["epoch"] == 1 and last["progress"]["best"] == 80.0


def weighed(weights):
    return sum(value.double().abs().sum().item() for value in weights.values())


def weigh(args):
    """The figure of an epoch is the weight of the model that is evaluated."""
    train.evaluate = lambda model, *_: {"acc1": weighed(model.state_dict())}
    main(args)


@pytest.mark.parametrize(("flags", "key"), [([], "model"), (["--eval-ema"], "model_ema")])
def test_which_model_an_epoch_is_evaluated_with(colours, tmp_path, flags, key):
    deit_ok(colours, tmp_path / "run", *PLAIN, "--epochs", "1", "--lr", "0.3", *flags, main=weigh)
    checkpoint = read_checkpoint(tmp_path / "run" / "checkpoint.pth")
    assert log_of(tmp_path / "run")[0]["test_acc1"] == weighed(checkpoint[key])
    assert weighed(checkpoint["model"]) != weighed(checkpoint["model_ema"])


def test_evaluation_needs_the_validation_set_only(trained, colours, tmp_path):
    folder, _ = trained
    shutil.copytree(colours / "val", tmp_path / "data" / "val")
    text = deit_ok(tmp_path / "data", tmp_path / "out", "--eval", "--resume", folder / "checkpoint.pth")
    last = log_of(folder)[-1]
    assert f"* Acc@1 {last['test_acc1']:.3f} Acc@5 100.000 loss {last['test_loss']:.3f}" in text
    assert not (tmp_path / "out" / "log.txt").exists()


def test_evaluation_of_the_moving_average(trained, colours, tmp_path):
    folder, _ = trained
    checkpoint = read_checkpoint(folder / "checkpoint.pth")
    torch.save({"model": checkpoint["model_ema"]}, tmp_path / "average.pth")
    expected = deit_ok(colours, tmp_path / "a", "--eval", "--resume", tmp_path / "average.pth")
    text = deit_ok(colours, tmp_path / "b", "--eval", "--resume", folder / "checkpoint.pth", "--eval-ema")
    result = [line for line in expected.splitlines() if "Acc@1" in line]
    assert result[0] in text
    plain = deit_ok(colours, tmp_path / "c", "--eval", "--resume", folder / "checkpoint.pth")
    assert result[0] not in plain


def published_form(checkpoint, folder):
    """What the published code writes: a Namespace with a path in it, and here the prefix of a wrapped model."""
    published = {key: checkpoint[key] for key in ("optimizer", "lr_scheduler", "epoch", "scaler")}
    for key in ("model", "model_ema"):
        published[key] = {f"module.{name}": value for name, value in checkpoint[key].items()}
    published["args"] = argparse.Namespace(**vars(checkpoint["args"]) | {"output_dir": pathlib.PosixPath("/published")})
    torch.save(published, folder / "published.pth")
    return folder / "published.pth"


def test_a_published_checkpoint_evaluates_and_resumes(trained, colours, tmp_path):
    folder, _ = trained
    file = published_form(read_checkpoint(folder / "checkpoint.pth"), tmp_path)
    text = deit_ok(colours, tmp_path / "out", "--eval", "--resume", file)
    assert f"* Acc@1 {log_of(folder)[-1]['test_acc1']:.3f}" in text
    unread = ["--finetune", "nowhere.pth"]
    deit_ok(colours, tmp_path / "more", *PLAIN, "--resume", file, "--epochs", "7", "--lr", "0.3", *unread)
    assert [line["epoch"] for line in log_of(tmp_path / "more")] == [6]


def test_a_checkpoint_that_would_run_code_is_refused(colours, tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it ran"),)

    torch.save({"model": Hostile()}, tmp_path / "hostile.pth")
    (ended,) = deit(colours, tmp_path / "out", "--eval", "--resume", tmp_path / "hostile.pth")
    assert ended.code not in (0, None) and "refused" in ended.text and not (tmp_path / "it ran").exists()


def test_a_checkpoint_of_another_model_is_refused_with_its_keys(trained, colours, tmp_path):
    folder, _ = trained
    (ended,) = deit(colours, tmp_path / "out", "--eval", "--resume", folder / "checkpoint.pth", "--rpe", "none")
    assert ended.code == 1 and "unexpected: blocks.0.attn.rpe_q.lookup_table_weight" in ended.text
    assert "Traceback" not in ended.text


def test_a_checkpoint_of_other_classes_is_refused(trained, tmp_path):
    folder, _ = trained
    write_images(tmp_path / "data" / "val", dict.fromkeys(["ant", "bee", "cat", "fox"], 1))
    (ended,) = deit(tmp_path / "data", tmp_path / "out", "--eval", "--resume", folder / "checkpoint.pth")
    assert ended.code == 1 and "the validation data have classes that the checkpoint lacks: fox" in ended.text


RESUMABLE = ["--deterministic", "--epochs", "3", "--lr", "0.05"]  # with every augmentation that is on by default


def assert_same_run(one, other):
    assert (one / "log.txt").read_text() == (other / "log.txt").read_text()
    a, b = (read_checkpoint(folder / "checkpoint.pth") for folder in (one, other))
    flat_a, flat_b = (torch.utils._pytree.tree_leaves({k: v for k, v in c.items() if k != "args"}) for c in (a, b))
    assert len(flat_a) == len(flat_b) > 100
    for x, y in zip(flat_a, flat_b, strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


@pytest.fixture(scope="module")
def uninterrupted(colours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    deit_ok(colours, folder, *RESUMABLE)
    return folder


@pytest.mark.parametrize("step", [5, 8], ids=["at the end of an epoch", "in mid-epoch"])
def test_interrupted_and_resumed_equals_uninterrupted(uninterrupted, colours, tmp_path, step):
    (ended,) = deit(colours, tmp_path / "run", *RESUMABLE, main=partial(change_a_loss, main, step, 0, be_stopped))
    assert ended.code == Preempted.EXIT_CODE, ended.text
    deit_ok(colours, tmp_path / "run", *RESUMABLE, "--resume", "auto", "--num_workers", "1")
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_finished_run_resumed_has_each_epoch_once_and_its_best_figure(uninterrupted, colours, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    deit_ok(colours, tmp_path / "run", *RESUMABLE, "--resume", "auto")
    assert_same_run(tmp_path / "run", uninterrupted)
    assert read_checkpoint(uninterrupted / "checkpoint.pth")["progress"]["best"] == max(
        line["test_acc1"] for line in log_of(uninterrupted)
    )


@pytest.mark.distributed
def test_two_processes_train_and_evaluate_each_image_once(trained, colours, tmp_path):
    """22 images, then 21: they divide evenly neither into batches nor, the second time, over ranks."""
    folder, _ = trained
    flags = ["--eval", "--resume", folder / "checkpoint.pth"]
    for removed in (None, colours / "val" / "dog" / "4.png"):
        data = tmp_path / f"data_{removed is not None}"
        shutil.copytree(colours / "val", data / "val")
        if removed is not None:
            (data / "val" / "dog" / "4.png").unlink()
        one = deit_ok(data, tmp_path / "one", *flags)
        two, other = deit(data, tmp_path / "two", *flags, world_size=2)
        assert two.code == other.code == 0, two.text + other.text
        figures = [line for line in one.splitlines() if line.startswith("* Acc@1")]
        assert figures == [line for line in two.text.splitlines() if line.startswith("* Acc@1")] and len(figures) == 1
        assert "Acc@1" not in other.text
        counted = [(tmp_path / ranks / "eval_classes.csv").read_text() for ranks in ("one", "two")]
        assert counted[0] == counted[1]
    for ended in deit(colours, tmp_path / "train", "--epochs", "1", world_size=2):
        assert ended.code == 0, ended.text
    (line,) = log_of(tmp_path / "train")
    assert line["test_acc1"] * 22 / 100 == pytest.approx(round(line["test_acc1"] * 22 / 100))
    checkpoint = read_checkpoint(tmp_path / "train" / "checkpoint.pth")
    assert checkpoint["args"].distributed is True and checkpoint["args"].lr == 5e-4 * 8 * 2 / 512


@pytest.mark.parametrize(
    "flags",
    [
        ("--mixup", "0", "--start_epoch", "1", "--epochs", "2"),  # CutMix alone: soft targets
        ("--mixup", "0", "--cutmix", "0", "--no-aug", "--sched", "tanh", "--weight-decay", "0"),
        ("--lr", "0", "--train-interp", "lanczos", "--input-size", "40", "--no-train-mode"),
        ("--mixup-mode", "elem", "--drop", "0.1", "--clip-grad", "1", "--no-model-ema", "--accumulate", "2"),
        ("--amp", "bf16", "--input-size", "48x32", "--no-abs-pos", "--eval-ema", "--sched", "step", "--opt", "sgd"),
    ],
)
def test_other_recipes_train(colours, tmp_path, flags):
    deit_ok(colours, tmp_path / "run", "--epochs", "1", *flags)
    (line,) = log_of(tmp_path / "run")
    assert 0 < line["train_loss"] < 10 and line["epoch"] == ("--start_epoch" in flags)


def test_gradient_accumulation_equals_the_larger_batch(colours, tmp_path):
    flags = [*PLAIN, "--epochs", "1", "--lr", "0.1", "--drop-path", "0"]
    deit_ok(colours, tmp_path / "large", *flags, "--batch-size", "16")
    deit_ok(colours, tmp_path / "small", *flags, "--batch-size", "8", "--accumulate", "2")
    large, small = (read_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("large", "small"))
    assert large["args"].lr == small["args"].lr
    for key, value in large["model"].items():
        assert torch.allclose(value, small["model"][key], atol=2e-4), key


def test_fewer_images_than_a_batch_still_train(tmp_path):
    for split, count in (("train", 3), ("val", 1)):
        write_images(tmp_path / split, {"a": count, "b": count})
    others = "--warmup-epochs", "1", "--warmup-lr", "1e-4", "--output_dir", ""
    text = deit_ok(tmp_path, tmp_path / "run", "--epochs", "1", "--batch-size", "64", *others)
    assert "  output              none: without --output_dir nothing is written\n" in text
    assert not (tmp_path / "run").exists()
    assert re.search(r"effective lr +\S+ after 1 epoch\(s\) of warm-up from 0\.0001$", text, flags=re.MULTILINE)
    assert "6 training samples per process: the batch is 6, not 64" in text and "1 steps, 6 samples" in text


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_distillation_from_a_teacher(trained, colours, tmp_path, kind):
    folder, _ = trained
    torch.save({"model": create_model("deit_demo_patch4_32", num_classes=4).state_dict()}, tmp_path / "t.pth")
    teacher = [
        "--distillation-type",
        kind,
        "--teacher-model",
        "deit_demo_patch4_32",
        "--teacher-path",
        tmp_path / "t.pth",
    ]
    student = ["deit_small_distilled_patch16_224" if flag == "deit_tiny_patch16_224" else flag for flag in MODEL]
    deit_ok(colours, tmp_path / "run", *PLAIN, *teacher, "--epochs", "1", "--lr", "0.05", model=student)
    weights = read_checkpoint(tmp_path / "run" / "checkpoint.pth")["model"]
    assert weights["head_dist.weight"].shape == (4, 32) and weights["pos_embed"].shape == (1, 2 + 16, 32)
    (ended,) = deit(colours, tmp_path / "plain", *PLAIN, *teacher, "--epochs", "1")
    assert ended.code == 1 and "needs a model with a distillation head" in ended.text


def test_fine_tuning_resizes_and_trains_with_stochastic_depth_unless_told_otherwise(trained, tmp_path):
    folder, _ = trained
    for split in ("train", "val"):
        write_images(tmp_path / split, {"x": 4, "y": 4}, side=48)
    flags = ["--finetune", folder / "best.pth", "--input-size", "48x64", "--epochs", "1", "--deterministic"]
    text = deit_ok(tmp_path, tmp_path / "run", *flags, "--drop-path", "0.9")
    assert "--finetune: pos_embed resampled from 4x4 to 6x8 patches" in text
    assert "--finetune: head.weight starts fresh: different classes, 4 there, 2 here" in text
    assert "on, with dropout 0 and stochastic depth 0.9 (the published --finetune: off, --no-train-mode)" in text
    assert "--no-train-mode" not in deit_ok(tmp_path, tmp_path / "without", *flags, "--drop-path", "0")
    text = deit_ok(tmp_path, tmp_path / "published", *flags, "--drop-path", "0.9", "--no-train-mode")
    assert "off, without dropout or stochastic depth, as the published --finetune" in text
    losses = [log_of(tmp_path / name)[0]["train_loss"] for name in ("run", "without", "published")]
    assert losses[0] != losses[1] == losses[2]


def test_a_tar_trains_as_its_folder_does(colours, tmp_path):
    for split in ("train", "val"):
        pack(colours / split, tmp_path / f"{split}.tar")
    deit_ok(colours, tmp_path / "folder", "--epochs", "1")
    deit_ok(tmp_path, tmp_path / "tar", "--epochs", "1", "--load-tar")
    assert log_of(tmp_path / "folder") == log_of(tmp_path / "tar")


@pytest.mark.parametrize(("epochs", "warmup", "told"), [(2, 5, True), (6, 5, True), (7, 5, False), (1, 0, False)])
def test_a_run_that_is_all_warm_up_is_told(epochs, warmup, told, caplog):
    args = argparse.Namespace(epochs=epochs, warmup_epochs=warmup, warmup_lr=1e-6)
    train.warn_of_warmup(args)
    words = f"--epochs {epochs} --warmup-epochs 5: all {epochs} epoch(s) are warm-up from 1e-06 and stay below the full"
    assert (words in caplog.text and "--warmup-epochs 0" in caplog.text) if told else not caplog.text


def test_training_longer_says_what_the_rate_will_be(trained, colours, tmp_path):
    folder = shutil.copytree(trained[0], tmp_path / "run")
    flags = folder / "config.yaml"
    before = flags.read_text()
    again = partial(deit_ok, colours, folder, *PLAIN, "--lr", "0.3", "--model-ema-decay", "0.9", "--resume", "auto")
    text = again("--epochs", "1")
    assert "nothing left to train: 6 epoch(s) are done, --epochs is 1\n" in text and flags.read_text() == before
    text = again("--epochs", "8", "--batch-size", "4")
    assert "it ends after 6 epoch(s), and later ones keep its lowest rate. For a new schedule, start a run" in text
    rate = log_of(trained[0])[-1]["train_lr"]
    assert re.search(r"effective lr +(\S+) now, then as the", text)[1] == f"{log_of(folder)[6]['train_lr']:g}"
    assert log_of(folder)[6]["train_lr"] < rate and log_of(folder)[7]["train_lr"] == pytest.approx(1e-5)
