"""The search of ggml's own quantisers, byte for byte llama.cpp's, weighed by the inputs where they are known."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..formats import QTensor
from ..formats.ggml import Ggml
from .recipe import Plan
from .stats import InputStats


def solve(w: Tensor, plan: Plan, stats: InputStats | None, options: Any) -> QTensor:
    """See METHODS. The importance of a column is the mean square of its input (llama.cpp's importance matrix)."""
    assert isinstance(plan.format, Ggml)
    importance = None if stats is None else stats.importance
    if importance is None and stats is not None and stats.tokens and options.importance:
        importance = stats.second_moment
    # Not fit and encode: the types without levels choose their codes before their scales are rounded.
    return plan.format.quantize(w, importance)
