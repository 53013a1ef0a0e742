"""What the machine can do, how quiet it is, and what it draws: the limits that a measured speed is held against."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tritkit import _native

BUFFER = 512 << 20  # bytes, far beyond any cache
STREAMS = (1, 2, 4, 8)  # side by side on each thread
AHEAD = (0, 2048)  # bytes of prefetch
PASSES = 5
PROBE_SECONDS = 3e-4
SETTLE_SECONDS = 5e-3  # until other people's threads have stopped spinning
PIECE_SECONDS = 0.25  # of work between two probes

QUIET_PEAK = 0.93  # of the integer peak, on every thread, or somebody else is using the core
QUIET_WAIT = 0.015  # of the time may be spent waiting for a core that another process has


class Limits:
    """Reads memory and multiplies in registers, on ``threads`` threads. For its buffer's sake in its own process."""

    def __init__(self, threads: int, isa: str | None = None):
        self._runner = _native.Runner(threads, isa or "")
        self._reader = _native.MemoryReader(self._runner, BUFFER)

    def read(self) -> dict[tuple[int, int], list[float]]:
        """GB/s of some passes for every number of streams and every prefetch."""
        found: dict[tuple[int, int], list[float]] = {(s, a): [] for s in STREAMS for a in AHEAD}
        for _ in range(PASSES):
            for (streams, ahead), rates in found.items():
                rates.append(self._reader.read(streams, ahead))
        return found

    def peak(self) -> list[float]:
        """Gop/s of each thread in the best of some runs."""
        return max((_native.integer_peak(self._runner, 5e-3) for _ in range(10)), key=sum)


@dataclass(frozen=True)
class Machine:
    """The best that was measured. ``stream_median`` is the median of the best way to read."""

    stream_gb_s: float
    stream_median: float
    streams: int
    ahead: int
    int8_gops: float
    threads: int


def best_of(reads: Iterable[dict[tuple[int, int], list[float]]], peaks: Iterable[list[float]]) -> Machine:
    """What several visits to ``Limits`` found together."""
    rates: dict[tuple[int, int], list[float]] = {}
    for read in reads:
        for way, passes in read.items():
            rates.setdefault(way, []).extend(passes)
    (streams, ahead), values = max(rates.items(), key=lambda item: median(item[1]))
    peak = max(peaks, key=sum)
    return Machine(max(max(v) for v in rates.values()), median(values), streams, ahead, sum(peak), len(peak))


@dataclass(frozen=True)
class Sample:
    """One timed piece of work. ``peak``: Gop/s of the slowest thread in the slowest probe; ``waited``: share of the
    time that our threads stood in line for a core; joules: of the whole processor, None where it cannot be read."""

    seconds: float
    peak: float
    waited: float
    joules: float | None

    def is_quiet(self, peak_of_a_thread: float) -> bool:
        return self.peak >= QUIET_PEAK * peak_of_a_thread and self.waited <= QUIET_WAIT


class Stopwatch:
    """Times work, and looks before, between and after it whether the machine is as fast as it can be."""

    def __init__(self, threads: int, isa: str | None = None):
        self._runner = _native.Runner(threads, isa or "")
        self._counters = energy_counters()

    def time(self, steps: Iterable[object]) -> Sample:
        """The time that ``steps`` takes to be exhausted; the probes between its items do not count."""
        peak, seconds, waited = self._probe(), 0.0, 0.0
        joules: float | None = 0.0 if self._counters else None
        steps = iter(steps)
        over = False
        while not over:
            wait, energy = _waited(), _energy(self._counters)
            begin = time.perf_counter()
            for _ in steps:
                if time.perf_counter() - begin > PIECE_SECONDS:
                    break
            else:
                over = True
            seconds += time.perf_counter() - begin
            waited += _waited() - wait
            if joules is not None:
                joules += _spent(energy, _energy(self._counters), self._counters)
            peak = min(peak, self._probe())
        return Sample(seconds, peak, waited / max(seconds, 1e-9), joules)

    def _probe(self) -> float:
        time.sleep(SETTLE_SECONDS)
        return min(max((_native.integer_peak(self._runner, PROBE_SECONDS) for _ in range(2)), key=min))


def _waited() -> float:
    """Seconds that the threads of this process have stood in line for a core so far; 0 where nobody counts them."""
    total = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(file.read_text().split()[1])
        except (OSError, IndexError, ValueError):  # the thread has ended
            continue
    return total * 1e-9


def energy_counters(root: Path = Path("/sys/class/powercap")) -> list[tuple[Path, int]]:
    """RAPL's counters of whole processors that may be read here: file and the microjoules at which it wraps."""
    found = []
    for zone in sorted(root.glob("*rapl*:*")):
        if zone.name.count(":") != 1:  # parts of a processor
            continue
        try:
            if (zone / "name").read_text().startswith("package"):
                int((zone / "energy_uj").read_text())
                found.append((zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())))
        except (OSError, ValueError):  # usually only root may read it
            continue
    return found


def _energy(counters: list[tuple[Path, int]]) -> list[int]:
    return [int(file.read_text()) for file, _ in counters]


def _spent(before: list[int], after: list[int], counters: list[tuple[Path, int]]) -> float:
    """Joules between two readings."""
    pairs = zip(before, after, counters, strict=True)
    return sum((b - a if b >= a else b - a + wraps) * 1e-6 for a, b, (_, wraps) in pairs)
