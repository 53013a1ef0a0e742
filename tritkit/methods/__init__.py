"""Which numbers of a format to choose: the methods of after-training quantisation. One file and one row each.

``solve(w, plan, stats, options) -> QTensor``: w float32 [out, in]; plan: its format and range; stats: what is known of
the linear's inputs, or None where there is no calibration data; options: the recipe.
"""

from __future__ import annotations

from collections.abc import Callable

from ..formats import QTensor
from . import gptq, rtn, search

Solve = Callable[..., QTensor]

METHODS: dict[str, Solve] = {"rtn": rtn.solve, "gptq": gptq.solve, "search": search.solve}
NEED_INPUTS = ("gptq",)  # these do nothing sensible without calibration data

__all__ = ["METHODS", "NEED_INPUTS", "Solve"]
