"""What calibration tells of the inputs of a linear: their second moments, sizes, outliers and histogram."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..inputs import THRESHOLD as OUTLIER
from ..kernels.floats import linear, second_moment

T = TypeVar("T")

BINS = 64
SAMPLE = 8192  # rows that histograms look at, at most
FEW = 2048  # rows that stand for all where an error is to be known, about


@dataclass
class InputStats:
    """Sums over the tokens that a linear has read. hessian: float64 [in, in], the sum of x x^T (GPTQ's H is twice its
    mean), where it is ``paired``, which takes as long as multiplying by a weight; squares: its diagonal; absolute: sum
    of |x|; largest: of |x|; each float64 or float32 [in]."""

    features: int
    paired: bool = True
    tokens: int = 0
    hessian: Tensor = field(init=False)
    squares: Tensor = field(init=False)
    absolute: Tensor = field(init=False)
    largest: Tensor = field(init=False)
    outliers: int = 0  # inputs of at least OUTLIER
    sample: list[Tensor] = field(default_factory=list)  # rows from all over, for histograms
    share: float = 1.0  # of the rows that are in the sample
    drawn: list[Tensor] = field(default_factory=list)  # for each of these what was drawn of [0, 1), less than the share
    first: list[Tensor] = field(default_factory=list)  # rows that begin a sequence: attention's sinks
    observers: dict[Any, Any] = field(default_factory=dict)  # of static ranges, which see every row
    importance: Tensor | None = None  # float32 [in]: of the columns, from a file, in place of the mean squares here
    derived: dict[Any, Any] = field(default_factory=dict)  # what was computed of them, once for all that read them

    def __post_init__(self) -> None:
        columns = self.features if self.paired else 0
        self.hessian = torch.zeros(columns, columns, dtype=torch.float64)
        self.squares = torch.zeros(self.features, dtype=torch.float64)
        self.absolute = torch.zeros(self.features, dtype=torch.float64)
        self.largest = torch.zeros(self.features)
        self.random = torch.Generator().manual_seed(0)

    def weighed(self, importance: Tensor) -> InputStats:
        """The same with the importance of the columns from elsewhere, float32 [in]."""
        other = copy.copy(self)
        other.importance = importance
        return other

    def update(self, x: Tensor, first: Tensor | None = None) -> None:
        """Count the rows of x, float32 [..., in]. first: those that begin a sequence, [sequences, in]."""
        if first is not None:
            self.first.append(first.detach().float().cpu().clone())
        rows = x.detach().reshape(-1, self.features).float()
        if not torch.isfinite(rows).all():
            raise ValueError("the model's activations on the calibration data are not finite")
        size = rows.abs()
        self.tokens += len(rows)
        if self.paired:
            product = second_moment(rows).double().cpu()
            self.hessian += product
            self.squares += product.diagonal()
        else:
            self.squares += rows.square().sum(0).double().cpu()
        self.absolute += size.sum(0).double().cpu()
        self.largest = torch.maximum(self.largest, size.amax(0).cpu())
        self.outliers += int((size >= OUTLIER).sum())
        # by chance and not every so many: sequences are of equal length, and their first tokens are unlike all others
        drawn = torch.rand(len(rows), generator=self.random)
        chosen = drawn < self.share
        self.sample.append(rows.cpu()[chosen])
        self.drawn.append(drawn[chosen])
        while sum(map(len, self.sample)) > SAMPLE:
            self.share /= 2
            kept = torch.cat(self.drawn) < self.share
            self.sample, self.drawn = [torch.cat(self.sample)[kept]], [torch.cat(self.drawn)[kept]]
        for observer in self.observers.values():
            observer.update(rows)

    @property
    def second_moment(self) -> Tensor:
        """Mean of x^2 of each input, float32 [in]: the importance matrix of llama.cpp."""
        return (self.squares / max(self.tokens, 1)).float()

    def mean_absolute(self) -> Tensor:
        """Mean of |x| of each input, float32 [in]."""
        return (self.absolute / max(self.tokens, 1)).float()

    def rows(self) -> Tensor:
        """A sample of the inputs, float32 [n, in]."""
        return torch.cat(self.sample) if self.sample else torch.zeros(0, self.features)

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """What ``compute`` returns, computed by the first linear that asks: linears of a stage share their inputs."""
        if key not in self.derived:
            self.derived[key] = compute()
        return self.derived[key]

    def output_error(self, difference: Tensor) -> float:
        """Mean over tokens of |difference . x|^2, difference float32 [out, in]: trace(D H D^T) / tokens; over some of
        them where there is no H."""
        if not self.paired:
            rows = self.rows()
            rows = rows[:: max(len(rows) // FEW, 1)]
            return float(linear(rows, difference).square().sum(dtype=torch.float64)) / max(len(rows), 1)
        hessian = self.once("hessian32", self.hessian.float)
        return max(float(((difference @ hessian) * difference).sum(dtype=torch.float64)), 0.0) / max(self.tokens, 1)


def decibels(signal: float, noise: float) -> float | None:
    """10 log10(signal / noise); None where there is no noise or no signal."""
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None
