# SPDX-License-Identifier: Apache-2.0
"""The published model zoo: its checkpoints, where they are kept, and how to download them.

``configs/model_zoo.yaml`` is the one home of the names, addresses and published figures; this module reads it. If it
has no hash, the first download's is kept beside the file as ``FILE.sha256`` and checked on later use.
"""

import argparse
import contextlib
import sys
from dataclasses import dataclass, field
from pathlib import Path

from irpe_train.config import ROOT, ConfigError, read_yaml
from irpe_train.download import cache_folder, fetch_once, sha256
from irpe_train.errors import reported_by
from irpe_train.flags import FlagParser
from irpe_train.text_files import read_text, write_text

ZOO_FILE = ROOT / "configs" / "model_zoo.yaml"


@dataclass(frozen=True)
class Entry:
    """One released checkpoint and the figures its authors printed.

    ``expect`` maps a figure's name (``acc1`` in percent, ``AP`` as a fraction, ``params_M``, ...) to its value;
    ``config`` is the YAML that trains it; ``entries`` counts the tensors of its state dict.
    """

    name: str
    package: str
    config: str
    file: str
    url: str
    entries: int
    expect: dict[str, float] = field(default_factory=dict)
    sha256: str | None = None
    size: int | None = None


@dataclass(frozen=True)
class Zoo:
    """The whole file: entries by name, and the tolerance of each figure."""

    models: dict[str, Entry]
    tolerance: dict[str, float]
    source: str

    def find(self, name: str) -> Entry:
        """The entry called ``name``, or trained by the config file ``name``.

        Raises: ValueError: there is none; lists the known names.
        """
        if name in self.models:
            return self.models[name]
        for entry in self.models.values():
            if Path(name).resolve() == ROOT / entry.config:
                return entry
        known = f"expected one of {', '.join(self.models)}, or the config of one."
        raise ValueError(f"model zoo: no published checkpoint {name!r}; {known}")


def read_zoo(path: Path = ZOO_FILE) -> Zoo:
    """Read the zoo file.

    Raises: FileNotFoundError: there is none; ConfigError: a malformed file.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"model zoo: no file {path}. A checkout and an installed package both have one: install again, "
            "or give the checkpoint with --resume FILE."
        )
    raw = read_yaml(path, f"model zoo {path}")
    try:
        models = {}
        for name, given in raw["models"].items():
            if Path(given["file"]).name != given["file"]:
                raise ValueError(f"{name}: file: {given['file']!r}: expected a name without a folder")
            models[name] = Entry(name=name, url=given.pop("url", raw["prefix"] + given["file"]), **given)
        return Zoo(models, raw["tolerance"], raw["source"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"model zoo {path}: not in the form of {ZOO_FILE.name} ({error!r:.200})") from error


def fetch(name: str, *, folder: Path | None = None, zoo: Zoo | None = None) -> Path:
    """The checked file of a zoo entry, downloaded if missing.

    An existing file is checked too, even one put there by hand. See ``download.fetch_once`` for the rest.

    Returns: its path in ``folder`` (default: torch hub's cache).
    Raises: ValueError: unknown name, or the file found or downloaded is a different one; ConnectionError: no network,
        with the remedy.
    """
    entry = (zoo or read_zoo()).find(name)
    folder = folder or cache_folder()
    target = folder / entry.file
    if target.exists():
        verify(target, entry)
        return target
    print(f"downloading {entry.url} -> {target}", file=sys.stderr)
    try:
        fetch_once(entry.url, target, most=entry.size, check=lambda part: verify(part, entry, record=_record(target)))
    except OSError as error:
        raise ConnectionError(
            f"model zoo: cannot download {entry.url} ({error}). Download {entry.file} on a machine with a network and "
            f"put it here: {target}. To keep it elsewhere set TORCH_HOME, or give irpe zoo a --folder."
        ) from error
    return target


def verify(path: Path, entry: Entry, *, record: Path | None = None) -> None:
    """Raise ValueError unless ``path`` is the entry's checkpoint: size, hash and number of tensors.

    Args: record: the hash of the first download (default: beside ``path``). Without it, and without a hash in the zoo,
        the file is read as a checkpoint, and its hash is recorded.
    """
    record = record or _record(path)
    again = "Delete it and download it again."
    if entry.size is not None and (size := path.stat().st_size) != entry.size:
        raise ValueError(f"{path}: {size} bytes, {entry.size} expected for {entry.name}. {again}")
    expected, whose = entry.sha256, "by the model zoo"
    if expected is None and record.is_file():
        expected, whose = read_text(record)[:64], f"by {record}, written when it was first downloaded"
        again += f" If the authors have replaced it, delete {record.name} too."
    found = sha256(path)
    if expected == found:
        return
    if expected is not None:
        raise ValueError(f"{path}: sha256 {found}, expected {expected} for {entry.name} {whose}. {again}")
    from irpe_train.checkpoint import read_weights

    weights = read_weights(path)
    if len(weights) != entry.entries:
        raise ValueError(f"{path}: {len(weights)} tensors in 'model', {entry.entries} expected for {entry.name}.")
    with contextlib.suppress(OSError):  # somebody else's cache
        write_text(record, f"{found}  {entry.file}\n")


def _record(target: Path) -> Path:
    """The file with its hash, in the format of ``sha256sum``."""
    return target.with_name(target.name + ".sha256")


def get_parser() -> argparse.ArgumentParser:
    parser = FlagParser("python -m irpe_train.zoo", description="List the published checkpoints, or download them.")
    parser.add_argument("names", nargs="*", metavar="NAME|CONFIG|all", help="what to download; without a name, list")
    parser.add_argument("--folder", type=Path, help="where to put it (default: torch hub's cache)")
    parser.add_argument("--where", action="store_true", help="print where it is or would be, download nothing")
    parser.add_argument("--zoo", type=Path, default=ZOO_FILE, help="the zoo file")
    return parser


def main(argv: list[str] | None = None) -> None:
    """List the zoo, or download from it."""
    parser = get_parser()
    with reported_by(parser.prog):
        args = parser.parse_args(argv)
        zoo, folder = read_zoo(args.zoo), args.folder or cache_folder()
        if not args.names:
            for name, entry in zoo.models.items():
                print(f"{'here' if (folder / entry.file).is_file() else 'not here':8}  {name}  {entry.url}")
        names = list(zoo.models) if args.names == ["all"] else args.names
        entries = [zoo.find(name) for name in names]  # check every name before the first download
        for entry in entries:
            print(folder / entry.file if args.where else fetch(entry.name, folder=folder, zoo=zoo))


if __name__ == "__main__":
    main()
