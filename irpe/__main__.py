# SPDX-License-Identifier: Apache-2.0
"""``irpe COMMAND ...``: every program of the project under one name. The module forms stay, with the same flags."""

import difflib
import importlib
import importlib.util
import sys
from pathlib import Path

import irpe
from irpe_train.errors import import_optional, reported_by

TASKS = {"classify": "deit_irpe", "detect": "detr_irpe"}
COMMANDS = {  # module, and line in the overview
    "classify train": ("deit_irpe.train", "train DeiT, or any timm ViT, with or without an encoding"),
    "classify eval": ("deit_irpe.train", "evaluate a checkpoint: top-1 and top-5"),
    "classify predict": ("deit_irpe.predict", "predict the classes of images"),
    "classify export": ("deit_irpe.export", "export to ONNX, torch.export and safetensors"),
    "classify check": ("deit_irpe.check_data", "find images that cannot be read, and classes that differ"),
    "detect train": ("detr_irpe.train", "train DETR with or without an encoding"),
    "detect eval": ("detr_irpe.train", "evaluate a checkpoint: COCO's average precision"),
    "detect predict": ("detr_irpe.predict", "predict boxes and masks, drawn and as JSON"),
    "detect export": ("detr_irpe.export", "export to ONNX, torch.export and safetensors"),
    "detect check": ("detr_irpe.check_data", "find mistakes in annotations and images"),
    "ablate": ("irpe_lab.ablate", "train a grid of runs, resumable, and make its table"),
    "report": ("irpe_lab.report", "make tables from logs, beside the published figures"),
    "plot": ("irpe_lab.plots", "draw the curves of runs over each other"),
    "visualize": ("irpe_ops.visualize", "draw an encoding's buckets"),
    "info": ("irpe_ops.info", "show which backends this machine has, and why others are missing"),
    "zoo": ("irpe_train.zoo", "list and download the published checkpoints"),
    "completion": ("", "print a completion script: irpe completion {bash,zsh,...}"),
}


def main(argv: list[str] | None = None) -> None:
    """Run ``irpe ARGV``."""
    with reported_by("irpe"):
        _main(sys.argv[1:] if argv is None else argv)


def _main(argv: list[str]) -> None:
    task = argv[0] if argv and argv[0] in TASKS else ""
    words = argv[: 2 if task else 1]
    name, rest = " ".join(words), argv[len(words) :]
    if name in ("--version", "-V"):
        print(f"irpe {irpe.__version__}")
    elif name == task or words[-1] in ("-h", "--help", "--help-all", "help"):
        print(overview(task))
    elif name not in COMMANDS:
        print(f"irpe: error: no command {name!r}; {nearest(argv)}", file=sys.stderr)
        sys.exit(2)
    else:
        sys.argv = [f"irpe {name}", *rest]  # the program's name in messages
        run(name, ["--eval", *rest] if name.endswith(" eval") else rest)


def overview(task: str = "") -> str:
    """The commands, or those of one task."""
    lines = [f"  {name:18} {what}" for name, (_, what) in COMMANDS.items() if name.startswith(task)]
    return "\n".join(["usage: irpe COMMAND [flags]   (irpe COMMAND --help; irpe --version)", "", *lines])


def nearest(argv: list[str]) -> str:
    """The commands that an unknown one probably meant."""
    verbs = [name for name in COMMANDS if name.endswith(f" {argv[0]}")]
    close = verbs or difflib.get_close_matches(" ".join(argv[:2]), [*COMMANDS, *TASKS], n=1)
    close = close or difflib.get_close_matches(argv[0], [*COMMANDS, *TASKS], n=1)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else "irpe --help lists them"


def run(name: str, argv: list[str]) -> None:
    """Help and flag errors come first, before PyTorch is imported."""
    if name == "completion":
        print(completion(argv))
        return
    from irpe_train.config import ConfigError, parse_args, with_home

    parser, argv = parser_of(name), with_home(argv)
    if name.endswith((" train", " eval")):
        parser.others = {f"irpe {task} train": parser_of(f"{task} train") for task in TASKS if task not in name}
    try:
        parse_args(parser, argv)
    except ConfigError as error:
        parser.error(str(error))
    main = importlib.import_module(COMMANDS[name][0]).main
    if name.split()[0] not in TASKS:
        sys.exit(main(argv) or 0)
    from irpe_train.launch import launch

    launch(main, parser, argv)


def parser_of(name: str):
    """The parser of a command; ``PACKAGE/args.py`` is loaded without its package, whose import takes seconds."""
    from irpe_train.flags import FlagParser

    module = COMMANDS[name][0]
    package, verb = module.split(".")[0], name.split()[-1]
    if package not in (*TASKS.values(), "irpe_ops"):
        return importlib.import_module(module).get_parser()
    file = Path(importlib.util.find_spec(package).origin).with_name("args.py")
    spec = importlib.util.spec_from_file_location(f"_{package}_args", file)
    flags = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(flags)
    if package == "irpe_ops":
        return getattr(flags, f"get_{verb}_parser")(FlagParser)
    return getattr(flags, "get_args_parser" if verb in ("train", "eval") else f"get_{verb}_parser")()


def completion(argv: list[str]) -> str:
    """The completion script of a shell, for the commands and their flags."""
    import argparse

    from irpe_train.flags import FlagParser

    shtab = import_optional("shtab", "irpe completion needs shtab")
    asked = FlagParser("irpe completion", description="Print a completion script, which says where to put it.")
    asked.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
    shell = asked.parse_args(argv).shell

    parser = argparse.ArgumentParser("irpe")
    parser.add_argument("--version", action="store_true")
    commands = parser.add_subparsers()
    tasks = {task: commands.add_parser(task, help=task).add_subparsers() for task in TASKS}
    for name, (module, what) in COMMANDS.items():
        task, _, verb = name.rpartition(" ")
        parents = [parser_of(name)] if module else [asked]
        for action in parents[0]._actions:
            if action.nargs != 0 and not action.choices:
                action.complete = shtab.FILE  # shtab would offer nothing, not even files
        tasks.get(task, commands).add_parser(verb, help=what, parents=parents, add_help=False)
    script = shtab.complete(parser, shell=shell)
    return script.replace("-o bashdefault", "-o bashdefault -o default")  # bash: files after --flag= too


if __name__ == "__main__":
    main()
