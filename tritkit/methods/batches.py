"""Calibration batches of modules: a tensor, a tuple or a dict each, as the model takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def run(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch, given as one argument, as arguments, or as keywords."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def held_out(count: int, share: float) -> int:
    """How many of ``count`` batches or samples nothing is fitted on: at least one, and not all."""
    return min(max(round(count * share), 1), count - 1)


def split(batch: Any, share: float) -> tuple[Any, Any]:
    """The samples of a batch that something is fitted on, and those that are held out. Samples are rows of its
    tensors; what has another number of rows than the first tensor belongs to both. ValueError for less than two."""
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else [batch]
    count = next((len(v) for v in parts if isinstance(v, Tensor) and v.dim()), 0)
    if count < 2:
        raise ValueError(f"qwt needs at least two samples, one of them to be held out, but the only batch has {count}")

    def some(rows: slice) -> Any:
        def cut(value: Any) -> Any:
            return value[rows] if isinstance(value, Tensor) and value.dim() and len(value) == count else value

        if isinstance(batch, Mapping):
            return {name: cut(value) for name, value in batch.items()}
        return tuple(cut(v) for v in batch) if isinstance(batch, tuple | list) else cut(batch)

    fitted = count - held_out(count, share)
    return some(slice(0, fitted)), some(slice(fitted, count))
