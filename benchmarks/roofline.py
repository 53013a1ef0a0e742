"""How near each matrix of a model comes to what the machine can do, drawn as an SVG.

    python benchmarks/roofline.py --shape bitnet-2b4t --threads 2 --out docs/roofline.svg

For every shape of matrix and M tokens at a time: the least time that the machine allows, which is the larger of its
bytes at the best way to read and of its operations at the int8 peak, over the time that the product takes. Each matrix
exists so often that it comes from memory and not from a cache. Memory, peak and product are measured in turns, and the
median of their ratio counts: other tenants of the host slow all three.
"""

import argparse
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from tritkit import _native
from tritkit.models.config import ModelConfig
from tritkit.models.shapes import linear_shape
from tritkit.speed.machine import QUIET_WAIT, Limits, machine_of, waited_seconds
from tritkit.speed.shapes import SHAPES, draw, shape_named, ternary_words

TOKENS = (1, 2, 4, 8, 16, 32, 128, 512)
FROM_MEMORY = 128 << 20  # bytes of copies: several times a large cache
MOST_OPERATIONS = 2e11  # of a pass, where memory is no longer the limit
PASSES = 9
MOST_PASSES = 60  # where other processes take our cores
PEAK_SECONDS = 1e-3
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e")


@dataclass
class Curve:
    """One shape of matrix. shares and by_memory: for each of TOKENS, the share and whether memory is the limit."""

    name: str
    rows: int
    columns: int
    shares: list[float] = field(default_factory=list)
    by_memory: list[bool] = field(default_factory=list)
    disturbed: int = 0  # passes that count although another process had one of our cores


def curves_of(config: ModelConfig) -> list[Curve]:
    names = {"q, o": "q_proj", "k, v": "k_proj", "gate, up": "up_proj", "down": "down_proj"}
    return [Curve(label, *linear_shape(config, f"x.{name}")) for label, name in names.items()]


def measure(curve: Curve, runner: _native.Runner, reader: _native.MemoryReader, way: tuple[int, int]) -> None:
    chance = np.random.SFC64(0)
    linears: list[_native.Linear] = []
    while not linears or sum(linear.bytes for linear in linears) < FROM_MEMORY:
        words = np.concatenate(list(draw(chance, curve.rows // 4 * curve.columns // 2, ternary_words())))
        data = words.view(np.uint8).reshape(curve.rows // 4, curve.columns)
        linears.append(_native.Linear(runner, "hf_autobitlinear", data, curve.rows, curve.columns, 1.0, "a8", None))
    for tokens in TOKENS:
        operations = 2 * tokens * curve.rows * curve.columns
        few = linears[: max(1, int(MOST_OPERATIONS / operations))]
        passes = []
        while len(passes) < MOST_PASSES and sum(p.waited <= QUIET_WAIT for p in passes) < PASSES:
            passes.append(one_pass(runner, reader, way, few, tokens, operations))
        calm = sorted(passes, key=lambda p: p.waited)[:PASSES]
        curve.shares.append(median(p.share for p in calm))
        curve.by_memory.append(sum(p.by_memory for p in calm) > PASSES / 2)
        curve.disturbed += sum(p.waited > QUIET_WAIT for p in calm)


@dataclass(frozen=True)
class Pass:
    """A product beside what the machine did just before; waited: share of the time in line for a core."""

    share: float
    by_memory: bool
    waited: float


def one_pass(
    runner: _native.Runner,
    reader: _native.MemoryReader,
    way: tuple[int, int],
    linears: list[_native.Linear],
    tokens: int,
    operations: int,
) -> Pass:
    began, waited = time.perf_counter(), waited_seconds()
    read = linears[0].bytes / reader.read(*way)  # nanoseconds
    multiply = operations / sum(_native.integer_peak(runner, PEAK_SECONDS))
    (seconds,) = _native.product_seconds(runner, linears, tokens, 1)
    waited = (waited_seconds() - waited) / (time.perf_counter() - began) / runner.threads
    return Pass(max(read, multiply) * 1e-9 / seconds, read > multiply, waited)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="bitnet-2b4t", choices=[n for n in SHAPES if n.startswith("bitnet")])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="the SVG to write")
    options = parser.parse_args()
    runner = _native.Runner(options.threads)
    limits = Limits(runner.threads)
    machine = machine_of([limits.look() for _ in range(3)])
    curves = curves_of(shape_named(options.shape))
    for curve in curves:
        measure(curve, runner, limits.reader, (machine.streams, machine.ahead))
    title = f"{options.shape} on {runner.threads} threads ({runner.isa}): share of what the machine allows"
    heads = (f"M = {tokens}" for tokens in TOKENS)
    table = Table("matrix", "rows x columns", *heads, title=title, title_justify="left")
    for curve in curves:
        table.add_row(curve.name, f"{curve.rows} x {curve.columns}", *(f"{share:.0%}" for share in curve.shares))
    Console(width=120).print(table)
    disturbed = sum(curve.disturbed for curve in curves)
    if disturbed:
        print(f"the machine was busy: {disturbed} of {len(curves) * len(TOKENS) * PASSES} passes were disturbed")
    words = f"memory {machine.stream_gb_s:.0f} GB/s, int8 {machine.int8_gops:.0f} Gop/s"
    options.out.write_text(draw_svg(title, words, curves), encoding="utf-8")


# --- The picture: tokens on a logarithmic axis to the right, shares upwards.

WIDTH, HEIGHT = 760, 430
LEFT, RIGHT, TOP, BOTTOM = 56, 150, 52, 56


def draw_svg(title: str, machine: str, curves: list[Curve]) -> str:
    def x(tokens: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log2(tokens) / math.log2(TOKENS[-1])

    def y(share: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(share, 1.1) / 1.1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(LEFT, 20, title, size=14),
        text(LEFT, 37, machine, size=11),
    ]
    for percent in range(0, 101, 20):
        at = y(percent / 100)
        parts.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(text(LEFT - 8, at + 4, f"{percent} %", anchor="end"))
    for tokens in TOKENS:
        parts.append(text(x(tokens), HEIGHT - BOTTOM + 20, str(tokens), anchor="middle"))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, "tokens at a time (M)", anchor="middle"))
    for i, (curve, colour) in enumerate(zip(curves, COLOURS, strict=False)):
        points = [(x(tokens), y(share)) for tokens, share in zip(TOKENS, curve.shares, strict=True)]
        line = "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
        parts.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (a, b), tokens, share, hollow in zip(points, TOKENS, curve.shares, curve.by_memory, strict=True):
            fill = "white" if hollow else colour
            parts.append(
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{fill}" stroke="{colour}" stroke-width="2">'
                f"<title>{curve.name}, M = {tokens}: {share:.0%}</title></circle>"
            )
        at = TOP + 20 + 36 * i
        parts.append(f'<path d="M{WIDTH - RIGHT + 14} {at}h18" stroke="{colour}" stroke-width="2"/>')
        parts.append(text(WIDTH - RIGHT + 38, at + 4, curve.name))
        parts.append(text(WIDTH - RIGHT + 38, at + 18, f"{curve.rows} x {curve.columns}", size=10))
    for i, line in enumerate(("hollow: the limit is", "the memory; filled:", "the integer units")):
        parts.append(text(WIDTH - RIGHT + 14, HEIGHT - BOTTOM - 30 + 14 * i, line, size=10))
    return "\n".join([*parts, "</svg>", ""])


def text(x: float, y: float, words: str, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="#222">{words}</text>'


if __name__ == "__main__":
    main()
