"""Latent weights to packed ones: each linear rounded once and for all, as training rounded it at every step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import results
from .checkpoint import ModelFolder, open_folder
from .files import atomic_open
from .folderfacts import code_shares, describe
from .folderwriter import copy_companions, unpacked_tensors, write_folder
from .formats import format_of
from .layers import run_on_integers
from .layouts import LAYOUTS, Packed
from .methods.rtn import unpacked
from .models.shapes import linear_names
from .progress import progress
from .tensorfile import StoredTensor

PACKABLE = ("hf_autobitlinear", "binary_rows")  # layouts that the containers and the engines know so far
DTYPES = {"bfloat16": "BF16", "float32": "F32"}


def pack_linears(folder: ModelFolder) -> tuple[dict[str, Packed], str]:
    """Every linear of a latent folder in its format's default layout; ValueError names one that it cannot hold."""
    format = format_of(str(folder.config.weights))
    if format.layout not in PACKABLE:
        raise ValueError(f"weights in {format.name} cannot be packed yet; ternary and binary ones can")
    activations = folder.config.activations
    if not run_on_integers(format, format_of(str(activations))):
        raise ValueError(f"activations in {activations} cannot run on packed weights; int8 ones a token can")
    layout = LAYOUTS[format.layout]
    found = {}
    names = [name for name in linear_names(folder.config) if folder.config.is_low_bit(name)]
    with progress(f"pack {folder.path.name}", len(names), "linears") as advance:
        for name in names:
            latent = torch.from_numpy(folder.tensors[f"{name}.weight"].float32())
            try:
                found[name] = layout.pack(unpacked(format.quantize(latent)))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            advance()
    return found, format.layout


def pack(source: Path | str, out: Path | str, dtype: str = "bfloat16", overwrite: bool = False) -> dict[str, Any]:
    """Write the packed form of the latent folder ``source`` into ``out`` and return its metrics.

    Codes and scales as trained; embedding, head and norms in ``dtype``, "bfloat16" or "float32". ValueError for a
    folder that is packed already, is full precision, or has a shape that its layout cannot hold.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; known are 'bfloat16' and 'float32'")
    folder, out = open_folder(source), Path(out)
    if folder.config.weights is None:
        raise ValueError(f"{source} is a full-precision model: there are no low-bit weights to pack")
    if folder.is_packed:
        raise ValueError(f"{source} is packed already, in the layout {folder.layout}")
    if out.resolve() == folder.path.resolve():
        raise ValueError(f"{out} is the model itself, whose latent weights would be lost; give another folder")
    if (out / "config.json").exists() and not overwrite:
        raise ValueError(f"{out} already holds a model; give another folder, or --overwrite")
    packed, layout = pack_linears(folder)
    tensors = dict(unpacked_tensors(folder.tensors, set(packed), DTYPES[dtype]))
    for name, linear in packed.items():
        for suffix, array in linear.arrays.items():
            tensors[f"{name}.{suffix}"] = StoredTensor("U8" if array.dtype == np.uint8 else "F32", array)
    out.mkdir(parents=True, exist_ok=True)
    write_folder(out, folder.config, tensors, folder.tokenizer(), dict.fromkeys(packed, layout))
    copy_companions(folder.path, out)
    written = open_folder(out)
    for name, linear in packed.items():  # verify after write
        if not all(np.array_equal(a, written.packed(name).arrays[k]) for k, a in linear.arrays.items()):
            raise OSError(f"{out} does not hold what was written to it: {name} differs")
    per_linear = code_shares(written)
    metrics = describe(written, per_linear)
    with atomic_open(out / "tritkit.toml") as file:
        file.write(f"[pack]\nparent = {json.dumps(str(source))}\ndtype = {json.dumps(dtype)}\n")
    trained = [run["metrics"] for run in results.read(source) if run["verb"] == "train"]  # what packing does not change
    settings = {"parent": str(source), "layout": layout, "dtype": dtype}
    results.record(out, "pack", settings, {**(trained[-1] if trained else {}), **metrics}, per_linear, begins=True)
    return metrics
