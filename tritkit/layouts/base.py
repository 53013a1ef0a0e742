"""What a layout is: codes and scales to named byte arrays and back. numpy only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

CHUNK = 1 << 18  # weights that are floats at once, so that what is made on the way stays small, and in the cache


@dataclass(frozen=True)
class Packed:
    """What a layout stores of one weight matrix, by tensor suffix ("weight", "weight_scale", ...)."""

    arrays: dict[str, np.ndarray]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays.values())


@dataclass(frozen=True)
class TwoLevels:
    """Scales of a k-quant as it stores them: ``scale = d * scales`` and ``offset = -dmin * mins``.

    d and dmin: float16 [rows, blocks]; scales and mins: int16 [rows, groups]. dmin and mins are None where a type has
    no offset. The float32 scale alone does not say which of the two levels made it.
    """

    d: np.ndarray
    scales: np.ndarray
    dmin: np.ndarray | None = None
    mins: np.ndarray | None = None

    @staticmethod
    def joined(parts: list[TwoLevels]) -> TwoLevels:
        """Those of neighbouring columns as one."""

        def cat(name: str) -> np.ndarray | None:
            arrays = [getattr(part, name) for part in parts]
            return None if arrays[0] is None else np.concatenate(arrays, axis=1)

        d, scales = cat("d"), cat("scales")
        assert d is not None and scales is not None
        return TwoLevels(d, scales, cat("dmin"), cat("mins"))


@dataclass(frozen=True)
class Unpacked:
    """codes: int16 [out, in]; scale and offset: float32 [rows, groups], rows and groups 1 where shared."""

    codes: np.ndarray
    scale: np.ndarray
    offset: np.ndarray | None = None
    levels: Any = None  # TwoLevels of a k-quant, SecondLevel of nf4_dq


class Layout(ABC):
    """Bytes of one weight matrix. ``pack`` refuses, with ValueError, what it cannot express."""

    name: str

    @abstractmethod
    def pack(self, matrix: Unpacked) -> Packed: ...

    @abstractmethod
    def unpack(self, packed: Packed, shape: tuple[int, int]) -> Unpacked: ...

    def dequantize(self, packed: Packed, shape: tuple[int, int]) -> np.ndarray:
        """The values, float32 [out, in]."""
        matrix = self.unpack(packed, shape)
        groups = matrix.scale.shape[1]
        grouped = matrix.codes.astype(np.float32).reshape(shape[0], groups, -1)
        grouped *= matrix.scale[:, :, None]
        if matrix.offset is not None:
            grouped += matrix.offset[:, :, None]
        return grouped.reshape(shape)

    def rows(self, packed: Packed, shape: tuple[int, int], some: slice | np.ndarray) -> Packed | None:
        """What is stored of some rows, as a matrix of its own; views for a slice. None where rows share bytes."""
        if len(packed.arrays["weight"]) != shape[0]:
            return None
        return Packed({n: a[some] if a.ndim == 2 and len(a) == shape[0] else a for n, a in packed.arrays.items()})

    def _require_codes(self, codes: np.ndarray, allowed: tuple[int, ...]) -> None:
        low, high = int(codes.min(initial=0)), int(codes.max(initial=0))
        if low < min(allowed) or high > max(allowed) or not np.isin(codes, allowed).all():
            raise ValueError(f"{self.name} holds the codes {allowed}, but the matrix has codes from {low} to {high}")

    def _one_scale(self, matrix: Unpacked) -> np.ndarray:
        if matrix.scale.size != 1:
            raise ValueError(f"{self.name} holds one scale per matrix, but this matrix has {matrix.scale.size}")
        if matrix.offset is not None:
            raise ValueError(f"{self.name} holds one scale per matrix and no offset, but this matrix has one")
        return matrix.scale.astype(np.float32).reshape(1)

    def _array(self, packed: Packed, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A stored array of that shape (-1: any side), or ValueError."""
        found = packed.arrays.get(name)
        if found is None:
            raise ValueError(f"{self.name} has no array {name}")
        if len(found.shape) != len(shape) or any(s not in (-1, f) for s, f in zip(shape, found.shape, strict=True)):
            what = "bytes" if name == "weight" else "values"
            raise ValueError(f"{self.name} wants {name} of {shape} {what}, but it has {found.shape}")
        if name == "weight" and found.dtype != np.uint8:
            raise ValueError(f"{self.name} is made of bytes, but weight has dtype {found.dtype}")
        return found

    def _stored_scale(self, packed: Packed) -> np.ndarray:
        """The one scale of a matrix, float32 [1, 1]."""
        scale = packed.arrays.get("weight_scale")
        if scale is None or scale.size != 1:
            found = "none" if scale is None else f"{scale.size}"
            raise ValueError(f"{self.name} holds one weight_scale per matrix, but there are {found}")
        if not np.isfinite(scale).all():
            raise ValueError(f"{self.name} holds a finite weight_scale, but this one is {scale.item()}")
        return scale.astype(np.float32).reshape(1, 1)


def chunks(shape: tuple[int, ...]) -> list[slice]:
    """Runs of rows of about CHUNK weights."""
    step = max(CHUNK // max(shape[1], 1), 1)
    return [slice(start, start + step) for start in range(0, shape[0], step)]
