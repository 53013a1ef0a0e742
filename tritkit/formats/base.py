"""What every number format is: a way to choose a grid, to round onto it and to come back.

A value on a uniform grid is ``w ~ scale * code + offset`` with ``lo <= code <= hi``. A format says ``fit`` (weights to
grid); ``encode`` and ``decode`` follow from the grid, and from those follow the straight-through estimator of
training, round-to-nearest and the oracle of every kernel test.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

EPSILON = 1e-5  # the clamp on absmax and absmean in all of Microsoft's BitNet code (FACTS 12)


@dataclass(frozen=True)
class Grid:
    """Where the codes lie: ``w ~ scale * code + offset``.

    ``inverse`` is what encoding multiplies by. It is kept apart from ``scale`` because the papers' code computes
    ``127 / absmax`` once and divides by it on the way back: the last bit depends on that order.
    Tensors broadcast against what ``Format.split`` returns: float32 [rows, groups, 1].
    """

    scale: Tensor
    inverse: Tensor
    offset: Tensor | None = None
    threshold: Tensor | None = None  # of a binary format: above it the code is +1
    levels: Any = None  # layouts.TwoLevels of a k-quant, whose scales and minima are codes themselves

    @classmethod
    def from_scale(cls, scale: Tensor, offset: Tensor | None = None) -> Grid:
        return cls(scale, 1.0 / scale, offset)

    @classmethod
    def from_inverse(cls, inverse: Tensor) -> Grid:
        return cls(1.0 / inverse, inverse)


@dataclass(frozen=True)
class Format:
    """A number format. ``group`` says which values share a scale: "tensor", "row" (a token, for activations) or N."""

    name: str
    lo: int
    hi: int
    group: str | int
    layout: str = "dense"

    @property
    def has_offset(self) -> bool:
        """Whether its grids are shifted: w ~ scale * code + offset with an offset that is not zero."""
        return False

    @property
    def block(self) -> int:
        """Columns of a row whose grid is chosen together: those of a group; 0 where that is the row or the matrix."""
        return self.group if isinstance(self.group, int) else 0

    @property
    def fits_int8(self) -> bool:
        return self.lo >= -128 and self.hi <= 127

    def split(self, w: Tensor) -> Tensor:
        """View w [..., in] as [rows, groups, values that share a scale].

        Raises ValueError where the last dimension is no multiple of the group size.
        """
        if self.group == "tensor":
            return w.reshape(1, 1, -1)
        if self.group == "row":
            return w.reshape(-1, 1, w.shape[-1])
        size = int(self.group)
        if w.shape[-1] % size:
            raise ValueError(
                f"{self.name} shares a scale between {size} weights of a row, but a row has {w.shape[-1]} weights; "
                f"choose a group size that divides {w.shape[-1]}"
            )
        return w.reshape(-1, w.shape[-1] // size, size)

    def fit(self, w_rgk: Tensor, importance: Tensor | None = None) -> Grid:
        """Choose the grid of each group of a split, float32 tensor [rows, groups, k].

        importance: how much an error in a column matters, float32 [groups, k], not negative; only formats that search
        for their grid have a use for it.
        """
        raise NotImplementedError

    def encode(self, w_rgk: Tensor, grid: Grid) -> Tensor:
        """Nearest codes as integers in float32, half to even, clamped to [lo, hi]."""
        shifted = w_rgk if grid.offset is None else w_rgk - grid.offset
        return (shifted * grid.inverse).round_().clamp_(self.lo, self.hi)

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        values = codes * grid.scale
        return values if grid.offset is None else values + grid.offset

    def quantize(self, w: Tensor) -> QTensor:
        """Round to nearest (RTN): fit the grid and encode."""
        w_rgk = self.split(w.detach().float())
        grid = self.fit(w_rgk)
        return QTensor(self, self.encode(w_rgk, grid).to(torch.int16), grid, tuple(w.shape))

    def bits(self) -> float:
        """Bits of a code alone; what scales add depends on the layout and is measured there."""
        return float(torch.log2(torch.tensor(float(self.hi - self.lo + 1))))


@dataclass(frozen=True)
class QTensor:
    """Codes and grid of one tensor. codes: int16 [rows, groups, k]; shape: of the tensor they stand for."""

    format: Format
    codes: Tensor
    grid: Grid
    shape: tuple[int, ...]

    def dequantize(self) -> Tensor:
        """float32 values in the original shape."""
        return self.format.decode(self.codes.float(), self.grid).reshape(self.shape)

    def with_codes(self, codes: Tensor) -> QTensor:
        return replace(self, codes=codes)


def fake_quantize(w: Tensor, format: Format, strength: float = 1.0) -> Tensor:
    """Round to the format's grid on the way forward, pretend not to on the way back.

    Returns ``w + strength * (q(w) - w)`` with the gradient of the identity (the straight-through estimator, Bengio
    et al. 2013). ``strength`` below one is the warm-up of a conversion (FACTS 6.5). Same shape and dtype as w.
    """
    q = format.quantize(w).dequantize().to(w.dtype)
    if strength == 1.0:  # exactly q(w): w + (q - w) would lose its last bits
        return _StraightThrough.apply(w, q)
    return w + strength * (q - w).detach()


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w: Tensor, q: Tensor) -> Tensor:  # type: ignore[override]
        return q

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        return gradient, None
