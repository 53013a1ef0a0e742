"""ggml's block types: a row is a run of blocks, and a block holds the codes of its columns with their scales.

A type says how one block is read and written; rows, scales and checks are the same for all. Layouts and names are
those of ggml-common.h (FACTS 9.3), names in lower case.
"""

from abc import abstractmethod

import numpy as np

from .base import Layout, Packed, Unpacked, chunks


class GgmlBlocks(Layout):
    """``block`` columns in ``block_bytes``; ``group`` of them share a scale; codes run from ``lo`` to ``hi``."""

    block: int
    block_bytes: int
    group: int
    lo: int
    hi: int
    floats: tuple[int, ...]  # where the float16 numbers of a block lie

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row; ValueError where the columns are no whole blocks."""
        if cols % self.block:
            raise ValueError(f"{self.name} has blocks of {self.block} columns, but a row has {cols}")
        return cols // self.block * self.block_bytes

    def pack(self, matrix: Unpacked) -> Packed:
        """Bytes of codes and scales as they are given; nothing is rounded."""
        row_bytes = self.row_bytes(matrix.codes.shape[1])
        low, high = int(matrix.codes.min(initial=0)), int(matrix.codes.max(initial=0))
        if low < self.lo or high > self.hi:
            raise ValueError(
                f"{self.name} holds codes from {self.lo} to {self.hi}, but the matrix has codes from {low} to {high}"
            )
        byte = self._pack_blocks(matrix.codes.reshape(-1, self.block), matrix)
        return Packed({"weight": byte.reshape(len(matrix.codes), row_bytes)})

    def unpack(self, packed: Packed, shape: tuple[int, int]) -> Unpacked:
        return self._unpack_blocks(self._stored(packed, shape).reshape(-1, self.block_bytes), shape)

    def dequantize(self, packed: Packed, shape: tuple[int, int]) -> np.ndarray:
        """float32 [out, in], the bits that gguf.quants.dequantize gives."""
        byte = self._stored(packed, shape)
        values = np.empty(shape, np.float32)
        for some in chunks(shape):
            rows = byte[some]
            part = self.unpack(Packed({"weight": rows}), (len(rows), shape[1]))
            y = values[some].reshape(len(rows), -1, self.group)
            with np.errstate(invalid="ignore", over="ignore"):  # scales that are not finite are nonfinite's to report
                np.multiply(part.codes.reshape(y.shape), part.scale[..., None], out=y, dtype=np.float32)
                if part.offset is not None:
                    y += part.offset[..., None]
        return values

    def nonfinite(self, packed: Packed) -> int:
        """How many blocks have a scale that is not finite, which no quantiser writes."""
        blocks = self._blocks(packed)
        odd = np.zeros(len(blocks), bool)
        for at in self.floats:
            odd |= (blocks[:, at + 1] & 0x7C) == 0x7C  # the exponent of a float16 is all ones
        return int(odd.sum())

    def first_scales(self, packed: Packed) -> np.ndarray:
        """Of each block the scale, float32; of k-quants d, which multiplies the scales of its groups."""
        return float32(self._blocks(packed)[:, self.floats[0] : self.floats[0] + 2])[:, 0]

    @abstractmethod
    def _pack_blocks(self, codes: np.ndarray, matrix: Unpacked) -> np.ndarray:
        """uint8 [blocks, block_bytes] of int16 codes [blocks, block]."""

    @abstractmethod
    def _unpack_blocks(self, blocks: np.ndarray, shape: tuple[int, int]) -> Unpacked: ...

    def _stored(self, packed: Packed, shape: tuple[int, int]) -> np.ndarray:
        return self._array(packed, "weight", (shape[0], self.row_bytes(shape[1])))

    def _blocks(self, packed: Packed) -> np.ndarray:
        return self._array(packed, "weight", (-1, -1)).reshape(-1, self.block_bytes)

    def _for_groups(self, values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """Numbers of the groups of a matrix of that shape, [groups in all, 1]; those shared are repeated."""
        groups = shape[1] // self.group
        rows, given = values.shape
        if rows not in (1, shape[0]) or not given or groups % given:
            raise ValueError(
                f"{self.name} has a scale for {self.group} columns; {values.shape} do not share out {shape}"
            )
        spread = np.broadcast_to(np.repeat(values, groups // given, axis=1), (shape[0], groups))
        return np.ascontiguousarray(spread).reshape(-1, 1)

    def _float16(self, values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """The same as float16, in bytes [groups in all, 2]; ValueError for what float16 does not hold."""
        values = self._for_groups(values, shape)
        with np.errstate(over="ignore"):
            half = values.astype("<f2")
        if not np.array_equal(half.astype(np.float32), values, equal_nan=True):
            raise ValueError(f"{self.name} holds scales as float16, but these are no float16 values")
        return half.view(np.uint8)


class GgmlQuantizer(GgmlBlocks):
    """A type that weights are rounded to by one formula: the bytes of gguf.quants.quantize."""

    def quantize(self, w: np.ndarray) -> Packed:
        """Bytes of float32 [out, in]; ValueError for weights that are not finite or too large for float16 scales."""
        from .search import quantize

        return Packed({"weight": quantize(self.name, w)})


def float32(half: np.ndarray) -> np.ndarray:
    """Bytes [n, 2] of float16 numbers as float32 [n, 1]."""
    return np.ascontiguousarray(half).view("<f2").astype(np.float32)
