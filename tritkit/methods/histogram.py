"""Counts of values in bins of equal width that are laid out by the first batch and grow with the later ones."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 2048  # that the first batch is counted in
MOST = 8192  # beyond that, neighbours are merged in pairs, so that one late outlier does not fill the memory
CHUNK = 1 << 20  # values that are placed at once


class Histogram:
    """Bin k counts the values from (start + k) * width on; ``signed`` or of their magnitudes.

    The bins never move: a batch that exceeds them adds bins of the same width (as NVIDIA's calibrators do), until there
    are more than MOST, when each two neighbours become one. Both keep every count exact.
    low, high: the smallest and the largest value so far, zero included.
    """

    def __init__(self, signed: bool):
        self.signed = signed
        self.low = self.high = 0.0
        self.width = 0.0  # until a value is not zero
        self.start = 0
        self.counts = torch.zeros(0, dtype=torch.int64)
        self._zeros = 0

    def update(self, x: Tensor) -> None:
        """Count a batch of any shape. ValueError where a value is not finite."""
        x = x.detach().reshape(-1).float()
        if not x.numel():
            return
        low, high = (float(v) for v in x.aminmax())
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            odd = int((~x.isfinite()).sum())
            raise ValueError(f"a range is of finite values, but {odd} of these {x.numel()} are not")
        self.low, self.high = min(self.low, low), max(self.high, high)
        if low == high == 0 and not self.width:
            self._zeros += x.numel()
            return
        largest = max(-low, high)
        if not self.signed:
            x, low, high = x.abs(), 0.0, largest
        if not self.width:
            self.width = (max(high, 0.0) - min(low, 0.0)) / BINS
            self.counts = torch.tensor([self._zeros])
        first, last = self._bin(min(low, 0.0)), self._bin(high)
        while max(last, self._end() - 1) - min(first, self.start) >= MOST + BINS:
            self._merge()
            first, last = self._bin(min(low, 0.0)), self._bin(high)
        self._reach(first, last)
        for part in x.split(CHUNK):
            places = (part.double() / self.width).floor_().long().sub_(self.start).clamp_(0, len(self.counts) - 1)
            self.counts += torch.bincount(places, minlength=len(self.counts))

    @property
    def seen(self) -> int:
        """How many values were counted."""
        return int(self.counts.sum()) if self.width else self._zeros

    @property
    def edges(self) -> Tensor:
        """float64 [bins + 1]."""
        return torch.arange(self.start, self._end() + 1, dtype=torch.float64) * self.width

    @property
    def centers(self) -> Tensor:
        """float64 [bins]."""
        return (torch.arange(self.start, self._end(), dtype=torch.float64) + 0.5) * self.width

    def _bin(self, value: float) -> int:
        """The bin that a value belongs to. The end of the last bin belongs to it, as the largest value lies there."""
        place = int(value // self.width)
        return place - 1 if value > 0 and place * self.width >= value else place

    def _end(self) -> int:
        return self.start + len(self.counts)

    def _reach(self, first: int, last: int) -> None:
        before, after = max(self.start - first, 0), max(last + 1 - self._end(), 0)
        self.counts = torch.nn.functional.pad(self.counts, (before, after))
        self.start -= before

    def _merge(self) -> None:
        """Each two neighbours to one, those beginning at an even number."""
        odd_start, odd_end = self.start % 2, (self.start + len(self.counts)) % 2
        self.counts = torch.nn.functional.pad(self.counts, (odd_start, odd_end)).reshape(-1, 2).sum(-1)
        self.start = (self.start - odd_start) // 2
        self.width *= 2
