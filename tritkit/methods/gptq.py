"""GPTQ: quantise column by column and let the columns that are left make up for the error. arXiv 2210.17323.

The layer-wise problem is argmin |W X - Q X|^2. With H = X X^T + damping and U the upper Cholesky factor of H^-1, the
error of column j, (w_j - q_j) / U_jj, is subtracted from every later column i with weight U_ji (algorithm 1).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..formats import Format, Grid, QTensor
from .recipe import GptqOptions, Plan
from .rtn import fit
from .stats import InputStats

MOST_DAMPING = 10.0  # of the mean diagonal; a Hessian that is still singular then is no Hessian


def solve(w: Tensor, plan: Plan, stats: InputStats | None, options: Any) -> QTensor:
    """See METHODS. ``stats.derived["note"]`` tells where more damping was needed than the recipe asks for."""
    format, gptq = plan.format, options.gptq
    assert format is not None
    if stats is None or not stats.tokens:
        raise ValueError("gptq needs calibration data; give batches of inputs")
    grouped = format.block > 0  # else the grid is one of the whole row or matrix
    if gptq.act_order and grouped and not gptq.static_groups:
        # Groups of columns that are no neighbours would need an index of columns, which no layout of ours has.
        gptq = replace(gptq, static_groups=True)
    dead = stats.hessian.diagonal() <= 0
    importance = stats.second_moment if options.importance else None
    fixed = None
    if gptq.static_groups or not grouped:
        fixed = fit(format.split(w), format, plan, _grouped(importance, format, w))
    order, inverse = stats.once(("factor", gptq), lambda: _factor(stats, gptq))
    w = w.masked_fill(dead, 0)
    codes, grids = _columns(w if order is None else w[:, order], inverse, format, plan, gptq, fixed, order, importance)
    if order is not None:
        codes = codes[:, torch.argsort(order)]
    grid = fixed if fixed is not None else _joined(grids)
    split = format.split(w).shape
    return QTensor(format, codes.reshape(split).to(torch.int16), grid, tuple(w.shape))


def _factor(stats: InputStats, options: GptqOptions) -> tuple[Tensor | None, Tensor]:
    """The order of the columns (None: their own), and the factor of the inverse Hessian in that order."""
    hessian = stats.hessian / stats.tokens
    if stats.first and options.sink != 1:
        first = torch.cat(stats.first).double()
        hessian += (options.sink - 1) / stats.tokens * (first.t() @ first)
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    if dead.any():  # inputs that are always zero: any number that does not change the mean will do
        diagonal[dead] = float(diagonal[~dead].mean()) if not dead.all() else 1.0
    order = torch.argsort(diagonal, descending=True, stable=True) if options.act_order else None
    if order is not None:
        hessian = hessian[order][:, order]
    return order, inverse_factor(hessian, options, stats)


def inverse_factor(hessian: Tensor, options: GptqOptions, stats: InputStats) -> Tensor:
    """Upper Cholesky factor of the damped inverse, float32 [in, in]. Damping grows tenfold while H is singular.

    ``hessian`` is changed: its diagonal carries the damping afterwards.
    """
    mean, damping, added = float(hessian.diagonal().mean()), options.damping, 0.0
    while True:
        hessian.diagonal().add_((damping - added) * mean)
        added = damping
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and torch.isfinite(upper).all():
            break
        damping = max(10 * damping, 1e-6)
        if damping > MOST_DAMPING:
            raise ValueError("the second moments of the inputs are no positive matrix, whatever the damping")
    if damping != options.damping:
        stats.derived["note"] = f"the Hessian was singular: damping {damping:g} in place of {options.damping:g}"
    return upper.float()


def _columns(
    w: Tensor,
    inverse: Tensor,
    format: Format,
    plan: Plan,
    options: GptqOptions,
    fixed: Grid | None,
    order: Tensor | None,
    importance: Tensor | None,
) -> tuple[Tensor, list[Grid]]:
    """Codes float32 [out, in] in the given order of columns; grids of the blocks of columns where they are not fixed.

    Updates go to the columns of the same lazy batch at once and to all later ones when the batch is done.
    """
    columns = w.shape[1]
    codes, grids = torch.empty_like(w), []
    size = format.block
    batch = options.columns if fixed is not None else max(options.columns // size, 1) * size
    for begin in range(0, columns, batch):
        end = min(begin + batch, columns)
        part, factor = w[:, begin:end].clone(), inverse[begin:end, begin:end]
        errors = torch.empty_like(part)
        for j in range(end - begin):
            column = begin + j
            if fixed is None and column % size == 0:
                here = format.split(part[:, j : j + size].contiguous())
                weights = None if importance is None else importance[column : column + size].reshape(here.shape[1:])
                grids.append(fit(here, format, plan, weights))
            if fixed is not None:
                grid = _grid_of(fixed, format, column if order is None else int(order[column]))
            else:
                grid = _grid_of(grids[-1], format, column % size)
            value = part[:, j]
            code = format.encode(value[:, None, None].clone(), grid)
            codes[:, column] = code[:, 0, 0]
            errors[:, j] = (value - format.decode(code, grid)[:, 0, 0]) / factor[j, j]
            part[:, j + 1 :] -= errors[:, j, None] * factor[j, j + 1 :]
        w[:, end:] -= errors @ inverse[begin:end, end:]
    return codes, grids


def _grid_of(grid: Grid, format: Format, column: int) -> Grid:
    """The grid of one column of those that ``grid`` was fitted for."""
    group = column // format.group if isinstance(format.group, int) else 0

    def of(t: Tensor | None) -> Tensor | None:
        return None if t is None else t[:, group : group + 1]

    scale, inverse = of(grid.scale), of(grid.inverse)
    assert scale is not None and inverse is not None
    return Grid(scale, inverse, of(grid.offset), of(grid.threshold))


def _grouped(importance: Tensor | None, format: Format, w: Tensor) -> Tensor | None:
    shape = format.split(w).shape
    if importance is None:
        return None
    return importance.reshape(shape[1:]) if shape[1] * shape[2] == w.shape[1] else None


def _joined(grids: list[Grid]) -> Grid:
    """The grids of neighbouring blocks of columns as one."""

    def cat(name: str) -> Tensor | None:
        parts = [getattr(g, name) for g in grids]
        return None if parts[0] is None else torch.cat(parts, dim=1)

    scale, inverse = cat("scale"), cat("inverse")
    assert scale is not None and inverse is not None
    levels = None if grids[0].levels is None else grids[0].levels.joined([g.levels for g in grids])
    return Grid(scale, inverse, cat("offset"), cat("threshold"), levels)
