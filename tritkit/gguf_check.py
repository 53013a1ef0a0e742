"""Whether a GGUF file holds the model that it was written from: opened as a stranger would, row by row.

The bounds are those of the types' definitions, not of our code of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from .checkpoint import ModelFolder
from .gguf_model import open_gguf
from .layouts import GGML, LAYOUTS, Packed, Unpacked
from .layouts.search import quantize
from .models.shapes import matrix_shape

SAMPLE = 16  # rows of each matrix that are read back
ROUNDING = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "mxfp4")  # types that hold the nearest of their numbers
K_QUANTS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
HALF_A_STEP = 0.5 + 2.0**-10  # and a rounding error


def verify(
    model: ModelFolder,
    path: Path,
    names: Iterable[str],
    types: Mapping[str, str],
    i2_s: str,
    advance: Callable[[], None],
    importance: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Compare tensors by name, of matrices some rows within the error of their type; OSError says where they differ.

    importance: float32 [columns] of the matrices whose quantisation was weighed by it.
    """
    written = open_gguf(path, i2_s)
    generator = np.random.default_rng(0)
    for name in names:
        module = name.removesuffix(".weight")
        if module in types:
            rows = np.sort(generator.permutation(matrix_shape(model.config, module)[0])[:SAMPLE])
            wanted, found = rows_of(model, module, rows), rows_of(written, module, rows)
            kind, weights = types[module], (importance or {}).get(module)
            if kind in K_QUANTS and model.layouts.get(module) != kind:
                error = steps_off(kind, codes_of(written, module, rows), wanted)
                allowed = np.full_like(wanted, HALF_A_STEP)
            elif kind in ROUNDING and weights is not None and model.layouts.get(module) != kind:
                wanted = GGML[kind].dequantize(Packed({"weight": quantize(kind, wanted, weights)}), wanted.shape)
                error, allowed = np.abs(found - wanted), np.zeros_like(wanted)  # its definition is the search alone
            else:
                error, allowed = np.abs(found - wanted), largest_error(kind, wanted)
        else:
            wanted, found = model.tensors[name].float32(), written.tensors[name].float32()
            error, allowed = np.abs(found - wanted), np.zeros_like(wanted)
        if not (error <= allowed).all():
            at = np.unravel_index(int(np.argmax(error - allowed)), error.shape)
            raise OSError(
                f"{name} does not read back as it was written: {found[at]:.6g} instead of {wanted[at]:.6g}; "
                "the file was removed"
            )
        advance()
    told, kept = model.config.to_hf(), written.config.to_hf()
    for key in ("hidden_size", "num_hidden_layers", "head_dim", "rms_norm_eps", "hidden_act", "tie_word_embeddings"):
        exact = not isinstance(told.get(key), float)  # GGUF has float32
        if told.get(key) != kept.get(key) if exact else np.float32(told[key]) != np.float32(kept.get(key)):
            raise OSError(f"{key} does not read back as it was written: {kept.get(key)} instead of {told.get(key)}")
    (ours, our_factor), (theirs, their_factor) = model.config.rope_frequencies(), written.config.rope_frequencies()
    if not np.allclose(ours, theirs, rtol=1e-5) or not np.isclose(our_factor, their_factor, rtol=1e-5):
        raise OSError("the rotary frequencies do not read back as they were written")


def steps_off(kind: str, matrix: Unpacked, values: np.ndarray) -> np.ndarray:
    """How many steps of their grid the codes of a k-quant are from its values: float32 [rows, columns].

    Whatever chose its scales, a k-quant ends with the nearest code at the scales as stored: at most half a step, values
    beyond the last code aside. A scale of zero says nothing of its codes.
    """
    rows, groups = matrix.scale.shape
    offset = 0 if matrix.offset is None else matrix.offset[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        place = (values.reshape(rows, groups, -1) - offset) / matrix.scale[..., None]
    place = np.where(matrix.scale[..., None] == 0, np.nan, place).clip(GGML[kind].lo, GGML[kind].hi)
    off = np.abs(place - matrix.codes.reshape(place.shape))
    return np.nan_to_num(off, nan=0.0).reshape(values.shape)


def rows_of(model: ModelFolder, name: str, rows: np.ndarray) -> np.ndarray:
    """Some rows of a matrix as float32. Only these are decoded where a layout keeps rows apart."""
    layout = model.layouts.get(name)
    if layout is None:
        stored = model.tensors[f"{name}.weight"]
        return stored._replace(array=stored.array[rows]).float32()
    if layout in GGML or layout.startswith("i2_s"):
        return LAYOUTS[layout].dequantize(*_part_of(model, name, rows))
    return model.floats(name)[rows]


def codes_of(model: ModelFolder, name: str, rows: np.ndarray) -> Unpacked:
    """Codes and scales of some rows of a matrix of blocks."""
    return LAYOUTS[model.layouts[name]].unpack(*_part_of(model, name, rows))


def _part_of(model: ModelFolder, name: str, rows: np.ndarray) -> tuple[Packed, tuple[int, int]]:
    packed = model.packed(name)
    part = Packed({**packed.arrays, "weight": packed.arrays["weight"][rows]})
    return part, (len(rows), matrix_shape(model.config, name)[1])


def largest_error(kind: str, values: np.ndarray) -> np.ndarray:
    """How far rounding to a type may be from each value, by the type's definition and not by our code of it."""
    size = np.abs(values)
    if kind == "f32":
        return np.zeros_like(values)
    if kind in ("f16", "bf16", "tq1_0", "tq2_0", "i2_s"):  # float16 has 11 bits, below 2^-14 fewer; bfloat16 has 8
        return size * (2.0**-8 if kind == "bf16" else 2.0**-11) + (0 if kind == "bf16" else 2.0**-25)
    blocks = values.reshape(*values.shape[:-1], -1, GGML[kind].block)
    widest = np.abs(blocks).max(-1, keepdims=True)
    if kind == "mxfp4":
        # Half of the gap from 4 to 6 at a scale that is 2^(floor(log2 widest) - 2), or what is above 6: 8 is possible.
        with np.errstate(divide="ignore"):
            scale = np.exp2(np.maximum(np.floor(np.log2(widest)) - 2, -127))
        allowed = np.maximum(scale, widest - 6 * scale)
        return np.broadcast_to(allowed, blocks.shape).reshape(values.shape)
    spread = blocks.max(-1, keepdims=True) - blocks.min(-1, keepdims=True)
    # Half a step, or a whole one at the end that a signed grid lacks; and float16 scales.
    step = {
        "q8_0": widest / 127 / 2,
        "q4_0": widest / 8,
        "q5_0": widest / 16,
        "q4_1": spread / 15 / 2,
        "q5_1": spread / 31 / 2,
    }
    scales = (widest + spread) * 2.0**-10 + 2.0**-20
    allowed = step[kind] + scales if kind in step else np.zeros_like(widest)  # others are copied
    return np.broadcast_to(allowed, blocks.shape).reshape(values.shape)
