"""Speed of a model as llama-bench counts it: ppN, a prompt in one go, and tgN, token after token. numpy only.

Every engine runs in a process of its own (child.py), so that its peak of memory is its alone, and the machine's limits
are measured before and after (machine.py). Engines that are compared take turns, sample by sample.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..engine import Engine, Job
from ..engine.load import decoder_weights
from ..engine.native import NativeEngine
from ..memory import peak_memory_mib
from ..models.config import ModelConfig
from ..models.shapes import linear_names, linear_shape
from ..progress import progress
from ..sources import open_model
from .child import Child
from .machine import Machine, Sample, Stopwatch, machine_of

TESTS = ("prefill", "decode")


@dataclass(frozen=True)
class Work:
    """What is run. prompt: tokens of a prefill; tokens: decoded after each other, by ``batch`` sequences together,
    each of which has ``context`` tokens behind it already."""

    prompt: int = 512
    tokens: int = 128
    context: int = 0
    batch: int = 1

    def __post_init__(self) -> None:
        for name, least in (("prompt", 1), ("tokens", 1), ("context", 0), ("batch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")

    def positions(self) -> int:
        """The longest that a sequence gets."""
        return max(self.prompt, self.context + self.tokens)

    def mean_positions(self) -> float:
        """Positions that a decoded token attends to, on average."""
        return self.context + (self.tokens + 1) / 2

    def require_room(self, context_length: int) -> None:
        if self.positions() > context_length:
            what = f"a prompt of {self.prompt}"
            if self.context + self.tokens > self.prompt:
                what = f"{self.tokens} tokens behind a context of {self.context}"
            raise ValueError(f"{what} are more than the model's context of {context_length}")


class Contestant:
    """One engine with one model, in a child process: ``open`` is its own; the rest is the same for all.

    A subclass gives ``facts`` and the four methods below that raise NotImplementedError.
    """

    facts: dict[str, Any]

    def __init__(self, work: Work, threads: int):
        self.work = work
        self.threads = threads
        self._stopwatch: Stopwatch | None = None

    def told(self) -> dict[str, Any]:
        """Facts of this engine and this model, for the report."""
        return self.facts

    def sample(self, test: str) -> Sample:
        if self._stopwatch is None:
            self._stopwatch = Stopwatch(self.threads)
        self.prepare(test)
        return self._stopwatch.time(self.prefill() if test == "prefill" else self.decode())

    def peak_mib(self) -> float:
        return peak_memory_mib()

    def prepare(self, test: str) -> None:
        """Brings the sequences to where ``test`` begins; not timed."""
        raise NotImplementedError

    def prefill(self) -> Iterator[None]:
        raise NotImplementedError

    def decode(self) -> Iterator[None]:
        raise NotImplementedError


class Ours(Contestant):
    """A model folder with one of tritkit's engines. ``options``: what the native engine was asked for by name."""

    def __init__(self, folder: Path, work: Work, threads: int, engine: str, options: dict[str, Any]):
        began = time.perf_counter()
        opened = open_model(folder)
        work.require_room(opened.config.max_position_embeddings)
        self.engine: Engine
        if engine == "native":
            native = NativeEngine(decoder_weights(opened), threads=threads, **options)
            self.facts = {
                "engine": "tritkit",
                "threads": native.threads,
                "isa": native.isa,
                "layout": native.layout,
                "head": native.head,
                "kv_bits": native.kv_bits,
                "kv_bytes": native.kv_bytes_per_position,
            }
            self._row_bytes = opened.tensors["model.embed_tokens.weight"].array[0].nbytes
            self.engine = native
        else:
            if options:
                raise ValueError(f"the torch engine has no --{next(iter(options)).replace('_', '-')}")
            from ..engine.torch import TorchEngine

            self.engine = TorchEngine.open(opened, threads=threads)
            import torch

            self.facts = {"engine": "torch", "threads": torch.get_num_threads(), "isa": "torch"}
            self.facts |= {"layout": "floats", "head": "f32", "kv_bits": self.engine.kv_bits}
        super().__init__(work, self.facts["threads"])
        self._chance = np.random.default_rng(0)
        self._sequences: list[int] = []
        self._prompt = self.engine.new()
        list(self._step([self._prompt], 1))
        self.facts["ready_s"] = time.perf_counter() - began

    def told(self) -> dict[str, Any]:
        if not isinstance(self.engine, NativeEngine):
            return self.facts
        again = self.engine.rescored_rows  # so far, as the bytes are
        read, ffn_bytes = self.engine.ffn_bytes
        return self.facts | {
            "weight_bytes": self.engine.bytes_per_token,
            "rescored_rows": again,
            "logit_bytes": again * self._row_bytes,
            "density": [round(share, 4) for share in self.engine.density],
            "ffn_bytes": read,
            "ffn_share": read / ffn_bytes,
        }

    def prepare(self, test: str) -> None:
        self.engine.truncate(self._prompt, 0)
        if test == "prefill":
            return
        while len(self._sequences) < self.work.batch:
            sequence = self.engine.new()
            if self.work.context:
                list(self._step([sequence], self.work.context))
            self._sequences.append(sequence)
        for sequence in self._sequences:
            self.engine.truncate(sequence, self.work.context)

    def prefill(self) -> Iterator[None]:
        yield from self._step([self._prompt], self.work.prompt)

    def decode(self) -> Iterator[None]:
        for _ in range(self.work.tokens):
            yield from self._step(self._sequences, 1)

    def _step(self, sequences: Sequence[int], tokens: int) -> Iterator[None]:
        ids = self._chance.integers(0, self.engine.vocab_size, (len(sequences), tokens)).astype(np.int32)
        self.engine.step([Job(s, row, "last") for s, row in zip(sequences, ids, strict=True)])
        yield


@dataclass
class Samples:
    """The samples of one test of one contestant; slow ones were taken again while there was patience."""

    test: str
    tokens: int
    all: list[Sample] = field(default_factory=list)

    def quiet(self, peak_of_a_thread: float) -> list[Sample]:
        return [s for s in self.all if s.is_quiet(peak_of_a_thread)]

    def counted(self, repeat: int, peak_of_a_thread: float) -> list[Sample]:
        """The ``repeat`` least disturbed ones, whatever their speed; the first ones where all were quiet."""
        return sorted(self.all, key=lambda s: (not s.is_quiet(peak_of_a_thread), s.noise(peak_of_a_thread)))[:repeat]

    def summary(self, repeat: int, machine: Machine) -> dict[str, Any]:
        """Mean and standard deviation of those that count."""
        counted = self.counted(repeat, machine.peak_of_a_thread)
        rates = [self.tokens / s.seconds for s in counted]
        joules = [s.joules / self.tokens for s in counted if s.joules is not None]
        quiet = len(self.quiet(machine.peak_of_a_thread))
        return {
            f"{self.test}_tok_s": statistics.fmean(rates),
            f"{self.test}_sd": statistics.stdev(rates) if len(rates) > 1 else 0.0,
            f"{self.test}_samples": len(rates),
            f"{self.test}_slow_samples": len(self.all) - quiet,
            f"{self.test}_slow_counted": max(len(rates) - quiet, 0),
            f"{self.test}_joules": statistics.fmean(joules) if joules else None,
        }


def take_turns(
    children: Sequence[Child], limits: Child, work: Work, repeat: int
) -> tuple[list[list[Samples]], Machine]:
    """For each child its samples of every test: one that does not count, then ``repeat``, each child in turn, and the
    machine's limits in turn with them.

    Where the machine was busy in a sample another one is taken, at most ``repeat`` times more in all.
    """
    tokens = {"prefill": work.prompt, "decode": work.tokens * work.batch}
    found = [[Samples(test, tokens[test]) for test in TESTS] for _ in children]
    looks = [limits.call("look")]
    total = (repeat + 1) * sum(tokens.values()) * len(children)
    with progress("bench", total, "tokens") as advance:
        for round in range(2 * repeat + 1):
            peak = machine_of(looks).peak_of_a_thread
            wanting = [
                (child, samples)
                for child, tests in zip(children, found, strict=True)
                for samples in tests
                if round <= repeat or len(samples.quiet(peak)) < repeat
            ]
            for child, samples in wanting:
                sample = child.call("sample", samples.test)
                if round > 0:
                    samples.all.append(sample)
                advance(samples.tokens, note="" if sample.is_quiet(peak) else "(busy machine)")
            if wanting:
                looks.append(limits.call("look"))
    return found, machine_of(looks)


def report(
    facts: dict[str, Any],
    samples: Sequence[Samples],
    repeat: int,
    machine: Machine,
    config: ModelConfig,
    work: Work,
    peak_mib: float,
) -> dict[str, Any]:
    """One engine's row: rates, what they are of the machine's limits, and the facts. Of these, weight_bytes are read
    once for all sequences that decode together, kv_bytes by each for every position behind it, and logit_bytes by each
    for the logits that a screened head computes again."""
    measured: dict[str, Any] = {}
    for test in samples:
        measured |= test.summary(repeat, machine)
    facts = dict(facts)
    weights, kv = facts.pop("weight_bytes", None), facts.pop("kv_bytes", None)
    again = facts.pop("logit_bytes", 0)
    a_token = None if weights is None else weights / work.batch + kv * work.mean_positions() + again
    decode, prefill = measured.pop("decode_tok_s"), measured.pop("prefill_tok_s")
    return {
        "decode_tok_s": decode,
        "prefill_tok_s": prefill,
        "bytes_per_token": a_token,
        "stream_gb_s": machine.stream_gb_s,
        "roofline_share": None if a_token is None else 1e-9 * a_token * decode / machine.stream_gb_s,
        "int8_gops": machine.int8_gops,
        "prefill_share": 2e-9 * linear_weights(config) * prefill / machine.int8_gops if config.activations else None,
        "peak_rss_mib": peak_mib,
        **facts,
        "stream_best_gb_s": machine.stream_best,
        **measured,
    }


def linear_weights(config: ModelConfig) -> int:
    """Weights of the linears of the layers: a token of a prefill is multiplied with each once."""
    shapes = (linear_shape(config, name) for name in linear_names(config))
    return sum(rows * columns for rows, columns in shapes)
