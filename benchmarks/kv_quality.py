"""What the width of the KV cache costs in quality: perplexity, KL to the 32-bit cache, top-1 agreement.

python benchmarks/kv_quality.py [MODEL ...] [--data TEXT ...] [--tokens 50000] [--context N] [--threads N]

Documents from BOS on, windows that score each token once with at least half a context before it (the `document`
protocol of `tritkit eval`). No MODEL: the bundled one; no TEXT: the bundled held-out books. Standard errors are over
tokens; that of a difference in perplexity is over the paired differences, hence far smaller.
"""

import argparse
import math
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from tritkit.data import find_files
from tritkit.engine import Engine, Job
from tritkit.engine.load import load
from tritkit.evals.perplexity import Window, document_windows, held_out_text
from tritkit.progress import progress

WIDTHS = (32, 16, 8, 4, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--tokens", type=int, default=50_000, help="scored tokens, about")
    parser.add_argument("--context", type=int, default=0, help="tokens of a window (default: the model's context)")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    for model in options.models or [None]:
        measure(model, options)


def measure(folder: str | None, options: argparse.Namespace) -> None:
    models = {bits: load(folder, threads=options.threads, kv_bits=bits) for bits in WIDTHS}
    model = models[32]
    context = options.context or model.engine.context_length
    files = find_files(options.data or [str(held_out_text())])
    windows, scored = [], 0
    for window in document_windows(model, files, context, "text")[0]:
        windows.append(window)
        scored += int((window.targets >= 0).sum())
        if scored >= options.tokens:
            break
    found = {bits: ([], [], []) for bits in WIDTHS}
    name = "bundled" if folder is None else Path(folder).name
    with progress(f"{name}, {len(WIDTHS)} widths", sum(len(w.tokens) for w in windows), "tokens") as advance:
        for window in windows:
            rows, targets = np.flatnonzero(window.targets >= 0), window.targets[window.targets >= 0]
            exact = log_softmax(logits(model.engine, window)[rows])
            p = np.exp(exact)
            for bits in WIDTHS:
                log_p = exact if bits == 32 else log_softmax(logits(models[bits].engine, window)[rows])
                nll, kl, same = found[bits]
                nll.append(-log_p[np.arange(len(rows)), targets])
                kl.append((p * (exact - log_p)).sum(-1))
                same.append(log_p.argmax(-1) == exact.argmax(-1))
            advance(len(window.tokens))

    title = f"{name}, {scored} tokens of {', '.join(f.name for f in files)}, windows of {context}"
    table = Table(title=title)
    for column in ("kv_bits", "bits a value", "perplexity", "± error", "change", "± error", "mean KL", "same top-1"):
        table.add_column(column, justify="right")
    exact_nll = np.concatenate(found[32][0])
    config = model.folder.config
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    for bits in WIDTHS:
        nll, kl, same = (np.concatenate(parts) for parts in found[bits])
        perplexity, n = math.exp(nll.mean()), math.sqrt(len(nll))
        change = nll - exact_nll
        table.add_row(
            str(bits),
            f"{models[bits].engine.kv_bytes_per_position * 8 / values:.3f}",
            f"{perplexity:.3f}",
            f"{perplexity * nll.std() / n:.3f}",
            f"{math.expm1(change.mean()):+.3%}",
            f"{change.std() / n:.3%}",
            f"{kl.mean():.2e}",
            f"{same.mean():.2%}",
        )
    Console(width=max(100, Console().width)).print(table)


def logits(engine: Engine, window: Window) -> np.ndarray:
    sequence = engine.new()
    (found,) = engine.step([Job(sequence, window.tokens, "all")])
    engine.free(sequence)
    assert found is not None
    return found


def log_softmax(x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


if __name__ == "__main__":
    main()
