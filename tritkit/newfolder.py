"""A model folder that is written beside its place, checked there, and then moved: what was there before stays until
then, and a stop in between leaves nothing. Also: are all numbers of a model finite? numpy only."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .checkpoint import ModelFolder
from .files import ended_politely
from .folderwriter import COMPANIONS
from .layouts import GGML
from .tensorfile import FLOATS, StoredTensor

# The exponent bits of a float, which are all ones in NaN and infinity.
EXPONENTS = {"F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80), "F32": (np.uint32, 0x7F800000)}


def require_new(out: Path, overwrite: bool, source: Path | None = None) -> None:
    """ValueError where ``out`` is a file, the model ``source`` itself, or a model that may not be replaced."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, but the model needs a folder")
    if source is not None and source.resolve() == out.resolve():
        raise ValueError(f"{out} is the model itself; give another folder")
    held = [*out.glob("*.safetensors"), *out.glob("config.json"), *out.glob("*.safetensors.index.json")]
    if held and not overwrite:
        raise ValueError(f"{out} already holds a model ({held[0].name}); give another folder, or --overwrite")


# Beside COMPANIONS, what would say something of another model where it stayed.
OTHERS = ("model.safetensors.index.json", "quantize_config.json", "tritkit.toml", "log.jsonl", "optimizer.safetensors")


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A place to write the folder to; at the end of the block it goes to ``out``, unless there was an error."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f".{out.name}.{os.getpid()}.unverified")
    with ended_politely():
        try:
            yield folder
            _move(folder, out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _move(folder: Path, out: Path) -> None:
    """The verified folder to its place. Where there is one already, only what belongs to a model is replaced."""
    if not out.exists():
        os.rename(folder, out)
        return
    stale = (*out.glob("model*.safetensors"), *(out / name for name in (*COMPANIONS, *OTHERS)))
    if (out / "results.json").is_file():
        os.replace(out / "results.json", out / "results.previous.json")
    for old in stale:
        if not (folder / old.name).exists():
            old.unlink(missing_ok=True)
    for new in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(new, out / new.name)


def require_finite(model: ModelFolder, name: str, tensor: StoredTensor) -> None:
    """ValueError where a float of this tensor, or the scale of a block, is NaN or infinite."""
    odd = nonfinite(model, name, tensor)
    if odd:
        raise ValueError(f"{model.path}: {name} has {odd} not finite: the file is damaged")


def nonfinite(model: ModelFolder, name: str, tensor: StoredTensor) -> str:
    """How many blocks or values are not finite, in words; empty where all are."""
    module = name.removesuffix(".weight")
    layout = model.layouts.get(module, "") if name.endswith(".weight") else ""
    if layout in GGML:
        count = GGML[layout].nonfinite(model.packed(module))
        return f"{count} blocks with a scale that is" if count else ""
    if tensor.dtype not in FLOATS:
        return ""
    flat, count = tensor.array.reshape(-1), 0
    for start in range(0, flat.size, 1 << 22):
        part = flat[start : start + (1 << 22)]
        if tensor.dtype in EXPONENTS:
            kind, ones = EXPONENTS[tensor.dtype]
            count += int(np.count_nonzero((part.view(kind) & ones) == ones))
        else:
            count += int(np.count_nonzero(~np.isfinite(part)))
    return f"{count} values that are" if count else ""


def require_no_extras(model: ModelFolder, container: str) -> None:
    """ValueError where the model has adapters or rounded inputs, which that container has no place for."""
    if model.adapters:
        raise ValueError(f"{model.path} has adapters in {len(model.adapters)} layers, which {container} cannot hold")
    if model.inputs:
        kinds = " and ".join(sorted(set(model.inputs.values())))
        raise ValueError(
            f"{model.path} rounds the inputs of {len(model.inputs)} linears to {kinds}, which {container} cannot say"
        )
