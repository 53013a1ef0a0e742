"""``tritkit export MODEL OUT.gguf``: a model as a GGUF file that llama.cpp, bitnet.cpp or ik_llama.cpp loads.

Each matrix gets the type that was asked for or that a mix of llama.cpp has for it, or what that falls back to; codes
that are of that type already are copied, ternary codes are translated exactly, everything else is quantised with ggml's
own search, weighed by an importance matrix where there is one: the bytes of llama-quantize. What was written is read
back and compared with the model before it gets its name.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import ModelFolder
from .files import ended_politely
from .folderwriter import as_dtype
from .gguf import FLOAT_TYPES
from .gguf_check import verify
from .gguf_config import ARCHITECTURES, ROPE_FACTORS, architecture_of, metadata_of, rope_factors
from .gguf_model import ggml_name, halves_to_pairs
from .gguf_plan import TERNARY, WEIGHED, Plan, mix_of, plan, ternary_of_floats
from .gguf_writer import NewTensor, write_gguf
from .layouts import GGML, I2S, LAYOUTS, GgmlQuantizer, Packed
from .layouts.search import SEARCHES, quantize
from .layouts.translate import TERNARY as TERNARY_LAYOUTS
from .layouts.translate import pack_ternary, translate
from .models.shapes import EMBEDDING, HEAD, linear_names, matrix_names, matrix_shape
from .newfolder import require_finite, require_no_extras
from .progress import progress


def export_gguf(
    source: ModelFolder,
    out: Path | str,
    kind: str | None = None,
    embedding: str | None = None,
    overwrite: bool = False,
    i2_s: str | None = None,
    pure: bool = False,
    imatrix: Path | str | None = None,
) -> dict[str, Any]:
    """Write ``source`` as a GGUF file and return a report: types with their numbers of matrices, notes, bytes.

    kind: type of the linears or a mix, one of gguf_plan.WRITTEN (none: what each is, TQ2_0 for ternary ones).
    embedding: type of the embedding and the output head (none: theirs where it is a type of ggml, else what the mix
    says, EMBEDDINGS or kind). i2_s: the order of I2_S codes, "x86" (as none) or "arm", which bitnet.cpp's builds for
    ARM want. pure: no mix, each matrix the type itself. imatrix: file of an importance matrix. ValueError for what
    cannot be written; OSError where what was written does not read back as it should, and then there is no file.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists; give another name, or --overwrite")
    if out.exists() and (out.is_dir() or out.resolve() == source.path.resolve()):
        what = "a folder" if out.is_dir() else "the model itself"
        raise ValueError(f"{out} is {what}; give another name")
    if not out.parent.is_dir():
        raise ValueError(f"there is no folder {out.parent} to write {out.name} into")
    kind, embedding = (None if k is None else k.lower() for k in (kind, embedding))
    require_no_extras(source, "GGUF")
    if source.config.linear_norm_eps:
        raise ValueError(f"{source.path} has a norm in front of each low-bit linear, for which GGUF has no place")
    architecture = architecture_of(source)
    model = _packed(source) if source.config.weights is not None and not source.is_packed else source
    importance = None if imatrix is None else _importance_of(model, imatrix)
    plans = plan(model, kind, embedding, pure, importance is not None)
    if importance is not None and all(p.type not in WEIGHED for p in plans.values()):
        raise ValueError(f"{imatrix} weighs the search for {', '.join(WEIGHED)}, but no matrix becomes one of these")
    most = Counter(plans[name].type for name in linear_names(model.config)).most_common(1)[0][0]
    if i2_s is not None and all(p.type != "i2_s" for p in plans.values()):
        raise ValueError(
            f"--i2-s {i2_s} is the order of I2_S codes, but the linears become {most.upper()}: --type i2_s"
        )
    metadata = metadata_of(model, architecture, kind or mix_of(model, plans) or most)
    for name, tensor in source.tensors.items():  # reads every byte: what can be refused without that has been
        require_finite(source, name, tensor)
    order = f"i2_s_{i2_s or 'x86'}"
    heads = _row_orders(model, architecture)
    names = _names(model)
    tensors = {}
    for name in names:
        module = name.removesuffix(".weight")
        weights = None if importance is None else importance.get(module)
        tensors[ggml_name(name)] = _new_tensor(model, name, plans.get(module), order, heads, weights)
    factors = rope_factors(model.config)
    if factors is not None:
        tensors[ROPE_FACTORS] = NewTensor("f32", factors.shape, lambda: factors)
    beside = out.with_name(f".{out.name}.{os.getpid()}.unverified")
    try:
        with ended_politely(), progress(f"export {out.name}", 2 * len(tensors), "tensors") as advance:
            write_gguf(beside, metadata, tensors, advance)
            types = {name: p.type for name, p in plans.items()}
            verify(model, beside, names, types, i2_s or "x86", advance, importance or {})
        os.replace(beside, out)
    finally:
        beside.unlink(missing_ok=True)
    return {
        "architecture": architecture,
        "types": dict(Counter(p.type for p in plans.values())),
        "file_bytes": out.stat().st_size,
        "notes": notes(model, architecture, most, plans),
    }


def _packed(model: ModelFolder) -> ModelFolder:
    """A latent model with its linears rounded as training rounds them."""
    from dataclasses import replace

    from .pack import pack_linears
    from .tensorfile import StoredTensor

    packed, layout = pack_linears(model)
    tensors = dict(model.tensors.items())
    for name, linear in packed.items():
        for suffix, array in linear.arrays.items():
            tensors[f"{name}.{suffix}"] = StoredTensor("U8" if array.dtype == np.uint8 else "F32", array)
    return replace(model, layouts=dict.fromkeys(packed, layout), tensors=tensors)


def _names(model: ModelFolder) -> list[str]:
    """Every tensor of the file in Hugging Face's names: matrices, norms, biases. The file's scales are inside."""
    known = [f"{name}.weight" for name in matrix_names(model.config)]
    extras = [n for n in model.tensors if n.endswith((".weight", ".bias")) and n not in set(known)]
    return known + [n for n in extras if n != f"{HEAD}.weight"]


def _row_orders(model: ModelFolder, architecture: str) -> dict[str, int]:
    if not ARCHITECTURES[architecture].pairs:
        return {}
    return {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}


def _new_tensor(
    model: ModelFolder,
    name: str,
    plan: Plan | None,
    order: str,
    heads: dict[str, int],
    importance: np.ndarray | None,
) -> NewTensor:
    module, _, _ = name.rpartition(".")
    turned = heads.get(module.rpartition(".")[2])
    if plan is None:  # norms and biases stay float32, as llama.cpp wants them
        values = model.tensors[name].float32()
        if turned is not None:
            values = values[halves_to_pairs(len(values), turned)]
        return NewTensor("f32", values.shape, lambda: values)
    shape = matrix_shape(model.config, module)
    rows = None if turned is None else halves_to_pairs(shape[0], turned)

    def make() -> np.ndarray:
        return encoded(model, module, plan.type, order, rows, importance)

    return NewTensor(plan.type, shape, make)


def encoded(
    model: ModelFolder,
    name: str,
    kind: str,
    order: str,
    rows: np.ndarray | None,
    importance: np.ndarray | None = None,
) -> np.ndarray:
    """The bytes of a matrix in a type of ggml, its rows in that order; importance: float32 [columns]."""
    own = model.layouts.get(name)

    def ordered(array: np.ndarray) -> np.ndarray:
        return array if rows is None else array[rows]

    if kind in FLOAT_TYPES:
        return ordered(_as_float(model, name, kind))
    target = order if kind == "i2_s" else kind
    if own == target:
        packed = model.packed(name)
    elif kind in TERNARY:
        packed = _as_ternary(model, name, target)
    elif kind in SEARCHES:
        packed = _searched(model, name, kind, importance)
    else:
        layout_of = GGML[kind]
        assert isinstance(layout_of, GgmlQuantizer)  # mxfp4
        packed = layout_of.quantize(model.floats(name))
    packed = Packed({**packed.arrays, "weight": ordered(packed.arrays["weight"])})
    layout = LAYOUTS[target]
    return layout.to_stored(packed) if isinstance(layout, I2S) else packed.arrays["weight"]


def _as_float(model: ModelFolder, name: str, kind: str) -> np.ndarray:
    stored, (dtype, _) = model.tensors[f"{name}.weight"], FLOAT_TYPES[kind]
    if name not in model.layouts and stored.dtype == dtype:
        return stored.array
    return as_dtype(name, model.floats(name), dtype)


def _searched(model: ModelFolder, name: str, kind: str, importance: np.ndarray | None) -> Packed:
    try:
        return Packed({"weight": quantize(kind, model.floats(name), importance)})
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _importance_of(model: ModelFolder, path: Path | str) -> dict[str, np.ndarray]:
    """Importance of the columns of each matrix that the file knows; ValueError for one of another model."""
    from .methods.importance import read_importance

    known, found = read_importance(path), {}
    for name in matrix_names(model.config):
        weights, columns = known.of(name), matrix_shape(model.config, name)[1]
        if weights is None or (name == EMBEDDING and len(weights) != columns):  # llama.cpp takes no notice of that
            continue
        if len(weights) != columns:
            raise ValueError(f"{path} has {len(weights)} columns for {name}, which has {columns}: of another model")
        found[name] = weights
    if not found:
        raise ValueError(f"{path} has no importance for any matrix of this model")
    return found


def _as_ternary(model: ModelFolder, name: str, target: str) -> Packed:
    own, shape = model.layouts.get(name), matrix_shape(model.config, name)
    if own not in TERNARY_LAYOUTS:
        matrix = ternary_of_floats(model, name)
    try:
        if own in TERNARY_LAYOUTS:
            return translate(model.packed(name), own, target, shape).packed
        return pack_ternary(matrix, target).packed
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def notes(model: ModelFolder, architecture: str, kind: str, plans: Mapping[str, Plan]) -> list[str]:
    """What a user should know of the file, a sentence each."""
    found = []
    for reason, count in Counter((p.type, p.reason) for p in plans.values() if p.reason).items():
        found.append(f"{count} matrices are {reason[0].upper()}: {reason[1]}.")
    if architecture == "bitnet-b1.58":
        found.append(
            "Mainline llama.cpp cannot run this file: its bitnet has a SiLU gate, this model has ReLU²; bitnet.cpp and "
            "ik_llama.cpp run it."
        )
    error = max((_scale_error(model, name, plans[name].type) for name in linear_names(model.config)), default=0.0)
    if error:
        found.append(f"Codes are exact; scales were rounded to float16, by up to {error:.2g} of their size.")
    if kind == "i2_s":
        found.append("I2_S is a type of bitnet.cpp (36), which mainline llama.cpp does not know.")
    if model.config.activations is not None and kind not in TERNARY:
        found.append("The model was trained with int8 activations; whoever runs this file runs float ones.")
    return found


def _scale_error(model: ModelFolder, name: str, kind: str) -> float:
    """How far the float16 scale of a TQ block is from the one scale of the matrix, relative."""
    if kind not in ("tq1_0", "tq2_0") or f"{name}.weight_scale" not in model.tensors:
        return 0.0
    scale = model.codes(name).scale
    return float(np.abs(scale.astype(np.float16).astype(np.float32) / scale - 1).max())
