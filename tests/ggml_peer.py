"""ggml's own quantisers, those inside llama-cpp-python."""

import ctypes
import functools
import importlib.util
from pathlib import Path

import numpy as np

from tritkit.layouts import GGML

TYPES = {"q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10, "q3_k": 11, "q4_k": 12, "q5_k": 13}
TYPES |= {"q6_k": 14, "tq1_0": 34, "tq2_0": 35}


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """libNAME of llama-cpp-python; ImportError where it is not installed."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise ImportError("llama-cpp-python is not installed")
    (path,) = (Path(spec.origin).parent / "lib").glob(f"lib{name}.so")
    return ctypes.CDLL(str(path))


def quantize_chunk(name: str, w: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """uint8 [rows, row bytes] of float32 [rows, columns]."""
    chunk = library("ggml-base").ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    out = np.zeros((len(w), GGML[name].row_bytes(w.shape[1])), np.uint8)
    assert w.dtype == np.float32 and w.flags.c_contiguous
    weights = None if importance is None else importance.ctypes.data
    assert chunk(TYPES[name], w.ctypes.data, out.ctypes.data, 0, *w.shape, weights) == out.size
    return out
