"""tq1_0 and tq2_0: 256 ternary columns and one float16 scale d. A weight is d * (t - 1), t = 0, 1 or 2.

tq2_0, 66 bytes: two halves of 128 columns, in 32 bytes each; bits 2n and 2n + 1 of byte m are t of column m + 32n.

tq1_0, 54 bytes: a byte is a fraction of base 3, so that a digit is what a multiplication by 3 carries over:

    32 bytes, 5 digits: t of m + 32n | 16 bytes, 5 digits: t of 160 + m + 16n | 4 bytes, 4 digits: t of 240 + m + 4n | d
"""

import numpy as np

from .base import Unpacked
from .fields import CRUMBS, join, split
from .ggml import GgmlQuantizer, float32

RUNS = ((0, 32, 5), (32, 48, 5), (48, 52, 4))  # of tq1_0: first byte, end, digits in each


class GgmlTernary(GgmlQuantizer):
    """``quantize`` loses nothing of weights that are ternary already, and is no good quantiser of others: the largest
    weight of a block is its d, and what is below half of it becomes zero."""

    block = group = 256
    lo, hi = -1, 1

    def _pack_blocks(self, codes: np.ndarray, matrix: Unpacked) -> np.ndarray:
        if matrix.offset is not None:
            raise ValueError(f"{self.name} holds no offsets, but this matrix has them")
        halves = self._float16(matrix.scale, matrix.codes.shape)
        return np.concatenate([self._join((codes + 1).astype(np.uint8)), halves], axis=1)

    def _unpack_blocks(self, blocks: np.ndarray, shape: tuple[int, int]) -> Unpacked:
        codes = self._split(blocks[:, :-2]).astype(np.int16) - 1
        return Unpacked(codes.reshape(shape), float32(blocks[:, -2:]).reshape(shape[0], shape[1] // self.block))

    def _join(self, t: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _split(self, byte: np.ndarray) -> np.ndarray:
        raise NotImplementedError


class TQ2(GgmlTernary):
    name = "tq2_0"
    block_bytes = 66
    floats = (64,)

    def _join(self, t: np.ndarray) -> np.ndarray:
        return join(t, 32, CRUMBS)

    def _split(self, byte: np.ndarray) -> np.ndarray:
        t = split(byte, 32, CRUMBS)
        if (t == 3).any():
            raise ValueError(f"{self.name} holds the codes -1, 0 and 1, but its bytes have a fourth code")
        return t


class TQ1(GgmlTernary):
    """ggml writes 243 of the 256 bytes, 81 where they have four digits; the others decode too, as ggml decodes them."""

    name = "tq1_0"
    block_bytes = 54
    floats = (52,)

    def _join(self, t: np.ndarray) -> np.ndarray:
        parts, column = [], 0
        for start, end, digits in RUNS:
            lanes = end - start
            run = t[:, column : column + lanes * digits].reshape(len(t), digits, lanes)
            number = np.zeros((len(t), lanes), np.uint16)
            for n in range(5):  # the first digit is the highest; where there are four, the fifth is 0
                number = number * 3 + (run[:, n] if n < digits else 0)
            parts.append(((number * np.uint16(256) + np.uint32(242)) // 243).astype(np.uint8))
            column += lanes * digits
        return np.concatenate(parts, axis=1)

    def _split(self, byte: np.ndarray) -> np.ndarray:
        parts = []
        for start, end, digits in RUNS:
            fraction = byte[:, None, start:end] * np.array([3**n for n in range(digits)], np.uint8)[:, None]
            parts.append(((fraction.astype(np.uint16) * 3) >> 8).astype(np.uint8).reshape(len(byte), -1))
        return np.concatenate(parts, axis=1)
