"""Small folders whose matrices are in many layouts, with rounded inputs and adapters: what `tritkit quantize` may
write. Formats are given in turn; None leaves floats."""

import numpy as np
import torch

from tritkit.checkpoint import HEAD, linear_names, matrix_names, open_folder, write_folder
from tritkit.formats import format_of
from tritkit.inputs import input_format
from tritkit.layouts import GGML, LAYOUTS, GgmlQuantizer, Packed, Unpacked
from tritkit.tensorfile import StoredTensor

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}  # for blocks of 256
DTYPES = {"float16": "F16", "float32": "F32", "uint8": "U8", "int16": "I16"}
# Every width and form of scales at least once.
FORMATS = ["int4_g32", "int8_row", "q4_k", "int3_g64_asym", "q8_0", "int2_g16", "int5_row_asym", "q6_k", "int6_tensor",
           "ternary", "q4_1", "int7_g128", "q3_k", "int4_row_asym"]  # fmt: skip


def random_blocks(name: str, shape: tuple[int, int], seed: int, size: float = 0.02) -> np.ndarray:
    """Any bytes that are blocks of ggml, with scales that make weights of about that size."""
    layout, chance = GGML[name], np.random.default_rng(seed)
    byte = chance.integers(0, 256, (shape[0], layout.row_bytes(shape[1])), np.uint8).reshape(-1, layout.block_bytes)
    for at in layout.floats:
        byte[:, at : at + 2] = chance.uniform(0.5, 1, (len(byte), 1)).astype("<f2").view(np.uint8)
    if name == "mxfp4":
        byte[:, 0] = chance.integers(110, 130, len(byte))
    byte[:, :64] &= 0xAA if name == "tq2_0" else 0xFF  # 3 is no code
    values = layout.dequantize(Packed({"weight": byte.reshape(shape[0], -1)}), shape)
    for at in layout.floats:
        scale = byte[:, at : at + 2].copy().view("<f2").astype(np.float32) * size / values.std()
        byte[:, at : at + 2] = scale.astype("<f2").view(np.uint8)
    return byte.reshape(shape[0], -1)


def packed(name: str, w: np.ndarray, seed: int = 0) -> tuple[str, dict[str, np.ndarray]]:
    """Layout and arrays of float32 weights in a format, or of random ones in a type that only ggml rounds to."""
    if name in GGML:
        layout = GGML[name]
        if isinstance(layout, GgmlQuantizer):
            return name, layout.quantize(w).arrays
        return name, {"weight": random_blocks(name, w.shape, seed)}
    q = format_of(name).quantize(torch.from_numpy(w))
    layout_name = "dense" if name == "ternary" else q.format.layout
    offset = None if q.grid.offset is None else q.grid.offset[..., 0].numpy()
    matrix = Unpacked(q.codes.reshape(q.shape).numpy(), q.grid.scale[..., 0].numpy(), offset)
    return layout_name, LAYOUTS[layout_name].pack(matrix).arrays


def mixed(source, out, formats=FORMATS, inputs=(), adapters=(), embedding=None, head=None, threshold=6.0):
    """Write `source`, a full-precision folder, with its linears in these formats in turn, its inputs too, and random
    adapters. Static inputs get a grid that clips a little."""
    folder, chance = open_folder(source), np.random.default_rng(5)
    tensors, layouts, kinds = dict(folder.tensors), {}, {}
    linears = linear_names(folder.config)
    wanted = {name: formats[i % len(formats)] for i, name in enumerate(linears)} if formats else {}
    wanted |= {"model.embed_tokens": embedding, HEAD: head}
    for i, name in enumerate(n for n in matrix_names(folder.config) if wanted.get(n)):
        layouts[name], arrays = packed(wanted[name], folder.floats(name), i)
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
