"""Round to nearest: the grid that the range asks for, and the nearest code of each weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formats import Format, Grid, QTensor
from ..formats.integer import Integer
from ..layouts import LAYOUTS, Packed, Unpacked
from .recipe import Plan
from .stats import InputStats


def fit(w_rgk: Tensor, format: Format, plan: Plan, importance: Tensor | None = None) -> Grid:
    """The grid of each group by the plan's range; none: the format's own way. w_rgk: float32 [rows, groups, k]."""
    if plan.range is None:
        return format.fit(w_rgk, importance)
    if not isinstance(format, Integer):
        raise ValueError(f"range is {plan.range!r}, but {format.name} has a grid of its own; ranges are for integers")
    from .ranges import choose

    return choose(w_rgk, format, plan.range)


def solve(w: Tensor, plan: Plan, stats: InputStats | None, options: Any) -> QTensor:
    """See METHODS. Needs no calibration data."""
    assert plan.format is not None
    w_rgk = plan.format.split(w)
    grid = fit(w_rgk, plan.format, plan)
    return QTensor(plan.format, plan.format.encode(w_rgk, grid).to(torch.int16), grid, tuple(w.shape))


def unpacked(q: QTensor) -> Unpacked:
    """A quantised matrix as layouts take it: codes int16 [out, in], scales float32 [rows, groups]."""
    codes = q.codes.reshape(q.shape).numpy()
    offset = None if q.grid.offset is None else q.grid.offset[..., 0].numpy()
    return Unpacked(codes, q.grid.scale[..., 0].numpy(), offset, q.grid.levels)


def packed(q: QTensor, layout: str | None = None) -> Packed:
    """Its bytes, in its format's own layout or another that holds it."""
    return LAYOUTS[layout or q.format.layout].pack(unpacked(q))
