"""Speed and memory of a model in this process: prefill and decode as llama-bench counts them. numpy only."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

from ..engine import Job
from ..engine.load import Model
from ..memory import peak_memory_mib
from ..progress import progress


def measure(model: Model, prompt_tokens: int = 128, tokens: int = 64, repeat: int = 5) -> dict[str, Any]:
    """Tokens a second, median of ``repeat`` runs with their standard deviation, after one that is not counted.

    prefill: a prompt of that many tokens in one step. decode: one token after the other behind it, logits each time,
    no sampling. The peak of resident memory is this process's, so measure one engine a process. ValueError where the
    model's context is too short.
    """
    engine = model.engine
    if prompt_tokens < 1 or tokens < 1 or repeat < 1:
        raise ValueError("prompt tokens, tokens and repeat must each be at least 1")
    if prompt_tokens + tokens > engine.context_length:
        raise ValueError(
            f"{prompt_tokens} + {tokens} tokens are more than the model's context of {engine.context_length}"
        )
    random = np.random.default_rng(0)
    ids = random.integers(0, engine.vocab_size, prompt_tokens + tokens).astype(np.int32)
    prefill, decode = [], []
    with progress(f"bench {engine.name}", (repeat + 1) * len(ids), "tokens") as advance:
        for _ in range(repeat + 1):
            sequence = engine.new()
            begin = time.perf_counter()
            engine.step([Job(sequence, ids[:prompt_tokens], "last")])
            middle = time.perf_counter()
            for token in ids[prompt_tokens:]:
                engine.step([Job(sequence, token[None], "last")])
            end = time.perf_counter()
            engine.free(sequence)
            prefill.append(prompt_tokens / (middle - begin))
            decode.append(tokens / (end - middle))
            advance(len(ids))
    metrics = {f"{engine.name}_peak_mib": peak_memory_mib(), f"{engine.name}_kv_bits": engine.kv_bits}
    for name, rates in (("prefill", prefill[1:]), ("decode", decode[1:])):
        metrics[f"{engine.name}_{name}_rate"] = statistics.median(rates)
        metrics[f"{engine.name}_{name}_rate_sd"] = statistics.stdev(rates) if len(rates) > 1 else 0.0
    return metrics
