"""Formats whose codes are places in a table: NF4 (QLoRA, arXiv 2305.14314) and FP4 with the numbers of E2M1.

A weight is ``table[code] * scale``. The numbers of a table are not evenly spaced, so that encoding looks for the
nearest one and decoding looks it up; everything else is as for integers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..layouts.codebook import E2M1, NF4, SecondLevel
from .base import Format, Grid

_NAME = re.compile(r"(?P<table>nf4|fp4)(?:_g(?P<group>[1-9]\d*))?(?P<double>_dq)?")


@dataclass(frozen=True)
class Codebook(Format):
    """scale = max|w| / max|table| for each group, float32 as bitsandbytes has it; of two numbers that are as near, the
    lower one.

    double: QLoRA's double quantisation. The scales of the whole matrix, less their mean, are rounded to 8 bits in
    blocks of 256, so a grid can only be chosen for all of it at once; codes are nearest with those rounded scales.
    """

    table: tuple[float, ...] = NF4
    double: bool = False

    @property
    def block(self) -> int:
        return 0 if self.double else super().block

    @property
    def fits_int8(self) -> bool:
        return False  # codes are no numbers to multiply

    def fit(self, w_rgk: Tensor, importance: Tensor | None = None) -> Grid:
        scale = w_rgk.abs().amax(-1, keepdim=True) / max(self.table)
        if not self.double:
            scale = torch.where(scale > 0, scale.clamp(min=torch.finfo(torch.float32).tiny), 1.0)
            return Grid.from_scale(scale)
        second = SecondLevel.of(np.ascontiguousarray(scale[..., 0].numpy(force=True)))
        scale = torch.from_numpy(second.scale()).to(scale)[..., None]
        usable = scale.abs() >= torch.finfo(torch.float32).tiny  # that of a group far below the mean may be negative
        return Grid(scale, torch.where(usable, 1 / scale, 0.0), levels=second)

    def encode(self, w_rgk: Tensor, grid: Grid) -> Tensor:
        """Codes of the nearest numbers, as integers in float32."""
        middles, order, _ = _lookup(self.table, w_rgk.device)
        return order[torch.bucketize(w_rgk * grid.inverse, middles)]

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        return _lookup(self.table, codes.device)[2][codes.long()] * grid.scale

    def bits(self) -> float:
        return 4.0


@lru_cache(maxsize=16)
def _lookup(table: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Middles between neighbouring numbers, the codes of those numbers in their order, and the numbers by code."""
    order = sorted(range(len(table)), key=lambda code: (table[code], code))
    order = [code for i, code in enumerate(order) if not i or table[code] != table[order[i - 1]]]  # one zero of fp4's
    values = torch.tensor([table[code] for code in order], device=device)
    codes = torch.tensor(order, dtype=torch.float32, device=device)
    return (values[:-1] + values[1:]) / 2, codes, torch.tensor(table, device=device)


_FP4 = Codebook("fp4", 0, 15, 64, "fp4", E2M1)
_NF4 = Codebook("nf4", 0, 15, 64, "nf4", NF4)


def codebook(name: str) -> Codebook:
    """The format of a name that ``parse_codebook`` knows."""
    found = parse_codebook(name)
    assert found is not None
    return found


def parse_codebook(name: str) -> Codebook | None:
    """The format of a name nf4[_gN][_dq] or fp4[_gN], or None where it is none of these."""
    found = _NAME.fullmatch(name)
    if not found or (found["double"] and found["table"] == "fp4"):
        return None
    group = int(found["group"] or 64)
    format = replace(_FP4 if found["table"] == "fp4" else _NF4, name=name, group=group)
    return replace(format, layout="nf4_dq", double=True) if found["double"] else format
