"""Integers of 2 to 8 bits, per tensor, per row or per group, symmetric or asymmetric; and int8/int4 activations."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import EPSILON, Format, Grid

SMALLEST_SCALE = 2.0**-20  # of a group: of float16's numbers below 2^-14 those that still have four bits
_NAME = re.compile(r"int(?P<bits>[2-8])(?:_g(?P<group>[1-9]\d*)|_(?P<shared>row|tensor))?(?P<asym>_asym)?")


@dataclass(frozen=True)
class Integer(Format):
    """Absmax (symmetric) or min-max (asymmetric) mapping of "A Visual Guide to Quantization".

    Symmetric: scale = max|w| / (2^(b-1) - 1), codes -2^(b-1)..2^(b-1)-1. Asymmetric: the range always contains zero,
    scale = (max - min) / (2^b - 1), codes 0..2^b-1 and an integer zero point, so that 0 is represented exactly.
    Scales of groups are rounded to float16, which is how they are stored.
    """

    symmetric: bool = True

    @property
    def has_offset(self) -> bool:
        return not self.symmetric

    def fit(self, w_rgk: Tensor, importance: Tensor | None = None) -> Grid:
        return self.grid_of(w_rgk.amin(-1, keepdim=True), w_rgk.amax(-1, keepdim=True))

    def grid_of(self, low: Tensor, high: Tensor) -> Grid:
        """The grid that covers a range, ends in float [rows, groups, 1]: a symmetric one up to the larger magnitude."""
        if self.symmetric:
            return Grid.from_scale(self._storable(torch.maximum(-low, high) / self.hi))
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = self._storable((high - low) / self.hi)
        zero = (-low / scale).round_().clamp_(self.lo, self.hi)
        return Grid.from_scale(scale, offset=-scale * zero)

    def _storable(self, scale: Tensor) -> Tensor:
        """A scale of zero (a group of zeros) becomes one; groups keep the precision of their float16 on disk."""
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        if isinstance(self.group, int):
            scale = scale.clamp(SMALLEST_SCALE, torch.finfo(torch.float16).max)
            subnormal = scale < torch.finfo(torch.float16).tiny  # few bits are left: up, so that no value is clipped
            scale = torch.where(subnormal, torch.ceil(scale * 2.0**24) * 2.0**-24, scale.half().float())
        return scale


def integer(bits: int, group: str | int = "row", symmetric: bool = True) -> Integer:
    """The integer format of so many bits; its name follows the grammar int{2..8}[_g{N}|_row|_tensor][_asym]."""
    name = f"int{bits}_{f'g{group}' if isinstance(group, int) else group}{'' if symmetric else '_asym'}"
    lo, hi = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    return Integer(name, lo, hi, group, "dense", symmetric)


def parse_integer(name: str) -> Integer | None:
    """The format that a name of the grammar means, or None where it is not of the grammar."""
    found = _NAME.fullmatch(name)
    if not found:
        return None
    group: str | int = int(found["group"]) if found["group"] else found["shared"] or "row"
    return integer(int(found["bits"]), group, not found["asym"])


@dataclass(frozen=True)
class AbsmaxActivation(Format):
    """Per token absmax int8: codes clip(round(Q x / max|x|), -128, 127).

    Q = 127 in b1.58 and its descendants (arXiv 2402.17764 and the authors' code), Q = 128 in BitNet b1
    (arXiv 2310.11453 eq. 3, where Q_b = 2^(b-1)).
    """

    peak: float = 127.0

    def fit(self, w_rgk: Tensor, importance: Tensor | None = None) -> Grid:
        return Grid.from_inverse(self.peak / w_rgk.abs().amax(-1, keepdim=True).clamp_(min=EPSILON))


@dataclass(frozen=True)
class AbsmeanActivation(Format):
    """BitNet a4.8's INT4: codes clip(round(sqrt(7) x / mean|x|), -8, 7) per token. arXiv 2411.04965 section 2."""

    def fit(self, w_rgk: Tensor, importance: Tensor | None = None) -> Grid:
        return Grid.from_inverse(math.sqrt(7.0) / w_rgk.abs().mean(-1, keepdim=True).clamp(min=EPSILON))
