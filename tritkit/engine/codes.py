"""Codes of our own layouts as the native engine takes them: fields of bits with scales for groups of columns."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..checkpoint import CODEBOOKS
from ..inputs import NAMED, InputFormat
from ..layouts import LAYOUTS, Packed
from ..layouts.base import chunks
from .weights import Groups, Inputs

# Tables of numbers are int16 in the engine. Of all factors this one brings NF4's numbers nearest to integers: they are
# off by 3.6e-6 (rms) of the largest, which is 1; twice E2M1's are integers as they are.
FACTORS = {"nf4": 25544.95, "nf4_dq": 25544.95, "fp4": 2.0}
UNIT = 16  # groups of weights are multiples of so many columns
STRIP = 32  # groups of inputs are


class NotNative(ValueError):
    """A model holds what this engine does not run and the torch engine does."""


def grouped(layout: str, arrays: dict[str, np.ndarray], shape: tuple[int, int]) -> tuple[np.ndarray, Groups, float]:
    """The codes as they lie, what they mean, and a scale for all of them; ValueError for what has no native form."""
    first = LAYOUTS[layout].rows(Packed(arrays), shape, slice(0, 1))
    if first is None:
        raise ValueError(f"{layout} wants {shape[0]} rows of bytes, but there are {len(arrays['weight'])}")
    LAYOUTS[layout].unpack(first, (1, shape[1]))  # which says what is odd about the arrays
    if layout in CODEBOOKS:
        data, groups, scale = _of_table(layout, arrays, shape)
    else:
        data, groups, scale = _of_dense(arrays, shape)
    if not np.isfinite(groups.scales).all():
        raise ValueError(f"{int((~np.isfinite(groups.scales)).sum())} of its scales are not finite")
    if groups.size < shape[1] and groups.size % UNIT:
        raise NotNative(
            f"it has groups of {groups.size} columns; the native engine runs multiples of {UNIT}, --engine torch any"
        )
    return data, groups, scale


def _of_dense(arrays: dict[str, np.ndarray], shape: tuple[int, int]) -> tuple[np.ndarray, Groups, float]:
    bits, lo = (int(v) for v in arrays["weight_code"].reshape(-1))
    width = max(bits, 2)
    scales = _by_row(arrays["weight_scale"], shape)
    zero = arrays.get("weight_zero")
    if zero is None and lo == -(1 << (width - 1)):
        zeros = None
    else:  # a code stands for code + lo - zero
        shifted = (np.int16(0) if zero is None else _by_row(zero, shape).astype(np.int16)) - np.int16(lo)
        if np.min(shifted) < 0 or np.max(shifted) > 255:
            raise NotNative(f"its zero points lie {np.min(shifted)} to {np.max(shifted)} above its lowest code")
        zeros = np.ascontiguousarray(np.broadcast_to(shifted, scales.shape).astype(np.uint8))
    return arrays["weight"], Groups(width, _size(scales, shape), scales, zeros=zeros, field_bits=bits), 1.0


def _of_table(layout: str, arrays: dict[str, np.ndarray], shape: tuple[int, int]) -> tuple[np.ndarray, Groups, float]:
    codebook = LAYOUTS[layout]
    plain = codebook.rows(Packed(arrays), shape, slice(None))  # scales of two levels become what they stand for
    assert plain is not None
    byte, scales = plain.arrays["weight"], _by_row(plain.arrays["weight_scale"], shape)
    factor = FACTORS[layout]
    table = np.rint(codebook.table.astype(np.float64) * factor).astype(np.int16)  # type: ignore[attr-defined]
    groups = Groups(4, _size(scales, shape), scales, table=table, field_bits=4)
    return byte << 4 | byte >> 4, groups, 1 / factor  # here the first code is the low half of a byte


def _by_row(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Those that all rows share become those of each."""
    return np.ascontiguousarray(np.broadcast_to(values, (shape[0], values.shape[1])))


def _size(scales: np.ndarray, shape: tuple[int, int]) -> int:
    return shape[1] // scales.shape[1]


def inputs_of(
    name: str, format: InputFormat, grid: tuple[float, float | None] | None, rows: Iterator[np.ndarray]
) -> Inputs | None:
    """What the inputs of a linear are rounded to; None for a8_g32, which is what they are without a word.

    rows: the values of its weights, float32, some rows at a time, of which asymmetric inputs need the sums. ValueError,
    with the name of the linear, for what has no native form.
    """
    if format.name == "a8_g32":
        return None
    if format.has_outliers:
        raise NotNative(f"{name} keeps outliers of its inputs in floats (LLM.int8()), which only the torch engine runs")
    if format.name == "a4" or (isinstance(format.group, int) and (format.is_asymmetric or format.group % STRIP)):
        raise NotNative(f"{name} has inputs {format.name}, which only the torch engine runs")
    low = 0 if format.is_asymmetric else -(1 << (format.bits - 1))
    high = low + (1 << format.bits) - 1
    group = format.group if isinstance(format.group, int) else 0
    if format.name in NAMED:
        return Inputs(low, high, group, peak=128.0 if format.name == "a8_q128" else 127.0)
    scale, zero = grid or (0.0, None)
    sums = None
    if format.is_asymmetric:
        sums = np.concatenate([some.sum(axis=1, dtype=np.float64) for some in rows]).astype(np.float32)
    return Inputs(low, high, group, format.is_asymmetric, scale, zero or 0.0, row_sums=sums)


def rows_of(layout: str, arrays: dict[str, np.ndarray], shape: tuple[int, int]) -> Iterator[np.ndarray]:
    """The values of a matrix, some rows at a time."""
    packed = Packed(arrays)
    for some in chunks(shape):
        part = LAYOUTS[layout].rows(packed, shape, some)
        if part is None:
            yield LAYOUTS[layout].dequantize(packed, shape)
            return
        yield LAYOUTS[layout].dequantize(part, (len(range(shape[0])[some]), shape[1]))
