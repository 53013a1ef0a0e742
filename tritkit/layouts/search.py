"""ggml's own quantisers: float32 rows to the bytes that llama.cpp would write, with or without importance.

The searches are in csrc/ggml_quantize*; they give ggml's bytes on every CPU (FACTS 9.4).
"""

from __future__ import annotations

import numpy as np

import tritkit._native as _native

from . import GGML, Packed

SEARCHES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "tq1_0", "tq2_0")
# Beyond this the squares of weights are too large for float32, and long before it no type holds them.
LARGEST = 1e18


def quantize(name: str, w: np.ndarray, importance: np.ndarray | None = None, threads: int = 0) -> np.ndarray:
    """uint8 [rows, row bytes] of w, float32 [rows, columns]: the bytes of ``ggml_quantize_chunk``.

    name: one of SEARCHES. importance: float32 [columns], not negative: how much an error of each column matters, in
    llama.cpp's importance matrix the mean square of its input; q8_0, tq1_0 and tq2_0 have no use for it. threads: 0 is
    one for each core. ValueError for another name, rows that are no whole blocks, weights or importance that are not
    finite, and weights too large for float16 scales.
    """
    if name not in SEARCHES:
        raise ValueError(f"there is no quantiser for {name!r}; known are {', '.join(SEARCHES)}")
    if w.ndim != 2:
        raise ValueError(f"{name} quantises matrices, but this array has the shape {w.shape}")
    GGML[name].row_bytes(w.shape[1])
    w = np.ascontiguousarray(w, np.float32)
    if w.size:
        largest = max(float(w.max()), -float(w.min()))  # not a number where one of them is
        if not largest <= LARGEST:
            odd = int((~np.isfinite(w)).sum())
            what = f"{odd} of these are not" if odd else f"one of these is {largest:.6g}, too large for its scales"
            raise ValueError(f"{name} holds finite weights, but {what}")
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
        if importance.shape != (w.shape[1],):
            raise ValueError(f"importance wants the shape ({w.shape[1]},), one number a column, not {importance.shape}")
        if not (np.isfinite(importance).all() and (importance >= 0).all()):
            raise ValueError("importance holds finite numbers that are not negative, but some of these are not")
    rows = _native.quantize_blocks(name, w, importance, threads)
    if GGML[name].nonfinite(Packed({"weight": rows})):
        raise ValueError(f"{name} holds scales as float16, at most 65504, but these weights are too large for that")
    return rows
