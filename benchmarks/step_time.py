"""Training step of b1.58 against its full-precision twin, forward and backward apart, over a few widths.

python benchmarks/step_time.py [--dtype auto|float32|bfloat16] [--threads N] [--repeat 7]

The two models of a width take turns within one run, so a busy machine disturbs both alike; medians are printed.
"""

import argparse
import statistics
import time
from contextlib import nullcontext

import torch
from rich.console import Console
from rich.table import Table

from tritkit.models.config import ModelConfig
from tritkit.models.transformer import build
from tritkit.optim import OptimConfig, make_optimizer
from tritkit.trainer import TrainConfig, compute_dtype

WIDTHS = ((256, 768), (512, 1536), (1024, 3072))  # hidden, FFN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8, help="sequences of 256 tokens")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = compute_dtype(TrainConfig(dtype=options.dtype), torch.device("cpu"))
    name = str(dtype).removeprefix("torch.")
    table = Table(title=f"ms a step, 2 layers, {options.batch} x 256 tokens, {name}, {torch.get_num_threads()} threads")
    for column in ("width", "FFN", "model", "forward", "backward", "optimiser", "step / twin"):
        table.add_column(column, justify="right")
    for hidden, ffn in WIDTHS:
        runs = {kind: Run(kind, hidden, ffn, options.batch, dtype) for kind in ("llama", "b1.58")}
        for repeat in range(options.repeat + 1):
            for run in runs.values():
                run.step(count=repeat > 0)
        twin = sum(runs["llama"].medians())
        for kind, run in runs.items():
            parts = run.medians()
            cells = [f"{1e3 * part:.0f}" for part in parts]
            table.add_row(str(hidden), str(ffn), kind, *cells, f"{sum(parts) / twin:.2f}")
    Console().print(table)


class Run:
    """One model that steps, and the seconds of its parts."""

    def __init__(self, kind: str, hidden: int, ffn: int, batch: int, dtype: torch.dtype):
        formats = {"weights": "ternary", "activations": "a8"} if kind == "b1.58" else {}
        family = "bitnet" if kind == "b1.58" else "llama"
        sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": 2, "vocab_size": 2048}
        self.model = build(ModelConfig(family=family, **sizes, **formats), seed=0)
        self.optimizer = make_optimizer(self.model, OptimConfig())
        self.tokens = torch.randint(0, 2048, (batch, 257), generator=torch.Generator().manual_seed(0))
        self.dtype = dtype
        self.seconds: list[tuple[float, float, float]] = []

    def step(self, count: bool) -> None:
        low = self.dtype == torch.bfloat16
        begin = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16) if low else nullcontext():
            loss = self.model.loss(self.tokens[:, :-1], self.tokens[:, 1:])
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if count:
            self.seconds.append((forward - begin, backward - forward, time.perf_counter() - backward))

    def medians(self) -> list[float]:
        return [statistics.median(column) for column in zip(*self.seconds, strict=True)]


if __name__ == "__main__":
    main()
