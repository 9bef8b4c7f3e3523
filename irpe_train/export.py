# SPDX-License-Identifier: Apache-2.0
"""Write a trained model for other programs: ONNX, ``torch.export`` and safetensors, each compared with the original."""

import contextlib
import copy
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from irpe_train.arguments import SUFFIX
from irpe_train.errors import BadCheckpoint, RunError, first_line, import_optional, in_one_line
from irpe_train.outputs import refuse_existing
from irpe_train.text_files import complete

NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "pt2": (), "safetensors": ("safetensors",)}
# fp32 sums in another order: observed differences are 1e-6 of the largest output; a wrong table is off by far more.
TOLERANCE = 1e-4


def export_model(
    model: nn.Module,
    examples: Sequence[tuple[Tensor, ...]],
    out: str | Path,
    *,
    formats: Sequence[str] | None = None,
    inputs: dict[str, dict[int, str]],
    outputs: Sequence[str],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write ``model`` in each format, run what was written, and print by how much its outputs differ.

    Args:
        model: takes tensors, returns a tensor or a tuple of tensors. It is exported in evaluation mode.
        examples: inputs. The first is traced; all are compared, so they should differ in every dynamic dimension.
        out: each format's suffix replaces that of another format, and is appended to other names (``m_lr0.1``).
        formats: keys of ``SUFFIX``; None: the one of the suffix of ``out``, or ONNX.
        inputs: by name, ``{dimension: name}`` of the dimensions that may vary. outputs: their names.
        metadata: what a user of the file must know, such as classes and image size: in ONNX's metadata, the header of
            safetensors, and beside a ``.pt2`` in its ``extra_files`` (``metadata.json``).
    Raises: ImportError: a package is missing (named, with the command). RunError: a file is there already,
        or PyTorch cannot write this model. ValueError: the outputs differ.
    """
    if Path(out).is_dir():
        raise RunError(f"--out {str(out)!r}: expected the name of a file")
    out = Path(out)
    formats = formats or [next((format for format, suffix in SUFFIX.items() if suffix == out.suffix.lower()), "onnx")]
    stem = out.stem if out.suffix.lower() in SUFFIX.values() else out.name
    paths = {format: out.with_name(stem + SUFFIX[format]) for format in formats}
    for format, path in paths.items():
        if missing := [name for name in NEEDS[format] if importlib.util.find_spec(name) is None]:
            install = f"pip install {' '.join(missing)} (or install this project with [export])"
            raise ImportError(f"--formats {format} needs {', '.join(missing)}: {install}")
        refuse_existing(path)
    model = model.eval()
    with torch.no_grad():
        expected = [_as_tuple(model(*example)) for example in examples]
        # A name is the same size in every input; torch finds the equalities itself.
        shapes = tuple({axis: torch.export.Dim.DYNAMIC for axis in axes} for axes in inputs.values())
        program = None
        for format, path in paths.items():
            with complete(path) as (part,):  # an interrupted export leaves no file that looks like a result
                try:
                    if format == "safetensors":
                        written = _save_safetensors(model, part, metadata)
                    else:
                        program = program or torch.export.export(model, tuple(examples[0]), dynamic_shapes=shapes)
                        save = _save_onnx if format == "onnx" else _save_pt2
                        written = save(program, part, metadata or {}, inputs, outputs)
                    found = [_as_tuple(written(*example)) for example in examples]
                except OSError:  # the disk is full
                    raise
                except Exception as error:  # PyTorch's own, of many kinds: it cannot trace or write every model
                    cause = error
                    while cause.__cause__:  # the exporter's own words name a step, the first error the operation
                        cause = cause.__cause__
                    raise RunError(f"{path}: this model cannot be exported ({first_line(cause)})") from error
                difference = _largest_difference(found, expected)
                if not difference <= TOLERANCE:
                    wanted = f"at most {TOLERANCE:g} was expected. The file was not written."
                    differ = f"differ from the model's by {difference:.1e} of the largest"
                    raise ValueError(f"{path}: its outputs {differ}; {wanted}")
            print(f"{path}: its outputs differ from the model's by at most {difference:.1e} of the largest")


class OnnxModel:
    """An ONNX file from ``export_model``, run on the CPU. ``metadata``: the texts stored with it, by name."""

    def __init__(self, path: Path):
        onnxruntime = import_optional("onnxruntime", f"{path} runs with onnxruntime")
        # The bytes, not the path: its name need not be UTF-8.
        self._session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map

    def run(self, outputs: Sequence[str], **inputs: Tensor) -> list[Tensor]:
        """The named outputs for the inputs, which may be on any device."""
        feed = {name: tensor.cpu().numpy() for name, tensor in inputs.items()}
        return [torch.from_numpy(array) for array in self._session.run(list(outputs), feed)]


@contextlib.contextmanager
def read_onnx(path: Path, what: str) -> Iterator[OnnxModel]:
    """Inside, ``path`` is tried out; any error there means that it is not a ``what``.

    Raises: ImportError: onnxruntime is missing. BadCheckpoint: no such file, or not a ``what``, with the reason.
    """
    if not path.is_file():
        raise BadCheckpoint(f"{path}: no such file")
    try:
        yield OnnxModel(path)
    except ImportError:
        raise
    except Exception as error:  # onnxruntime's own errors derive from Exception alone, and have several lines
        raise BadCheckpoint(f"{path}: not a {what} ({type(error).__name__}: {in_one_line(error)})") from error


def _save_onnx(program, path: Path, metadata: dict, inputs: dict, outputs: Sequence[str]) -> Callable:
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it lists what it does not simplify
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "# The axis name")  # inputs share "batch" on purpose
        names = dict(input_names=list(inputs), output_names=list(outputs))
        exported = torch.onnx.export(program, **names, dynamic_shapes=inputs, verbose=False)
    exported.model.metadata_props.update(metadata)
    exported.save(path, external_data=False)
    written = OnnxModel(path)
    return lambda *example: written.run(outputs, **dict(zip(inputs, example, strict=True)))


def _save_pt2(program, path: Path, metadata: dict, *_) -> Callable:
    torch.export.save(program, archive := io.BytesIO(), extra_files={"metadata.json": json.dumps(metadata)})
    path.write_bytes(archive.getbuffer())  # PyTorch's own writer ends the process if the disk is full
    return torch.export.load(io.BytesIO(path.read_bytes())).module()


def _save_safetensors(model: nn.Module, path: Path, metadata: dict[str, str] | None) -> nn.Module:
    from safetensors.torch import load, save

    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    # Named as in checkpoints: without the prefix of a wrapper around the model.
    wrapper = "model." if all(name.startswith("model.") for name in weights) else ""
    path.write_bytes(save({name.removeprefix(wrapper): tensor for name, tensor in weights.items()}, metadata))
    fresh = copy.deepcopy(model)
    fresh.load_state_dict({wrapper + name: tensor for name, tensor in load(path.read_bytes()).items()})
    return fresh


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _largest_difference(found: list[tuple[Tensor, ...]], expected: list[tuple[Tensor, ...]]) -> float:
    """Relative to the largest value of an output; NaN if any is, which Python's ``max`` may drop."""
    pairs = [pair for outputs in zip(found, expected, strict=True) for pair in zip(*outputs, strict=True)]
    return torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max().item()
