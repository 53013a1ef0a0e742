"""Rotary frequencies and the ways to stretch them, with transformers' formulas. numpy only: both engines use them.

A pair of dimensions i of a head turns by position * frequency[i]. Scaling lowers frequencies, so that a context longer
than the trained one turns no further than training did; yarn also multiplies cos and sin, which sharpens attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..jsonfile import shown


@dataclass(frozen=True)
class Rope:
    """Scaling of the rotary embedding; the entries of ``rope_parameters`` in config.json. None: the type's default."""

    type: str = "default"  # a row of SCALINGS
    factor: float | None = None
    original_max_position_embeddings: int | None = None  # the trained context; llama3, yarn
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None
    attention_factor: float | None = None  # yarn
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    def __post_init__(self) -> None:
        if self.type not in SCALINGS:
            raise ValueError(f"rope scaling {self.type!r} is none that tritkit runs; known are {', '.join(SCALINGS)}")
        for name in SCALINGS[self.type].needs:
            if getattr(self, name) is None:
                raise ValueError(f"rope scaling {self.type!r} needs {name}")
        for name, value in asdict(self).items():
            if name not in ("type", "truncate") and value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} of rope scaling {self.type!r} is {value}, expected a number above 0")
        if self.type == "llama3" and not self.high_freq_factor > self.low_freq_factor:  # type: ignore[operator]
            raise ValueError(
                f"high_freq_factor of rope scaling 'llama3' is {self.high_freq_factor}, expected more than "
                f"low_freq_factor, {self.low_freq_factor}"
            )

    def to_hf(self, theta: float) -> dict[str, Any]:
        given = {name: value for name, value in asdict(self).items() if name != "type" and value is not None}
        return {"rope_type": self.type, "rope_theta": theta, **given}


def rope_from_hf(hf: dict[str, Any], max_positions: int) -> tuple[Rope, float | None]:
    """Scaling and theta of a config.json, in either spelling; theta is None where it is silent."""
    table = hf.get("rope_scaling") or hf.get("rope_parameters") or {}  # which transformers takes first
    if not isinstance(table, dict):
        raise ValueError(f"config.json has rope parameters {shown(table)}, which are no table")
    table = {**table, "type": table.get("rope_type", table.get("type", "default"))}
    kind = table["type"]
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise ValueError(f"config.json has rope scaling {shown(kind)}; tritkit runs {', '.join(SCALINGS)}")
    for where in (hf, table):
        if where.get("partial_rotary_factor") not in (None, 1):
            factor = where["partial_rotary_factor"]
            raise ValueError(f"config.json has partial_rotary_factor {shown(factor)}; tritkit rotates whole heads")
    if kind in ("llama3", "yarn"):
        trained = hf.get("original_max_position_embeddings") or table.get("original_max_position_embeddings")
        table["original_max_position_embeddings"] = trained or max_positions
        if kind == "yarn" and table.get("factor") is None:
            table["factor"] = max_positions / _number(table, "original_max_position_embeddings")
    used = ("type", *SCALINGS[kind].needs, *SCALINGS[kind].takes)
    values = {name: table[name] for name in used if table.get(name) is not None}
    for name in values:
        if name == "truncate":
            values[name] = bool(values[name])
        elif name != "type":
            whole = name == "original_max_position_embeddings"
            values[name] = int(_number(table, name)) if whole else float(_number(table, name))
    theta = table.get("rope_theta", hf.get("rope_theta"))
    if theta is not None:
        theta = float(_number({"rope_theta": theta}, "rope_theta"))
    return Rope(**values), theta


def _number(table: dict[str, Any], name: str) -> float:
    value = table[name]
    if type(value) not in (int, float) or not 0 < value < 2**63:
        raise ValueError(f"config.json has {name} {shown(value)}, expected a number above 0")
    return value


def frequencies(rope: Rope, theta: float, head_dim: int, max_positions: int) -> tuple[NDArray[np.float32], float]:
    """Turn of each pair of dimensions from one position to the next, float32 [head_dim / 2], and what multiplies cos
    and sin."""
    plain = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    try:
        with np.errstate(all="ignore"):
            scaled, attention_factor = SCALINGS[rope.type].scale(rope, plain, theta, max_positions)
            turns = scaled.astype(np.float32)
    except (OverflowError, ZeroDivisionError):
        turns, attention_factor = np.full(1, np.nan, np.float32), math.nan
    if not np.isfinite(turns).all() or not math.isfinite(attention_factor):
        raise ValueError(f"rope scaling {rope.type!r} makes frequencies that are no finite numbers")
    return turns, attention_factor


Scaled = tuple[NDArray[np.float64], float]


def _default(rope: Rope, plain: NDArray[np.float64], theta: float, max_positions: int) -> Scaled:
    return plain, 1.0


def _linear(rope: Rope, plain: NDArray[np.float64], theta: float, max_positions: int) -> Scaled:
    """Positions divided by the factor."""
    assert rope.factor is not None
    return plain / rope.factor, 1.0


def _llama3(rope: Rope, plain: NDArray[np.float64], theta: float, max_positions: int) -> Scaled:
    """Llama 3.1: waves that fit high_freq_factor times into the trained context stay, those that do not fit
    low_freq_factor times are divided by the factor, those between are mixed."""
    assert rope.factor and rope.low_freq_factor and rope.high_freq_factor
    fits = (rope.original_max_position_embeddings or max_positions) * plain / (2 * math.pi)
    kept = np.clip((fits - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    return (1 - kept) * plain / rope.factor + kept * plain, 1.0


def _yarn(rope: Rope, plain: NDArray[np.float64], theta: float, max_positions: int) -> Scaled:
    """YaRN (Peng et al. 2023): the same idea with a ramp over the dimensions, from the one that turns beta_fast times
    within the trained context to the one that turns beta_slow times."""
    assert rope.factor
    size, trained = 2 * len(plain), rope.original_max_position_embeddings or max_positions

    def dimension(turns: float) -> float:
        return size * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(rope.beta_fast or 32), dimension(rope.beta_slow or 1)
    if rope.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001
    divided = np.clip((np.arange(len(plain)) - low) / (high - low), 0, 1)
    attention = rope.attention_factor
    if attention is None:
        all_dim = rope.mscale_all_dim if rope.mscale and rope.mscale_all_dim else None
        attention = _mscale(rope.factor, rope.mscale if all_dim else 1.0)
        attention /= _mscale(rope.factor, all_dim) if all_dim else 1.0
    return divided * plain / rope.factor + (1 - divided) * plain, attention


def _mscale(factor: float, mscale: float | None) -> float:
    return 1.0 if factor <= 1 else 0.1 * (mscale or 1.0) * math.log(factor) + 1.0


@dataclass(frozen=True)
class Scaling:
    """``needs`` and ``takes``: fields of Rope without which it cannot be, and those that it may have."""

    scale: Callable[[Rope, NDArray[np.float64], float, int], Scaled]
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()


SCALINGS = {
    "default": Scaling(_default),
    "linear": Scaling(_linear, ("factor",)),
    "llama3": Scaling(
        _llama3, ("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)
    ),
    "yarn": Scaling(
        _yarn,
        ("factor",),
        (
            "original_max_position_embeddings",
            *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
        ),
    ),
}
