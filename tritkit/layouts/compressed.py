"""The layout "pack-quantized" of compressed-tensors: codes along each row, lowest bit first, in words of 32 bits.

    weight_packed      int32 [out, in * bits / 32]
    weight_scale       float [out, groups]
    weight_shape       int64 [2]
    weight_zero_point  int32 [out * bits / 32, groups], asymmetric weights only, packed along the outputs

A weight is ``scale * (code - zero)``. Codes and zero points are signed there and shifted by 2^(bits - 1) for packing:
what lies in the file counts from 0.
"""

from __future__ import annotations

import numpy as np

from .base import Layout, Packed, Unpacked
from .dense import stored_scale
from .gptq import fields
from .words import count, from_words, to_words

NAMES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")


class PackQuantized(Layout):
    """Of one width, 2 to 8 bits. Scales are float16 or float32, as ours are."""

    name = "pack-quantized"

    def __init__(self, bits: int):
        if not 2 <= bits <= 8:
            raise ValueError(f"compressed-tensors is read with 2 to 8 bits a code, not {bits}")
        self.bits = bits

    def pack(self, matrix: Unpacked) -> Packed:
        codes, zero, scale = fields(matrix, self.bits)
        stored = stored_scale(scale)
        arrays = {
            "weight_packed": to_words(codes, self.bits),
            "weight_scale": stored,
            "weight_shape": np.array(codes.shape, np.int64),
        }
        if matrix.offset is not None:
            arrays["weight_zero_point"] = np.ascontiguousarray(to_words(np.ascontiguousarray(zero.T), self.bits).T)
        return Packed(arrays)

    def unpack(self, packed: Packed, shape: tuple[int, int]) -> Unpacked:
        rows, cols = shape
        if "weight_shape" in packed.arrays:
            told = tuple(int(n) for n in self._array(packed, "weight_shape", (2,)))
            if told != shape:
                raise ValueError(f"{self.name} has weight_shape {told}, but the matrix is {shape}")
        words = self._array(packed, "weight_packed", (rows, -1))
        if words.shape[1] != count(cols, self.bits):
            padded = -(-cols // (32 // self.bits))
            old = "; releases of compressed-tensors that left bits of each word empty are not read"
            raise ValueError(
                f"{self.name} has {words.shape[1]} words a row, but {cols} codes of {self.bits} bits take "
                f"{count(cols, self.bits)}{old if words.shape[1] == padded else ''}"
            )
        scale = self._array(packed, "weight_scale", (-1, -1)).astype(np.float32)
        if scale.shape[0] not in (1, rows) or not scale.shape[1] or cols % scale.shape[1]:
            raise ValueError(f"{self.name} has weight_scale of {scale.shape}, which do not share out a {shape} matrix")
        codes = from_words(words, self.bits, cols).astype(np.int16)
        if "weight_zero_point" not in packed.arrays:
            return Unpacked(codes - (1 << self.bits - 1), scale)
        zero = self._array(packed, "weight_zero_point", (count(rows, self.bits), scale.shape[1]))
        zero = from_words(np.ascontiguousarray(zero.T), self.bits, rows).T
        return Unpacked(codes, scale, -scale * zero.astype(np.float32))
