# SPDX-License-Identifier: Apache-2.0
"""``irpe COMMAND ...``: every program of the project under one name. The module forms stay, with the same flags."""

import difflib
import importlib.util
import runpy
import sys
from pathlib import Path

import irpe

TASKS = {"classify": "deit_irpe", "detect": "detr_irpe"}
COMMANDS = {  # what `python -m` would run, and what the overview says of it
    "classify train": ("deit_irpe", "train DeiT, or any ViT of timm, with or without an encoding"),
    "classify eval": ("deit_irpe", "evaluate a checkpoint: top-1 and top-5"),
    "classify predict": ("deit_irpe.predict", "the classes of images"),
    "classify export": ("deit_irpe.export", "to ONNX, torch.export and safetensors"),
    "classify check": ("deit_irpe.check_data", "find images that cannot be read, and classes that differ"),
    "detect train": ("detr_irpe", "train DETR with or without an encoding"),
    "detect eval": ("detr_irpe", "evaluate a checkpoint: COCO's average precision"),
    "detect predict": ("detr_irpe.predict", "boxes and masks in images, drawn and as JSON"),
    "detect export": ("detr_irpe.export", "to ONNX, torch.export and safetensors"),
    "detect check": ("detr_irpe.check_data", "find what is wrong in annotations and images"),
    "ablate": ("irpe_lab.ablate", "a grid of runs, resumable, and its table"),
    "report": ("irpe_lab.report", "tables from logs, beside the published figures"),
    "visualize": ("irpe_ops.visualize", "draw an encoding's buckets"),
    "info": ("irpe_ops.info", "which backends this machine has, and why one is missing"),
    "zoo": ("irpe_train.zoo", "list and fetch the published checkpoints"),
    "completion": ("", "print a completion script: irpe completion {bash,zsh}"),
}


def main(argv: list[str] | None = None) -> None:
    """Run ``irpe ARGV``."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--version"]:
        print(f"irpe {irpe.__version__}")
        return
    words = argv[: 2 if argv and argv[0] in TASKS else 1]
    name, rest = " ".join(words), argv[len(words) :]
    if not words or words[-1] in ("-h", "--help", *TASKS):
        print(overview(words[0] if words and words[0] in TASKS else ""))
    elif name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "irpe --help lists them"
        print(f"irpe: error: no command {name!r}; {hint}", file=sys.stderr)
        sys.exit(2)
    elif name == "completion":
        print(completion(rest))
    elif name.endswith((" train", " eval")):
        train(name, ["--eval", *rest] if name.endswith(" eval") else rest)
    else:
        sys.argv = [f"irpe {name}", *rest]
        runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=True)


def overview(task: str = "") -> str:
    """The commands, or those of one task."""
    lines = [f"  {name:18} {what}" for name, (_, what) in COMMANDS.items() if name.startswith(task)]
    return "\n".join(["usage: irpe COMMAND [flags]   (irpe COMMAND --help; irpe --version)", "", *lines])


def train(name: str, argv: list[str]) -> None:
    """Train or evaluate. Help and mistakes come first, in less time than importing PyTorch takes."""
    from irpe_train.config import ConfigError, parse_args

    package = COMMANDS[name][0]
    parser = parser_of(package)
    parser.prog = f"irpe {name}"
    parser.others = {f"irpe {other} train": parser_of(kind) for other, kind in TASKS.items() if kind != package}
    try:
        parse_args(parser, argv)
    except ConfigError as error:
        parser.error(str(error))

    from irpe_train.launch import launch

    launch(importlib.import_module(f"{package}.train").main, parser, argv)


def parser_of(package: str):
    """The parser in ``PACKAGE/args.py``, without the package: importing that imports timm, which takes seconds."""
    file = Path(importlib.util.find_spec(package).origin).with_name("args.py")
    spec = importlib.util.spec_from_file_location(f"_{package}_args", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_args_parser()


def completion(argv: list[str]) -> str:
    """The completion script of a shell; the training commands complete their flags too."""
    import argparse

    try:
        import shtab
    except ImportError:
        sys.exit("irpe completion needs shtab: pip install shtab")
    asked = argparse.ArgumentParser("irpe completion")
    asked.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
    shell = asked.parse_args(argv).shell

    parser = argparse.ArgumentParser("irpe")
    parser.add_argument("--version", action="store_true")
    commands = parser.add_subparsers()
    tasks = {task: commands.add_parser(task, help=task).add_subparsers() for task in TASKS}
    for name, (module, what) in COMMANDS.items():
        task, _, verb = name.rpartition(" ")
        parents = [parser_of(module)] if module in TASKS.values() else []
        tasks.get(task, commands).add_parser(verb, help=what, parents=parents, add_help=False)
    return shtab.complete(parser, shell=shell)


if __name__ == "__main__":
    main()
