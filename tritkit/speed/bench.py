"""The verb `bench`: its options, the run, and what it prints."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tritkit import _native

from .. import results
from ..models.config import ModelConfig
from ..sources import open_model
from . import peer
from .child import Child
from .machine import Limits, Machine
from .measure import TESTS, Ours, Work, report, take_turns
from .shapes import SHAPES, random_folder, shape_named

LLAMA_BENCH = Work()  # pp512, tg128

# What the native engine may be asked for: options here, arguments of NativeEngine there.
ENGINE_OPTIONS = ("kv_bits", "head", "layout")

LAYOUTS = ("t16_2", "t16_3", "l64_3")

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
    parser.add_argument("--layout", choices=LAYOUTS, help="of ternary weights (default: the fastest)")
    parser.add_argument(
        "--density",
        metavar="UP,DOWN",
        type=_density,
        action="append",
        help="decode with these percentages of up's rows and down's columns, forced, beside the best layout that reads "
        "all; may be repeated",
    )
    parser.add_argument("--peer", choices=peer.PEERS, help="run the same shape there too, turn by turn")
    parser.add_argument("--json", action="store_true", help="only the line of JSON")
    parser.add_argument("--no-record", action="store_true", help="do not add the numbers to results.json")


def run(options: argparse.Namespace) -> int:
    """Measure, print, and record where a model folder was measured."""
    if options.model is not None and options.shape is not None:
        raise ValueError("give either a model folder or --shape, not both")
    if options.repeat < 1:
        raise ValueError(f"--repeat is {options.repeat}, expected at least 1")
    if options.density:
        _require_density_alone(options)
    asked = {name: getattr(options, name) for name in ENGINE_OPTIONS if getattr(options, name) is not None}
    with _model(options) as (name, folder, config):
        rows, machine = measure(
            *(name, folder, config, _work(options, config)),
            engine=options.engine,
            threads=options.threads,
            repeat=options.repeat,
            against=options.peer,
            asked=asked,
            densities=options.density or (),
        )
    if options.model is not None and Path(options.model).is_dir() and not options.no_record:
        settings = {k: v for k, v in vars(options).items() if k not in ("model", "no_record", "json")}
        results.record(options.model, "bench", settings, _metrics(options.engine, rows[0]))
    if not options.json:
        from ..tables import print_bench

        print_bench(name, rows, machine, against=options.peer)
    line = {key: rows[0][key] for key in KEYS} | rows[0]
    if options.density:
        line |= {"densities": [beside_dense(row, rows[-1]) for row in rows[:-1]], "others": rows[1:]}
    if options.peer:
        line |= {"ratios": ratios(rows), "others": rows[1:]}
    print(json.dumps(line))
    return 0


def _density(text: str) -> tuple[float, float]:
    try:
        up, down = (float(share) / 100 for share in text.split(","))
    except ValueError:
        up = down = -1.0
    if not 1 >= up >= down >= 0:
        raise argparse.ArgumentTypeError(f"{text} is not two percentages UP,DOWN with 100 >= UP >= DOWN >= 0")
    return up, down


def _require_density_alone(options: argparse.Namespace) -> None:
    """A forced density is a property of decoding one sequence with one layout of one engine."""
    conflicts = {
        "--batch": options.batch > 1,
        "--peer": bool(options.peer),
        "--layout": options.layout not in (None, "l64_3"),
        "--engine torch": options.engine != "native",
    }
    for name, given in conflicts.items():
        if given:
            raise ValueError(f"--density cannot be used with {name}")


@contextmanager
def _model(options: argparse.Namespace) -> Iterator[tuple[str, Path, ModelConfig]]:
    """Name, folder and shape of what is measured; what cannot be is refused before anything is written."""
    if options.shape is None:
        from ..engine.load import bundled_folder

        folder = Path(options.model) if options.model is not None else bundled_folder()
        model = open_model(folder)
        if options.peer:
            peer.require(options.peer, model.config, peer.runs(model))
        yield (str(folder) if options.model is not None else "the bundled model"), folder, model.config
        return
    config = shape_named(options.shape, _work(options, None).positions())
    if options.peer:
        peer.require(options.peer, config)
    with random_folder(options.shape, config) as folder:
        yield options.shape, folder, config


def _work(options: argparse.Namespace, config: ModelConfig | None) -> Work:
    """llama-bench's sizes unless others were asked for, cut to the context of a model (None: of any length)."""
    prompt, tokens = options.prompt, options.tokens
    room = None if config is None else config.max_position_embeddings
    if prompt is None:
        prompt = LLAMA_BENCH.prompt if room is None else min(LLAMA_BENCH.prompt, room)
    if tokens is None:
        tokens = LLAMA_BENCH.tokens if room is None else min(LLAMA_BENCH.tokens, max(room - options.context, 1))
    work = Work(prompt, tokens, options.context, options.batch)
    if room is not None:
        work.require_room(room)
    return work


def measure(
    name: str,
    folder: Path,
    config: ModelConfig,
    work: Work,
    *,
    engine: str = "native",
    threads: int = 0,
    repeat: int = 5,
    against: str | None = None,
    asked: dict[str, Any] | None = None,
    densities: Sequence[tuple[float, float]] = (),
) -> tuple[list[dict[str, Any]], Machine]:
    """A row for each contestant, ours first. They take turns with each other and with looks at the machine's limits.
    With densities: a row for each of them, and one for the best layout that reads everything."""
    asked = asked or {}
    variants = [asked | {"layout": "l64_3", "density": density} for density in densities]
    if variants:
        variants.append(asked | {"layout": _native.Runner(1).tiles})
    with ExitStack() as stack:
        enter = stack.enter_context
        children = [
            enter(Child(f"the {engine} engine", Ours, folder, work, threads, engine, variant))
            for variant in variants or [asked]
        ]
        threads = children[0].call("told")["threads"]
        if against:
            children += [enter(Child(*other)) for other in _others(stack, name, folder, config, work, threads, asked)]
        limits = enter(Child("the machine's limits", Limits, threads))
        found, machine = take_turns(children, limits, work, repeat)
        rows = [
            report(child.call("told"), samples, repeat, machine, config, work, child.call("peak_mib"))
            | {"shape": name, **asdict(work)}
            for child, samples in zip(children, found, strict=True)
        ]
    return rows, machine


def _others(
    stack: ExitStack,
    name: str,
    folder: Path,
    config: ModelConfig,
    work: Work,
    threads: int,
    asked: dict[str, Any],
) -> Iterator[tuple]:
    """What `Child` takes for llama.cpp, and for ourselves with a head as wide as its."""
    if "head" in ENGINE_OPTIONS and config.weights and asked.get("head") != "int6":
        alike = asked | {"head": "int6"}
        yield "the native engine with a 6-bit head", Ours, folder, work, threads, "native", alike
    model = open_model(folder)
    itself = name not in SHAPES and peer.runs(model)
    path, facts = stack.enter_context(peer.model_gguf(model) if itself else peer.random_gguf(name, config))
    yield "llama.cpp", peer.LlamaCpp, path, work, threads, facts


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How many times as fast each of our rows is as the last, the peer's: "decode", "prefill", "decode int6" ..."""
    *ours, theirs = rows
    return {
        test + (f" {row['head']}" if i else ""): row[f"{test}_tok_s"] / theirs[f"{test}_tok_s"]
        for i, row in enumerate(ours)
        for test in TESTS[::-1]
    }


def beside_dense(row: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    """What a density brings: "ideal" is how many times as fast decode would be if only bytes counted."""
    return {
        "up": row["density"][0],
        "down": row["density"][1],
        "ffn_bytes": row["ffn_bytes"],
        "ffn_share": row["ffn_bytes"] / dense["ffn_bytes"],
        "decode_tok_s": row["decode_tok_s"],
        "times": row["decode_tok_s"] / dense["decode_tok_s"],
        "ideal": dense["bytes_per_token"] / row["bytes_per_token"],
    }


def _metrics(engine: str, row: dict[str, Any]) -> dict[str, Any]:
    """The row in the words of results.json, where native and torch stand side by side."""
    return {
        f"{engine}_prefill_rate": row["prefill_tok_s"],
        f"{engine}_prefill_rate_sd": row["prefill_sd"],
        f"{engine}_decode_rate": row["decode_tok_s"],
        f"{engine}_decode_rate_sd": row["decode_sd"],
        f"{engine}_peak_mib": row["peak_rss_mib"],
        f"{engine}_kv_bits": row["kv_bits"],
    }
