"""The verb `bench`: its options, the run, and what it prints."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import results
from ..checkpoint import open_folder
from ..models.config import ModelConfig
from .child import Child
from .machine import Limits, Machine, best_of
from .shapes import SHAPES, random_folder, shape_named
from .speed import Ours, Work, report, take_turns

LLAMA_BENCH = Work()  # pp512, tg128

# What the native engine may be asked for, each an argument of NativeEngine and an option here.
ENGINE_OPTIONS: dict[str, dict[str, Any]] = {}

# The keys that the JSON line always has, in this order; more follow.
KEYS = (
    *("decode_tok_s", "prefill_tok_s", "bytes_per_token", "stream_gb_s", "roofline_share", "int8_gops"),
    *("prefill_share", "peak_rss_mib", "threads", "isa", "layout", "head", "shape"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a model folder (none: the bundled model)")
    parser.add_argument("--shape", metavar="NAME", help=f"random weights instead of MODEL: {', '.join(SHAPES)}")
    parser.add_argument("--prompt", type=int, help="tokens of a prefill (default 512, at most the model's context)")
    parser.add_argument("--tokens", type=int, help="tokens decoded one by one (default 128, at most the context)")
    parser.add_argument("--context", type=int, default=0, help="decode behind so many tokens (default 0)")
    parser.add_argument("--batch", type=int, default=1, help="sequences that decode together (default 1)")
    parser.add_argument("--repeat", type=int, default=5, help="samples that count (default 5)")
    for name, arguments in ENGINE_OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, **arguments)
    parser.add_argument("--json", action="store_true", help="only the line of JSON")
    parser.add_argument("--no-record", action="store_true", help="do not add the numbers to results.json")


def run(options: argparse.Namespace) -> int:
    """Measure, print, and record where a model folder was measured."""
    if options.model is not None and options.shape is not None:
        raise ValueError("give either a model folder or --shape, not both")
    if options.repeat < 1:
        raise ValueError(f"--repeat is {options.repeat}, expected at least 1")
    with _model(options) as (name, folder, config):
        row, machine = measure(name, folder, config, _work(options, config), options)
    if options.model is not None and not options.no_record:
        settings = {k: v for k, v in vars(options).items() if k not in ("model", "no_record", "json")}
        results.record(options.model, "bench", settings, _metrics(options.engine, row))
    if not options.json:
        from ..tables import print_bench

        print_bench(name, [row], machine)
    print(json.dumps({key: row[key] for key in KEYS} | row))
    return 0


@contextmanager
def _model(options: argparse.Namespace) -> Iterator[tuple[str, Path, ModelConfig]]:
    if options.shape is None:
        from ..engine.load import bundled_folder

        folder = Path(options.model) if options.model is not None else bundled_folder()
        yield str(folder), folder, open_folder(folder).config
        return
    wanted = _work(options, shape_named(options.shape, 1 << 30))
    config = shape_named(options.shape, wanted.positions())
    with random_folder(options.shape, config) as folder:
        yield options.shape, folder, config


def _work(options: argparse.Namespace, config: ModelConfig) -> Work:
    """llama-bench's sizes, cut to a model with a shorter context, unless others were asked for."""
    room = config.max_position_embeddings
    prompt = min(LLAMA_BENCH.prompt, room) if options.prompt is None else options.prompt
    tokens = options.tokens
    if tokens is None:
        tokens = min(LLAMA_BENCH.tokens, max(room - options.context, 1))
    work = Work(prompt, tokens, options.context, options.batch)
    work.require_room(room)
    return work


def measure(
    name: str, folder: Path, config: ModelConfig, work: Work, options: argparse.Namespace
) -> tuple[dict[str, Any], Machine]:
    """One row: the model's samples between two looks at what the machine can do."""
    asked = {key: getattr(options, key) for key in ENGINE_OPTIONS if getattr(options, key) is not None}
    reads, peaks = [], []

    def look_at_the_machine(threads: int) -> None:
        with Child("the machine's limits", Limits, threads) as limits:
            reads.append(limits.call("read"))
            peaks.append(limits.call("peak"))

    with ExitStack() as stack:
        ours = stack.enter_context(
            Child(f"the {options.engine} engine", Ours, folder, work, options.threads, options.engine, asked)
        )
        facts = ours.call("told")
        look_at_the_machine(facts["threads"])
        found = take_turns([ours], work, options.repeat, min(max(peaks, key=sum)))
        look_at_the_machine(facts["threads"])
        machine = best_of(reads, peaks)
        row = report(facts, found[0], machine, config, work, ours.call("peak_mib"))
    return row | {"shape": name, **asdict(work)}, machine


def _metrics(engine: str, row: dict[str, Any]) -> dict[str, Any]:
    """The row in the words of results.json, where native and torch stand side by side."""
    return {
        f"{engine}_prefill_rate": row["prefill_tok_s"],
        f"{engine}_prefill_rate_sd": row["prefill_sd"],
        f"{engine}_decode_rate": row["decode_tok_s"],
        f"{engine}_decode_rate_sd": row["decode_sd"],
        f"{engine}_peak_mib": row["peak_rss_mib"],
    }
