"""``tritkit diff A B``: are these the same weights? Tensor by tensor, whatever containers and layouts they are in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from .checkpoint import ModelFolder
from .gguf_check import HALF_A_STEP, K_QUANTS, ROUNDING, largest_error, steps_off
from .layouts import Unpacked
from .models.shapes import matrix_names, matrix_shape

EQUAL, ROUNDED, REQUANTISED, DIFFERENT, MISSING = "equal", "rounded", "requantised", "different", "missing"
# Bits of the significand, the hidden one too: how far a value may be from what it was rounded from.
PRECISION = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}
SCALE_ROUNDING = 2.0**-8  # at least as good as bfloat16
FARTHEST = 0.7  # relative distance of a matrix and its k-quant; that of q2_k is about 0.3, of zeros 1


@dataclass(frozen=True)
class TensorDifference:
    """One tensor of both. largest: the largest difference of two values; relative: rms of it over the rms of A.

    status: equal; rounded (the same codes with scales, or the same values, in another precision); requantised (one is
    what rounding the other to its type may give); different; missing.
    """

    name: str
    status: str
    forms: tuple[str, str]
    largest: float = 0.0
    relative: float = 0.0


def differences(
    a: ModelFolder, b: ModelFolder, advance: Callable[[], None] = lambda: None
) -> Iterator[TensorDifference]:
    """Every tensor of either model, matrices first. Names are Hugging Face's; the order of rows is theirs too."""
    matrices = list(dict.fromkeys([*matrix_names(a.config), *matrix_names(b.config)]))
    rest = list(dict.fromkeys(n for m in (a, b) for n in m.tensors if n.endswith((".weight", ".bias"))))
    known = {f"{name}.weight" for name in matrices}
    for name in matrices:
        yield _matrix(a, b, name)
        advance()
    for name in rest:
        if name not in known:
            yield _values(a, b, name)
            advance()


def _form(model: ModelFolder, name: str) -> str:
    module = name.removesuffix(".weight")
    if name.endswith(".weight") and module in model.layouts:
        return model.layouts[module]
    return model.tensors[name].dtype.lower() if name in model.tensors else "-"


def _matrix(a: ModelFolder, b: ModelFolder, name: str) -> TensorDifference:
    key = f"{name}.weight"
    forms = (_form(a, key), _form(b, key))
    if key not in a.tensors or key not in b.tensors:
        return TensorDifference(key, MISSING, forms)
    if matrix_shape(a.config, name) != matrix_shape(b.config, name):
        return TensorDifference(key, DIFFERENT, forms, np.inf, np.inf)
    x, y = a.floats(name), b.floats(name)
    largest, relative = _distance(x, y)
    if largest == 0:
        return TensorDifference(key, EQUAL, forms)
    if name in a.layouts and name in b.layouts:
        rounded = _same_codes(a.codes(name), b.codes(name))
    else:
        rounded = _same_values(x, y, forms)
    if rounded:
        return TensorDifference(key, ROUNDED, forms, largest, relative)
    there = _is_requantised(x, y, b, name, forms, relative) or _is_requantised(y, x, a, name, forms[::-1], relative)
    status = REQUANTISED if there else DIFFERENT
    return TensorDifference(key, status, forms, largest, relative)


def _is_requantised(
    x: np.ndarray, y: np.ndarray, model: ModelFolder, name: str, forms: tuple[str, str], relative: float
) -> bool:
    """Whether y, a matrix of the model in a type of ggml, is x rounded to it."""
    if forms[0] == forms[1]:
        return False
    if forms[1] in K_QUANTS and name in model.layouts:
        off = steps_off(forms[1], model.codes(name), x)
        return relative < FARTHEST and bool((off <= HALF_A_STEP).all())
    return forms[1] in ROUNDING and bool((np.abs(x - y) <= largest_error(forms[1], x)).all())


def _values(a: ModelFolder, b: ModelFolder, name: str) -> TensorDifference:
    forms = (_form(a, name), _form(b, name))
    if name not in a.tensors or name not in b.tensors:
        return TensorDifference(name, MISSING, forms)
    x, y = a.tensors[name].float32(), b.tensors[name].float32()
    if x.shape != y.shape:
        return TensorDifference(name, DIFFERENT, forms, np.inf, np.inf)
    largest, relative = _distance(x, y)
    same = _same_values(x, y, forms)
    return TensorDifference(name, EQUAL if largest == 0 else ROUNDED if same else DIFFERENT, forms, largest, relative)


def _distance(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    if not x.size:
        return 0.0, 0.0
    gap = np.abs(x - y)
    size = float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))
    rms = float(np.sqrt(np.mean(np.square(gap, dtype=np.float64))))
    return float(gap.max()), rms / size if size else float(rms > 0)


def _same_values(x: np.ndarray, y: np.ndarray, forms: tuple[str, str]) -> bool:
    """Whether one is the other in the coarser of two float types, or a code's value in that type."""
    bits = min(PRECISION.get(form.upper(), 24) for form in forms)
    if bits == 24:
        return False
    smallest = 2.0**-25 if "f16" in forms else 0.0  # of float16, below which it has no more bits
    return bool((np.abs(x - y) <= np.maximum(np.abs(x), np.abs(y)) * 2.0**-bits + smallest).all())


def _same_codes(x: Unpacked, y: Unpacked) -> bool:
    """Whether the codes are equal and the scales nearly so. Codes of blocks whose scale is zero have no meaning."""
    if x.offset is not None or y.offset is not None:
        return False
    rows, groups = len(x.codes), int(np.lcm(x.scale.shape[1], y.scale.shape[1]))

    def spread(scale: np.ndarray) -> np.ndarray:
        given = scale.shape[1]
        return np.repeat(np.broadcast_to(scale, (rows, given)), groups // given, 1)

    sx, sy = spread(x.scale), spread(y.scale)
    cx, cy = (m.codes.reshape(rows, groups, -1) for m in (x, y))
    empty = [(c == 0).all(-1) | (s == 0) for c, s in ((cx, sx), (cy, sy))]
    if (empty[0] != empty[1]).any():
        return False
    full = ~empty[0]
    near = np.abs(sx - sy)[full] <= SCALE_ROUNDING * np.abs(sx)[full]
    return bool(near.all()) and bool((cx[full] == cy[full]).all())
