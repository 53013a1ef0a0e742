"""Perplexity by three protocols. Numbers of different protocols are never comparable, so each names its own.

llama.cpp  the file is tokenised once; chunks of n tokens that do not overlap; BOS replaces the first token of each;
           only the second half of a chunk is scored, from n/2 on: n - n/2 - 1 predictions (FACTS 9.6).
gptq       WikiText rows joined by blank lines; windows of n tokens that do not overlap, the tail dropped; the mean
           loss of n-1 predictions counted as n; no BOS (FACTS 8.1).
document   each document by itself from BOS to EOS; every token is scored once with at least half a context before
           it; also bits per byte, which does not depend on the tokenizer.

numpy only; the engine decides whether torch is there.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data import documents, find_files
from ..engine import Engine, Job
from ..engine.load import Model, load
from ..progress import progress

PROTOCOLS = ("document", "llama.cpp", "gptq")


@dataclass(frozen=True)
class ScoredText:
    """What is scored, by one protocol."""

    protocol: str
    context: int  # tokens of a window, at most
    files: str  # their names
    windows: list[Window]
    utf8_bytes: int  # of the whole text

    @property
    def name(self) -> str:
        """The protocol as metrics write it."""
        return self.protocol.replace(".", "_")

    def facts(self, prefix: str, tokens: int) -> dict[str, Any]:
        """What a number says nothing without."""
        return {f"{prefix}_tokens": tokens, f"{prefix}_context": self.context, f"{prefix}_text": self.files}


@dataclass(frozen=True)
class Window:
    """Tokens to read and their targets, int32 [t]; a target of -1 is not scored. weight: predictions it counts as."""

    tokens: np.ndarray
    targets: np.ndarray
    weight: float = 1.0

    def weights(self) -> np.ndarray:
        """What each of its predictions counts as: float64 [scored targets]."""
        count = int((self.targets >= 0).sum())
        return np.full(count, self.weight / count if self.weight != 1 else 1.0)


def evaluate(
    model: Model | Path | str,
    sources: list[str] | tuple[str, ...] | None = None,
    *,
    protocol: str = "document",
    context: int | None = None,
    limit: int = 0,
    text_field: str = "text",
) -> dict[str, Any]:
    """Perplexity of a model, one from ``load`` or a folder; metrics carry the protocol in their names.

    sources: files, folders or globs of text; none: the bundled held-out books.
    context: tokens of a chunk; none takes the protocol's own (512, 2048) or the model's context, whichever is less.
    limit: stop after so many scored tokens, at the end of a window; 0 scores all. ValueError for text that is too
    short, a context below 2 or longer than the model's, a negative limit, or an unknown protocol.
    """
    model = model if isinstance(model, Model) else load(model)
    text = scored_text(model, sources, protocol=protocol, context=context, limit=limit, text_field=text_field)
    engine = model.engine
    started = time.perf_counter()
    nll, weights = score(engine, text.windows, f"eval {model.folder.path.name}")
    seconds = time.perf_counter() - started
    metrics = {**summary(text, nll, weights), **facts(engine), "eval_tokens_per_second": len(nll) / seconds}
    if protocol == "document" and not limit:
        metrics["bits_per_byte"] = float(nll.sum()) / math.log(2) / text.utf8_bytes
    return metrics


def facts(engine: Engine) -> dict[str, Any]:
    return {"eval_engine": engine.name, "eval_kv_bits": engine.kv_bits}


def summary(text: ScoredText, nll: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """Perplexity and its standard error; nll, weights: losses of all scored targets, what each counts as; float64."""
    perplexity = math.exp(np.average(nll, weights=weights))
    error = float(np.std(nll)) / math.sqrt(len(nll))
    return {
        f"{text.name}_perplexity": perplexity,
        f"{text.name}_perplexity_error": perplexity * error,
        **text.facts(text.name, len(nll)),
    }


def scored_text(
    model: Model,
    sources: list[str] | tuple[str, ...] | None = None,
    *,
    protocol: str = "document",
    context: int | None = None,
    limit: int = 0,
    text_field: str = "text",
) -> ScoredText:
    """The text cut as the protocol wants it; arguments and errors of ``evaluate``."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}; known are {', '.join(PROTOCOLS)}")
    longest = model.engine.context_length
    usual = {"llama.cpp": 512, "gptq": 2048, "document": longest}[protocol]
    context = min(usual, longest) if context is None else context
    least = 3 if protocol == "llama.cpp" else 2  # of fewer tokens none is predicted
    if not least <= context <= longest:
        raise ValueError(f"--context is {context}, expected at least {least}; the model's context is {longest} tokens")
    if limit < 0:
        raise ValueError(f"--limit is {limit}, expected 0 (all of the text) or more")
    files = find_files(sources or [str(held_out_text())])
    cut = {"llama.cpp": llama_cpp_windows, "gptq": gptq_windows, "document": document_windows}[protocol]
    every, utf8_bytes = cut(model, files, context, text_field)
    windows = _limited(every, limit)
    if not windows:
        raise ValueError(f"the text is shorter than one window of {context} tokens; give --context less or more text")
    names = ", ".join(f.name for f in files) if sources else "bundled held-out books"
    return ScoredText(protocol, context, names, windows, utf8_bytes)


def held_out_text() -> Path:
    """The bundled books that no bundled model and no demo was trained on."""
    return Path(__file__).parent.parent / "bundled" / "text" / "held_out.txt.xz"


def score(engine: Engine, windows: list[Window], title: str = "eval") -> tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihoods in nats of all scored targets, float64 [n], and what each counts as."""
    found, weights = [], []
    with progress(title, sum(len(w.tokens) for w in windows), "tokens") as advance:
        for window in windows:
            sequence = engine.new()
            try:
                job = Job(sequence, window.tokens.astype(np.int32), "nll", window.targets.astype(np.int32))
                nll = engine.step([job])[0]
            finally:
                engine.free(sequence)
            assert nll is not None
            scored = nll[window.targets >= 0].astype(np.float64)
            found.append(scored)
            weights.append(window.weights())
            so_far = np.concatenate(found).mean() if len(found) % 8 == 1 else None
            advance(len(window.tokens), f"perplexity {math.exp(so_far):.2f}" if so_far is not None else "")
    return np.concatenate(found), np.concatenate(weights)


def _limited(windows: Iterator[Window], limit: int) -> list[Window]:
    kept: list[Window] = []
    scored = 0
    for window in windows:
        kept.append(window)
        scored += int((window.targets >= 0).sum())
        if limit and scored >= limit:
            break
    return kept


Cut = Callable[[Model, list[Path], int, str], tuple[Iterator[Window], int]]


def _whole(files: list[Path], text_field: str) -> str:
    return "".join(documents(files, text_field))


def llama_cpp_windows(model: Model, files: list[Path], n: int, text_field: str) -> tuple[Iterator[Window], int]:
    text = _whole(files, text_field)
    ids = np.asarray(model.tokenizer.encode(text), np.int32)
    bos = model.tokenizer.bos_id
    adds_bos = bos is not None and len(ids) > 0 and ids[0] == bos

    def cut() -> Iterator[Window]:
        for start in range(0, len(ids) - n + 1, n):
            chunk = ids[start : start + n].copy()
            targets = np.full(n, -1, np.int32)
            targets[n // 2 : n - 1] = chunk[n // 2 + 1 :]  # logits of n/2 .. n-2 predict n/2+1 .. n-1
            if adds_bos:
                chunk[0] = ids[0]
            yield Window(chunk, targets)

    return cut(), len(text.encode())


def gptq_windows(model: Model, files: list[Path], n: int, text_field: str) -> tuple[Iterator[Window], int]:
    # A row of the WikiText data set is a line with its line end, and an empty string for a blank line. Only "\n" ends
    # one: str.splitlines would also cut at form feeds, U+0085 and U+2028.
    lines = io.StringIO(_whole(files, text_field))
    text = "\n\n".join(line if line.strip() else "" for line in lines)
    ids = np.asarray(model.tokenizer.encode(text, special=False), np.int32)

    def cut() -> Iterator[Window]:
        for start in range(0, len(ids) - n + 1, n):
            chunk = ids[start : start + n]
            yield Window(chunk, np.append(chunk[1:], np.int32(-1)), weight=n)

    return cut(), len(text.encode())


def document_windows(model: Model, files: list[Path], n: int, text_field: str) -> tuple[Iterator[Window], int]:
    texts = list(documents(files, text_field))
    begin = [] if model.tokenizer.bos_id is None else [model.tokenizer.bos_id]
    end = [] if model.tokenizer.eos_id is None else [model.tokenizer.eos_id]

    def cut() -> Iterator[Window]:
        for text in texts:
            ids = np.asarray([*begin, *model.tokenizer.encode(text, special=False), *end], np.int32)
            for start, stop, first in sliding(len(ids) - 1, n):
                targets = ids[start + 1 : stop + 1].copy()
                targets[: first - start] = -1
                yield Window(ids[start:stop], targets)

    return cut(), sum(len(text.encode()) for text in texts)


def sliding(length: int, n: int) -> Iterator[tuple[int, int, int]]:
    """Windows (start, stop, first scored) of at most n positions that score each of ``length`` positions once."""
    first = 0
    while first < length:
        start = max(0, first - n // 2) if first else 0
        stop = min(start + n, length)
        yield start, stop, first
        first = stop
