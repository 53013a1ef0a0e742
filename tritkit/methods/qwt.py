"""Quantization without Tears: y = block(x) + W x + b, W and b in closed form. arXiv 2411.13918, section 3.

x is what the quantised block reads, behind the quantised and compensated blocks before it; the target is the
difference that quantising makes on that very input, float_block(x) - block(x) (FACTS 7.1). Least squares in float64
with ridge: the normal matrix of a language model is ruled by a few massive channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.floats import linear
from ..layers import Adapter

Pair = tuple[Tensor, Tensor]  # what the block reads and what is missing from its output, [..., in] and [..., out]


@dataclass(frozen=True)
class Compensation:
    """W: float16 [out, in], b: float32 [out], as they are stored."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x.float(), self.weight.float(), self.bias)

    def module(self) -> Adapter:
        """The same as a part of a model."""
        adapter = Adapter(*self.weight.shape)
        adapter.weight.data, adapter.bias.data = self.weight, self.bias
        return adapter


def solve(pairs: Iterable[Pair], ridge: float) -> Compensation:
    """argmin mean |Y - X W^T - b|^2 + ridge * mean(diag C) * |W|^2 over all rows, C the covariance of X; the intercept
    is not shrunk: W^T = (C + ridge * mean(diag C))^-1 cov(X, Y), b = mean Y - W mean X.
    """
    count, sum_x, sum_y, xx, xy = 0, None, None, None, None
    for x, y in pairs:
        rows, missing = x.detach().flatten(0, -2).double(), y.detach().flatten(0, -2).double()
        products = rows.t() @ rows, rows.t() @ missing
        if xx is None or xy is None or sum_x is None or sum_y is None:
            sum_x, sum_y, (xx, xy) = rows.sum(0), missing.sum(0), products
        else:
            sum_x, sum_y, xx, xy = sum_x + rows.sum(0), sum_y + missing.sum(0), xx + products[0], xy + products[1]
        count += len(rows)
    if xx is None or xy is None or sum_x is None or sum_y is None:
        raise ValueError("qwt needs calibration data; give batches of inputs")
    mean_x, mean_y = sum_x / count, sum_y / count
    covariance = xx / count - torch.outer(mean_x, mean_x)
    cross = xy / count - torch.outer(mean_x, mean_y)
    strength = ridge * float(covariance.diagonal().mean())
    covariance.diagonal().add_(max(strength, torch.finfo(torch.float64).tiny))
    # eigh and not Cholesky: without ridge, collinear channels leave directions that no data speaks of
    values, vectors = torch.linalg.eigh(covariance)
    usable = values > values[-1] * 1e-12
    inverse = torch.where(usable, 1 / values.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    theta = vectors @ (inverse[:, None] * (vectors.t() @ cross))
    weight = theta.t().half()
    if not torch.isfinite(weight).all():
        raise ValueError("the compensation has values beyond float16; more qwt.ridge keeps them small")
    bias = mean_y - weight.double() @ mean_x  # for the weights as they are stored
    return Compensation(weight, bias.float())


def explained(pairs: Iterable[Pair], term: Callable[[Tensor], Tensor]) -> float:
    """R^2 of the term: 1 - |Y - term(X)|^2 / |Y - mean Y|^2; below 0 it does harm."""
    left = total = 0.0
    count, sums = 0, torch.zeros(())
    for x, y in pairs:
        missing = y.detach().flatten(0, -2).double()
        left += float((missing - term(x).flatten(0, -2).double()).square().sum())
        total += float(missing.square().sum())
        sums = sums + missing.sum(0)
        count += len(missing)
    total -= float(sums.square().sum()) / max(count, 1)
    return 1 - left / total if total > 0 else 0.0


def report(term: Any, fitted: float, held_out: float | None, kept: bool, **more: Any) -> dict[str, Any]:
    """What results.json says of a block's term."""
    return {
        "r2": round(fitted, 6),
        "r2_held_out": None if held_out is None else round(held_out, 6),
        "kept": kept,
        "largest": round(float(term.weight.abs().max()), 6),
        **more,
    }
