"""q2_k to q6_k: 256 columns; groups of 16 or 32 of them have an integer scale, and those share a float16 d.

q2_k   84 bytes   scales[16]: low half sc, high half m | qs[64] | d | dmin            d * sc * q - dmin * m
q3_k  110 bytes   hmask[32]: third bits | qs[64] | scales[12]: 6 bits | d             d * (sc - 32) * (q - 4)
q4_k  144 bytes   d | dmin | scales[12]: 6 bits of sc and m | qs[128]                 d * sc * q - dmin * m
q5_k  176 bytes   d | dmin | scales[12] | qh[32]: fifth bits | qs[128]                d * sc * q - dmin * m
q6_k  210 bytes   ql[128] | qh[64]: upper two bits | scales[16]: int8 | d             d * sc * (q - 32)
"""

import numpy as np

from .base import TwoLevels, Unpacked
from .fields import BITS, CRUMBS, NIBBLES, join, split
from .ggml import GgmlBlocks


class KQuant(GgmlBlocks):
    """Reads and writes the three parts of a block: codes minus ``lo``, integer scales, float16 numbers."""

    block = 256
    scale_range: tuple[int, int]

    @property
    def has_min(self) -> bool:
        return len(self.floats) == 2

    def _pack_blocks(self, codes: np.ndarray, matrix: Unpacked) -> np.ndarray:
        levels = matrix.levels
        if levels is None:
            raise ValueError(f"{self.name} holds scales of two levels, d and small integers, but this matrix has one")
        rows, cols = matrix.codes.shape
        blocks, groups = (rows, cols // self.block), (rows, cols // self.group)
        wanted = [blocks, groups, *((blocks, groups) if self.has_min else (None, None))]
        parts = [levels.d, levels.scales, levels.dmin, levels.mins]
        found = [None if part is None else part.shape for part in parts]
        if found != wanted:
            raise ValueError(f"{self.name} wants scales, minima of shapes {wanted} for these codes, but has {found}")
        low, high = self.scale_range
        if any(p is not None and (p.min(initial=low) < low or p.max(initial=low) > high) for p in parts[1::2]):
            raise ValueError(f"{self.name} holds integer scales from {low} to {high}, but these reach beyond")
        given = (matrix.scale, matrix.offset)
        if not all(map(same, given, self._grid(levels))):
            raise ValueError(f"{self.name}: the scales of this matrix are not those of its two levels")
        integers = [levels.scales.reshape(len(codes), -1)]
        halves = [levels.d.astype("<f2").reshape(-1, 1).view(np.uint8)]
        if levels.dmin is not None and levels.mins is not None:
            integers.append(levels.mins.reshape(len(codes), -1))
            halves.append(levels.dmin.astype("<f2").reshape(-1, 1).view(np.uint8))
        return np.concatenate(self._join((codes - self.lo).astype(np.uint8), integers, halves), axis=1)

    def _unpack_blocks(self, blocks: np.ndarray, shape: tuple[int, int]) -> Unpacked:
        rows, cols = shape
        fields, integers = self._split(blocks)
        halves = [np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").reshape(rows, -1) for at in self.floats]
        small = [part.astype(np.int16).reshape(rows, -1) for part in integers]
        levels = TwoLevels(halves[0], small[0], *((halves[1], small[1]) if self.has_min else ()))
        codes = fields.astype(np.int16).reshape(rows, cols) + self.lo
        return Unpacked(codes, *self._grid(levels), levels)

    def _grid(self, levels: TwoLevels) -> tuple[np.ndarray, np.ndarray | None]:
        """Scale and offset of each group, in float32 as ggml multiplies them."""
        per_block = self.block // self.group
        with np.errstate(invalid="ignore"):
            scale = np.repeat(levels.d.astype(np.float32), per_block, axis=1) * levels.scales.astype(np.float32)
            if levels.dmin is None or levels.mins is None:
                return scale, None
            low = np.repeat(levels.dmin.astype(np.float32), per_block, axis=1) * levels.mins.astype(np.float32)
            return scale, -low

    def _split(self, blocks: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Codes minus lo [blocks, 256] and integer scales [blocks, groups] (and minima)."""
        raise NotImplementedError

    def _join(self, fields: np.ndarray, integers: list[np.ndarray], halves: list[np.ndarray]) -> list[np.ndarray]:
        """The parts of the blocks in their order."""
        raise NotImplementedError


def same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b if a is None or b is None else np.array_equal(a, b, equal_nan=True)


class Q2K(KQuant):
    name = "q2_k"
    block_bytes, group = 84, 16
    lo, hi, scale_range = 0, 3, (0, 15)
    floats = (80, 82)

    def _split(self, blocks):
        return split(blocks[:, 16:80], 32, CRUMBS), [blocks[:, :16] & 15, blocks[:, :16] >> 4]

    def _join(self, fields, integers, halves):
        scales = (integers[0] | integers[1] << 4).astype(np.uint8)
        return [scales, join(fields, 32, CRUMBS), *halves]


class Q3K(KQuant):
    name = "q3_k"
    block_bytes, group = 110, 16
    lo, hi, scale_range = -4, 3, (-32, 31)
    floats = (108,)

    def _split(self, blocks):
        fields = split(blocks[:, 32:96], 32, CRUMBS) | split(blocks[:, :32], 32, BITS) << 2
        scales = split(blocks[:, 96:104], 8, NIBBLES) | split(blocks[:, 104:108], 4, CRUMBS) << 4
        return fields, [scales.astype(np.int16) - 32]

    def _join(self, fields, integers, halves):
        scales = (integers[0] + 32).astype(np.uint8)
        packed = [join(scales & 15, 8, NIBBLES), join(scales >> 4, 4, CRUMBS)]
        return [join(fields >> 2, 32, BITS), join(fields & 3, 32, CRUMBS), *packed, *halves]


class Q4K(KQuant):
    name = "q4_k"
    block_bytes, group = 144, 32
    lo, hi, scale_range = 0, 15, (0, 63)
    floats = (0, 2)

    def _split(self, blocks):
        return split(blocks[:, 16:], 32, NIBBLES), split_6bit(blocks[:, 4:16])

    def _join(self, fields, integers, halves):
        return [*halves, join_6bit(*integers), join(fields, 32, NIBBLES)]


class Q5K(KQuant):
    name = "q5_k"
    block_bytes, group = 176, 32
    lo, hi, scale_range = 0, 31, (0, 63)
    floats = (0, 2)

    def _split(self, blocks):
        fields = split(blocks[:, 48:], 32, NIBBLES) | split(blocks[:, 16:48], 32, BITS) << 4
        return fields, split_6bit(blocks[:, 4:16])

    def _join(self, fields, integers, halves):
        return [*halves, join_6bit(*integers), join(fields >> 4, 32, BITS), join(fields & 15, 32, NIBBLES)]


class Q6K(KQuant):
    name = "q6_k"
    block_bytes, group = 210, 16
    lo, hi, scale_range = -32, 31, (-128, 127)
    floats = (208,)

    def _split(self, blocks):
        fields = split(blocks[:, :128], 64, NIBBLES) | split(blocks[:, 128:192], 32, CRUMBS) << 4
        return fields, [blocks[:, 192:208].view(np.int8)]

    def _join(self, fields, integers, halves):
        scales = integers[0].astype(np.int8).view(np.uint8)
        return [join(fields & 15, 64, NIBBLES), join(fields >> 4, 32, CRUMBS), scales, *halves]


# Eight scales and eight minima of 6 bits in 12 bytes: the first four of each lie in the low bits of bytes 0-3 and 4-7,
# the last four with their low halves in bytes 8-11 and their upper two bits on top of bytes 0-3 and 4-7.


def split_6bit(byte: np.ndarray) -> list[np.ndarray]:
    s, m, both = byte[:, :4], byte[:, 4:8], byte[:, 8:]
    return [
        np.concatenate([s & 63, both & 15 | s >> 2 & 48], axis=1),
        np.concatenate([m & 63, both >> 4 | m >> 2 & 48], axis=1),
    ]


def join_6bit(scales: np.ndarray, mins: np.ndarray) -> np.ndarray:
    s, m = scales.astype(np.uint8), mins.astype(np.uint8)
    high_s, high_m = s[:, 4:], m[:, 4:]
    return np.concatenate([s[:, :4] | high_s >> 4 << 6, m[:, :4] | high_m >> 4 << 6, high_s & 15 | high_m << 4], axis=1)
