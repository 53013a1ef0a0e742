"""What a folder says of the inputs of its linears, and of adapters. Imports no torch: ``formats`` has the numbers.

In quantization_config a linear's inputs are a name of the same grammar as weights have: ``int8_row`` (a scale for each
token), ``int8_row_asym``, ``int4_row``, ``int8_g32`` (a scale for 32 columns of a token), the names of BitNet's
activations (``a8``, ``a8_q128``, ``a4``), ``a8_g32``, or ``int8_tensor[_asym]``: one grid from calibration for all
tokens, stored beside the weights. ``+outliers`` keeps columns of large values in floats, as LLM.int8() does.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from .jsonfile import shown
from .tensorfile import FLOATS

if TYPE_CHECKING:
    from .checkpoint import ModelFolder

OUTLIERS = "+outliers"
THRESHOLD = 6.0  # of outliers: alpha of LLM.int8() (arXiv 2208.07339 section 3.2)
NAMED: dict[str, tuple[str | int, int]] = {
    "a8": ("row", 8),
    "a8_q128": ("row", 8),
    "a4": ("row", 4),
    "a8_g32": (32, 8),
}  # group and bits
_GRAMMAR = re.compile(r"int([2-8])(?:_g([1-9]\d{0,8})|_(row|tensor))?(_asym)?")


class InputFormat(NamedTuple):
    """name: of the format, without "+outliers"; group: "row" (a token), "tensor" (static) or columns of a token."""

    name: str
    bits: int
    group: str | int
    is_asymmetric: bool = False
    has_outliers: bool = False

    @property
    def is_static(self) -> bool:
        """Whether its grid is stored."""
        return self.group == "tensor"


def input_format(name: str) -> InputFormat:
    """The format of inputs of that name; ValueError where there is none."""
    base = name.removesuffix(OUTLIERS)
    has_outliers = base != name
    found = _GRAMMAR.fullmatch(base)
    if base in NAMED:
        format = InputFormat(base, NAMED[base][1], NAMED[base][0], False, has_outliers)
    elif found:
        group: str | int = int(found[2]) if found[2] else found[3] or "row"
        format = InputFormat(base, int(found[1]), group, bool(found[4]), has_outliers)
    else:
        raise ValueError(
            f"inputs cannot be {shown(name)}; known are {', '.join(NAMED)} and int2 to int8 with _row, _gN or _tensor, "
            f"_asym and {OUTLIERS}"
        )
    if has_outliers and (format.group != "row" or format.is_asymmetric):
        raise ValueError(f"inputs cannot be {shown(name)}: outliers stay apart from codes with one scale a token")
    return format


def read_inputs(q: dict[str, Any], linears: Collection[str]) -> dict[str, str]:
    """The formats of inputs by linear that quantization_config names; ValueError where they make no sense."""
    found = q.get("inputs") or {}
    if not isinstance(found, dict):
        raise ValueError(f"config.json has inputs {shown(found)}, expected a table of formats by linear")
    for name, format in found.items():
        if name not in linears:
            raise ValueError(f"config.json has inputs for {shown(name)}, which is no linear of this model's layers")
        if not isinstance(format, str):
            raise ValueError(f"config.json has inputs {shown(format)} for {name}, expected the name of a format")
        try:
            input_format(format)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return dict(found)


def read_threshold(q: dict[str, Any]) -> float:
    """From which absolute value on a column of inputs "+outliers" stays in floats."""
    found = q.get("outlier_threshold", THRESHOLD)
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < float("inf"):
        raise ValueError(f"config.json has outlier_threshold {shown(found)}, expected a number above 0")
    return float(found)


def read_adapters(q: dict[str, Any], layers: int) -> tuple[int, ...]:
    """The layers that have an adapter, in order."""
    found = q.get("adapters") or []
    if not isinstance(found, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in found):
        raise ValueError(f"config.json has adapters {shown(found)}, expected a list of layer numbers")
    odd = next((i for i in found if not 0 <= i < layers), None)
    if odd is not None:
        raise ValueError(f"config.json has an adapter of layer {shown(odd)}, but the layers are 0 to {layers - 1}")
    if len(set(found)) < len(found):
        raise ValueError(f"config.json has several adapters for one layer: {shown(found)}")
    return tuple(sorted(found))


def adapter_shapes(adapters: tuple[int, ...], hidden: int) -> dict[str, tuple[int, ...]]:
    """The tensors of the adapters and their shapes."""
    found: dict[str, tuple[int, ...]] = {}
    for i in adapters:
        found |= {f"model.layers.{i}.adapter.weight": (hidden, hidden), f"model.layers.{i}.adapter.bias": (hidden,)}
    return found


def require_inputs(folder: ModelFolder, columns: Mapping[str, int]) -> set[str]:
    """The names of the tensors that adapters and static inputs have; ValueError where one is missing or odd, or where
    a linear cannot have such inputs. columns: of each linear."""
    tensors = folder.tensors
    known = adapter_shapes(folder.adapters, folder.config.hidden_size)
    for key, shape in known.items():
        if key not in tensors:
            raise ValueError(f"{folder.path} has no tensor {key}, but config.json names its layer in adapters")
        if tensors[key].dtype not in FLOATS or tensors[key].array.shape != shape:
            found = f"{tensors[key].dtype} {tensors[key].array.shape}"
            raise ValueError(f"{key} is {found}, but an adapter of this model has floats of shape {shape}")
    stored = set(known)
    for name, text in folder.inputs.items():
        inputs = input_format(text)
        if name not in folder.layouts:
            raise ValueError(f"config.json has inputs {text} for {name}, whose weights are floats")
        if folder.config.is_low_bit(name):
            raise ValueError(
                f"config.json has inputs {text} for {name}, whose activations are {folder.config.activations} already"
            )
        if inputs.has_outliers and not has_row_scales(folder, name):
            raise ValueError(f"config.json has inputs {text} for {name}, whose weights have not one scale a row")
        if isinstance(inputs.group, int) and columns[name] % inputs.group:
            raise ValueError(f"config.json has inputs {text} for {name}, which has {columns[name]} columns")
        if inputs.is_static:
            stored |= set(_require_grid(folder, name, inputs))
    return stored


def has_row_scales(folder: ModelFolder, name: str) -> bool:
    """Whether a stored matrix is of symmetric integers with one scale a row, as LLM.int8() needs them."""
    if folder.layouts.get(name) != "dense" or f"{name}.weight_zero" in folder.tensors:
        return False
    shape = folder.tensors[f"{name}.weight_scale"].array.shape
    return len(shape) == 2 and shape[1] == 1


def _require_grid(folder: ModelFolder, name: str, inputs: InputFormat) -> list[str]:
    """The tensors of a stored grid."""
    keys = [f"{name}.input_scale", *([f"{name}.input_zero"] if inputs.is_asymmetric else [])]
    for key in keys:
        if key not in folder.tensors:
            raise ValueError(f"{folder.path} has no tensor {key}, which inputs of the format {inputs.name} need")
        stored = folder.tensors[key]
        if stored.dtype not in FLOATS or stored.array.size != 1:
            raise ValueError(f"{key} is {stored.dtype} {stored.array.shape}, expected one number")
    scale, zero = (float(folder.tensors[key].float32().reshape(())) for key in (keys[0], keys[-1]))
    if not 0 < scale < float("inf"):
        raise ValueError(f"{keys[0]} should be a finite number above 0, but it is {scale:.6g}")
    if inputs.is_asymmetric and not (zero.is_integer() and 0 <= zero < 1 << inputs.bits):
        raise ValueError(f"{keys[1]} should be a whole number of 0 to {(1 << inputs.bits) - 1}, but it is {zero:.6g}")
    return keys
