"""One run of an ablation: its job, its worker, and what it leaves behind."""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed.run

from irpe_lab import jobs
from irpe_train.config import ROOT
from irpe_train.errors import RunError
from tests.helpers.full_disk import full_disk
from tests.helpers.processes import wait_for


def test_a_worker_waits_for_a_busy_run(tmp_path):
    jobs.prepare(tmp_path / "run", ["-c", "raise SystemExit('started')"], "")
    with jobs.locked(tmp_path / "run") as lock:
        assert lock and jobs.busy(tmp_path / "run")
        worker = subprocess.Popen([sys.executable, "-m", "irpe_lab.jobs", str(tmp_path / "run")], cwd=ROOT)
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(1)
        assert not (tmp_path / "run" / "detail.log").exists()
    assert worker.wait() == 1 and not jobs.busy(tmp_path / "run")
    assert jobs.done(tmp_path / "run")["reason"] == "started"


def test_a_run_is_worked_on_where_nothing_can_be_locked(tmp_path, monkeypatch, capsys):
    def flock(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    jobs.prepare(tmp_path, ["-c", "print('here')"], "")
    assert not jobs.busy(tmp_path) and jobs.work(tmp_path) == 0
    said = f"{tmp_path} cannot be locked (Function not implemented): do not start a second runner there\n"
    assert capsys.readouterr().out == said and (tmp_path / "detail.log").read_text() == "here\n"


def test_torchrun_need_not_look_up_the_name_of_this_machine(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(jobs.subprocess, "Popen", lambda command, env, **how: started.append(env))
    jobs.LocalPool([{}]).start(tmp_path)
    monkeypatch.setattr("os.environ", started[0])
    assert torch.distributed.run.get_args_parser().parse_args(["program.py"]).local_addr == "127.0.0.1"


def test_a_run_whose_worker_was_killed_is_still_busy(tmp_path):
    jobs.prepare(tmp_path / "run", ["-c", "import time; print('here', flush=True); time.sleep(1)"], "")
    worker = subprocess.Popen([sys.executable, "-m", "irpe_lab.jobs", str(tmp_path / "run")], cwd=ROOT)
    console = tmp_path / "run" / "detail.log"
    wait_for(lambda: console.exists() and console.read_text() == "here\n")
    worker.kill()
    worker.wait()
    assert jobs.busy(tmp_path / "run")
    wait_for(lambda: not jobs.busy(tmp_path / "run"))


def test_a_preempted_run_has_no_outcome_yet_and_its_time_counts(tmp_path, monkeypatch):
    jobs.prepare(tmp_path / "run", ["-c", "import os; os._exit(75 if not os.path.exists('run/x') else 0)"], "")
    monkeypatch.chdir(tmp_path)
    assert jobs.work(Path("run")) == 75 and jobs.done(tmp_path / "run") is None
    job = tmp_path / "run" / "job.json"
    told = json.loads(job.read_text())
    assert told["seconds"] > 0
    job.write_text(json.dumps(told | {"seconds": 1000}))
    (tmp_path / "run" / "x").touch()
    assert jobs.work(Path("run")) == 0
    assert 1000 < jobs.done(tmp_path / "run")["seconds"] < 1100  # of both attempts


def test_a_failed_run_is_not_evaluated(tmp_path):
    jobs.prepare(tmp_path, ["-c", "raise SystemExit('broke')"], "", {"later": ["-c", "print('evaluated')"]})
    assert jobs.work(tmp_path) == 1 and jobs.done(tmp_path)["reason"] == "broke"
    assert not jobs.evaluation_log(tmp_path, "later").exists()


def test_an_evaluation_whose_output_is_gone_is_run_again(tmp_path):
    wanted = ["-c", ""], "", {"later": ["-c", "print('evaluated')"]}
    console = jobs.evaluation_log(tmp_path, "later")
    for _ in range(2):
        jobs.prepare(tmp_path, *wanted)
        assert jobs.work(tmp_path) == 0 and console.read_text() == "evaluated\n"
        jobs.prepare(tmp_path, *wanted)
        assert jobs.finished(tmp_path)
        console.unlink()


def test_a_number_written_in_another_way_is_the_same_flag(tmp_path):
    jobs.prepare(tmp_path, ["-c", ""], "lr: 5.0e-05\nweight-decay: 0.1\n")
    assert jobs.work(tmp_path) == 0
    jobs.prepare(tmp_path, ["-c", ""], "lr: 0.00005\nweight-decay: 0.10\n")
    assert jobs.finished(tmp_path)
    with pytest.raises(RunError, match="the results of other flags"):
        jobs.prepare(tmp_path, ["-c", ""], "lr: 0.0001\nweight-decay: 0.10\n")


def test_a_full_disk_under_a_run_is_one_message(tmp_path):
    jobs.prepare(tmp_path / "run", ["-c", ""], "")
    with full_disk(0):
        told = subprocess.run(
            [sys.executable, "-m", "irpe_lab.jobs", tmp_path / "run"], cwd=ROOT, stderr=subprocess.PIPE
        )
    assert told.returncode == 1 and re.fullmatch(rb"[^\n]*job.json'\n", told.stderr)


ODD_OUTCOMES = [{"seconds": value} for value in ("5", None, float("nan"), -1, 10**400)] + [{"rc": "0"}, {"rc": None}]


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "{}", "\xff"),
        *(json.dumps({"rc": 0, "seconds": 1.0, "reason": None} | odd) for odd in ODD_OUTCOMES),
    ],
)
def test_a_damaged_outcome_counts_as_missing(tmp_path, text):
    jobs.prepare(tmp_path, ["-c", ""], "")
    (tmp_path / "done.json").write_text(text, encoding="latin-1")
    assert jobs.done(tmp_path) is None and jobs.work(tmp_path) == 0 and jobs.finished(tmp_path)
