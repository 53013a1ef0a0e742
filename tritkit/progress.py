"""Progress bars with rate and time left, for people; a line now and then where no terminal is listening."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[..., None]


def console() -> Console:
    """Where people read: standard error, so that standard output stays what a verb prints."""
    return Console(file=sys.stderr, highlight=False)


def warn(sentence: str) -> None:
    console().print(f"warning: {sentence}", style="yellow", soft_wrap=True)


@contextmanager
def progress(title: str, total: float, unit: str = "", done: float = 0.0, every: float = 30.0) -> Iterator[Advance]:
    """Yields advance(amount, note=""); shows done, rate and time left. ``done``: what an earlier run did already."""
    screen = console()
    if not screen.is_terminal:
        yield _Lines(title, total, unit, done, every, screen)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=screen, speed_estimate_period=60) as bar:
        task = bar.add_task(title, total=total, completed=int(done), rate="", note="")
        start = time.monotonic()
        here = 0.0  # what this process did: the rate is of that alone

        def advance(amount: float = 1, note: str = "") -> None:
            nonlocal here
            here += amount
            rate = here / max(time.monotonic() - start, 1e-9)
            fields: dict[str, Any] = {"note": note} if note else {}
            bar.update(task, advance=amount, rate=_rate(rate, unit), **fields)

        yield advance


class _Lines:
    """The same for a log file: one line every so many seconds and one at the end."""

    def __init__(self, title: str, total: float, unit: str, done: float, every: float, screen: Console):
        self.title, self.total, self.unit, self.every, self.screen = title, total, unit, every, screen
        self.start = self.shown = time.monotonic()
        self.before = self.done = done

    def __call__(self, amount: float = 1, note: str = "") -> None:
        was_over = self.done >= self.total
        self.done = min(self.done + amount, self.total)  # totals may be guesses
        now = time.monotonic()
        if now - self.shown >= self.every or (self.done >= self.total and not was_over):
            self.shown = now
            rate = (self.done - self.before) / max(now - self.start, 1e-9)
            left = (self.total - self.done) / max(rate, 1e-9)
            share = self.done / max(self.total, 1e-9)
            line = f"{self.title}: {share:.0%} {_rate(rate, self.unit)}, {left:.0f} s left {note}"
            self.screen.print(line, soft_wrap=True)


def _rate(rate: float, unit: str) -> str:
    for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if rate >= size:
            return f"{rate / size:.1f} {prefix}{unit}/s"
    return f"{rate:.2f} {unit}/s"
