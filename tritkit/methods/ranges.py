"""Ranges: which stretch of the numbers line a grid of integers covers. One code for weights and activations.

What is outside the range is clipped to its end, so a shorter range has finer steps and a larger error outside. The
methods are those of NVIDIA's calibrators (TensorRT, Migacz 2017) and of GPTQ:

    absmax      from -max|x| to max|x|
    minmax      from the smallest to the largest value; the same as absmax for a symmetric format
    percentile  what holds 99.99 % of the values; of an asymmetric format, half of the rest lies below and half above
    mse         least squared error of rounding, by a search over shorter ranges
    entropy     least Kullback-Leibler divergence of the rounded from the original distribution, symmetric formats only

Weights are looked at themselves, group by group (``choose``). Activations come in batches that nobody keeps, so that
they are counted in a histogram (``RangeObserver``) and give one range per tensor, which is then static.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..formats import Format, Grid
from ..formats.integer import Integer
from .histogram import BINS, Histogram

PERCENTILE = 99.99  # per cent, the default of NVIDIA's calibrator
SHRINKS = tuple(1 - i / 100 for i in range(80))  # GPTQ's grid of 100 and maxshrink of 0.8 (IST-DASLab/gptq, quant.py)
START = 128  # the first threshold that the searches over a histogram try, in bins, whatever the bits
TIE = 1e-12  # divergences nearer to each other than this are equal: sums in another order differ so

Range = tuple[Tensor, Tensor]  # low and high, float32 [rows, groups, 1]


class Values:
    """Weights as ``Format.split`` gives them, float32 [rows, groups, k]: each group has its own range."""

    def __init__(self, values_rgk: Tensor):
        self.values = values_rgk

    def ends(self) -> Range:
        return self.values.amin(-1, keepdim=True), self.values.amax(-1, keepdim=True)

    def below(self, share: float, magnitudes: bool) -> Tensor:
        """What this share of the values (of their magnitudes) of each group is below, between two of them linearly,
        as numpy.quantile does. torch.quantile ends at 16 million values."""
        values = self.values.abs() if magnitudes else self.values
        rank = share * (values.shape[-1] - 1)
        lower, part = math.floor(rank), rank - math.floor(rank)
        if share < 0.5:
            sorted_ = values.topk(min(lower + 2, values.shape[-1]), -1, largest=False).values
            pair = sorted_[..., lower:]
        else:
            sorted_ = values.topk(values.shape[-1] - lower, -1).values
            pair = sorted_[..., -2:].flip(-1) if sorted_.shape[-1] > 1 else sorted_
        return torch.lerp(pair[..., :1], pair[..., -1:], part)

    def least_error(self, format: Integer) -> Range:
        """Of the range of all values, shrunk step by step, the one whose rounding has the least squared error."""
        low, high = self.ends()
        if format.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        best, kept = torch.full_like(low, math.inf), torch.ones_like(low)
        for shrink in SHRINKS:
            grid = format.grid_of(shrink * low, shrink * high)
            rounded = format.decode(format.encode(self.values, grid), grid)
            error = (rounded - self.values).square_().sum(-1, keepdim=True)
            better = error < best
            best, kept = torch.where(better, error, best), torch.where(better, shrink, kept)
        return kept * low, kept * high

    def histograms(self, format: Integer) -> list[Histogram]:
        if self.values.shape[-1] < BINS:
            raise ValueError(
                f"entropy looks at a histogram of {BINS} bins, but {format.name} has {self.values.shape[-1]} weights "
                "to a scale here; mse is for such groups"
            )
        found = []
        for group in self.values.flatten(0, 1):
            found.append(Histogram(signed=False))
            found[-1].update(group)
        return found


class Counted:
    """A histogram in the place of values: one group."""

    def __init__(self, histogram: Histogram):
        self.histogram = histogram

    def ends(self) -> Range:
        return _group(self.histogram.low), _group(self.histogram.high)

    def below(self, share: float, magnitudes: bool) -> Tensor:
        """The lower edge of the bin in which this share is reached, as NVIDIA's calibrator has it; for the share of a
        lower end the same from above. Of a bin that begins at 0, which would be no range, the other edge."""
        h = self.histogram
        assert magnitudes is not h.signed
        counts = h.counts.double()
        if share < 0.5:
            reached = torch.searchsorted(counts.flip(0).cumsum(0) / counts.sum(), 1 - share)
            edge = float(h.edges[len(counts) - min(int(reached), len(counts) - 1)])
            return _group(edge or -h.width)
        reached = torch.searchsorted(counts.cumsum(0) / counts.sum(), share)
        return _group(float(h.edges[min(int(reached), len(counts) - 1)]) or h.width)

    def least_error(self, format: Integer) -> Range:
        """Symmetric: the centre of a bin from START on whose choice as the end has the least error, as NVIDIA's
        calibrator has it. Asymmetric: both ends shrunk by one factor, then the low and the high end alone."""
        h = self.histogram
        if format.symmetric:
            high = h.centers[START:]
            found = self._best(format, -high, high)
            return -high[found].reshape(1, 1, 1), high[found].reshape(1, 1, 1)
        shrinks = torch.tensor(SHRINKS, dtype=torch.float64)
        low, high = torch.tensor(h.low, dtype=torch.float64), torch.tensor(h.high, dtype=torch.float64)
        found = self._best(format, shrinks * low, shrinks * high)
        low, high = shrinks[found] * low, shrinks[found] * high
        lows = torch.tensor(h.low, dtype=torch.float64) * shrinks
        low = lows[self._best(format, lows, high.expand_as(shrinks))]
        highs = torch.tensor(h.high, dtype=torch.float64) * shrinks
        high = highs[self._best(format, low.expand_as(shrinks), highs)]
        return low.reshape(1, 1, 1), high.reshape(1, 1, 1)

    def _best(self, format: Integer, lows: Tensor, highs: Tensor) -> int:
        """Which of these ranges, float64 [n], rounds the centres of the bins with the least squared error.

        The bins of one code are neighbours, so the error comes from sums over all bins up to those where codes change.
        """
        h = self.histogram
        points, counts = h.centers, h.counts.double()
        grid = format.grid_of(lows[:, None], highs[:, None])
        offset = 0.0 if grid.offset is None else grid.offset
        codes = torch.arange(format.lo, format.hi + 1, dtype=torch.float64)
        values = codes * grid.scale + offset
        changes = (codes[1:] - 0.5) * grid.scale + offset
        first = (changes / h.width - h.start - 0.5).ceil().clamp(0, len(points)).long()
        ends = torch.nn.functional.pad(torch.nn.functional.pad(first, (1, 0)), (0, 1), value=len(points))
        moments = [
            torch.nn.functional.pad((counts * points**power).cumsum(0), (1, 0))[ends].diff(dim=-1) for power in range(3)
        ]
        return int((moments[2] - 2 * values * moments[1] + values**2 * moments[0]).sum(-1).argmin())

    def histograms(self, format: Integer) -> list[Histogram]:
        return [self.histogram]


Sample = Values | Counted


def _group(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64).reshape(1, 1, 1)


def absmax(sample: Sample, format: Integer) -> Range:
    low, high = sample.ends()
    largest = torch.maximum(-low, high)
    return -largest, largest


def minmax(sample: Sample, format: Integer) -> Range:
    return sample.ends()


def percentile(sample: Sample, format: Integer, percent: float = PERCENTILE) -> Range:
    """In a group of fewer than 1 / (1 - share) values, 10,000, nothing but a part of the largest is cut off."""
    share = percent / 100
    if format.symmetric:
        high = sample.below(share, magnitudes=True)
        return -high, high
    return sample.below((1 - share) / 2, magnitudes=False), sample.below((1 + share) / 2, magnitudes=False)


def mse(sample: Sample, format: Integer) -> Range:
    return sample.least_error(format)


def entropy(sample: Sample, format: Integer) -> Range:
    """The threshold at which the rounded distribution tells most of the original one (TensorRT, Migacz 2017)."""
    _require_symmetric(format)
    high = torch.stack([_most_telling(h, format) for h in sample.histograms(format)])
    high = high.reshape(sample.ends()[0].shape)
    return -high, high


def _most_telling(histogram: Histogram, format: Integer) -> Tensor:
    """0 of nothing but zeros, as the other methods have it."""
    if not histogram.width:
        return torch.zeros((), dtype=torch.float64)
    return histogram.edges[_threshold(histogram.counts, format.hi + 1)]


def _require_symmetric(format: Integer) -> None:
    if not format.symmetric:
        raise ValueError(
            f"entropy looks for one threshold on both sides of zero, but {format.name} has two ends; take the "
            "symmetric format, or percentile or mse"
        )


def _threshold(counts: Tensor, levels: int) -> int:
    """How many bins to keep, by the search of NVIDIA's calibrator.

    For each number i from START: P is the first i bins, with all that is beyond them added to the last; Q is the same
    bins, without that, merged into levels whose count is shared evenly among those of their bins that are not empty.
    The last i with the least KL(P || Q) wins. The first bin is set to the second, since zeros are no news. All levels
    of one i come from sums of counts up to a bin, so that a candidate costs as much as it has levels, not bins.
    """
    bins = counts.double().clone()
    bins[0] = bins[1]
    zero = torch.zeros(1, dtype=torch.float64)
    count = torch.cat([zero, bins.cumsum(0)])
    filled = torch.cat([zero, (bins > 0).double().cumsum(0)])
    own = torch.cat([zero, torch.special.xlogy(bins, bins).cumsum(0)])  # sums of n log n
    kept = torch.arange(START, len(bins) + 1)
    starts = -(-kept[:, None] * torch.arange(levels + 1) // levels)  # the first bin of each level: ceil(k i / levels)
    mass = count[starts[:, 1:]] - count[starts[:, :-1]]
    spread = filled[starts[:, 1:]] - filled[starts[:, :-1]]
    share = torch.log(torch.where(spread > 0, mass / spread.clamp(min=1), 1.0))  # log of a bin of Q, per level
    total, inside = count[-1], count[kept]
    tail, last = total - inside, bins[kept - 1]
    p_log_p = own[kept] + torch.special.xlogy(last + tail, last + tail) - torch.special.xlogy(last, last)
    p_log_q = (mass * share).sum(-1) + tail * share[:, -1]
    divergence = (p_log_p - p_log_q) / total - torch.log(total) + torch.log(inside)
    divergence[(last == 0) & (tail > 0)] = math.inf  # P has the tail where Q has nothing
    divergence[inside == 0] = math.inf
    return int(kept[divergence <= divergence.min() + TIE][-1])


RANGES: dict[str, Callable[..., Range]] = {
    "absmax": absmax,
    "minmax": minmax,
    "percentile": percentile,
    "mse": mse,
    "entropy": entropy,
}


def choose(values_rgk: Tensor, format: Format, method: str) -> Grid:
    """The grid of weights, float32 [rows, groups, k] as ``format.split`` gives them, whose range the method chooses.

    ValueError for an unknown method, for one that cannot tell anything of such a format or such groups, and for a
    format that is no range of integers.
    """
    found, integers = _method(method), _integers(format)
    low, high = found(Values(values_rgk), integers)
    return integers.grid_of(low.float(), high.float())


class RangeObserver:
    """Collects activations and chooses their static range: one of the whole tensor, by several methods at once."""

    def __init__(self, format: Format, methods: Iterable[str] | None = None):
        """methods: rows of RANGES; none: all that the format allows. ValueError for others, or another format."""
        self.format = format = _integers(format)
        if format.group != "tensor":
            raise ValueError(
                f"a static range is one of the whole tensor, but {format.name} has one per {format.group}; "
                f"dynamic ranges need no calibration"
            )
        if methods is None:
            methods = [name for name in RANGES if format.symmetric or name != "entropy"]
        self.methods = {name: _method(name) for name in methods}
        self.histogram = Histogram(signed=not format.symmetric)
        if "entropy" in self.methods:
            _require_symmetric(format)

    def update(self, x: Tensor) -> None:
        """Count the values of activations [..., features]; ValueError where one is not finite."""
        self.histogram.update(x)

    def ranges(self) -> dict[str, tuple[float, float]]:
        """Low and high end by method, all 0 where nothing but zeros was seen; ValueError where nothing was."""
        return {name: self._range(name) for name in self.methods}

    def grid(self, method: str) -> Grid:
        """The grid of that range, scale float32 [1, 1, 1]."""
        low, high = self._range(method)
        return self.format.grid_of(torch.full((1, 1, 1), low), torch.full((1, 1, 1), high))

    def _range(self, method: str) -> tuple[float, float]:
        if not self.histogram.seen:
            raise ValueError("a range needs activations, but there were none")
        if not self.histogram.width:
            return 0.0, 0.0
        low, high = self.methods[method](Counted(self.histogram), self.format)
        return float(low), float(high)


def _method(name: str) -> Callable[..., Range]:
    if name not in RANGES:
        raise ValueError(f"unknown range method {name!r}; known are {', '.join(RANGES)}")
    return RANGES[name]


def _integers(format: Format) -> Integer:
    if not isinstance(format, Integer):
        raise ValueError(f"ranges are chosen for integers, but {format.name} has a grid of its own")
    return format
