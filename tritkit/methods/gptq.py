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
    """See METHODS. ``stats.note`` tells where more damping was needed than the recipe asks for."""
    format, gptq = plan.format, options.gptq
    assert format is not None
    if stats is None or not stats.tokens:
        raise ValueError("gptq needs calibration data; give text with --calibration")
    grouped = format.block > 0  # else the grid is one of the whole row or matrix
    if gptq.act_order and grouped and not gptq.static_groups:
        # Groups of columns that are no neighbours would need an index of columns, which no layout of ours has.
        gptq = replace(gptq, static_groups=True)
    hessian, dead, order = _hessian(stats, gptq)
    importance = hessian.diagonal().float()
    fixed = None
    if gptq.static_groups or not grouped:
        fixed = fit(format.split(w), format, plan, _grouped(importance, format, w))
    w = w.masked_fill(dead, 0)
    inverse = stats.once(("factor", gptq), lambda: inverse_factor(hessian[order][:, order], gptq, stats))
    codes, grids = _columns(w[:, order], inverse, format, plan, gptq, fixed, order, importance)
    back = torch.argsort(order)
    codes = codes[:, back]
    grid = fixed if fixed is not None else _joined(grids)
    split = format.split(w).shape
    return QTensor(format, codes.reshape(split).to(torch.int16), grid, tuple(w.shape))


def _hessian(stats: InputStats, options: GptqOptions) -> tuple[Tensor, Tensor, Tensor]:
    """The mean of x x^T, which inputs are always zero, and the order of the columns."""
    hessian = stats.hessian / stats.tokens
    dead = hessian.diagonal() <= 0
    hessian[dead, dead] = 1.0
    order = torch.arange(len(hessian))
    if options.act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    return hessian, dead, order


def inverse_factor(hessian: Tensor, options: GptqOptions, stats: InputStats) -> Tensor:
    """Upper Cholesky factor of the damped inverse, float32 [in, in]. Damping grows tenfold while H is singular."""
    mean, damping = float(hessian.diagonal().mean()), options.damping
    identity = torch.eye(len(hessian), dtype=hessian.dtype)
    while True:
        lower, failed = torch.linalg.cholesky_ex(hessian + damping * mean * identity)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and torch.isfinite(upper).all():
            break
        damping = max(10 * damping, 1e-6)
        if damping > MOST_DAMPING:
            raise ValueError("the second moments of the inputs are no positive matrix, whatever the damping")
    if damping != options.damping:
        stats.note = f"the Hessian was singular: damping {damping:g} in place of {options.damping:g}"
    return upper.float()


def _columns(
    w: Tensor,
    inverse: Tensor,
    format: Format,
    plan: Plan,
    options: GptqOptions,
    fixed: Grid | None,
    order: Tensor,
    importance: Tensor,
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
                weights = importance[column : column + size].reshape(here.shape[1:])
                grids.append(fit(here, format, plan, weights))
            grid = _grid_of(fixed, format, int(order[column])) if fixed is not None else None
            if grid is None:
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


def _grouped(importance: Tensor, format: Format, w: Tensor) -> Tensor | None:
    shape = format.split(w).shape
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
