"""Folders whose linears are integers, rounded to nearest, for tests of the containers."""

from pathlib import Path

import numpy as np
import torch

from tritkit.checkpoint import open_folder
from tritkit.folderwriter import write_folder
from tritkit.formats import format_of
from tritkit.methods.rtn import packed
from tritkit.models.shapes import linear_names
from tritkit.tensorfile import StoredTensor

DTYPES = {"uint8": "U8", "int16": "I16", "int32": "I32", "int64": "I64", "float16": "F16", "float32": "F32"}


def stored(array: np.ndarray) -> StoredTensor:
    return StoredTensor(DTYPES[array.dtype.name], array)


def integer_folder(source: Path, out: Path, format: str, **others: str) -> Path:
    """The float folder ``source`` with all linears in that format; others: part of a name to another format."""
    model = open_folder(source)
    names = linear_names(model.config)
    tensors = {key: model.tensors[key] for key in model.tensors if key.removesuffix(".weight") not in names}
    layouts = {}
    for name in names:
        found = format_of(next((f for part, f in others.items() if part in name), format))
        q = found.quantize(torch.from_numpy(model.floats(name)))
        tensors |= {f"{name}.{suffix}": stored(array) for suffix, array in packed(q).arrays.items()}
        layouts[name] = found.layout
    write_folder(out, model.config, tensors, model.tokenizer(), layouts)
    return out
