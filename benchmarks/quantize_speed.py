"""Seconds that ggml's quantisers take, ours beside llama.cpp's own in the same run.

    python benchmarks/quantize_speed.py                          # 100 M weights of each k-quant, threads as given
    python benchmarks/quantize_speed.py --model models/smol --type q4_k_m

The first compares tritkit's search (``tritkit.layouts.search.quantize``) with ``ggml_quantize_chunk`` of
llama-cpp-python, both on the same Gaussian weights and threads, turn by turn, and prints medians; bytes are compared.
The second times a whole export, and quantising alone, beside ``llama_model_quantize``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from ggml_peer import quantize_chunk, quantize_file

from tritkit.gguf_config import FILE_TYPES
from tritkit.gguf_export import encoded, export_gguf
from tritkit.gguf_plan import plan
from tritkit.layouts.search import quantize
from tritkit.models.shapes import matrix_names
from tritkit.sources import open_model

COLUMNS, PART = 2048, 4096  # 8 M weights at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default="q2_k,q3_k,q4_k,q5_k,q6_k", help="to compare, with commas between")
    parser.add_argument("--weights", type=float, default=100e6, help="how many")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", help="a model folder or GGUF file of floats: time a whole export")
    parser.add_argument("--type", default="q4_k_m", help="of the export")
    options = parser.parse_args()
    if options.model:
        whole(options.model, options.type, options.repeats)
    else:
        types(options.types.split(","), int(options.weights), options.threads, options.repeats)


def timed(work: Callable[[], object], times: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(times):
        work()
    return time.perf_counter() - start


def types(names: list[str], count: int, threads: int, repeats: int) -> None:
    random = np.random.default_rng(0)
    w = random.standard_normal((PART, COLUMNS)).astype(np.float32) * np.float32(0.02)
    importance = np.exp(random.standard_normal(COLUMNS)).astype(np.float32)
    parts = max(round(count / w.size), 1)
    print(f"seconds per 100 M weights, {threads} threads, median of {repeats}")
    print(f"{'type':6} {'importance':10} {'tritkit':>8} {'llama.cpp':>10} {'ratio':>6}")
    for name in names:
        for weights in (None, importance):
            calls = [partial(f, name, w, weights, threads) for f in (quantize, in_threads)]
            assert np.array_equal(*(call() for call in calls)), f"{name}: the bytes differ"
            turns = [[timed(call, parts) for call in calls] for _ in range(repeats)]
            ours, theirs = (statistics.median(t) * 1e8 / (parts * w.size) for t in zip(*turns, strict=True))
            weighed = "no" if weights is None else "yes"
            print(f"{name:6} {weighed:10} {ours:8.2f} {theirs:10.2f} {theirs / ours:6.2f}", flush=True)


def in_threads(name: str, w: np.ndarray, importance: np.ndarray | None, threads: int) -> np.ndarray:
    """llama.cpp's, its rows dealt out to threads as llama-quantize does; ctypes lets go of Python's lock."""
    with ThreadPoolExecutor(threads) as pool:
        runs = np.array_split(w, 8 * threads)
        return np.concatenate(list(pool.map(lambda run: quantize_chunk(name, run, importance), runs)))


def whole(source: str, kind: str, repeats: int) -> None:
    model = open_model(source)
    plans, matrices = plan(model, kind, None), matrix_names(model.config)

    def quantise() -> None:
        for name in matrices:
            encoded(model, name, plans[name].type, "i2_s_x86", None)

    with tempfile.TemporaryDirectory() as folder:
        floats, ours, theirs = (Path(folder) / f"{name}.gguf" for name in ("floats", "ours", "theirs"))
        export_gguf(model, floats, "bf16")
        for _ in range(repeats):
            alone = timed(quantise)
            written = timed(partial(export_gguf, model, ours, kind, overwrite=True))
            peer = timed(partial(quantize_file, floats, theirs, FILE_TYPES[kind]))
            print(f"quantising {alone:.1f} s, export {written:.1f} s; llama_model_quantize {peer:.1f} s", flush=True)


if __name__ == "__main__":
    main()
