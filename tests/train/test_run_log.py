"""log.txt, the recorded flags and versions, and the start banner."""

import argparse
import errno
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import threading
import types

import pytest
import torch

from irpe_train.config import parse_args
from irpe_train.errors import RunError
from irpe_train.logger import log_details, set_up_logging
from irpe_train.run import Run
from irpe_train.run_folder import lock
from irpe_train.run_log import RunLog, banner, changed_flags, git_state, record_start
from tests.helpers import tiny_run


def epochs(folder):
    return [json.loads(line)["epoch"] for line in (folder / "log.txt").read_text().splitlines()]


def test_a_line_an_epoch_with_keys_in_their_order(tmp_path):
    log = RunLog(tmp_path / "new", epoch=0, resumed=False, tensorboard=False)
    log.write({"train_lr": 1e-6, "train_loss": 0.1, "test_coco_eval_bbox": [0.5] * 12, "epoch": 0, "n_parameters": 7})
    assert (tmp_path / "new" / "log.txt").read_text() == (
        '{"train_lr": 1e-06, "train_loss": 0.1, "test_coco_eval_bbox": '
        + str([0.5] * 12)
        + ', "epoch": 0, "n_parameters": 7}\n'
    )


def test_each_epoch_once_after_a_resume(tmp_path):
    log = RunLog(tmp_path, epoch=0, resumed=False, tensorboard=False)
    for epoch in range(4):
        log.write({"epoch": epoch})
    with open(tmp_path / "log.txt", "a") as file:
        file.write('{"epoch": 4, "train_lo')  # killed while writing
    log = RunLog(tmp_path, epoch=2, resumed=True, tensorboard=False)
    assert epochs(tmp_path) == [0, 1]
    log.write({"epoch": 2})
    assert epochs(tmp_path) == [0, 1, 2]


@pytest.mark.parametrize("line", ["\ufeff", "[]\n", '{"epoch": "x"}\n', '{"epoch": null}\n', "[" * 100_000 + "\n"])
def test_a_resumed_log_that_an_editor_has_touched(tmp_path, line):
    """A byte-order mark costs no line; lines that are not epochs are dropped."""
    (tmp_path / "log.txt").write_text(line + '{"epoch": 0}\n{"epoch": 1}\n', encoding="utf-8")
    RunLog(tmp_path, epoch=1, resumed=True, tensorboard=False)
    assert (tmp_path / "log.txt").read_text() == '{"epoch": 0}\n'


def test_log_of_another_run_is_kept(tmp_path, capsys):
    set_up_logging(0)
    for _ in range(3):
        RunLog(tmp_path, epoch=0, resumed=False, tensorboard=False).write({"epoch": 0})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.1.txt", "log.2.txt", "log.txt"]
    assert "it is now log.2.txt" in capsys.readouterr().out


def test_no_folder_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    RunLog("", epoch=0, resumed=False).write({"epoch": 0})
    record_start(tiny_run.get_parser(), argparse.Namespace(output_dir=""), {})
    with pytest.raises(RunError, match="--wandb irpe keeps the run's identity in --output_dir: give one"):
        RunLog("", epoch=0, resumed=False, wandb="irpe")
    assert not list(tmp_path.iterdir())


def test_tensorboard_if_installed(tmp_path):
    pytest.importorskip("tensorboard")
    log = RunLog(tmp_path, epoch=0, resumed=False)
    log.write({"train_loss": 1.0, "test_coco_eval_bbox": [0.5] * 12, "epoch": 0})
    (events,) = (tmp_path / "tensorboard").iterdir()
    contents = events.read_bytes()
    assert b"train_loss" in contents and b"test_coco_eval_bbox_AP" in contents


def test_a_full_disk_under_tensorboard_is_one_warning(tmp_path, monkeypatch, capfd):
    writer = pytest.importorskip("tensorboard.summary.writer.record_writer")
    set_up_logging(0)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(writer.RecordWriter, "write", full)
    monkeypatch.setattr(writer.RecordWriter, "flush", full)
    log = RunLog(tmp_path, epoch=0, resumed=False)
    for epoch in range(3):
        log.write({"train_loss": 1.0, "epoch": epoch})
    assert epochs(tmp_path) == [0, 1, 2]
    captured = capfd.readouterr()
    assert captured.out.count("warning: TensorBoard: cannot write to") == 1 and "No space left" in captured.out
    assert "Traceback" not in captured.err


def test_a_folder_that_tensorboard_cannot_name_is_one_warning(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    set_up_logging(0)
    folder = tmp_path / os.fsdecode(b"not UTF-8: \xff")
    RunLog(folder, epoch=0, resumed=False).write({"epoch": 0})
    assert epochs(folder) == [0] and "warning: TensorBoard: cannot write to" in capsys.readouterr().out


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    log = RunLog(tmp_path, epoch=0, resumed=True, tensorboard=False)
    (tmp_path / "log.txt").symlink_to("unmounted/log.txt")
    with pytest.raises(FileNotFoundError, match="No such file.*log.txt"):
        log.write({"epoch": 0})


def test_a_line_is_on_the_disk_when_it_is_said_to_be(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    RunLog(tmp_path, epoch=0, resumed=False, tensorboard=False).write({"epoch": 0})
    assert synced == [(tmp_path / "log.txt").stat().st_size]


def test_the_state_of_git_is_the_commit_and_whether_files_differ(tmp_path, monkeypatch):
    monkeypatch.setattr("irpe_train.run_log.__file__", str(tmp_path / "run_log.py"))
    assert git_state() == "unknown"

    def git(*words):
        name = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        return subprocess.run(["git", "-C", tmp_path, *name, *words], check=True, capture_output=True, text=True).stdout

    (tmp_path / "run_log.py").write_text("")
    for words in (("init",), ("add", "."), ("commit", "-m", "first")):
        git(*words)
    commit = git("rev-parse", "HEAD").strip()
    assert len(commit) == 40 and git_state() == commit
    (tmp_path / "run_log.py").write_text("changed")
    assert git_state() == f"{commit} with local changes"


def test_start_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("IRPE_PLUGINS", "mine")
    monkeypatch.setattr("irpe_train.run_log.PACKAGES", ("torch", "none_such"))
    monkeypatch.setattr("irpe_train.run_log.git_state", lambda: "a commit")
    parser = tiny_run.get_parser()
    args = parse_args(parser, ["--output_dir", str(tmp_path), "--lr", "0.25", "--nan-at", "1", "2", "3"])
    record_start(parser, args, {"n_parameters": 7})
    record_start(parser, args, {"n_parameters": 7})
    again = parse_args(parser, ["--config", str(tmp_path / "config.yaml")])
    assert (again.lr, again.nan_at) == (0.25, [1, 2, 3])
    assert json.loads((tmp_path / "model.json").read_text()) == {"n_parameters": 7}
    starts = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert len(starts) == 2 and {"torch", "python", "git", "command", "gpus", "world_size"} <= set(starts[0])
    assert starts[0]["git"] == "a commit" and starts[0]["environment"]["IRPE_PLUGINS"] == "mine"
    assert starts[0]["torch"] == importlib.metadata.version("torch") and starts[0]["none_such"] is None


def test_a_config_that_a_user_put_into_the_folder_is_kept(tmp_path, capsys):
    """It may be the file the run was started with; one that a run wrote is rewritten."""
    set_up_logging(0)
    parser, mine = tiny_run.get_parser(), "lr: 0.25  # as in the paper\n"
    (tmp_path / "config.yaml").write_text(mine)
    for _ in range(2):
        argv = ["--config", str(tmp_path / "config.yaml"), "--output_dir", str(tmp_path)]
        record_start(parser, parse_args(parser, argv), {})
    assert (tmp_path / "config.1.yaml").read_text() == mine and "it is now config.1.yaml" in capsys.readouterr().out
    assert parse_args(parser, ["--config", str(tmp_path / "config.yaml")]).lr == 0.25
    assert not (tmp_path / "config.2.yaml").exists()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize(
    ("name", "use"),
    [
        (".lock", lock),
        ("detail_run.log", log_details),
        ("log.txt", lambda folder: RunLog(folder, epoch=1, resumed=True, tensorboard=False)),
        ("log.txt", lambda folder: RunLog.write(argparse.Namespace(path=folder / "log.txt"), {"epoch": 0})),
        ("starts.jsonl", lambda folder: started(folder)),
        ("config.yaml", lambda folder: started(folder)),
        ("model.json", lambda folder: started(folder)),
    ],
)
def test_a_pipe_or_folder_named_like_a_file_of_the_run_is_refused_at_once(tmp_path, name, use, make):
    folder = tmp_path / "run"
    folder.mkdir()
    make(folder / name)
    with pytest.raises(RunError, match=f"run/{name}: expected a plain file, not a folder"):
        use(folder)


def started(folder):
    record_start(tiny_run.get_parser(), parse_args(tiny_run.get_parser(), ["--output_dir", str(folder)]), {})


def test_banner_and_changed_flags(capsys):
    set_up_logging(0)
    parser = tiny_run.get_parser()
    args = parse_args(parser, ["--lr", "0.25", "--batch-size", "4", "--amp", "bf16"])
    assert changed_flags(parser, args, ignore=("amp",)) == ["lr=0.25 (default: 0.05)"]
    assert changed_flags(parser, parse_args(parser, [])) == []
    assert changed_flags(parser, args, stored={"batch_size": 4.0, "amp": "bf16"}) == []  # 4 and 4.0 are one number
    stored = {"lr": 0.25, "amp": torch.ones(9), "batch_size": "4\n", "of_another_program": 1}
    told = ["batch_size=4 (stored: 4)", "amp=bf16 (stored: tensor([1., 1., 1., 1., 1., 1., 1., 1., 1.]))"]
    assert changed_flags(parser, args, stored=stored) == told
    banner("tiny", {"effective batch": 8, "lr": "0.25\n0.5"})
    assert capsys.readouterr().out == "tiny\n  effective batch  8\n  lr               0.25\n                   0.5\n"


def test_a_run_of_days_says_how_many(capsys, monkeypatch):
    set_up_logging(0)
    monkeypatch.setattr("time.monotonic", iter([100.0, 100.0 + 54 * 3600 + 61]).__next__)
    Run(None, types.SimpleNamespace(folder=None), None, None, "AP").close()
    assert capsys.readouterr().out == "Training time 2 days, 6:01:01\n"


def test_wandb_gets_the_same_figures_and_goes_on_after_a_resume(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs Weights & Biases: pip install .[wandb]")
    monkeypatch.setenv("WANDB_MODE", "offline")  # it writes what it would send
    monkeypatch.setenv("WANDB_SILENT", "true")
    for run, (name, resumed) in enumerate([("one", False), ("one", True), ("other", False)]):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        log = RunLog(folder, epoch=run, resumed=resumed, tensorboard=False, wandb="irpe-test")
        log.write({"train_loss": 0.5 + run, "test_coco_eval_bbox": [0.4] * 12, "epoch": run})
        wandb.finish()
    wandb.teardown()  # ends the process that writes the files, so they are whole
    one, other = ([*(tmp_path / name).glob("wandb/offline-run-*/run-*.wandb")] for name in ("one", "other"))
    names = [{file.name for file in files} for files in (one, other)]
    assert len(one) == 2 and len(names[0]) == 1 and names[0] != names[1]  # a resumed run stays one run there
    for files, losses in ((one, (b"0.5", b"1.5")), (other, (b"2.5",))):
        content = b"".join(file.read_bytes() for file in files)
        assert b"irpe-test" in content and re.search(rb"test_coco_eval_bbox_AP[^a-z]*0\.4", content)
        assert all(re.search(rb"train_loss[^a-z]*" + re.escape(loss), content) for loss in losses)


def test_wandb_is_told_the_run_and_the_epoch(tmp_path, monkeypatch):
    told = []
    run = types.SimpleNamespace(log=lambda figures, step: told.append((figures, step)))
    module = types.SimpleNamespace(init=lambda **options: told.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", module)
    for resumed in (False, True, False):
        log = RunLog(tmp_path, epoch=3, resumed=resumed, tensorboard=False, wandb="irpe")
        log.write({"train_loss": 0.5, "epoch": 3})
    (first, figures), (second, _), (third, _) = zip(told[::2], told[1::2], strict=True)
    assert figures == ({"train_loss": 0.5}, 3) and first["resume"] == "allow"
    assert first["id"] == second["id"] != third["id"]


def test_wandb_that_refuses_is_one_message(tmp_path, monkeypatch):
    def init(**options):
        raise Exception("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with pytest.raises(RunError, match="^--wandb irpe: No API key configured. Use `wandb login` to log in.$"):
        RunLog(tmp_path, epoch=0, resumed=False, tensorboard=False, wandb="irpe")


def test_wandb_that_is_not_installed_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="--wandb irpe needs Weights & Biases: pip install wandb"):
        RunLog(tmp_path, epoch=0, resumed=False, tensorboard=False, wandb="irpe")
