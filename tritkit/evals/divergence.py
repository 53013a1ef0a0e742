"""How far a model is from its parent: both read the same windows, and their distributions are compared.

KL(parent || model) = sum over the vocabulary of p (ln p - ln q), in nats, p the parent's probabilities, q the model's,
at every scored position of a protocol of ``perplexity``; with llama.cpp's protocol these are the positions of its
``llama-perplexity --kl-divergence``. It falls to 0 only where nothing changed, and unlike perplexity it cannot become
better by chance. numpy only; the engine decides whether torch is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engine import Engine, Job
from ..engine.load import Model, load
from ..files import atomic_open
from ..progress import progress
from .perplexity import ScoredText, Window, facts, scored_text, summary

LOGITS = 1 << 24  # that are in memory at a time
ROWS = 32  # positions that are compared at a time, in float64

# Logits of the scored positions of window i, float32 [positions, vocabulary], in the pieces that ``pieces`` cuts.
Reference = Callable[[int], Iterator[NDArray[np.float32]]]


@dataclass(frozen=True)
class Differences:
    """One value for each scored position, float64 [n]; same: bool [n]."""

    kl: NDArray[np.float64]
    same: NDArray[np.bool_]  # the likeliest token is the parent's
    nll: NDArray[np.float64]  # of the target, by the model
    parent_nll: NDArray[np.float64]


def evaluate(
    model: Model | Path | str,
    sources: list[str] | tuple[str, ...] | None = None,
    *,
    parent: Model | Path | str,
    protocol: str = "document",
    context: int | None = None,
    limit: int = 0,
    text_field: str = "text",
) -> dict[str, Any]:
    """KL to the parent, share of positions with the same likeliest token, and the model's perplexity on the way.

    Arguments as of ``perplexity.evaluate``; both models are in memory. ValueError, besides its, for a parent with
    another vocabulary.
    """
    model = model if isinstance(model, Model) else load(model)
    parent = parent if isinstance(parent, Model) else load(parent)
    cut: dict[str, Any] = {"protocol": protocol, "limit": limit, "text_field": text_field}
    text = scored_text(model, sources, context=context, **cut)
    theirs = scored_text(parent, sources, context=text.context, **cut)
    sizes = model.engine.vocab_size, parent.engine.vocab_size
    if sizes[0] != sizes[1] or not _same(text.windows, theirs.windows):
        both = f"{model.folder.path} and its parent {parent.folder.path}"
        raise ValueError(f"{both} have different tokens ({sizes[0]} and {sizes[1]}), so nothing can be compared")
    engine = parent.engine
    metrics = measure(model, text, lambda i: logits_of(engine, text.windows[i]))
    return {**metrics, "divergence_parent": str(parent.folder.path)}


def _same(a: list[Window], b: list[Window]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x.tokens, y.tokens) for x, y in zip(a, b, strict=True))


def measure(model: Model, text: ScoredText, parent: Reference) -> dict[str, Any]:
    """The metrics of one model beside the logits of its parent."""
    found = differences(model.engine, text, parent, f"divergence {model.folder.path.name}")
    n = len(found.kl)
    top1 = float(found.same.mean())
    weights = np.concatenate([window.weights() for window in text.windows])
    return {
        "divergence_kl": float(found.kl.mean()),
        "divergence_kl_error": float(found.kl.std()) / math.sqrt(n),
        "divergence_top1": top1,
        "divergence_top1_error": math.sqrt(top1 * (1 - top1) / n),
        "divergence_target": float(np.abs(found.nll - found.parent_nll).mean()),
        "divergence_protocol": text.protocol,
        **text.facts("divergence", n),
        **summary(text, found.nll, weights),
        **facts(model.engine),
    }


def differences(engine: Engine, text: ScoredText, parent: Reference, title: str = "divergence") -> Differences:
    """Every scored position of every window."""
    rows: list[tuple[NDArray, ...]] = []
    with progress(title, sum(len(w.tokens) for w in text.windows), "tokens") as advance:
        for i, window in enumerate(text.windows):
            targets = window.targets[window.targets >= 0]
            for own, theirs in zip(logits_of(engine, window), parent(i), strict=True):
                for start in range(0, len(own), ROWS):
                    part = slice(start, min(start + ROWS, len(own)))
                    rows.append(compared(theirs[part], own[part], targets[part]))
                targets = targets[len(own) :]
            advance(len(window.tokens), f"KL {np.concatenate([row[0] for row in rows]).mean():.4f}")
    return Differences(*(np.concatenate(column) for column in zip(*rows, strict=True)))


def compared(parent: NDArray, own: NDArray, targets: NDArray) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """The columns of Differences for some positions. parent, own: logits float32 [n, vocabulary]; targets: int [n]."""
    p, q = _log_softmax(parent), _log_softmax(own)
    at = np.arange(len(targets))
    same = parent.argmax(axis=1) == own.argmax(axis=1)
    return (np.exp(p) * (p - q)).sum(axis=1), same, -q[at, targets], -p[at, targets]


def _log_softmax(logits: NDArray) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def pieces(window: Window, vocab_size: int) -> Iterator[slice]:
    """The positions of a window from the first to the last that is scored, so many at a time that memory holds them."""
    scored = np.flatnonzero(window.targets >= 0)
    rows = max(1, LOGITS // vocab_size)
    for start in range(int(scored[0]), int(scored[-1]) + 1, rows):
        yield slice(start, min(start + rows, int(scored[-1]) + 1))


def logits_of(engine: Engine, window: Window) -> Iterator[NDArray[np.float32]]:
    """The logits of its scored positions, float32 [positions, vocabulary], in pieces."""
    tokens = window.tokens.astype(np.int32)
    sequence = engine.new()
    try:
        for part in pieces(window, engine.vocab_size):
            if engine.length(sequence) < part.start:
                engine.step([Job(sequence, tokens[: part.start], "none")])
            logits = engine.step([Job(sequence, tokens[part], "all")])[0]
            assert logits is not None
            yield logits[window.targets[part] >= 0]
    finally:
        engine.free(sequence)


def keep_logits(engine: Engine, text: ScoredText, path: Path) -> None:
    """Write the logits of all scored positions, for many models to be compared with: float32, raw."""
    with (
        progress("logits of the parent", sum(len(w.tokens) for w in text.windows), "tokens") as advance,
        atomic_open(path, "wb") as file,
    ):
        for window in text.windows:
            for logits in logits_of(engine, window):
                file.write(np.ascontiguousarray(logits).data)
            advance(len(window.tokens))


def kept_logits(path: Path, text: ScoredText, vocab_size: int) -> Reference:
    """What ``keep_logits`` wrote. ValueError where the file is not of this text and vocabulary."""
    counts = [int((window.targets >= 0).sum()) for window in text.windows]
    wanted, size = 4 * vocab_size * sum(counts), path.stat().st_size
    if size != wanted:
        raise ValueError(f"{path} has {size} bytes, expected {wanted}")
    begins = np.cumsum([0, *counts])
    rows = np.memmap(path, np.float32, "r").reshape(-1, vocab_size)

    def logits(i: int) -> Iterator[NDArray[np.float32]]:
        at, window = int(begins[i]), text.windows[i]
        for part in pieces(window, vocab_size):
            count = int((window.targets[part] >= 0).sum())
            yield rows[at : at + count]
            at += count

    return logits
