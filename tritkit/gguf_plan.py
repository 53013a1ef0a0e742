"""Which type each matrix of a GGUF file becomes: the one asked for, what a mix has for it, or what fits its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .checkpoint import ModelFolder
from .gguf import FLOAT_TYPES
from .layouts import GGML, Unpacked
from .layouts.search import SEARCHES
from .layouts.translate import TERNARY as TERNARY_LAYOUTS
from .layouts.translate import ternary_codes
from .models.shapes import EMBEDDING, HEAD, linear_names, matrix_names, matrix_shape

TERNARY = ("tq1_0", "tq2_0", "i2_s")
# Types, and mixes of them as llama.cpp has them (methods/mixes.py); q3_k, q4_k and q5_k are types alone.
WRITTEN = (
    *("f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q3_k_s", "q3_k_m", "q3_k_l"),
    *("q4_k", "q4_k_s", "q4_k_m", "q5_k", "q5_k_s", "q5_k_m", "q6_k", "mxfp4", *TERNARY),
)
WEIGHED = tuple(k for k in SEARCHES if k not in ("q8_0", *TERNARY))  # types whose search an importance matrix weighs
# What a type's embedding and head become where nothing else is asked for. Rounding them to 8 bits costs nothing that
# can be measured; Microsoft's I2_S files keep them at 16.
EMBEDDINGS = {"tq1_0": "q8_0", "tq2_0": "q8_0", "i2_s": "f16"}


@dataclass(frozen=True)
class Plan:
    """What becomes of one matrix. reason: why it is not what was asked for, or None."""

    type: str
    reason: str | None = None


def own_type(model: ModelFolder, name: str) -> str:
    """What a matrix is already, ternary codes of other containers as TQ2_0."""
    layout = model.layouts.get(name)
    if layout is None:
        stored = model.tensors[f"{name}.weight"].dtype
        return {dtype: kind for kind, (dtype, _) in FLOAT_TYPES.items()}.get(stored, "f32")
    if layout in GGML:
        return layout
    if layout.startswith("i2_s"):
        return "i2_s"
    if layout in ("hf_bitlinear", "hf_autobitlinear"):
        return "tq2_0"
    raise ValueError(f"GGUF has no type for {name}, which is stored as {layout}; name one with --type")


def plan(
    model: ModelFolder, kind: str | None, embedding: str | None, pure: bool = False, importance: bool = False
) -> dict[str, Plan]:
    """The type of each matrix; ValueError for a type that cannot be written, or not for this model.

    pure: the type itself, no mix. importance: whether there is an importance matrix, which changes some mixes.
    """
    if kind is not None and kind not in WRITTEN:
        raise ValueError(f"there is no type {kind!r} to export; known are {', '.join(WRITTEN)}")
    known = [w for w in WRITTEN if w not in TERNARY and (w in GGML or w in FLOAT_TYPES)]
    if embedding is not None and embedding not in known:
        raise ValueError(f"there is no type {embedding!r} for an embedding; known are {', '.join(known)}")
    if kind in TERNARY:
        require_ternary(model)
    mixed = _mix_of(model, kind, pure, importance)
    most = kind or own_type(model, linear_names(model.config)[0])
    found = {}
    for name in matrix_names(model.config):
        if name not in (EMBEDDING, HEAD):
            wanted = mixed.get(name) or kind or own_type(model, name)
        else:
            own = own_type(model, name)
            usual = mixed.get(name) or EMBEDDINGS.get(most, most if kind in WRITTEN else own)
            keeps = own in GGML and kind not in FLOAT_TYPES
            wanted = embedding or (own if keeps else usual)
        found[name] = _fitting(model, name, wanted)
    return found


def _mix_of(model: ModelFolder, kind: str | None, pure: bool, importance: bool) -> dict[str, str]:
    """What a mix wants of each matrix; nothing where the type is no mix."""
    from .methods.mixes import MIXES, wanted_types

    if pure and kind not in SEARCHES:
        hint = f"; {MIXES[kind].base} is the type" if kind in MIXES else ""
        raise ValueError(f"--pure is for a quantised type in every matrix, not for {kind or 'what is there'}{hint}")
    return {} if kind is None or kind not in MIXES or pure else wanted_types(model.config, kind, importance)


def mix_of(model: ModelFolder, plans: Mapping[str, Plan]) -> str | None:
    """The mix whose types these are, matrix by matrix, as of a folder that was quantised to one; or None."""
    from .methods.mixes import MIXES, mix_types

    types = {name: p.type for name, p in plans.items()}
    for mix in MIXES:
        if types in (mix_types(model.config, mix, False), mix_types(model.config, mix, True)):
            return mix
    return None


def _fitting(model: ModelFolder, name: str, kind: str) -> Plan:
    """``kind``, or what it falls back to where the rows are no whole blocks."""
    from .methods.mixes import fallback

    cols = matrix_shape(model.config, name)[1]
    if kind == "i2_s":
        if cols % 128:
            raise ValueError(f"I2_S has blocks of 128 columns, but a row of {name} has {cols}")
    elif kind in GGML and cols % GGML[kind].block:
        if kind in TERNARY:
            raise ValueError(
                f"{kind.upper()} has blocks of {GGML[kind].block} columns, but a row of {name} has {cols}: "
                "this model cannot be ternary in GGUF; --type q8_0 or f16 holds its values"
            )
        return Plan(fallback(kind, cols), f"{cols} columns are no multiple of {GGML[kind].block}")
    return Plan(kind)


def require_ternary(model: ModelFolder) -> None:
    """ValueError, with the size of the misfit, unless each linear is -s, 0 and +s already."""
    for name in linear_names(model.config):
        if name not in model.layouts or model.layouts[name] not in TERNARY_LAYOUTS:
            ternary_of_floats(model, name)


def ternary_of_floats(model: ModelFolder, name: str) -> Unpacked:
    try:
        return ternary_codes(model.floats(name))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
