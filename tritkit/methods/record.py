"""What quantising did to a linear, in numbers that a report can draw: under 20 kB each, in results.json."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formats import QTensor
from ..kernels.floats import linear
from ..stored import InputQuantizer
from .recipe import Plan
from .stats import BINS, OUTLIER, InputStats, decibels

TOP_CHANNELS = 32
PART = 1 << 23  # values that a histogram counts at a time: its counts are float32


def record_of(
    before: Tensor,
    after: Tensor,
    weight: QTensor | None,
    plan: Plan,
    stats: InputStats | None,
    seconds: float,
    inputs: InputQuantizer | None = None,
    layout: str | None = None,
) -> dict[str, Any]:
    """before, after: float32 [out, in], the weights and what the codes stand for; inputs: what x goes through first;
    layout: of the codes where they are stored (none: the format's own).

    Errors of outputs are relative to the outputs' own size: |W~ x~ - W x|^2 / |W x|^2, a mean over all calibration
    tokens, or over a sample of them where inputs are rounded or the method has no use for products of inputs.
    """
    difference = after - before
    signal, noise = mean_square(before), mean_square(difference)
    found: dict[str, Any] = {
        "format": plan.format.name if plan.format else None,
        "method": plan.method if plan.format else None,
        "inputs": plan.inputs,
        "bits": bits_of(weight, layout),
        "mse": noise,
        "snr_db": decibels(signal, noise),
        "seconds": round(seconds, 4),
        "histograms": {"before": histogram(before), "after": histogram(after), "error": histogram(difference)},
    }
    if stats is None or not stats.tokens:
        return found
    about = stats.once("record", lambda: inputs_record(stats))
    found |= {"output_error": _output_error(before, after, stats, inputs), **about["facts"]}
    found["histograms"]["inputs"] = about["histogram"]
    if "note" in stats.derived:
        found["note"] = stats.derived["note"]
    return found


def _output_error(before: Tensor, after: Tensor, stats: InputStats, inputs: InputQuantizer | None) -> float:
    if inputs is None:
        noise, signal = stats.output_error(after - before), stats.output_error(before)
    else:
        rows = stats.rows()
        wanted = linear(rows, before)
        noise, signal = mean_square(linear(inputs(rows), after) - wanted), mean_square(wanted)
    return noise / signal if signal else 0.0


def mean_square(values: Tensor) -> float:
    """Summed in float64 without a copy."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2 / max(values.numel(), 1)


def inputs_record(stats: InputStats) -> dict[str, Any]:
    """What is to be said of the inputs alone."""
    rows = stats.rows()
    largest = torch.topk(stats.largest, min(TOP_CHANNELS, stats.features))
    facts = {
        "outliers": stats.outliers / (stats.tokens * stats.features),
        "outlier_threshold": OUTLIER,
        "calibration_tokens": stats.tokens,
        "top_channels": [[int(c), _short(v)] for v, c in zip(*largest, strict=True)],
        "ranges": ranges_of(rows) | {"absmax": [_short(-stats.largest.max()), _short(stats.largest.max())]},
    }
    return {"facts": facts, "histogram": histogram(rows)}


def bits_of(weight: QTensor | None, layout: str | None = None) -> float | None:
    """Bits a weight, scales included, as a layout (none: the format's own) stores it."""
    if weight is None:
        return None
    from .rtn import packed

    return 8 * packed(weight, layout).nbytes / weight.codes.numel()


def histogram(values: Tensor) -> dict[str, Any]:
    """BINS equal bins from the smallest to the largest value: {"low", "high", "counts"}."""
    if not values.numel():
        return {"low": 0.0, "high": 0.0, "counts": [0] * BINS}
    flat = values.detach().float().flatten()
    low, high = (float(v) for v in torch.aminmax(flat))
    counts = torch.zeros(BINS, dtype=torch.float64)
    if high > low:
        for part in flat.split(PART):
            counts += torch.histc(part, BINS, low, high)
    else:
        counts[0] = flat.numel()
    return {"low": _short(low), "high": _short(high), "counts": [int(c) for c in counts]}


def ranges_of(rows: Tensor) -> dict[str, list[float]]:
    """The range of the inputs that each method would choose for int8 codes of the whole tensor: {method: [lo, hi]}."""
    from ..formats import integer
    from .ranges import RangeObserver

    methods = ("absmax", "percentile", "mse", "entropy")
    observer = RangeObserver(integer(8, "tensor"), methods)
    observer.update(rows)
    return {name: [_short(low), _short(high)] for name, (low, high) in observer.ranges().items()}


def _short(value: Any) -> float:
    """Six digits say enough in a picture."""
    return float(f"{float(value):.6g}")
