"""What verbs print: tables for people, JSON for programs. Imports no torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import results
from .speed.machine import Machine


def _screen() -> Console:
    """Standard output; as wide as a table needs where it is no terminal."""
    screen = Console()
    return screen if screen.is_terminal else Console(width=120)


def _bytes(value: float) -> str:
    return f"{value / 1e6:.2f} MB" if value >= 1e6 else f"{value / 1e3:.0f} kB"


def _count(value: float) -> str:
    return f"{value / 1e6:.2f} M" if value >= 1e6 else f"{value:,.0f}"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _number(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


# The main table: metric, how people call it, how it is written.
MAIN: dict[str, tuple[str, Callable[[Any], str]]] = {
    "family": ("family", str),
    "weights": ("weights", str),
    "parameters": ("parameters", _count),
    "bits_per_weight": ("bits per weight (linears, measured)", lambda v: f"{v:.3f}"),
    "file_bytes": ("weights on disk", _bytes),
    "train_loss": ("training loss, last 50 steps", lambda v: f"{v:.3f}"),
    "val_loss": ("validation loss", lambda v: f"{v:.3f}"),
    "val_perplexity": ("validation perplexity", lambda v: f"{v:.2f}"),
    **{
        f"{protocol}_{name}": (label.format(protocol.replace("_", ".")), write)
        for protocol in ("document", "llama_cpp", "gptq")
        for name, label, write in (
            ("text", "evaluated on ({})", str),
            ("tokens", "tokens scored ({})", _count),
            ("perplexity", "perplexity ({})", lambda v: f"{v:.2f}"),
        )
    },
    "divergence_kl": ("KL divergence from the parent, nats", lambda v: f"{v:.4g}"),
    "divergence_top1": ("same likeliest token as the parent", lambda v: f"{100 * v:.2f} %"),
    "divergence_target": ("mean change of ln p of the text", lambda v: f"{v:.4g}"),
    "divergence_tokens": ("tokens compared with the parent", _count),
    "divergence_protocol": ("compared by the protocol", str),
    "bits_per_byte": ("bits per byte (document)", lambda v: f"{v:.3f}"),
    "share_-1": ("share of -1", _share),
    "share_0": ("share of 0", _share),
    "share_+1": ("share of +1", _share),
    "step_seconds": ("training step", lambda v: f"{1e3 * v:.0f} ms"),
    "train_seconds": ("training time", lambda v: f"{v:.0f} s"),
    "train_peak_mib": ("peak memory, training", lambda v: f"{v:.0f} MiB"),
    "native_decode_rate": ("decode, native", lambda v: f"{v:.0f} tokens/s"),
    "torch_decode_rate": ("decode, torch", lambda v: f"{v:.0f} tokens/s"),
    "native_peak_mib": ("peak memory, native", lambda v: f"{v:.0f} MiB"),
    "torch_peak_mib": ("peak memory, torch", lambda v: f"{v:.0f} MiB"),
}


def _cell(metrics: dict[str, Any], name: str) -> str:
    """A metric as people read it, with its standard error where one was measured."""
    if metrics.get(name) is None:
        return "-"
    _, write = MAIN.get(name, (name, _number))
    error = metrics.get(f"{name}_error", metrics.get(f"{name}_sd"))
    if error is None or not name.endswith(("perplexity", "_kl", "_top1")):
        return write(metrics[name])
    return f"{write(metrics[name])} ± {f'{100 * error:.2g} %' if name.endswith('_top1') else f'{error:.2g}'}"


def print_metrics(title: str, metrics: dict[str, Any]) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in metrics.items():
        if value is not None and not name.endswith("_error"):
            table.add_row(MAIN.get(name, (name,))[0], _cell(metrics, name))
    _screen().print(table)


def print_bench(title: str, rows: list[dict[str, Any]], machine: Machine, against: str | None = None) -> None:
    """One line an engine, and below them what the machine can do. against: the last line is that peer's."""
    tests = ("decode", "prefill")
    table = Table(title=title, title_justify="left")
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "engine": lambda r: r["engine"] + (f", {r['isa']}" if r["isa"] else ""),
        "weights, head": lambda r: f"{r['layout']}, {r['head']}",
        "decode tok/s": lambda r: f"{r['decode_tok_s']:.2f} ± {r['decode_sd']:.2f}",
        "MB a token": lambda r: _or_dash(r["bytes_per_token"], lambda v: f"{v / 1e6:.1f}"),
        "of memory": lambda r: _or_dash(r["roofline_share"], _share),
        "prefill tok/s": lambda r: f"{r['prefill_tok_s']:.1f} ± {r['prefill_sd']:.1f}",
        "of int8": lambda r: _or_dash(r["prefill_share"], _share),
        "peak MiB": lambda r: f"{r['peak_rss_mib']:.0f}",
    }
    if rows[0]["decode_joules"] is not None:
        columns["J a token"] = lambda r: f"{r['decode_joules']:.3f}"
    for name in columns:
        table.add_column(name, justify="left" if name in ("engine", "weights, head") else "right")
    for row in rows:
        table.add_row(*(write(row) for write in columns.values()))
    screen = _screen()
    screen.print(table)
    screen.print(
        f"pp{rows[0]['prompt']}, tg{rows[0]['tokens']} x {rows[0]['batch']} behind {rows[0]['context']} tokens, "
        f"{machine.threads} threads. The machine reads {machine.stream_gb_s:.1f} GB/s ({machine.streams} streams a "
        f"thread, prefetched {machine.ahead} bytes ahead; {machine.stream_best:.1f} in its best moment) and "
        f"multiplies {machine.int8_gops:.0f} Gop/s in int8."
        + (" Energy: not measured, no counter can be read." if rows[0]["decode_joules"] is None else ""),
        soft_wrap=True,
        highlight=False,
    )
    if len(rows) > 1 and against is None:
        screen.print(_densities(rows))
    if against is not None:
        *ours, theirs = rows
        for row in ours:
            decode, prefill = (row[f"{test}_tok_s"] / theirs[f"{test}_tok_s"] for test in tests)
            screen.print(
                f"With the {row['head']} head {row['engine']} is {decode:.2f} times as fast as {theirs['engine']} "
                f"({theirs['layout']}, {theirs['head']}) in decode, {prefill:.2f} times in prefill.",
                soft_wrap=True,
                highlight=False,
            )
    slow, counted = (sum(r[f"{t}_{n}"] for r in rows for t in tests) for n in ("slow_samples", "slow_counted"))
    if slow:
        kept = f"; {counted} of them count, for want of better ones" if counted else "; they do not count"
        screen.print(f"The machine was busy in {slow} samples{kept}.", soft_wrap=True, highlight=False)


def _densities(rows: list[dict[str, Any]]) -> Table:
    """Rows with forced densities beside the last one, which reads everything."""
    from .speed.bench import beside_dense

    table = Table(title="what a ReLU² gate makes zero is not read", title_justify="left")
    for name in ("up's rows", "down's columns", "FFN MB", "of dense", "decode tok/s", "times dense", "ideal by bytes"):
        table.add_column(name, justify="right")
    for row in rows:
        r = beside_dense(row, rows[-1])
        shares = (_share(r["up"]), _share(r["down"]), f"{r['ffn_bytes'] / 1e6:.1f}", _share(r["ffn_share"]))
        table.add_row(*shares, f"{r['decode_tok_s']:.2f}", f"{r['times']:.3f}", f"{r['ideal']:.3f}")
    return table


def _or_dash(value: float | None, write: Callable[[float], str]) -> str:
    return "-" if value is None else write(value)


def print_comparison(folders: list[str], every: bool, as_json: bool) -> None:
    """One column a folder, one row a metric that at least one of them has."""
    columns = {}
    for folder in folders:
        if not Path(folder).is_dir():
            raise ValueError(f"there is no model folder {folder}")
        columns[folder] = results.latest(folder)
        if not columns[folder]:
            raise ValueError(f"{folder} has no results.json; run tritkit eval {folder} first")
    if as_json:
        json.dump(columns, sys.stdout, indent=1)
        print()
        return
    known = list(MAIN) + (sorted({n for c in columns.values() for n in c} - set(MAIN)) if every else [])
    table = Table()
    table.add_column("")
    for folder in folders:
        table.add_column(Path(folder).name, justify="right")
    for name in known:
        if any(column.get(name) is not None for column in columns.values()):
            table.add_row(MAIN.get(name, (name,))[0], *(_cell(c, name) for c in columns.values()))
    _screen().print(table)


def print_export(out: str, report: dict[str, Any]) -> None:
    """What was written, and a sentence for each thing that a user should know of it."""
    types = ", ".join(f"{count} {name}" for name, count in report.get("types", {}).items())
    facts = {"matrices": types, **{k: v for k, v in report.items() if k not in ("types", "notes")}}
    print_metrics(out, {k: v for k, v in facts.items() if v})
    for note in report["notes"]:
        _screen().print(note, soft_wrap=True, highlight=False)


def print_differences(a: str, b: str, every: bool, i2_s: str | None, as_json: bool) -> int:
    """One row a tensor that is not equal, then one sentence; returns the exit code."""
    from .difference import DIFFERENT, EQUAL, MISSING, REQUANTISED, ROUNDED, differences
    from .progress import progress
    from .sources import open_model

    left, right = open_model(a, i2_s), open_model(b, i2_s)
    with progress("diff", len(left.tensors), "tensors") as advance:
        found = list(differences(left, right, advance))
    counts = {
        status: sum(d.status == status for d in found) for status in (EQUAL, ROUNDED, REQUANTISED, DIFFERENT, MISSING)
    }
    same = not counts[REQUANTISED] and not counts[DIFFERENT] and not counts[MISSING]
    if as_json:
        rows = [vars(d) for d in found if every or d.status != EQUAL]
        json.dump({"a": a, "b": b, "same": same, **counts, "tensors": rows}, sys.stdout, indent=1)
        print()
        return 0 if same else 1
    shown = [d for d in found if every or d.status != EQUAL]
    if shown:
        table = Table("tensor", "A", "B", "", "largest difference", "relative (rms)")
        for d in shown:
            table.add_row(d.name, *d.forms, d.status, f"{d.largest:.3g}", f"{d.relative:.3g}")
        _screen().print(table)
    most = max(found, key=lambda d: d.relative)
    verdict = "The same weights" + (" but for rounding" * bool(counts[ROUNDED]))
    if not same:
        verdict = "Different weights" if counts[DIFFERENT] or counts[MISSING] else "The same weights, some requantised"
    print(
        f"{verdict}: {counts[EQUAL]} tensors are equal, {counts[ROUNDED]} equal but for rounding, "
        f"{counts[REQUANTISED]} requantised, {counts[DIFFERENT]} different, {counts[MISSING]} in one of the two only"
        + (f"; most by {most.relative:.3g} of its size: {most.name}" if most.relative else "")
    )
    return 0 if same else 1


def print_inspection(source: str | None, i2_s: str | None, linears: bool, as_json: bool) -> None:
    from .inspection import inspect
    from .sources import bundled_folder

    found = inspect(source if source is not None else bundled_folder(), i2_s, linears)
    if as_json:
        json.dump(found, sys.stdout, indent=1)
        print()
        return
    screen = _screen()
    print_metrics(f"{found['source']}: {found['kind']}", found["facts"])
    table = Table("matrices", "layout", "count", "size", "bits per weight", "scales")
    for row in found["matrices"]:
        size, bits = (row[k] for k in ("bytes", "bits_per_weight"))
        scales = f"{row['smallest_scale']:.3g} to {row['largest_scale']:.3g}" if row.get("largest_scale") else "-"
        table.add_row(
            row["place"],
            row["layout"],
            str(row["count"]),
            _or_dash(size, _bytes),
            _or_dash(bits, lambda v: f"{v:.3f}"),
            scales,
        )
    screen.print(table)
    if found["tokenizer"]:
        print_metrics("tokenizer", found["tokenizer"])
    for title, lines in (("can", found["can"]), ("odd", found["odd"])):
        for line in lines:
            screen.print(f"{title}: {line}", soft_wrap=True, highlight=False)
    if found["runs"]:
        screen.print(f"tritkit cannot run it: {found['runs']}", soft_wrap=True, highlight=False)
    if found["per_linear"]:
        table = Table("linear", "-1", "0", "+1")
        for name, shares in found["per_linear"].items():
            table.add_row(name, *(_share(shares[k]) for k in ("share_-1", "share_0", "share_+1")))
        screen.print(table)
    elif linears:
        print("its linears have no ternary or binary codes to count")
