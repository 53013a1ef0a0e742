"""The search of ggml's own quantisers, byte for byte llama.cpp's, weighed by the inputs where they are known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formats import QTensor
from .recipe import Plan
from .stats import InputStats


def solve(w: Tensor, plan: Plan, stats: InputStats | None, options: Any) -> QTensor:
    """See METHODS. The importance of a column is the mean square of its input (llama.cpp's importance matrix)."""
    assert plan.format is not None
    weighs = stats is not None and options.importance and stats.tokens > 0
    importance = stats.second_moment if weighs and stats is not None else None
    w_rgk = plan.format.split(w)
    if importance is not None:
        importance = importance.reshape(w_rgk.shape[1], w_rgk.shape[2])
    grid = plan.format.fit(w_rgk, importance)
    return QTensor(plan.format, plan.format.encode(w_rgk, grid).to(torch.int16), grid, tuple(w.shape))
