"""Small folders whose matrices are in many layouts, with rounded inputs and adapters: what `tritkit quantize` may
write. Formats are given in turn; None leaves floats."""

import numpy as np
import torch

from tritkit.checkpoint import open_folder
from tritkit.folderwriter import write_folder
from tritkit.formats import format_of
from tritkit.inputs import input_format
from tritkit.layouts import GGML
from tritkit.methods import rtn
from tritkit.models.shapes import HEAD, linear_names, matrix_names
from tritkit.tensorfile import StoredTensor

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}  # for blocks of 256
DTYPES = {"float16": "F16", "float32": "F32", "uint8": "U8", "int16": "I16"}
# Every width and form of scales at least once.
FORMATS = ["int4_g32", "int8_row", "q4_k", "int3_g64_asym", "q8_0", "int2_g16", "int5_row_asym", "q6_k", "int6_tensor",
           "ternary", "q4_1", "int7_g128", "fp4_g32", "q3_k", "int4_row_asym"]  # fmt: skip


def packed(name: str, w: np.ndarray) -> tuple[str, dict[str, np.ndarray]]:
    """Layout and arrays of float32 weights, rounded to nearest."""
    if name == "mxfp4":  # a type of ggml that is no format
        return name, GGML[name].quantize(w).arrays
    q = format_of(name).quantize(torch.from_numpy(w))
    layout = "dense" if name == "ternary" else q.format.layout
    return layout, rtn.packed(q, layout).arrays


def mixed(source, out, formats=FORMATS, inputs=(), adapters=(), embedding=None, head=None, threshold=6.0):
    """Write `source`, a full-precision folder, with its linears in these formats in turn, its inputs too, and random
    adapters. Static inputs get a grid that clips a little."""
    folder, chance = open_folder(source), np.random.default_rng(5)
    tensors, layouts, kinds = dict(folder.tensors), {}, {}
    linears = linear_names(folder.config)
    wanted = {name: formats[i % len(formats)] for i, name in enumerate(linears)} if formats else {}
    wanted |= {"model.embed_tokens": embedding, HEAD: head}
    for name in (n for n in matrix_names(folder.config) if wanted.get(n)):
        layouts[name], arrays = packed(wanted[name], folder.floats(name))
        del tensors[f"{name}.weight"]
        for suffix, array in arrays.items():
            tensors[f"{name}.{suffix}"] = StoredTensor(DTYPES[array.dtype.name], array)
    for i, name in enumerate(linears):
        if inputs and inputs[i % len(inputs)] and name in layouts:
            kinds[name] = inputs[i % len(inputs)]
            tensors |= static_grid(name, kinds[name], chance)
    hidden = folder.config.hidden_size
    for i in adapters:
        weight = (chance.standard_normal((hidden, hidden)) * 0.3 * hidden**-0.5).astype(np.float16)
        tensors[f"model.layers.{i}.adapter.weight"] = StoredTensor("F16", weight)
        bias = chance.standard_normal(hidden).astype(np.float32) * np.float32(0.1)
        tensors[f"model.layers.{i}.adapter.bias"] = StoredTensor("F32", bias)
    write_folder(
        out, folder.config, tensors, folder.tokenizer(), layouts,
        inputs=kinds, adapters=adapters, outlier_threshold=threshold,
    )  # fmt: skip
    return out


def static_grid(name: str, kind: str, chance) -> dict[str, StoredTensor]:
    found = input_format(kind)
    if not found.is_static:
        return {}
    scale = 2.0 * chance.uniform(0.8, 1.2) / 2 ** (found.bits - 1)
    tensors = {f"{name}.input_scale": StoredTensor("F32", np.array([scale], np.float32))}
    if found.is_asymmetric:
        zero = np.array([chance.integers(1 << (found.bits - 2), 3 << (found.bits - 2))], np.float32)
        tensors[f"{name}.input_zero"] = StoredTensor("F32", zero)
    return tensors
