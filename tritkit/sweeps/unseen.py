"""Whether a calibration text holds passages of the test text, under whatever name. numpy only."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

PASSAGE = 50  # tokens in a row that texts do not share by chance
MOST = 1e-3  # of the calibration's passages that may be in the test text: quotations


def require_unseen(calibration: Iterable[NDArray], test: Iterable[NDArray], name: str) -> None:
    """ValueError where more than a few passages of the calibration sequences (tokens, int [t] each) are in the windows
    of the test text. name: of the calibration text."""
    passages = np.concatenate([_passages(row) for row in calibration])
    seen = np.isin(passages, np.concatenate([_passages(row) for row in test]))
    if seen.sum() > MOST * len(seen):
        raise ValueError(
            f"{int(seen.sum()):,} of the {len(seen):,} passages of {PASSAGE} tokens of the calibration text {name} are "
            "in the test text too; what is measured must be unseen"
        )


def _passages(tokens: NDArray) -> NDArray[np.uint64]:
    """A number for each run of PASSAGE tokens, the same for the same run: a polynomial modulo 2^64."""
    if len(tokens) < PASSAGE:
        return np.empty(0, np.uint64)
    powers = np.array([pow(0x9E3779B97F4A7C15, i, 1 << 64) for i in range(PASSAGE)], np.uint64)
    runs = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens, np.uint64) + np.uint64(1), PASSAGE)
    return runs @ powers
