"""The one command: it finds its programs, its help needs no PyTorch, a mistake is one line."""

import importlib
import io
import os
import re
import runpy
import signal
import subprocess
import sys

import pytest

import irpe
import irpe_ops
from deit_irpe.args import get_args_parser as deit_parser
from detr_irpe.args import get_args_parser as detr_parser
from irpe.__main__ import COMMANDS, TASKS, completion, main, overview
from irpe_ops.args import get_visualize_parser
from irpe_ops.attention import BACKENDS
from irpe_train.config import answer_early
from irpe_train.precision import DTYPES
from tests.helpers.deit_runs import MODEL, QUICK
from tests.helpers.quick_python import quick_programs
from tests.helpers.snippets import REPOSITORY
from tests.helpers.tiny_images import write_images


@pytest.fixture(autouse=True)
def restored_argv(monkeypatch):
    """The command writes its name into ``sys.argv``."""
    monkeypatch.setattr(sys, "argv", ["pytest"])


def message(capsys, *argv: str) -> str:
    """The stderr of ``irpe ARGV``, which must exit with status 2."""
    with pytest.raises(SystemExit) as end:
        main(list(argv))
    assert end.value.code == 2
    return capsys.readouterr().err


def test_the_home_folder_is_found_by_every_command(tmp_path, monkeypatch, capsys):
    """After ``--flag=`` no shell looks for it, and a folder called ``~`` would be made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    importlib.import_module("irpe_train.zoo").main(["--folder=~/new", "--where", "all"])
    assert capsys.readouterr().out.startswith(f"{tmp_path}/new/deit_")
    assert get_visualize_parser().parse_args(["--output=~/a.png"]).output == tmp_path / "a.png"
    monkeypatch.setattr("irpe_ops.visualize.main", lambda argv: sys.exit(" ".join(argv)))
    with pytest.raises(SystemExit, match=f"^--output={tmp_path}/a.png$"):
        main(["visualize", "--output=~/a.png"])


@pytest.mark.parametrize("name", ["irpe_lab.ablate", "irpe_lab.report", "irpe_train.card", "deit_irpe.model_stats"])
def test_flags_are_read_without_docstrings(name, monkeypatch):
    program = importlib.import_module(name)
    monkeypatch.setattr(program, "__doc__", None)  # as under python -OO
    with pytest.raises(SystemExit) as end:
        program.main(["--help"])
    assert end.value.code == 0


@pytest.mark.parametrize(
    ("command", "unbuffered"),
    [
        (["irpe", "--help"], True),
        (["irpe", "zoo"], True),
        (["irpe", "classify", "train", "--print-config"], True),
        (["irpe_train.zoo"], True),
        (["deit_irpe", "--print-config"], True),
        (["irpe", "classify", "train", "--print-config"], False),  # written as Python exits
        (["irpe", "visualize", "-o", "OUT.png"], False),
        (["detr_irpe", "--help"], False),
        (["irpe_ops.info", "--help"], False),
    ],
    ids=str,
)
@pytest.mark.parametrize(("console", "told"), [("closed", ""), ("/dev/full", "No space left on device")])
def test_a_closed_or_full_console_gives_no_traceback(command, unbuffered, console, told, tmp_path):
    """As in ``irpe zoo | head -1``, or on a full disk."""
    reading, writing = os.pipe()
    os.close(reading)
    out = writing if console == "closed" else os.open(console, os.O_WRONLY)
    words = [sys.executable, "-m", *(word.replace("OUT", str(tmp_path / "x")) for word in command)]
    env = os.environ | {"PYTHONUNBUFFERED": "1" if unbuffered else ""}
    ended = subprocess.run(words, stdout=out, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env=env)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr and "Exception" not in ended.stderr
    assert len(ended.stderr.splitlines()) == bool(told) and told in ended.stderr


def test_an_interrupt_gives_no_traceback(monkeypatch):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("irpe_train.zoo.main", interrupted)
    with pytest.raises(SystemExit) as end:
        main(["zoo"])
    assert end.value.code == 130


MODULES = [
    path
    for package in (*TASKS.values(), "irpe_ops", "irpe_train", "irpe_lab")
    for path in sorted((REPOSITORY / package).glob("*.py"))
    if 'if __name__ == "__main__"' in path.read_text() and path.stem != "jobs"  # which is no command
]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_an_interrupted_module_gives_no_traceback(path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("argparse.ArgumentParser.parse_known_args", interrupted)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as end:  # a KeyboardInterrupt would end the whole of pytest
        runpy.run_module(f"{path.parent.name}.{path.stem}", run_name="__main__")
    assert getattr(end.value, "code", None) == 130


def test_every_command_is_a_module_and_is_in_the_overview(capsys):
    for name, (module, what) in COMMANDS.items():
        assert not module or importlib.util.find_spec(module), name
        assert f"  {name} " in overview() and what in overview()
    main(["--help"])
    main([])
    main(["help"])
    assert capsys.readouterr().out == 3 * f"{overview()}\n"
    main(["detect"])
    assert capsys.readouterr().out == f"{overview('detect')}\n"
    assert "classify" not in overview("detect")


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"irpe {irpe.__version__}\n"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["classify"],
        ["classify", "train", "--help"],
        ["classify", "predict", "--help"],
        ["classify", "export"],
        ["classify", "check", "--dta-path", "x"],
        ["detect", "eval", "--help-all"],
        ["detect", "predict", "--point", "x"],
        ["detect", "export", "--help"],
        ["detect", "check", "--help"],
        ["detect", "--lr=x"],
        ["ablate", "--help"],
        ["report", "--help"],
        ["zoo", "--help"],
        ["info", "--chek"],
        ["visualize", "--grid", "14"],
    ],
)
def test_help_and_mistakes_do_not_wait_for_pytorch(argv):
    code = f"import sys, irpe.__main__ as m\ntry: m.main({argv})\nfinally: assert 'torch' not in sys.modules"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert "AssertionError" not in ran.stderr, ran.stderr


@pytest.mark.parametrize("command, parser", [("classify train", deit_parser()), ("detect train", detr_parser())])
def test_help_shows_ten_flags_and_the_long_help_all(command, parser, capsys):
    printed = []
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            main([*command.split(), flag])
        printed.append(capsys.readouterr().out)
    options = [option for option in parser._option_string_actions if option.startswith("--")]
    assert len(parser.first) == 10 and all(f"  --{name}" in printed[0] for name in parser.first)
    assert sum(f"  {option} " in printed[0] for option in options) == 10
    assert all(option in printed[1] for option in options) and "\nmodel:\n" in printed[1]  # in groups
    assert not re.search(r"  --no[-_][a-z-_]+ [^-]*\(default", printed[1])  # it would read as the default of --no-x
    assert len(printed[0].splitlines()) < 45 < len(printed[1].splitlines())


@pytest.mark.parametrize(
    "argv, wanted",
    [
        ("classify train --bath-size 3", "unknown flag --bath-size; did you mean --batch-size?"),
        ("classify train --LR_nois_pct=3", "unknown flag --LR_nois_pct; did you mean --lr-noise-pct?"),
        ("detect train --zzzz", "unknown flag --zzzz; --help-all lists all"),
        ("detect train images", "unexpected argument: images"),
        ("classify train --coco-path x", "--coco-path is a flag of `irpe detect train`, not of this command"),
        ("detect eval --data_path x", "--data_path is a flag of `irpe classify train`, not of this command"),
        ("detect train --epochs many", "error: argument --epochs: expected a whole number, got 'many'"),
        ("classify train --attn-backend gpu", "argument --attn-backend: invalid choice: 'gpu' (choose from "),
        ("detect train --attn-backend gpu", "argument --attn-backend: invalid choice: 'gpu' (choose from "),
        ("detect train --set_cost_giou nan", "argument --set_cost_giou: expected a number from 0 to 1e30, got nan"),
        ("detect train --eos_coef 0", "argument --eos_coef: expected a number above 0, at most 1e30, got 0"),
        ("detect train --dropout nan", "argument --dropout: expected a fraction from 0 to 1, got nan"),
        ("detect train --start_epoch -5", "argument --start_epoch: expected 0 or more, got -5"),
        ("detect train --enc_layers -1", "argument --enc_layers: expected 0 or more, got -1"),
        ("detect train --dec_layers 0", "argument --dec_layers: expected 1 or more, got 0"),
        ("detect train --epochs -5", "argument --epochs: expected 1 or more, got -5"),
        ("classify train --config none.yaml", "--config none.yaml: "),
        ("classify predict --resum x a.jpg --attentin", "unknown flag --attentin; did you mean --attention?"),
        ("detect check --coco_pth x", "unknown flag --coco_pth; did you mean --coco_path?"),
        ("detect check --coco_path x y", "unexpected argument: y"),
        ("zoo --flder x", "irpe zoo: error: unknown flag --flder; did you mean --folder?"),
        ("info --chek", "irpe info: error: unknown flag --chek; did you mean --check?"),
        ("visualize --gird 3x3", "irpe visualize: error: unknown flag --gird; did you mean --grid?"),
        ("visualize --grid 3", "argument --grid: expected HxW in patches, got '3'"),
        ("visualize --query 3,x", "argument --query: expected ROW,COL in patches, got '3,x'"),
        ("detect predict --resume x --point 3", "argument --point: expected X,Y in pixels, got '3'"),
        ("detect train --lr fast", "argument --lr: expected a number, got 'fast'"),
        ("classify predict a.jpg", "irpe classify predict: error: the following arguments are required: --resume"),
        ("completion", "irpe completion: error: the following arguments are required: shell"),
        ("report", "irpe report: error: nothing to write: give -o FILE.md, --readme FILE.md or both"),
        ("clasify", "no command 'clasify'; did you mean 'classify'?"),
        ("clasify train --lr 1", "no command 'clasify'; did you mean 'classify train'?"),
        ("train", "no command 'train'; did you mean 'classify train' or 'detect train'?"),
        ("classify evaluate", "no command 'classify evaluate'; did you mean 'classify eval'?"),
        ("frobnicate", "no command 'frobnicate'; irpe --help lists them"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_remedy(argv, wanted, capsys):
    printed = message(capsys, *argv.split())
    assert wanted in printed and printed.count("\n") == 1


def test_dash_and_underscore_are_alike(capsys):
    for spelling in ("--batch_size", "--batch-size", "--Batch-Size"):
        with pytest.raises(SystemExit):
            main(["detect", "train", spelling, "7", f"{spelling.replace('atch', 'ATCH')}=7", "--print-config"])
        assert "batch_size: 7\n" in capsys.readouterr().out


@pytest.mark.parametrize("parser", [deit_parser, detr_parser])
def test_backends_are_those_of_the_attention(parser):
    assert next(a for a in parser()._actions if a.dest == "attn_backend").choices == BACKENDS


def test_number_formats_are_those_that_training_knows():
    assert set(next(a for a in deit_parser()._actions if a.dest == "amp").choices) == set(DTYPES)


def test_it_trains_and_evaluates(tmp_path):
    for split in ("train", "val"):
        write_images(tmp_path / split, {"ant": 8, "bee": 8})
    flags = ["--data-path", str(tmp_path), "--output_dir", str(tmp_path / "out"), *QUICK, *MODEL]
    for verb, more in (("train", ["--epochs", "1"]), ("eval", ["--resume", str(tmp_path / "out/best.pth")])):
        words = [quick_programs() / "irpe", "classify", verb, *flags, *more]
        ran = subprocess.run(words, capture_output=True, text=True, cwd=REPOSITORY)
        assert ran.returncode == 0 and "* Acc@1" in ran.stdout, ran.stderr
        assert ("Training time" in ran.stdout) == (verb == "train")


def test_other_programs_run_as_they_are(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        main(["zoo"])
    assert "rpe-2.0-product-ctx-1-k_300epochs" in capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_and_flags(shell):
    pytest.importorskip("shtab")
    script = completion([shell])
    for flag in ("--enc_rpe2d", "--rpe", "--threshold", "--formats", "--coco_panoptic_path", "--seeds", "--grid"):
        assert flag in script


def test_bash_completes_files(tmp_path):
    pytest.importorskip("shtab")
    (tmp_path / "complete.sh").write_text(completion(["bash"]))
    lines = "classify train --config REA", "ablate REA", "classify predict REA", "detect predict --resume REA"
    for words in lines:
        ask = f'COMP_WORDS=(irpe {words}); COMP_CWORD={len(words.split())}; _shtab_irpe; echo "${{COMPREPLY[@]}}"'
        ran = subprocess.run(["bash", "-c", f". {tmp_path}/complete.sh; {ask}; complete -p irpe"], cwd=REPOSITORY,
                             capture_output=True, text=True)  # fmt: skip
        found, how = ran.stdout.splitlines()
        assert found == "README.md" and " -o default " in how  # bash's own does --flag=REA


def test_completion_without_its_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit, match="irpe completion needs shtab: pip install shtab"):
        main(["completion", "bash"])


def test_the_front_door_hands_on_the_names_of_the_library():
    from irpe import build_rpe, get_rpe_config

    assert build_rpe is irpe_ops.build_rpe and get_rpe_config is irpe_ops.get_rpe_config
    namespace = {}
    exec("from irpe import *", namespace)
    assert set(irpe_ops.__all__) <= set(namespace) & set(dir(irpe))
    with pytest.raises(AttributeError, match="module 'irpe' has no attribute 'build_rp'"):
        irpe.build_rp  # noqa: B018


@pytest.mark.parametrize("name", irpe.MOVED)
def test_a_name_of_the_published_file_says_what_to_use_instead(name):
    with pytest.raises(ImportError, match=f"irpe has no {name}: .+docs/migrate.md"):
        exec(f"from irpe import {name}")
    assert name not in irpe_ops.__all__


@pytest.mark.parametrize("asked", ["", "1"])
def test_an_unforeseen_error_of_a_file_is_one_message_or_the_requested_traceback(asked):
    code = "import irpe.__main__ as m; m.overview = lambda task: open('/no/such/file'); m.main([])"
    environment = os.environ | {"IRPE_TRACEBACK": asked}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, env=environment)
    assert ran.returncode == 1 and "/no/such/file" in ran.stderr
    assert ("Traceback" in ran.stderr) == bool(asked)


@pytest.mark.parametrize(("encoding", "name"), [("ascii", "日"), ("utf-8", "\udce9")])
def test_a_console_without_the_letters_of_a_name_shows_their_numbers(tmp_path, monkeypatch, encoding, name):
    console = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", console)
    with pytest.raises(SystemExit) as end:
        main(["visualize", "-o", f"{tmp_path}/{name}.png"])
    console.flush()
    assert not end.value.code and f"\\u{ord(name):04x}.png" in console.buffer.getvalue().decode()


@pytest.mark.parametrize("program", ["", ".train", ".predict", ".export", ".check_data"])
@pytest.mark.parametrize("package", ["deit_irpe", "detr_irpe"])
@pytest.mark.parametrize("flag, status", [("--help", 0), ("--num_workers=x", 2)])
def test_the_module_forms_do_not_wait_for_pytorch_either(package, program, flag, status):
    does_not_wait(["-m", package + program, flag], status)


def does_not_wait(command, status):
    command = [sys.executable, "-X", "importtime", *command]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    imported = {line.split("|")[-1].strip() for line in ran.stderr.splitlines()}
    assert ran.returncode == status and "torch" not in imported and "irpe_train.flags" in imported


def test_ctrl_c_during_an_import_that_swallows_it_ends_the_program(tmp_path):
    stop = "try:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt:\n    print('swallowed')\n"
    (tmp_path / "torch.py").write_text(f"import os, signal\n{stop}")
    ran = subprocess.run(
        [sys.executable, "-m", "deit_irpe"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"},
        capture_output=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    assert (ran.returncode, ran.stdout) == (-signal.SIGINT, b"")


@pytest.mark.parametrize(
    "argv",
    [
        ["-m", "deit_irpe.export", "--resume", "weights.pth", "--out", "deit_irpe"],
        ["-m", "deit_irpe.model_stats", "deit_irpe"],
        ["-m", "pytest", "deit_irpe"],
        ["deit_irpe.model_stats"],
    ],
)
def test_a_value_that_is_called_like_a_package_starts_nothing(monkeypatch, argv):
    """The program is the first word that names the package; ``--out`` is a flag of its export, not of its training."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "orig_argv", ["python", *argv])
    monkeypatch.setattr(sys, "argv", ["-m", *argv[2:]] if argv[0] == "-m" else argv)
    answer_early("deit_irpe")
