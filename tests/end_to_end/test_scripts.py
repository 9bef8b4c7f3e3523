"""Every script's dry run prints a command that the argument parser accepts, from any folder; mistakes are named."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from deit_irpe.args import get_args_parser as deit_parser
from detr_irpe.args import get_args_parser as detr_parser
from irpe_train.config import parse_args
from tests.helpers.quick_python import quick_programs

ROOT = Path(__file__).resolve().parents[2]
PARSERS = {"deit_irpe": deit_parser, "detr_irpe": detr_parser}


def run(folder, script, *arguments, ok=True, **environment):
    """Run a script in ``folder``; returns its output."""
    clean = {
        key: value
        for key, value in os.environ.items()
        if key not in ("GPUS", "NNODES", "NODE_RANK", "MASTER_ADDR", "DATA", "CUDA_VISIBLE_DEVICES", "PYTHON")
        and not key.startswith("SLURM")
    }
    done = subprocess.run(
        [str(ROOT / "scripts" / script), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**clean, "PYTHON": str(quick_programs() / "python"), "DRY_RUN": "1", **environment},
    )
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout if ok else done.stderr


def parsed(line):
    """The launcher, the module and its parsed flags of a printed command."""
    words = shlex.split(line)
    module = next(word for word in words if word in PARSERS)
    at = words.index(module)
    return words[:at], module, parse_args(PARSERS[module](), words[at + 1 :])


@pytest.mark.parametrize(
    "script, config, module",
    [
        ("train_deit.sh", "small_k", "deit_irpe"),
        ("train_detr.sh", "r50_150epochs", "detr_irpe"),
        ("eval_deit.sh", "base_qkv", "deit_irpe"),
        ("eval_detr.sh", "rpe-2.0-product-ctx-1-k_300epochs", "detr_irpe"),
    ],
)
def test_train_and_eval(tmp_path, script, config, module):
    out = run(tmp_path, script, config, "--seed", "7", DATA="my data", CUDA_VISIBLE_DEVICES="0,1,2")
    launcher, found, args = parsed(out)
    assert found == module and args.seed == 7
    alone = ["--standalone", "--local-addr=127.0.0.1"]
    assert launcher[1:] == ["-m", "torch.distributed.run", *alone, "--nproc_per_node=3", "-m"]
    assert (args.data_path if module == "deit_irpe" else args.coco_path) == "my data"
    folder = "deit" if module == "deit_irpe" else "detr"
    assert args.config == str(ROOT / "configs" / folder / f"{config}.yaml")
    if script.startswith("eval"):
        name = "deit_base_patch16_224_ctx_product_50_shared_qkv" if folder == "deit" else config
        assert args.eval and args.resume.endswith(f"hub/checkpoints/{name}.pth")
        assert args.output_dir == f"outputs/eval_{config}"
    else:
        assert not args.eval and args.output_dir == f"outputs/{config}"
    assert list(tmp_path.iterdir()) == []


def test_a_config_is_named_as_seen_from_the_repository(tmp_path):
    out = run(tmp_path, "train_deit.sh", "configs/deit/small_k.yaml", DATA="x", CUDA_VISIBLE_DEVICES="")
    assert parsed(out)[2].config == str(ROOT / "configs/deit/small_k.yaml")


def test_a_checkpoint_of_ones_own(tmp_path):
    args = parsed(run(tmp_path, "eval_deit.sh", "small", "mine.pth", "--expect", DATA="x"))[2]
    assert (args.resume, args.expect) == ("mine.pth", "auto")
    assert parsed(run(tmp_path, "eval_detr.sh", "r50_150epochs", "--resume", "auto", DATA="x"))[2].resume == "auto"


def test_one_process_without_gpus(tmp_path):
    (tmp_path / "own.yaml").write_text("data-path: here\nmodel: deit_tiny_patch16_224\n")
    launcher, _, args = parsed(run(tmp_path, "train_deit.sh", str(tmp_path / "own.yaml"), CUDA_VISIBLE_DEVICES=""))
    assert launcher[1:] == ["-m"] and args.data_path == "here"


def test_several_nodes(tmp_path):
    launcher = parsed(
        run(tmp_path, "train_deit.sh", "small", DATA="x", NNODES="2", NODE_RANK="1", GPUS="8", MASTER_ADDR="node0")
    )[0]
    assert launcher[2:] == [
        "torch.distributed.run",
        "--nnodes=2",
        "--node_rank=1",
        "--nproc_per_node=8",
        "--master_addr=node0",
        "--master_port=29500",
        "-m",
    ]


@pytest.mark.parametrize(
    "script, arguments, environment, message",
    [
        ("train_deit.sh", [], {}, "usage: DATA=DIR scripts/train_deit.sh CONFIG"),
        ("train_detr.sh", ["nope"], {"DATA": "x"}, "no config nope. Known: .*r50_150epochs"),
        ("train_deit.sh", ["small"], {}, "where is the data. DATA=DIR train_deit.sh"),
        ("train_deit.sh", ["small"], {"DATA": "nowhere", "DRY_RUN": ""}, "DATA=nowhere: no such folder"),
        ("train_deit.sh", ["small"], {"DATA": "x", "NNODES": "2"}, "NNODES=2 needs NODE_RANK=0..1 and MASTER_ADDR"),
        ("train_deit.sh", ["small"], {"DATA": "x", "NNODES": "two"}, "NNODES=two is not a number"),
        ("train_deit.sh", ["small"], {"DATA": "x", "GPUS": "all"}, "GPUS=all is not a number"),
        ("eval_deit.sh", ["small"], {"DATA": "x"}, "no published checkpoint .*configs/deit/small.yaml"),
        ("eval_deit.sh", ["small", "no.pth"], {"DATA": str(ROOT), "DRY_RUN": ""}, "no checkpoint no.pth"),
    ],
)
def test_mistakes(tmp_path, script, arguments, environment, message):
    assert re.search(message, run(tmp_path, script, *arguments, ok=False, **environment))


def test_every_script_opens_with_its_usage():
    for path in (ROOT / "scripts").glob("*.sh"):
        lines = path.read_text().splitlines()
        if lines[0].startswith("#!"):
            assert "usage:" in lines[1], path.name
            sourced = "usage: source" in lines[1]
            assert sourced or "set -euo pipefail" in lines, path.name
    for name in ("train_deit", "train_detr", "eval_deit", "eval_detr"):
        assert os.access(ROOT / "scripts" / f"{name}.sh", os.X_OK)


def test_the_script_to_be_sourced_says_so(tmp_path):
    for command in ("scripts/setup.sh --help", "source scripts/setup.sh -h && echo here"):
        env = os.environ | {"VENV": str(tmp_path), "PYTHON": "no-python"}
        out = subprocess.run(
            ["bash", "-c", command], cwd=ROOT, env=env, capture_output=True, text=True, check=True
        ).stdout
        assert out.startswith("usage: source scripts/setup.sh [EXTRA...]") and out.endswith(("\nhere\n", " warning.\n"))


def test_scripts_are_found_and_write_where_the_caller_means(tmp_path):
    """By a relative path from another folder, with a ``CDPATH``, which makes ``cd`` go elsewhere or print where."""
    (tmp_path / "checkout").symlink_to(ROOT)
    (tmp_path / "bin").mkdir()
    for name in ("pip", "python"):
        (tmp_path / "bin" / name).write_text('#!/bin/bash\necho "$PWD $*"\n')
        (tmp_path / "bin" / name).chmod(0o755)

    def out(script, *arguments):
        env = os.environ | dict(CDPATH=".", VENV=str(tmp_path), PYTHON="python3", DATA="mine", DRY_RUN="1")
        command = ["bash", f"checkout/scripts/{script}", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout

    making = f"{tmp_path} {tmp_path}/checkout/scripts/make_demo_data.py --out mine --task classification"
    assert making in out("quickstart.sh", "classification").splitlines()
    assert f"--config {tmp_path}/checkout/configs/deit/small_k.yaml" in out("train_deit.sh", "small_k")
    assert out("test.sh", "--help").startswith("usage: ")


def test_scripts_keep_to_what_macos_has():
    """Its bash is 3.2, and its tools are those of BSD."""
    newer = r"mapfile|readarray|declare -A|\$\{\w+(,,|\^\^)|sha256sum|realpath|readlink -f|sed -i|grep -P|xargs -d"
    for script in [*ROOT.glob("scripts/*.sh"), ROOT / ".ci/run"]:
        code = "\n".join(line for line in script.read_text().splitlines() if not line.startswith("#"))
        assert not re.findall(newer, code), script.name


def test_training_is_written_as_the_zoo_names_it(tmp_path):
    """With a stand-in for the package: the logs folder has the run's log.txt and console, whatever the outcome."""
    package = tmp_path / "deit_irpe"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import pathlib, sys\nout = pathlib.Path(sys.argv[sys.argv.index('--output_dir') + 1])\n"
        "(out / 'log.txt').write_text('{\"epoch\": 0}\\n')\nprint('said')\nsys.exit(5)\n"
    )
    (tmp_path / "own.yaml").write_text("data-path: here\n")
    run(tmp_path, "train_deit.sh", "own.yaml", ok=False, DRY_RUN="", CUDA_VISIBLE_DEVICES="")
    assert (tmp_path / "logs" / "log_own.txt").read_text() == '{"epoch": 0}\n'
    assert (tmp_path / "logs" / "detail_own.log").read_text() == "said\n"


@pytest.mark.parametrize("script, node", [("eval_deit.sh", "0"), ("train_deit.sh", "1")])
def test_the_program_gets_the_signals_that_are_sent_to_the_script(tmp_path, script, node):
    (tmp_path / "deit_irpe.py").write_text("import os\nprint(os.getpid())\n")
    (tmp_path / "own.yaml").write_text("data-path: here\n")
    env = os.environ | dict(PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="", NODE_RANK=node)
    command = [ROOT / "scripts" / script, "own.yaml", "--resume", "x.pth"]
    started = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
    assert started.communicate()[0] == f"{started.pid}\n"


def test_gpu_report_lists_its_steps_and_needs_a_gpu(tmp_path):
    lines = run(tmp_path, "gpu_report.sh", "out", PYTHON="python").splitlines()
    assert [line for line in lines if "-m pytest -q -m gpu" in line] and "--benchmark out" in "\n".join(lines)
    assert len(lines) == 13 and not (tmp_path / "out").exists()
    words = run(tmp_path, "gpu_report.sh", "out", ok=False, DRY_RUN="", CUDA_VISIBLE_DEVICES="")
    assert "PyTorch finds no GPU here" in words and not (tmp_path / "out").exists()


def test_a_benchmark_states_its_conditions():
    script = runpy.run_path(str(ROOT / "scripts/benchmark_ops.py"))
    bench = SimpleNamespace(rounds=25, warm_up=2, keeps_memory=True)
    conditions = script["describe"](torch.device("cpu"), bench)
    for words in ("freed memory is kept", "timed rounds: 25, after 2 of warm-up", "thread(s)", "; torch 2."):
        assert words in conditions
