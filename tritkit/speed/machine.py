"""What the machine can do, how quiet it is, and what it draws: the limits that a measured speed is held against."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from tritkit import _native

BUFFER = 512 << 20  # bytes, far beyond any cache
STREAMS = (1, 2, 4, 8)  # side by side on each thread
AHEAD = (0, 2048)  # bytes of prefetch
PASSES = 3  # in each way, at each look
PEAK_SECONDS = 5e-3
PROBE_SECONDS = 3e-4
SETTLE_SECONDS = 5e-3  # until other people's threads have stopped spinning
PIECE_SECONDS = 0.25  # of work between two probes

QUIET_PEAK = 0.93  # of the integer peak, on every thread, or somebody else is using the core
QUIET_WAIT = 0.015  # of the time may be spent waiting for a core that another process has


class Limits:
    """Reads memory and multiplies in registers, on ``threads`` threads. For its buffer's sake in its own process."""

    def __init__(self, threads: int, isa: str | None = None):
        self._runner = _native.Runner(threads, isa or "")
        self.reader = _native.MemoryReader(self._runner, BUFFER)

    def look(self) -> Look:
        """Some passes over the buffer in every way, and between them runs of the peak loop."""
        reads: dict[tuple[int, int], list[float]] = {(s, a): [] for s in STREAMS for a in AHEAD}
        began, waited = time.perf_counter(), waited_seconds()
        peaks = [self._peak()]
        for _ in range(PASSES):
            for (streams, ahead), rates in reads.items():
                rates.append(self.reader.read(streams, ahead))
            peaks.append(self._peak())
        waited = (waited_seconds() - waited) / (time.perf_counter() - began) / self._runner.threads
        return Look(reads, max(peaks, key=sum), min(min(peak) for peak in peaks), waited)

    def _peak(self) -> list[float]:
        return _native.integer_peak(self._runner, PEAK_SECONDS)


@dataclass(frozen=True)
class Look:
    """GB/s of each pass by (streams, ahead); Gop/s of each thread in the best run, and of the slowest in any run; the
    share of time that we stood in line for a core."""

    reads: dict[tuple[int, int], list[float]]
    peak: list[float]
    slowest: float
    waited: float

    def stream(self) -> float:
        """GB/s of the best way to read, the median of its passes."""
        return max(median(rates) for rates in self.reads.values())


@dataclass(frozen=True)
class Machine:
    """What several looks, taken between the samples, have seen.

    Other tenants of a host take memory bandwidth that no probe of the cores shows, for minutes or for a moment. So
    ``stream_gb_s`` is the mean over the quiet looks, as a speed is over its samples; ``stream_best``, the fastest pass.
    """

    stream_gb_s: float
    stream_best: float
    streams: int  # of the way that was best at most looks
    ahead: int
    int8_gops: float
    threads: int

    @property
    def peak_of_a_thread(self) -> float:
        return self.int8_gops / self.threads


def machine_of(looks: Sequence[Look]) -> Machine:
    """The best way is that with the highest median over all looks; the peak is the highest. Looks at a busy machine
    say nothing about its memory; where it was busy at all of them, the fastest one does."""
    peak = max((look.peak for look in looks), key=sum)
    thread = sum(peak) / len(peak)
    quiet = [look for look in looks if is_quiet(look.slowest, look.waited, thread)]
    quiet = quiet or [max(looks, key=Look.stream)]
    ways = {way: median(r for look in quiet for r in look.reads[way]) for way in quiet[0].reads}
    streams, ahead = max(ways, key=lambda way: ways[way])
    return Machine(
        stream_gb_s=fmean(look.stream() for look in quiet),
        stream_best=max(rate for look in looks for rates in look.reads.values() for rate in rates),
        streams=streams,
        ahead=ahead,
        int8_gops=sum(peak),
        threads=len(peak),
    )


def is_quiet(peak: float, waited: float, peak_of_a_thread: float) -> bool:
    return peak >= QUIET_PEAK * peak_of_a_thread and waited <= QUIET_WAIT


@dataclass(frozen=True)
class Sample:
    """One timed piece of work. ``peak``: Gop/s of the slowest thread in the slowest probe; ``waited``: share of its
    threads' time that they stood in line for a core; joules: of the whole processor, None where nobody tells."""

    seconds: float
    peak: float
    waited: float
    joules: float | None

    def is_quiet(self, peak_of_a_thread: float) -> bool:
        return is_quiet(self.peak, self.waited, peak_of_a_thread)

    def noise(self, peak_of_a_thread: float) -> float:
        """What was taken from us, by both measures."""
        return max(1 - self.peak / peak_of_a_thread, 0.0) + self.waited


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
            wait, energy = waited_seconds(), _energy(self._counters)
            begin = time.perf_counter()
            for _ in steps:
                if time.perf_counter() - begin > PIECE_SECONDS:
                    break
            else:
                over = True
            seconds += time.perf_counter() - begin
            waited += waited_seconds() - wait
            if joules is not None:
                joules += _spent(energy, _energy(self._counters), self._counters)
            peak = min(peak, self._probe())
        return Sample(seconds, peak, waited / max(seconds, 1e-9) / self._runner.threads, joules)

    def _probe(self) -> float:
        time.sleep(SETTLE_SECONDS)
        return min(max((_native.integer_peak(self._runner, PROBE_SECONDS) for _ in range(2)), key=min))


def waited_seconds() -> float:
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
