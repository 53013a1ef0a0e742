"""What can be measured of a model folder without running it. numpy only."""

from __future__ import annotations

from typing import Any

from .checkpoint import ModelFolder, linear_names


def describe(folder: ModelFolder) -> dict[str, Any]:
    """Measured sizes of a folder."""
    return {
        "family": folder.config.family,
        "weights": folder.config.weights or "full",
        "layout": folder.layout or "floats",
        "parameters": folder.parameters(),
        "bits_per_weight": folder.bits_per_weight(),
        "file_bytes": folder.file_bytes(),
        **shares(folder),
    }


def code_shares(folder: ModelFolder) -> dict[str, dict[str, float]]:
    """Share of each code of -1, 0, +1 in every linear of a packed folder."""
    found = {}
    for name in linear_names(folder.config) if folder.is_packed else ():
        codes = folder.codes(name).codes
        found[name] = {f"share_{c:+d}" if c else "share_0": float((codes == c).mean()) for c in (-1, 0, 1)}
    return found


def shares(folder: ModelFolder) -> dict[str, float]:
    """The same over all linears together."""
    per_linear = code_shares(folder)
    sizes = {name: folder.codes(name).codes.size for name in per_linear}
    total = sum(sizes.values())
    keys = ("share_-1", "share_0", "share_+1")
    return {k: sum(per_linear[n][k] * sizes[n] for n in sizes) / total for k in keys} if total else {}
