"""GPTQ's layout, as AutoGPTQ and GPTQModel write it: codes along the inputs, zero points along the outputs.

    qweight int32 [in * bits / 32, out]      column o holds the codes of output o
    qzeros  int32 [groups, out * bits / 32]  the zero points of a group of inputs
    scales  float16 [groups, out]
    g_idx   int32 [in]                       the group of each input

A weight is ``scale * (code - zero)``, codes and zero points from 0 to 2^bits - 1; zero points of symmetric weights are
2^(bits - 1). Version 1 stores zero - 1, version 2 zero itself. (FACTS 8.3.)
"""

from __future__ import annotations

import numpy as np

from .base import Layout, Packed, Unpacked
from .words import WORD, count, from_words, to_words

BITS = (2, 3, 4, 8)
# What releases of GPTQModel before its pull request 2763 took from the words of 3-bit zero points in place of one from
# each field: the first and the third are in each other's place.
SWAPPED = np.array([0x24924924, 0x92492492, 0x49249249], np.uint32)
NAMES = ("qweight", "qzeros", "scales", "g_idx")


class Gptq(Layout):
    """Of one width; ``version`` 1 or 2."""

    def __init__(self, bits: int, version: int):
        if bits not in BITS:
            raise ValueError(f"GPTQ holds codes of 2, 3, 4 or 8 bits, not {bits}")
        self.name = "gptq" if version == 1 else "gptq_v2"
        self.bits, self.version = bits, version

    def pack(self, matrix: Unpacked) -> Packed:
        rows, cols = matrix.codes.shape
        for side, found in (("rows", rows), ("columns", cols)):
            if found * self.bits % WORD:
                raise ValueError(f"{self.name} packs words of 32 bits, which {found} {side} of {self.bits} do not fill")
        codes, zero, scale = fields(matrix, self.bits)
        with np.errstate(over="ignore"):
            half = scale.astype(np.float16)
        if ((half == 0) & (scale != 0)).any():
            raise ValueError(
                f"{self.name} holds scales as float16, and {np.abs(scale[scale != 0]).min():.3g} is 0 there"
            )
        if not np.isfinite(half).all():
            raise ValueError(
                f"{self.name} holds scales as float16, at most 65504, but one is {np.abs(scale).max():.6g}"
            )
        if self.version == 1:
            if not zero.all():
                raise ValueError(
                    f"{self.name} stores zero points less one, and {int((zero == 0).sum())} of these are 0; gptq_v2 "
                    "stores them as they are"
                )
            zero = zero - np.uint8(1)
        return Packed(
            {
                "qweight": np.ascontiguousarray(to_words(codes, self.bits).T),
                "qzeros": to_words(np.ascontiguousarray(zero.T), self.bits),
                "scales": np.ascontiguousarray(half.T),
                "g_idx": (np.arange(cols) // (cols // scale.shape[1])).astype(np.int32),
            }
        )

    def unpack(self, packed: Packed, shape: tuple[int, int]) -> Unpacked:
        """ValueError, too, where an input belongs to another group than its neighbours (act-order)."""
        rows, cols = shape
        scale = self._array(packed, "scales", (-1, rows)).T.astype(np.float32)
        groups = scale.shape[1]
        if not groups or cols % groups:
            raise ValueError(f"{self.name} has {groups} groups, which do not share out {cols} columns")
        qweight = self._array(packed, "qweight", (count(cols, self.bits), rows))
        qzeros = self._array(packed, "qzeros", (groups, count(rows, self.bits)))
        require_neighbours(packed.arrays.get("g_idx"), cols, groups)
        codes = from_words(np.ascontiguousarray(qweight.T), self.bits, cols).astype(np.int16)
        zero = self._zeros(qzeros, rows).T
        if self.is_symmetric(packed, rows):
            return Unpacked(codes - (1 << self.bits - 1), scale)
        return Unpacked(codes, scale, -scale * zero.astype(np.float32))

    def is_symmetric(self, packed: Packed, rows: int) -> bool:
        """Whether all zero points are in the middle, so that the weights need none."""
        qzeros = self._array(packed, "qzeros", (-1, count(rows, self.bits)))
        return bool((self._zeros(qzeros, rows) == 1 << self.bits - 1).all())

    def _zeros(self, qzeros: np.ndarray, rows: int) -> np.ndarray:
        """Zero points uint8 [groups, rows]. GPTQModel adds the one to whole words, which also undoes the borrows of the
        files that it wrote so (FACTS 8.3); fields that lie over the edge of two words are counted up by themselves."""
        if self.version == 2:
            return from_words(qzeros, self.bits, rows)
        if WORD % self.bits:
            found = from_words(qzeros, self.bits, rows) + np.uint8(1) & np.uint8((1 << self.bits) - 1)
            words = np.ascontiguousarray(qzeros).view(np.uint32).reshape(len(qzeros), -1, len(SWAPPED)) + SWAPPED
            swapped = from_words(words.reshape(len(qzeros), -1), self.bits, rows)
            middle = 1 << self.bits - 1  # nobody else's zero points become these, all of them
            return swapped if (swapped == middle).all() else found
        ones = np.uint32(sum(1 << at for at in range(0, WORD, self.bits)))
        return from_words(np.ascontiguousarray(qzeros).view(np.uint32) + ones, self.bits, rows)


def require_neighbours(index: np.ndarray | None, cols: int, groups: int) -> None:
    """ValueError where columns that are no neighbours share a group."""
    if index is not None and not np.array_equal(index, np.arange(cols) // (cols // groups)):
        raise ValueError(
            "its columns are spread over the groups in another order (act-order without static groups), which neither "
            "engine runs"
        )


def fields(matrix: Unpacked, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes from 0 on, uint8 [out, in]; zero points, uint8, and scales, float32, both [out, groups].

    ValueError for codes that are wider, and for offsets that are no integer zero point times the scale.
    """
    low, high = int(matrix.codes.min(initial=0)), int(matrix.codes.max(initial=0))
    half = 0 if matrix.offset is not None else 1 << bits - 1
    if low < -half or high >= (1 << bits) - half:
        raise ValueError(f"{bits} bits hold the codes {-half} to {(1 << bits) - half - 1}, not {low} to {high}")
    groups = matrix.scale.shape[1]
    scale = np.broadcast_to(matrix.scale, (len(matrix.codes), groups))
    zero = np.full(scale.shape, half, np.float32)
    if matrix.offset is not None:
        offset = np.broadcast_to(matrix.offset, scale.shape)
        # groups of zeros alone have none; the middle is what every version of these files can hold
        zero = np.where(scale == 0, 1 << bits - 1, np.rint(-offset / np.where(scale == 0, 1, scale)))
        if not np.array_equal(-scale * zero, offset) or not (zero.min() >= 0 and zero.max() < 1 << bits):
            raise ValueError("its offsets are no integer zero point times the scale")
    return (matrix.codes + half).astype(np.uint8), zero.astype(np.uint8), scale
