"""mxfp4: 32 columns of E2M1 numbers with one power of two, the OCP microscaling format as ggml lays it out.

    e: the scale is 2^(e - 127), an E8M0 number | qs: column j low and j + 16 high in byte j

The numbers of E2M1 are 0, 0.5, 1, 1.5, 2, 3, 4 and 6 with a sign. Codes are twice those, as in ggml, and scales half.
"""

import numpy as np

from .base import Packed, Unpacked, chunks
from .fields import NIBBLES, join, split
from .ggml import GgmlQuantizer

SIZES = (0, 1, 2, 3, 4, 6, 8, 12)
CODES = np.array([*SIZES, *(-k for k in SIZES)], np.int16)  # by nibble; 8 is minus zero, and nothing writes it
MIDDLES = (np.array(SIZES[1:], np.float32) + SIZES[:-1]) / 2
HALF_SCALES = np.ldexp(np.float32(1), np.arange(256) - 128)  # by exponent byte; 255 too, as ggml reads it
NAN = 255  # of E8M0


class MXFP4(GgmlQuantizer):
    name = "mxfp4"
    block = group = 32
    block_bytes = 17
    lo, hi = -12, 12
    floats = ()

    def nonfinite(self, packed: Packed) -> int:
        return int((self._blocks(packed)[:, 0] == NAN).sum())

    def first_scales(self, packed: Packed) -> np.ndarray:
        e = self._blocks(packed)[:, 0]
        return np.where(e == NAN, np.float32(np.nan), HALF_SCALES[e])

    def _pack_blocks(self, codes: np.ndarray, matrix: Unpacked) -> np.ndarray:
        if matrix.offset is not None:
            raise ValueError(f"{self.name} holds no offsets, but this matrix has them")
        sizes = abs(codes)
        at = np.searchsorted(SIZES, sizes)
        if (CODES[at] != sizes).any():
            raise ValueError(f"{self.name} holds the codes {SIZES} with a sign, but the matrix has others")
        scale = self._for_groups(matrix.scale, matrix.codes.shape)
        e = np.searchsorted(HALF_SCALES, scale).clip(0, 255).astype(np.uint8)
        if (HALF_SCALES[e] != scale).any():
            raise ValueError(f"{self.name} holds powers of two from 2^-128 to 2^127 as scales, but these are others")
        return self._bytes(e, at, codes < 0)

    def _bytes(self, e: np.ndarray, at: np.ndarray, negative: np.ndarray) -> np.ndarray:
        """Blocks of exponent bytes [n, 1] and of places in SIZES with their signs."""
        nibbles = (at + 8 * (negative & (at > 0))).astype(np.uint8)
        return np.concatenate([e, join(nibbles, 16, NIBBLES)], axis=1)

    def _unpack_blocks(self, blocks: np.ndarray, shape: tuple[int, int]) -> Unpacked:
        codes = CODES[split(blocks[:, 1:], 16, NIBBLES)]
        return Unpacked(codes.reshape(shape), HALF_SCALES[blocks[:, 0]].reshape(shape[0], shape[1] // self.group))

    def quantize(self, w: np.ndarray) -> Packed:
        byte = np.empty((len(w), self.row_bytes(w.shape[1])), np.uint8)
        for some in chunks(w.shape):
            x = np.ascontiguousarray(w[some], np.float32)
            if not np.isfinite(x).all():
                raise ValueError(
                    f"{self.name} holds finite weights, but {int((~np.isfinite(x)).sum())} of these are not"
                )
            byte[some] = self._quantize_blocks(x.reshape(-1, self.block)).reshape(len(x), -1)
        return Packed({"weight": byte})

    def _quantize_blocks(self, x: np.ndarray) -> np.ndarray:
        """uint8 [blocks, block_bytes] of float32 [blocks, block].

        The largest weight of a block lies between 4 and 8 times its scale: what is above 6 becomes 6. gguf's byte wraps
        round to NaN for blocks below 2^-125, and at the end of float32 its scale makes infinities; here the exponent
        stays where all is finite.
        """
        with np.errstate(divide="ignore"):
            e = np.floor(np.log2(abs(x).max(axis=1, keepdims=True))) - 2 + 127
        e = e.clip(0, 252).astype(np.uint8)
        at = np.searchsorted(MIDDLES, abs(x) / HALF_SCALES[e])  # the smaller one of two that are as near
        return self._bytes(e, at, x < 0)
