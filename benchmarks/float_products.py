"""Gflop/s of float32 products as torch computes them and as ``kernels/floats.py`` does, in one run.

python benchmarks/float_products.py --threads 2
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch

from tritkit.kernels import floats

SHAPES = ((2048, 576, 576), (2048, 576, 1536), (2048, 1536, 576), (64, 576, 1536), (2048, 2560, 6912))


def rate(work: Callable[[], object], operations: int, repeat: int) -> float:
    found = []
    for _ in range(repeat + 1):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return operations / median(found[1:]) / 1e9


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        "| rows, in, out | linear: torch | ours | second moments: torch | ours |\n| --- | ---: | ---: | ---: | ---: |"
    )
    for rows, inputs, outputs in SHAPES:
        x, w = torch.randn(rows, inputs), torch.randn(outputs, inputs)
        linear, moments = 2 * rows * inputs * outputs, 2 * rows * inputs * inputs
        works = (
            (partial(torch.nn.functional.linear, x, w), linear),
            (partial(floats.linear, x, w), linear),
            (partial(torch.matmul, x.t(), x), moments),
            (partial(floats.second_moment, x), moments),
        )
        cells = [f"{rate(work, operations, options.repeat):.0f}" for work, operations in works]
        print(f"| {rows}, {inputs}, {outputs} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
