"""Prompt to text, token by token. numpy only: the engine decides whether torch is there."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from . import Job
from .load import Model, load
from .sampling import Sampler, Sampling


@dataclass
class Timing:
    """Filled while a text is generated: counts of tokens and seconds of wall time."""

    prompt_tokens: int = 0
    tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    finish: str = "length"  # or "stop": the model ended its text, or a stop string came

    @property
    def decode_rate(self) -> float:
        """Tokens a second after the first one."""
        return (self.tokens - 1) / self.decode_seconds if self.tokens > 1 and self.decode_seconds else 0.0


def stream_ids(
    model: Model,
    prompt: Sequence[int],
    max_tokens: int,
    sampling: Sampling,
    timing: Timing | None = None,
) -> Iterator[int]:
    """Token ids that follow the prompt, up to one that ends the model's text or its turn.

    Rows of the logits beyond the tokenizer's vocabulary, which pad the embedding, are never drawn.
    Where the context is full the text goes on from its last half: the model re-reads that half and forgets the rest.
    ValueError for an empty prompt and for one that fills the context.
    """
    engine = model.engine
    if not len(prompt):
        raise ValueError("the prompt is empty and the tokenizer has no begin-of-text token to start from")
    if len(prompt) >= engine.context_length:
        raise ValueError(f"the prompt has {len(prompt)} tokens, but the model's context is {engine.context_length}")
    timing = timing if timing is not None else Timing()
    timing.prompt_tokens = len(prompt)
    sampler = Sampler(sampling)
    text = list(prompt)
    sequence = engine.new()
    try:
        started = time.perf_counter()
        logits = _last(engine.step([Job(sequence, np.asarray(text, np.int32), "last")]))
        timing.prefill_seconds = time.perf_counter() - started
        for made in range(max_tokens):
            token = sampler.sample(logits[: len(model.tokenizer)], text)
            if token in model.tokenizer.stop_ids:
                timing.finish = "stop"
                return
            text.append(token)
            timing.tokens += 1
            yield token
            if made + 1 == max_tokens:
                return
            started = time.perf_counter()
            if engine.length(sequence) == engine.context_length:
                engine.truncate(sequence, 0)
                again = text[-(engine.context_length // 2) :]
                logits = _last(engine.step([Job(sequence, np.asarray(again, np.int32), "last")]))
            else:
                logits = _last(engine.step([Job(sequence, np.asarray([token], np.int32), "last")]))
            timing.decode_seconds += time.perf_counter() - started
    finally:
        engine.free(sequence)


def _last(outcome: list[np.ndarray | None]) -> np.ndarray:
    assert outcome[0] is not None
    return outcome[0]


def until_stop(pieces: Iterable[str], stop: Sequence[str], timing: Timing | None = None) -> Iterator[str]:
    """Pass text on until one of the stop strings comes, which is not passed on, nor is any part of it."""
    held = ""
    longest = max((len(s) for s in stop), default=0)
    for piece in pieces:
        held += piece
        ends = [held.index(s) for s in stop if s in held]
        if ends:
            if timing is not None:
                timing.finish = "stop"
            yield held[: min(ends)]
            return
        safe = len(held) - next((n for n in range(longest - 1, 0, -1) if _begins(held, stop, n)), 0)
        if safe:
            yield held[:safe]
            held = held[safe:]
    yield held


def _begins(text: str, stop: Sequence[str], n: int) -> bool:
    """Whether the last n characters of text could be the first n of a stop string."""
    return len(text) >= n and any(len(s) > n and s.startswith(text[-n:]) for s in stop)


@dataclass(frozen=True)
class Request:
    """What ``generate`` and ``chat`` ask of a model."""

    prompt: str
    max_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()


def stream_text(model: Model, request: Request, timing: Timing | None = None) -> Iterator[str]:
    """The continuation of a prompt, piece by piece as characters become complete."""
    if request.max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, not {request.max_tokens}")
    ids = model.tokenizer.encode(request.prompt)
    if not ids and model.tokenizer.bos_id is not None:
        ids = [model.tokenizer.bos_id]
    pieces = model.tokenizer.stream(stream_ids(model, ids, request.max_tokens, request.sampling, timing))
    return until_stop(pieces, request.stop, timing)


def generate(
    prompt: str,
    model: Model | Path | str | None = None,
    *,
    max_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: Sequence[str] = (),
) -> str:
    """The continuation of ``prompt`` by a model: one from ``load``, a folder, or none for the bundled one.

    temperature 0 is greedy. ValueError for settings out of range and for a prompt that fills the context.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    opened = model if isinstance(model, Model) else load(model)
    return "".join(stream_text(opened, Request(prompt, max_tokens, sampling, tuple(stop))))
