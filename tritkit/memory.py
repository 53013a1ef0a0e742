"""What a process takes of the machine's memory, and what it could still take."""

import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path


def peak_memory_mib() -> float:
    """The largest resident size of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count what the parent held when it started us
        peaks = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        if peaks:
            return int(peaks[0]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take; None where the system does not say.

    Linux: what /proc/meminfo calls available, or what is left below the lowest cgroup limit, where page cache counts
    as free. Elsewhere: all of the machine's memory, since what is in use there can be compressed or swapped.
    """
    limits = [*_meminfo(root), *_cgroup_rest(root)]
    if limits:
        return max(min(limits), 0)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def _meminfo(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _cgroup_rest(root: Path) -> Iterator[int]:
    """What is left in each cgroup around this process, version 2 ("0::/path") and version 1 ("4:memory:/path")."""
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0":
            top, limit, used, cache = "sys/fs/cgroup", "memory.max", "memory.current", "file"
        elif "memory" in controllers.split(","):
            top, limit, used, cache = (
                "sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_cache",
            )
        else:
            continue
        inner = root / top / path.lstrip("/")
        for group in (inner, *inner.parents):
            found = [_lines(group / limit), _lines(group / used)]
            if all(found) and all(text[0].isdigit() for text in found):
                statistics = dict(line.split() for line in _lines(group / "memory.stat"))
                yield int(found[0][0]) - int(found[1][0]) + int(statistics.get(cache, 0))
            if group == root / top:
                break


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
