"""Ternary weights from one byte layout to another: codes stay what they are, scales go as far as the target can hold.

hf_bitlinear, hf_autobitlinear, i2_s_x86 and i2_s_arm have one float32 scale a matrix (the first stores its reciprocal),
tq1_0 and tq2_0 a float16 for each block of 256 columns, binary_rows and dense are our own. numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import LAYOUTS, Packed, Unpacked

TERNARY = ("hf_bitlinear", "hf_autobitlinear", "i2_s_x86", "i2_s_arm", "tq1_0", "tq2_0", "binary_rows", "dense")
BLOCK = 256  # columns that share a scale in tq1_0 and tq2_0
LARGEST_ERROR = 0.01  # of a scale; float16 is at most 0.05 % off above 6e-5, and ever more below


@dataclass(frozen=True)
class Translated:
    """scale_error: how far the target's scale is from the source's, relative; the largest where there are many."""

    packed: Packed
    scale_error: float


def translate(packed: Packed, source: str, target: str, shape: tuple[int, int]) -> Translated:
    """The same ternary matrix in another layout; ValueError where the target cannot hold it."""
    if target not in TERNARY:
        raise ValueError(f"{target!r} is no layout of ternary weights; those are {', '.join(TERNARY)}")
    return pack_ternary(LAYOUTS[source].unpack(packed, shape), target)


def pack_ternary(matrix: Unpacked, target: str) -> Translated:
    """A matrix of the codes -1, 0 and +1 in the layout ``target``."""
    _require_ternary(matrix, target)
    per_block = target in ("tq1_0", "tq2_0")
    if not (target == "dense" or (per_block and matrix.scale.shape[1] in (1, matrix.codes.shape[1] / BLOCK))):
        matrix = one_scale(matrix, target)
    scale = matrix.scale
    with np.errstate(over="ignore"):
        rounded = scale  # as it will be read back
        if per_block:
            rounded = scale.astype(np.float16).astype(np.float32)
        elif target == "hf_bitlinear":
            rounded = 1 / (1 / scale)
    change = np.abs(rounded - scale) / np.where(scale == 0, 1, np.abs(scale))
    error = float(change.max(initial=0))
    if error > LARGEST_ERROR:
        worst = change.argmax()
        raise ValueError(
            f"{target} cannot hold the scale {scale.flat[worst]:.6g}: it would become {rounded.flat[worst]:.6g}"
        )
    if per_block:
        scale = _zero_in_empty_blocks(rounded, matrix.codes) if scale.shape[1] == 1 else rounded
    return Translated(LAYOUTS[target].pack(Unpacked(matrix.codes, scale)), error)


def one_scale(matrix: Unpacked, target: str = "the target") -> Unpacked:
    """The same weights with one scale for all; ValueError, with those found, where they have several.

    Groups without a weight other than 0 belong to any scale: ggml gives them the scale 0.
    """
    rows, cols = matrix.codes.shape
    if matrix.scale.size == 1 and matrix.scale.all():
        return matrix
    scale = np.broadcast_to(matrix.scale, (rows, matrix.scale.shape[1]))
    used = matrix.codes.reshape(rows, scale.shape[1], -1).any(axis=2) & (scale != 0)
    found = np.unique(scale[used])
    if len(found) > 1:
        raise ValueError(
            f"{target} holds one scale per matrix, but this matrix has {len(found)}, from {found[0]:.6g} to "
            f"{found[-1]:.6g}"
        )
    if not used.all():  # where the scale is 0 so are the weights, whatever the codes
        matrix = Unpacked(matrix.codes * np.repeat(used, cols // scale.shape[1], axis=1), matrix.scale)
    one = found[0] if len(found) else np.float32(1)  # a matrix of zeros: any scale will do
    return Unpacked(matrix.codes, np.full((1, 1), one, np.float32))


def ternary_misfit(w: np.ndarray) -> tuple[float, float]:
    """The ternary matrix nearest to float weights: its scale, and the relative distance to it (0: it is the same).

    Distance is |w - scale * codes| / |w|, with the codes that absmean rounding gives (FACTS 3.2) and the scale that
    fits them best. Weights that are all -s, 0 or +s are on the grid, however sparse, and so is what bfloat16 or
    float16 made of them, which is one s again.
    """
    size = np.abs(w, dtype=np.float32)
    if not np.isfinite(size).all():
        raise ValueError(f"{int((~np.isfinite(size)).sum())} of these weights are not finite")
    largest = float(size.max(initial=0))
    if np.all((size == largest) | (size == 0)):
        return largest or 1.0, 0.0
    codes = size > 0.5 * size.mean(dtype=np.float64)
    scale = float(size[codes].mean(dtype=np.float64))
    square = np.square(size, dtype=np.float64).sum()
    return scale, float(np.sqrt(max(square - codes.sum() * scale**2, 0) / square))


def ternary_codes(w: np.ndarray) -> Unpacked:
    """Float weights that are ternary already as codes and scale; ValueError says how far others are from that."""
    scale, error = ternary_misfit(w)
    if error:
        raise ValueError(
            f"these weights are not ternary: the nearest ternary matrix, of scale {scale:.6g}, is {error:.2%} away; "
            "`tritkit quantize MODEL OUT ternary`, the next verb to come, rounds them properly"
        )
    return Unpacked(np.sign(w).astype(np.int16), np.full((1, 1), scale, np.float32))


def _require_ternary(matrix: Unpacked, target: str) -> None:
    codes = matrix.codes
    low, high = int(codes.min(initial=0)), int(codes.max(initial=0))
    if matrix.offset is not None or low < -1 or high > 1:
        beside = " and offsets" if matrix.offset is not None else ""
        raise ValueError(f"{target} holds the codes -1, 0 and 1, but the matrix has codes from {low} to {high}{beside}")
    if not np.isfinite(matrix.scale).all():
        raise ValueError("the scales of this matrix are not finite")
    if target == "binary_rows" and not codes.all():
        raise ValueError(f"{target} holds the codes -1 and 1, but {np.mean(codes == 0):.1%} of the weights are 0")


def _zero_in_empty_blocks(scale: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """A scale for each block of 256, 0 where all its codes are 0, as ggml's quantiser has it."""
    rows, cols = codes.shape
    if cols % BLOCK:
        return scale  # the layout refuses it
    return np.where(codes.reshape(rows, cols // BLOCK, BLOCK).any(axis=2), scale, np.float32(0))
