"""q4_0, q4_1, q5_0, q5_1 and q8_0: 32 columns with one float16 scale d, in the _1 types also a float16 minimum m.

    d | m (_1 only) | qh: fifth bits, column j in bit j (q5 only) | qs: column j low and j + 16 high in byte j

q8_0 has d and then 32 int8. A weight is d * code (+ m), with codes around zero in the _0 types and from 0 in the _1.
"""

import numpy as np

from .base import Unpacked
from .fields import BITS, NIBBLES, join, split
from .ggml import GgmlQuantizer, float32


class GgmlLegacy(GgmlQuantizer):
    block = group = 32

    def __init__(self, bits: int, has_min: bool):
        self.name = f"q{bits}_{int(has_min)}"
        self.bits, self.has_min = bits, has_min
        self.lo = 0 if has_min else -(1 << bits - 1)
        self.hi = self.lo + (1 << bits) - 1
        self.floats = (0, 2) if has_min else (0,)
        self.block_bytes = 2 * len(self.floats) + 4 * bits

    def _pack_blocks(self, codes: np.ndarray, matrix: Unpacked) -> np.ndarray:
        if matrix.offset is not None and not self.has_min:
            raise ValueError(f"{self.name} holds no offsets, but this matrix has them")
        scale, shape = matrix.scale, matrix.codes.shape
        halves = [self._float16(scale, shape)]
        if self.has_min:
            halves.append(self._float16(np.zeros_like(scale) if matrix.offset is None else matrix.offset, shape))
        return self._bytes(halves, codes - self.lo)

    def _bytes(self, halves: list[np.ndarray], fields: np.ndarray) -> np.ndarray:
        """Blocks of float16 numbers as bytes and of codes minus lo."""
        if self.bits == 8:
            return np.concatenate([*halves, (fields + self.lo).astype(np.int8).view(np.uint8)], axis=1)
        fields = fields.astype(np.uint8)
        parts = [join(fields >> 4, 1, BITS)] if self.bits == 5 else []
        return np.concatenate([*halves, *parts, join(fields & 15, 16, NIBBLES)], axis=1)

    def _unpack_blocks(self, blocks: np.ndarray, shape: tuple[int, int]) -> Unpacked:
        at = 2 * len(self.floats)
        if self.bits == 8:
            codes = blocks[:, at:].view(np.int8).astype(np.int16)
        else:
            fields = split(blocks[:, -16:], 16, NIBBLES)
            if self.bits == 5:
                fields |= split(blocks[:, at : at + 4], 1, BITS) << 4
            codes = fields.astype(np.int16) + self.lo
        groups = (shape[0], shape[1] // self.group)
        offset = float32(blocks[:, 2:4]).reshape(groups) if self.has_min else None
        return Unpacked(codes.reshape(shape), float32(blocks[:, :2]).reshape(groups), offset)
