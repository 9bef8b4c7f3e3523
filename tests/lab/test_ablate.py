"""The ablation runner, with a package that trains nothing: grids, resuming after a kill, failures, tables."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import deit_irpe
from deit_irpe.model_stats import macs
from irpe_lab import ablate, jobs, tables
from irpe_lab.ablate import main
from irpe_lab.figures import TASKS
from irpe_lab.grid import read_grid
from irpe_lab.results import Outcome, Row
from irpe_train.config import ROOT
from irpe_train.errors import RunError
from tests.helpers.full_disk import full_disk
from tests.helpers.processes import wait_for
from tests.helpers.quick_python import quick_programs
from tests.helpers.tiny_images import write_images

# Stands in for deit_irpe: two "epochs" to log.txt, resuming; every start and every epoch is noted in trace.txt.
PACKAGE = """
import argparse, json, os, pathlib, sys, time, yaml
parser = argparse.ArgumentParser()
for flag in ("config", "seed", "output_dir", "resume", "input-size"):
    parser.add_argument("--" + flag)
parser.add_argument("--eval", action="store_true")
args = parser.parse_args()
if args.eval:
    assert args.output_dir == "" and pathlib.Path(args.resume).parent.is_dir()
    if args.input_size == "77":
        sys.exit("ValueError: no such size")
    print(f"* Acc@1 {int(args.input_size) / 10 + int(args.seed)} Acc@5 99.0 loss 1.0")
    sys.exit()
args.rpe = yaml.safe_load(open(args.config))["rpe"]
out = pathlib.Path(args.output_dir)
out.mkdir(parents=True, exist_ok=True)
(out / "model.json").write_text(json.dumps({"n_parameters": 7, "macs_M": 1.5, "buckets": 50}))
if args.rpe == "rpe-9-cross-ctx-0-q":
    print("first words")
    sys.exit("ValueError: no such encoding here")
log = out / "log.txt"
begin = len(log.read_text().splitlines()) if log.exists() else 0
with open("trace.txt", "a") as trace:
    trace.write(f"start {args.rpe} {args.seed} {begin}\\n")
for epoch in range(begin, 2):
    if epoch == 1 and "ctx" in args.rpe:
        time.sleep(float(os.environ.get("SLOW", 0)))
    print(f"Epoch: [{epoch}] [0/1]  loss: 1.0  {100 + epoch} img/s  max mem: {50 + epoch}", flush=True)
    with open(log, "a") as file:
        acc1 = 80.0 + int(args.seed) + epoch + 2 * ("ctx" in args.rpe) * (1 - epoch) + 1.5 * ("bias" in args.rpe)
        file.write(json.dumps({"test_acc1": acc1, "epoch": epoch, "n_parameters": 7}) + "\\n")
"""
GRID = """
package: deit_irpe
config: configs/deit/small.yaml
grid: {rpe: [none, "rpe-1.9-product-{ctx,bias}-1-k"]}
seeds: [0, 1]
published: {rpe-1.9-product-ctx-1-k: deit_small_patch16_224_ctx_product_50_shared_k}
"""


@pytest.fixture
def place(tmp_path, monkeypatch, coarse_pictures):
    """A folder with the stand-in package and a grid; commands run from there."""
    (tmp_path / "deit_irpe").mkdir()
    (tmp_path / "deit_irpe" / "__init__.py").touch()
    (tmp_path / "deit_irpe" / "__main__.py").write_text(PACKAGE)
    (tmp_path / "grid.yaml").write_text(GRID)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(jobs.LocalPool, "poll_seconds", 0.1)
    return tmp_path


def starts(place):
    return [line for line in (place / "trace.txt").read_text().splitlines() if line.startswith("start")]


def table(folder):
    with open(folder / "table.csv", newline="") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def test_a_table_from_a_grid(place, capsys):
    (place / "grid.yaml").write_text(
        GRID + "runs: {a bad one: {rpe: rpe-9-cross-ctx-0-q}, other: {rpe: rpe-2-product-ctx-1-k}}\n"
    )
    assert main(["grid.yaml", "-o", "out", "--jobs", "2"]) == 1
    rows = table(place / "out")
    assert list(rows) == ["none", "rpe-1.9-product-ctx-1-k", "rpe-1.9-product-bias-1-k", "a_bad_one", "other"]
    product = rows["rpe-1.9-product-ctx-1-k"]
    assert product["figures"] == "81.0 82.0" and product["mean"] == "81.5" and product["published"] == "80.9"
    assert float(product["spread"]) == pytest.approx(0.5**0.5)
    assert (product["buckets"], product["n_parameters"], product["macs_M"]) == ("50", "7", "1.5")
    assert (product["images_per_second"], product["memory"], product["best_epoch"]) == ("100.5", "51.0", "82.5")
    assert 0 < float(product["seconds"]) < 60 and product["seeds"] == "0 1"
    bias = rows["rpe-1.9-product-bias-1-k"]
    assert (bias["difference"], bias["low"], bias["high"]) == ("1.5", "", "")
    assert product["difference"] == "0.0" and rows["none"]["difference"] == rows["a_bad_one"]["difference"] == ""
    bad = rows["a_bad_one"]
    assert bad["states"] == "failed failed" and bad["reason"] == "ValueError: no such encoding here"
    text = (place / "out" / "table.md").read_text()
    time = tables.duration(float(product["seconds"]))
    figures = "81.50 ± 0.71 | 82.50 | +0.00 [-]"
    assert f"| rpe-1.9-product-ctx-1-k | 50 | 7 | 1.5 | 100 | 51 | {time} | {figures} | 2/2 | 80.90 |" in text
    failed = "failed: ValueError: no such encoding here"
    assert f"| a_bad_one | - | - | - | - | - | - | {failed} | - | - | 0/2 | not published here |" in text
    assert "\\textcolor{red}{a\\_bad\\_one}" in (place / "out" / "table.tex").read_text()
    assert (place / "out" / "table.png").read_bytes().startswith(b"\x89PNG")
    assert (place / "out" / "table.pdf").read_bytes().startswith(b"%PDF")
    told = capsys.readouterr().out
    assert "a_bad_one" in told and re.search("^other +2 done", told, re.MULTILINE)  # of the run that ended last
    # Again: only failed runs are retried. What finished is published under the zoo's names.
    before = starts(place)
    assert main(["grid.yaml", "-o", "out", "--logs", "logs/mini"]) == 1
    assert starts(place) == before
    published = {path.name for path in (place / "logs" / "mini").iterdir()}
    assert {"table.md", "table.png", "log_none_seed1.txt", "detail_none_seed1.log"} <= published
    assert "log_a_bad_one_seed0.txt" not in published


def test_evaluations_after_training(place, capsys):
    """Added to a finished grid, they are made without training again; one that fails is the run's reason."""
    assert main(["grid.yaml", "-o", "out", "--only", "*k", "--seeds", "0,1"]) == 0
    began = starts(place)
    (place / "grid.yaml").write_text(
        GRID + "evaluations: {at 288: {input-size: 288}}\nbaseline: rpe-1.9-product-ctx-1-k\n"
    )
    capsys.readouterr()
    assert main(["grid.yaml", "-o", "out", "--only", "*k", "--seeds", "0", "--dry-run"]) == 0
    command = capsys.readouterr().out.splitlines()[1]
    folder = "out/rpe-1.9-product-ctx-1-k_seed0"
    assert command == (
        f"{sys.executable} -m deit_irpe --config {folder}/flags.yaml --seed 0 --input-size=288 --eval --resume "
        f"{folder}/checkpoint.pth --output_dir ''"
    )
    assert main(["grid.yaml", "-o", "out", "--only", "*k", "--logs", "logs"]) == 0
    assert (place / "logs" / "eval_at_288_rpe-1.9-product-ctx-1-k_seed1.log").is_file()
    assert starts(place) == began + [line[:-1] + "2" for line in began]  # resumed at their end
    for row in table(place / "out").values():
        assert (row["at 288: mean"], row["at 288: figures"]) == ("29.3", "28.8 29.8")
    assert table(place / "out")["rpe-1.9-product-bias-1-k"]["at 288: difference"] == "0.0"
    text = (place / "out" / "table.md").read_text()
    assert "| top-1 (%) at 288 | minus rpe-1.9-product-ctx-1-k at 288 [95%] |" in text
    assert "| 29.30 ± 0.71 | +0.00 [-] | 2/2 |" in text
    (place / "grid.yaml").write_text(GRID + "evaluations: {at 288: {input-size: 77}}\n")
    assert main(["grid.yaml", "-o", "out", "--only", "*k", "--table"]) == 0  # not of that size yet
    assert table(place / "out")["rpe-1.9-product-bias-1-k"]["at 288: mean"] == ""
    (place / "grid.yaml").write_text(GRID + "evaluations: {at 77: {input-size: 77}}\n")
    assert main(["grid.yaml", "-o", "out", "--only", "*k"]) == 1
    assert table(place / "out")["rpe-1.9-product-bias-1-k"]["reason"] == "at 77: ValueError: no such size"


def test_only_some_runs_and_the_table_of_all(place):
    """``--only`` starts some runs: those that finished earlier stay in the table, and are the baseline."""
    assert main(["grid.yaml", "-o", "out", "--only", "none", "--seeds", "0"]) == 0
    assert list(table(place / "out")) == ["none"]
    assert main(["grid.yaml", "-o", "out", "--only", "*bias*", "--seeds", "0", "--logs", "logs"]) == 0
    rows = table(place / "out")
    assert list(rows) == ["none", "rpe-1.9-product-bias-1-k"] and len(starts(place)) == 2
    assert rows["rpe-1.9-product-bias-1-k"]["difference"] == "1.5" and (place / "logs" / "log_none_seed0.txt").is_file()
    assert main(["grid.yaml", "-o", "out", "--only", "none", "--seeds", "0", "--table"]) == 0
    assert table(place / "out") == rows
    other = ["--set", "epochs=7", "--only", "*ctx*", "--seeds", "0"]  # the others were run with other flags
    assert main(["grid.yaml", "-o", "out", *other]) == 0 and list(table(place / "out")) == ["rpe-1.9-product-ctx-1-k"]


class OneAfterTheOther:
    """Works in this process, which has imported PyTorch."""

    poll_seconds = 0.0
    start = staticmethod(jobs.work)

    def free(self):
        return True

    def working(self):
        return set()

    def stop(self):
        pass


def test_a_table_counts_the_model_that_was_trained_and_evaluates_it_at_another_size(tmp_path, monkeypatch):
    """Three classes: parameters, multiply-accumulates and buckets are the run's, not those of 1000 classes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs, "LocalPool", lambda slots: OneAfterTheOther())
    monkeypatch.setattr(sys, "executable", quick_programs() / "python")
    for split in ("train", "val"):
        write_images(tmp_path / split, {"ant": 2, "bee": 2, "cat": 2})
    (tmp_path / "grid.yaml").write_text(
        "package: deit_irpe\nconfig: configs/deit/smoke.yaml\nflags: {data-path: ., batch-size: 4, epochs: 1, "
        "device: cpu, tensorboard: false, model-kwargs: [depth=1, embed_dim=16, num_heads=2]}\n"
        "runs: {irpe: {rpe: rpe-1.9-product-ctx-1-k}}\nevaluations: {at 48: {input-size: 48}}\n"
    )
    assert main(["grid.yaml", "-o", "out"]) == 0
    (row,) = table(tmp_path / "out").values()
    sizes = dict(depth=1, embed_dim=16, num_heads=2, num_classes=3, img_size=32)
    model = deit_irpe.create_model("deit_demo_patch4_32", "rpe-1.9-product-ctx-1-k", **sizes)
    assert int(row["n_parameters"]) == sum(p.numel() for p in model.parameters())
    assert float(row["macs_M"]) == pytest.approx(macs(model) / 1e6) and row["buckets"] == "50"
    assert 0 <= float(row["at 48: mean"]) <= 100
    printed = (tmp_path / "out" / "irpe_seed0" / "eval_at_48.log").read_text()
    assert "--input-size 48: pos_embed resampled from 8x8 to 12x12 patches" in printed


def run_in_background(place, *more):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SLOW": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "irpe_lab.ablate", "grid.yaml", "-o", "out", *more],
        env=environment,
        stdout=subprocess.DEVNULL,
        cwd=place,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_and_started_again(place, how):
    """The second run of three is killed in its second epoch; kill -9 leaves its worker, other signals stop it."""
    log = place / "out" / "rpe-1.9-product-ctx-1-k_seed0" / "log.txt"
    runner = run_in_background(place, "--seeds", "0")
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) == 1)
    runner.send_signal(how)
    assert runner.wait() == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 1}[how]
    assert main(["grid.yaml", "-o", "out", "--seeds", "0"]) == 0
    names = ["none", "rpe-1.9-product-ctx-1-k", "rpe-1.9-product-bias-1-k"]
    assert [row["figures"] for row in table(place / "out").values()] == ["81.0", "81.0", "82.5"]
    for name in names:
        lines = (place / "out" / f"{name}_seed0" / "log.txt").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == [0, 1]  # none missing, none twice
    once = [f"start {name} 0 0" for name in names]
    went_on = [*once[:2], "start rpe-1.9-product-ctx-1-k 0 1", once[2]]
    # Stopped by its runner, a run resumes in its second epoch, unless it was done before the signal came.
    assert starts(place) in ([once] if how == signal.SIGKILL else [once, went_on])


def test_a_folder_of_another_command(place):
    main(["grid.yaml", "-o", "out", "--only", "none", "--seeds", "0"])
    with pytest.raises(
        SystemExit, match="none_seed0 holds the results of other flags .see its flags.yaml.. Choose another folder"
    ):
        main(["grid.yaml", "-o", "out", "--only", "none", "--seeds", "0", "--set", "epochs=9"])
    assert main(["grid.yaml", "-o", "out", "--only", "none", "--seeds", "0", "--set", "epochs=9", "--table"]) == 1
    row = table(place / "out")["none"]
    assert row["mean"] == "" and row["reason"].startswith("out/none_seed0 holds the results of other flags")
    assert main(["grid.yaml", "-o", "out", "--only", "none", "--seeds", "0", "--table"]) == 0
    assert table(place / "out")["none"]["mean"] == "81.0"


def test_a_folder_that_was_moved_goes_on(place):
    (place / "grid.yaml").write_text(GRID + "evaluations: {at 288: {input-size: 288}}\n")
    choice = ["grid.yaml", "--only", "none", "--seeds", "0"]
    assert main([*choice, "-o", "out"]) == 0
    began = starts(place)
    (place / "out").rename(place / "kept")
    for folder in ("kept", str(place / "kept")):
        assert main([*choice, "-o", folder]) == 0
        row = table(place / "kept")["none"]
        assert (row["mean"], row["at 288: mean"]) == ("81.0", "28.8") and starts(place) == began
    job = json.loads((place / "kept/none_seed0/job.json").read_text())
    job["then"]["at 288"][:0] = ["-m", "torch.distributed.run"]  # by two processes
    (place / "kept/none_seed0/job.json").write_text(json.dumps(job))
    assert main([*choice, "-o", "kept", "--table"]) == 0 and table(place / "kept")["none"]["at 288: mean"] == "28.8"
    (place / "kept/none_seed0/done.json").unlink()
    assert main([*choice, "-o", "kept"]) == 0 and starts(place) != began and not (place / "out").exists()


def test_a_dry_run_with_another_evaluation_leaves_a_finished_run_finished(place):
    choice = ["grid.yaml", "-o", "out", "--only", "none", "--seeds", "0"]
    assert main(choice) == 0
    (place / "grid.yaml").write_text(GRID + "evaluations: {at 288: {input-size: 288}}\n")
    assert main([*choice, "--dry-run"]) == 0 and main([*choice, "--table"]) == 0
    assert table(place / "out")["none"]["mean"] == "81.0"
    assert main(choice) == 0 and table(place / "out")["none"]["at 288: mean"] == "28.8"


def test_dry_run(place, capsys, monkeypatch):
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("PYTHONPATH", "theirs")
    assert main(["grid.yaml", "-o", "out", "--dry-run", "--gpus-per-run", "4", "--set", "epochs=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and not list(place.rglob("log.txt"))
    assert lines[1].endswith(
        "-m torch.distributed.run --standalone --nproc_per_node=4 -m deit_irpe --config "
        "out/none_seed1/flags.yaml --seed 1 --output_dir out/none_seed1 --resume auto"
    )
    written = yaml.safe_load((place / "out" / "none_seed1" / "flags.yaml").read_text())
    shared = yaml.safe_load((ROOT / "configs" / "deit" / "small.yaml").read_text())
    assert written == shared | {"rpe": "none", "epochs": 3}
    assert signal.getsignal(signal.SIGTERM) is handler  # a caller keeps its own
    assert os.environ["PYTHONPATH"] == f"{ROOT}{os.pathsep}theirs"  # runs import what was imported here


def test_gpus_are_shared_out(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2,5,7")
    assert ablate.gpu_slots(1, 2) == [{"CUDA_VISIBLE_DEVICES": "0,2"}, {"CUDA_VISIBLE_DEVICES": "5,7"}]
    assert ablate.gpu_slots(1, 3) == [{"CUDA_VISIBLE_DEVICES": "0,2,5"}]  # one is left over
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert ablate.gpu_slots(2, 1) == [{}, {}]


def test_runs_at_once_and_processes_of_a_run(place, monkeypatch):
    seen = []
    monkeypatch.setattr(jobs, "LocalPool", lambda slots: slots)
    monkeypatch.setattr(ablate.Ablation, "work", lambda self, pool, processes: seen.append((len(pool), processes)))
    monkeypatch.setattr(ablate.Ablation, "write", lambda self: [])
    for flags in ([], ["--jobs", "3"], ["--gpus-per-run", "2"]):
        assert main(["grid.yaml", "-o", "out", *flags]) == 1  # nothing has run
    assert seen == [(1, 1), (3, 1), (1, 2)]


def test_a_row_is_told_when_its_state_changes(monkeypatch, capsys):
    good = Row("good", "", {0: Outcome("done", 2, 90.0, 90.0), 1: Outcome("running", 1)})
    bad = Row("bad", "", {0: Outcome("failed", reason="it broke")})
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    display = tables.Display(TASKS["deit_irpe"].figure)
    display.show([good, bad])
    assert capsys.readouterr().out == (
        "good  1 done, 1 running  3 epoch(s) in all  90.00\n"
        "\x1b[31mbad   1 failed  0 epoch(s) in all  failed: it broke\x1b[0m\n"
    )
    better = Row("good", "", {0: Outcome("done", 2, 90.0, 90.0), 1: Outcome("done", 2, 92.0, 92.0)})
    for _ in range(2):
        display.show([better, bad])
    assert capsys.readouterr().out == "good  2 done  4 epoch(s) in all  91.00 ± 1.41\n"


def test_two_runners_share_the_runs(place):
    """Neither starts what the other runs, and both see all of it done."""
    other = run_in_background(place, "--seeds", "0")
    assert main(["grid.yaml", "-o", "out", "--seeds", "0"]) == 0 and other.wait() == 0
    assert sorted(starts(place)) == sorted(f"start {run} 0 0" for run in table(place / "out"))


def test_slurm_jobs_go_through_submitit(place, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    grid = read_grid("grid.yaml", seeds="0", only=["none"])
    ablation = ablate.Ablation(grid, Path("out").absolute())
    pool = jobs.SlurmPool(place / "slurm", {"cluster": "local", "timeout_min": 5})
    pool.poll_seconds = 0.2
    ablation.work(pool)
    assert [row.figures() for row in ablation.rows()] == [{0: 81.0}]
    assert json.loads((place / "out" / "none_seed0" / "slurm.json").read_text())["job_id"]


@pytest.mark.parametrize("option", ["cluster=slurm", "foo=1", "timeout_min=x", "folder=x", "self=x"])
def test_what_slurm_does_not_take_is_one_message(place, monkeypatch, option):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "")  # this is not a cluster
    argv = ["grid.yaml", "--slurm", "--slurm-option", "cluster=local", "--slurm-option", option]
    with pytest.raises(SystemExit, match="ablate: BadFlags: --slurm, --slurm-option: ."):
        main(argv)


@pytest.mark.parametrize("flag", ["--jobs", "--gpus-per-run"])
def test_nothing_at_a_time_is_refused(place, flag, capsys):
    with pytest.raises(SystemExit):
        main(["grid.yaml", flag, "0"])
    assert "expected 1 or more, got 0" in capsys.readouterr().err


def test_a_run_without_a_result_is_no_success(place, capfd):
    folder = place / "out/none_seed0"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "detail.log")
    choice = ["grid.yaml", "-o", "out", "--only", "none", "--seeds", "0"]
    assert main(choice) == 1
    told = capfd.readouterr().err.replace(f"{place}/", "").replace("out/", "")
    assert re.fullmatch(r"none_seed0: RunError: none_seed0/detail.log: expected a plain file, not a [^\n]*\n", told)
    (folder / "detail.log").unlink()
    assert main([*choice, "--table"]) == 0  # nothing was to be run
    assert main(choice) == 0


def test_a_full_disk_keeps_the_copies_that_were_there(tmp_path):
    table, copy = tmp_path / "table.csv", tmp_path / "logs" / "table.csv"
    ablation = SimpleNamespace(folder=tmp_path, published_files=lambda: {table.name: table})
    copy.parent.mkdir()
    copy.write_text("old")
    table.write_text("new" * 99)
    with full_disk(50), pytest.raises(OSError, match=f"File too large: '{copy}'"):
        ablate.Ablation.publish(ablation, copy.parent)
    assert list(copy.parent.iterdir()) == [copy] and copy.read_text() == "old"


def test_other_results_are_refused_early(tmp_path):
    jobs.prepare(tmp_path, ["a"], "")
    jobs.prepare(tmp_path, ["b"], "lr: 1\n")  # nothing had been run yet
    (tmp_path / "log.txt").write_text("{}\n")
    jobs.prepare(tmp_path, ["b"], "lr: 1\n")
    with pytest.raises(RunError, match="holds the results of another command .b."):
        jobs.prepare(tmp_path, ["c"], "lr: 1\n")
    with pytest.raises(RunError, match="holds the results of other flags"):
        jobs.prepare(tmp_path, ["b"], "lr: 2\n")
    for edited in (
        3,
        ["p", "--output_dir", ""],
        ["p", "--output_dir", ":"],
        ["p", "--output_dir", 5],
        ["--output_dir"],
    ):
        (tmp_path / "job.json").write_text(json.dumps({"command": edited, "then": {"at 288": edited}}))
        with pytest.raises(RunError, match="holds the results of another command"):
            jobs.prepare(tmp_path, ["q", "--output_dir", str(tmp_path)], "lr: 1\n")
    assert (tmp_path / "flags.yaml").read_text() == "lr: 1\n"


@pytest.mark.parametrize(
    "name, text",
    [
        ("table.md", "my notes"),
        ("table.csv", "a,b\n1,2\n"),
        ("table.csv", "run,flags,mean\nanother,--rpe x,1\n"),
        ("table.csv", ""),
        ("table.png", "a picture"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--table"]])
def test_tables_replace_no_file_of_somebody_else(place, name, text, more):
    (place / "out").mkdir()
    (place / "out" / name).write_text(text)
    with pytest.raises(SystemExit, match=rf"out/{name}: already there, and not from these runs; give another folder"):
        main(["grid.yaml", "-o", "out", *more])
    assert [path.name for path in (place / "out").iterdir()] == [name] and (place / "out" / name).read_text() == text


def test_published_logs_replace_their_own_alone(place):
    for only in ("none", "none", "*-bias-*"):
        assert main(["grid.yaml", "-o", "out", "--jobs", "2", "--only", only, "--logs", "logs"]) == 0
    assert {path.name for path in (place / "logs").iterdir()} >= {"table.csv", "table.png", "log_none_seed0.txt"}
    (place / "logs" / "table.csv").unlink()
    log = place / "logs" / "log_none_seed0.txt"
    log.write_text("somebody else's")
    with pytest.raises(SystemExit, match=r"logs/(table.md|log_none_seed0.txt): already there"):
        main(["grid.yaml", "-o", "out", "--table", "--logs", "logs"])
    assert log.read_text() == "somebody else's"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["-o", "grid.yaml/x"], r"-o grid\.yaml/x/none_seed0: cannot write there \(Not a directory\)"),
        (["-o", "out", "--logs", "grid.yaml"], r"--logs grid\.yaml: cannot write there \(File exists\)"),
    ],
)
def test_a_place_that_cannot_be_written_is_named_before_any_run(place, flags, words):
    with pytest.raises(SystemExit, match=words):
        main(["grid.yaml", "--only", "none", *flags])
    assert not (place / "trace.txt").exists()
