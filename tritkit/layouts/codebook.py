"""Codes that are places in a table of 16 numbers: nf4 and fp4, two codes a byte, the first in the high nibble.

A weight is ``table[code] * scale``, one scale for each group of columns; the shape of the scales says how wide a group
is. Nibbles lie as in bitsandbytes, whose nf4 these bytes are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .base import Layout, Packed, Unpacked

# NormalFloat of 4 bits: quantiles of the normal distribution, with a zero of its own (QLoRA, arXiv 2305.14314, app. E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# E2M1 by its bits (OCP microscaling formats, section 5.3.3): a sign, two of exponent, one of mantissa; 8 is minus zero.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
BLOCK = 256  # scales that share a scale of the second level


def dynamic_map() -> np.ndarray:
    """The 256 numbers of the dynamic 8-bit type (Dettmers, arXiv 1511.04561), sorted float32.

    Seven decades of magnitudes, each cut into twice as many equal parts as the smaller one; a number is the middle of
    its part. 0 and 1 are numbers of their own.
    """
    found = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2**decade + 1, dtype=np.float32)
        middles = np.float32(10.0 ** (decade - 6)) * ((edges[:-1] + edges[1:]) / 2)
        found += [*middles, *-middles]
    return np.sort(np.array(found, np.float32))


DYNAMIC = dynamic_map()
DYNAMIC_MIDDLES = (DYNAMIC[:-1] + DYNAMIC[1:]) / 2


@dataclass(frozen=True)
class SecondLevel:
    """Scales as codes themselves (QLoRA's double quantisation): ``scale = DYNAMIC[codes] * absmax + mean``.

    codes: uint8 [rows, groups]; absmax: float32, one for each BLOCK of codes in the order of rows; mean: float32.
    """

    codes: np.ndarray
    absmax: np.ndarray
    mean: np.ndarray

    @classmethod
    def of(cls, scale: np.ndarray) -> SecondLevel:
        """Round scales, float32 [rows, groups], to it."""
        mean = np.float32(scale.mean(dtype=np.float64))
        rest = np.zeros(-(-scale.size // BLOCK) * BLOCK, np.float32)
        rest[: scale.size] = scale.reshape(-1) - mean
        absmax = np.abs(rest.reshape(-1, BLOCK)).max(axis=1)
        x = rest.reshape(-1, BLOCK) * (1 / np.where(absmax > 0, absmax, 1).astype(np.float32))[:, None]
        codes = np.searchsorted(DYNAMIC_MIDDLES, x).astype(np.uint8)
        return cls(codes.reshape(-1)[: scale.size].reshape(scale.shape), absmax, np.full(1, mean))

    def scale(self) -> np.ndarray:
        """What the codes stand for, float32 [rows, groups]."""
        absmax = np.repeat(self.absmax, BLOCK)[: self.codes.size].reshape(self.codes.shape)
        return DYNAMIC[self.codes] * absmax + self.mean


class Codebook(Layout):
    """Scales as float32 [rows, groups], as bitsandbytes stores them."""

    def __init__(self, name: str, table: tuple[float, ...]):
        self.name = name
        self.table = np.array(table, np.float32)

    def pack(self, matrix: Unpacked) -> Packed:
        cols = matrix.codes.shape[1]
        if cols % 2:
            raise ValueError(f"{self.name} packs two columns in a byte, but a row has {cols}")
        if matrix.offset is not None:
            raise ValueError(f"{self.name} holds no offsets, but this matrix has them")
        low, high = int(matrix.codes.min(initial=0)), int(matrix.codes.max(initial=0))
        if low < 0 or high > 15:
            raise ValueError(f"{self.name} holds the codes 0 to 15, but the matrix has codes from {low} to {high}")
        self._require_groups(matrix.scale, matrix.codes.shape)
        codes = matrix.codes.astype(np.uint8)
        return Packed({"weight": codes[:, ::2] << 4 | codes[:, 1::2], **self._pack_scales(matrix)})

    def unpack(self, packed: Packed, shape: tuple[int, int]) -> Unpacked:
        byte = self._array(packed, "weight", (shape[0], -(-shape[1] // 2)))
        if shape[1] % 2:
            raise ValueError(f"{self.name} packs two columns in each of its bytes, so {shape[1]} columns cannot be")
        scale = self._array(packed, "weight_scale", (-1, -1))
        self._require_groups(scale, shape)
        codes = np.stack([byte >> 4, byte & 15], axis=-1).reshape(shape).astype(np.int16)
        return self._unpack_scales(packed, codes)

    def dequantize(self, packed: Packed, shape: tuple[int, int]) -> np.ndarray:
        matrix = self.unpack(packed, shape)
        values = self.table[matrix.codes].reshape(*matrix.scale.shape, -1)
        return (values * matrix.scale[..., None]).reshape(shape)

    def _require_groups(self, scale: np.ndarray, shape: tuple[int, int]) -> None:
        if scale.ndim != 2 or scale.shape[0] != shape[0] or not scale.shape[1] or shape[1] % scale.shape[1]:
            raise ValueError(
                f"{self.name} has scales for groups of columns of each row; {scale.shape} of them do not share out "
                f"a {shape} matrix"
            )

    def _pack_scales(self, matrix: Unpacked) -> dict[str, np.ndarray]:
        return {"weight_scale": matrix.scale.astype(np.float32)}

    def _unpack_scales(self, packed: Packed, codes: np.ndarray) -> Unpacked:
        return Unpacked(codes, packed.arrays["weight_scale"].astype(np.float32, copy=False))


class DoubleCodebook(Codebook):
    """Scales as bytes with a second level, QLoRA's double quantisation: 0.127 bits a weight in groups of 64."""

    def rows(self, packed: Packed, shape: tuple[int, int], some: slice | np.ndarray) -> Packed | None:
        """Rows share scales of the second level, so that here the scales become what they stand for."""
        scale = self._second(packed).scale() if packed.arrays["weight_scale"].dtype == np.uint8 else None
        found = {n: a for n, a in packed.arrays.items() if n in ("weight", "weight_scale")}
        if scale is not None:
            found["weight_scale"] = scale
        return Packed({name: array[some] for name, array in found.items()})

    def _pack_scales(self, matrix: Unpacked) -> dict[str, np.ndarray]:
        second = matrix.levels
        if not isinstance(second, SecondLevel) or not np.array_equal(second.scale(), matrix.scale):
            raise ValueError(f"{self.name} holds scales as codes of a second level, which these are not")
        return {
            "weight_scale": second.codes,
            "weight_scale_absmax": second.absmax.astype(np.float32),
            "weight_scale_mean": second.mean.astype(np.float32).reshape(1),
        }

    def _unpack_scales(self, packed: Packed, codes: np.ndarray) -> Unpacked:
        if packed.arrays["weight_scale"].dtype != np.uint8:  # some rows, see there
            return super()._unpack_scales(packed, codes)
        second = self._second(packed)
        return Unpacked(codes, second.scale(), levels=second)

    def _second(self, packed: Packed) -> SecondLevel:
        codes = self._array(packed, "weight_scale", (-1, -1))
        absmax = self._array(packed, "weight_scale_absmax", (-(-codes.size // BLOCK),))
        return SecondLevel(codes, absmax, self._array(packed, "weight_scale_mean", (1,)))
