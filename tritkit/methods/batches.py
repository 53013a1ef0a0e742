"""Calibration batches of modules: a tensor, a tuple or a dict each, as the model takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

# What tells real tokens from padding, [b, t], by the names that transformers and torch have for it; whether it is true
# of real ones.
MASKS = {"attention_mask": True, "src_key_padding_mask": False}


def real_tokens(model: nn.Module, batch: Any) -> Tensor | None:
    """Which tokens of a batch of keywords are no padding, bool [b, t]; none where all are, or nothing tells. A model
    with a decoder beside its encoder reads two texts, and nothing tells which of them a block has."""
    has_two = getattr(getattr(model, "config", None), "is_encoder_decoder", False)  # as transformers says it
    if has_two or not isinstance(batch, Mapping):
        return None
    for name, is_true in MASKS.items():
        mask = batch.get(name)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            real = mask.bool() if is_true else ~mask.bool()
            return None if real.all() else real
    return None


def without_padding(x: Tensor, real: Tensor | None) -> Tensor:
    """The rows of real tokens, [n, ...], of x [b, t, ...] or [b * t, ...]; x itself where it has no row for each."""
    if real is None:
        return x
    if x.dim() > 2 and x.shape[:2] == real.shape:
        return x[real]
    return x[real.flatten()] if x.dim() == 2 and len(x) == real.numel() else x


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
