"""The schema of results.json, and appending to it so that nothing is ever lost. Imports nothing heavy."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import jsonfile

SCHEMA = 1


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    model = named[0] if named else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": model, "cores": cores, "system": platform.system(), "python": platform.python_version()}


def record(
    folder: Path | str,
    verb: str,
    settings: dict[str, Any],
    metrics: dict[str, Any],
    per_linear: dict[str, dict[str, Any]] | None = None,
    begins: bool = False,
) -> dict[str, Any]:
    """Append one run to folder/results.json atomically and return it. Metrics are numbers, strings or None.

    begins: this run made the model, so what the folder held of an older one moves to results.previous.json.
    """
    from . import __version__
    from .files import atomic_open

    run = {
        "verb": verb,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "machine": machine(),
        "settings": settings,
        "metrics": metrics,
        "per_linear": per_linear or {},
    }
    runs = [*([] if begins else read(folder)), run]
    if begins and (Path(folder) / "results.json").is_file():
        os.replace(Path(folder) / "results.json", Path(folder) / "results.previous.json")
    with atomic_open(Path(folder) / "results.json") as file:
        json.dump({"schema": SCHEMA, "runs": runs}, file, indent=1)
        file.write("\n")
    return run


def read(folder: Path | str) -> list[dict[str, Any]]:
    """The runs of folder/results.json, oldest first; none where there is no such file. ValueError where it is odd."""
    path = Path(folder) / "results.json"
    if not path.is_file():
        return []
    tree = jsonfile.read(path)
    check(tree, path)
    return tree["runs"]


def check(tree: Any, path: Path | str = "results.json") -> None:
    """ValueError that says what is wrong where ``tree`` does not follow the schema."""
    if not isinstance(tree, dict) or tree.get("schema") != SCHEMA:
        found = tree.get("schema") if isinstance(tree, dict) else type(tree).__name__
        raise ValueError(f"{path} has schema {found}, but this tritkit reads schema {SCHEMA}")
    kinds = {
        "verb": str,
        "time": str,
        "version": str,
        "machine": dict,
        "settings": dict,
        "metrics": dict,
        "per_linear": dict,
    }
    if not isinstance(tree.get("runs"), list):
        raise ValueError(f"{path} has no runs of type list")
    for number, run in enumerate(tree["runs"]):
        for key, kind in kinds.items():
            if not isinstance(run, dict) or not isinstance(run.get(key), kind):
                raise ValueError(f"{path}: run {number} has no {key} of type {kind.__name__}")


def latest(folder: Path | str) -> dict[str, Any]:
    """The newest value of every metric of a folder, over all its runs; what a run could not say changes nothing."""
    merged: dict[str, Any] = {}
    for run in read(folder):
        merged.update({name: value for name, value in run["metrics"].items() if value is not None})
    return merged
