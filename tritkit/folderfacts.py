"""What can be measured of a model folder without running it. numpy only."""

from __future__ import annotations

from typing import Any

import numpy as np

from .checkpoint import ModelFolder
from .models.shapes import linear_names, linear_shape

SHARES = {"share_-1": -1, "share_0": 0, "share_+1": 1}
PerLinear = dict[str, dict[str, Any]]


def describe(folder: ModelFolder, per_linear: PerLinear | None = None) -> dict[str, Any]:
    """Measured sizes of a folder. per_linear: its ``code_shares``, where they are at hand."""
    return {
        "family": folder.config.family,
        "weights": folder.config.weights or folder.layout or "full",
        "layout": folder.layout or "floats",
        "parameters": folder.parameters(),
        "bits_per_weight": folder.bits_per_weight(),
        "file_bytes": folder.file_bytes(),
        **shares(folder, code_shares(folder) if per_linear is None else per_linear),
    }


def code_shares(folder: ModelFolder) -> PerLinear:
    """Share of each code of -1, 0, +1 in every ternary or binary linear that is stored as codes."""
    found = {}
    coded = folder.layouts if folder.config.weights is not None else ()
    for name in (n for n in linear_names(folder.config) if n in coded):
        codes = folder.codes(name).codes
        found[name] = {share: float((codes == code).mean()) for share, code in SHARES.items()}
    return found


def shares(folder: ModelFolder, per_linear: PerLinear) -> dict[str, float]:
    """The same over all linears together."""
    if not per_linear:
        return {}
    sizes = {name: int(np.prod(linear_shape(folder.config, name))) for name in per_linear}
    total = sum(sizes.values())
    return {share: sum(per_linear[n][share] * sizes[n] for n in sizes) / total for share in SHARES}
