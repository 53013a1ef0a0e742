"""``tritkit inspect``: what a file or folder is, what is in it, what can be done with it, and what is odd. No torch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from . import gguf_plan, hf_export
from .checkpoint import ModelFolder
from .folderfacts import PerLinear, code_shares, describe
from .gguf import GGUFFile, Strings
from .inputs import OUTLIERS
from .layouts import GGML
from .models.shapes import EMBEDDING, HEAD, linear_names, matrix_names, matrix_shape
from .newfolder import nonfinite
from .sources import open_model
from .tensorfile import TensorFile

SAMPLE = 1 << 22  # values of a float matrix that are looked at


def inspect(source: Path | str, i2_s: str | None = None, linears: bool = False) -> dict[str, Any]:
    """Facts of whatever ``source`` is, for people and programs.

    Keys: source, kind, runs (None, or why it does not), facts, matrices (a row for each layout), tokenizer, can, odd,
    per_linear (with ``linears``). ValueError where it is nothing that has weights in it.
    """
    found: dict[str, Any] = {"source": str(source), "runs": None, "facts": {}, "matrices": [], "can": [], "odd": []}
    try:
        model = open_model(source, i2_s)
    except ValueError as error:
        stranger = _stranger(Path(source))
        if stranger is None:
            raise
        return {**found, **stranger, "runs": str(error), "tokenizer": None, "per_linear": {}}
    c = model.config
    per_linear: PerLinear = code_shares(model)
    kinds = {"folder": "model folder", "gguf": "GGUF file", "llama2.c": "llama2.c checkpoint"}
    found["kind"] = kinds.get(model.container) or f"model folder of {model.container}"
    found["facts"] = {
        **describe(model, per_linear),
        "form": _form(model),
        "activations": c.activations or "float",
        "layers": c.num_hidden_layers,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "heads": f"{c.num_attention_heads} ({c.num_key_value_heads} for keys and values) of {c.head_dim}",
        "context": c.max_position_embeddings,
        "rope": f"{c.rope.type}, base {c.rope_theta:g}",
        "vocabulary": c.vocab_size,
        "tied_embeddings": c.tie_word_embeddings,
    }
    if model.container == "gguf":
        meta = GGUFFile(model.path).metadata
        names = ("general.architecture", "general.name", "general.quantized_by", "general.license")
        found["facts"] |= {name.removeprefix("general."): meta[name] for name in names if name in meta}
    found["matrices"] = _matrices(model)
    found["tokenizer"] = _tokenizer(model, found["odd"])
    found["odd"] += _odd(model)
    found["can"] = _can(model, found["tokenizer"])
    found["per_linear"] = per_linear if linears else {}
    return found


def _form(model: ModelFolder) -> str:
    if model.is_packed:
        return "packed"
    return "latent" if model.config.weights else "full precision"


def _matrices(model: ModelFolder) -> list[dict[str, Any]]:
    """For each place (embedding, head, linears) and layout: how many, how large, between which scales."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for name in matrix_names(model.config):
        place = {EMBEDDING: "embedding", HEAD: "head"}.get(name, "linears")
        stored = model.tensors[f"{name}.weight"]
        layout = model.layouts.get(name) or stored.dtype.lower()
        row = rows.setdefault((place, layout), {"place": place, "layout": layout, "count": 0, "weights": 0, "bytes": 0})
        row["count"] += 1
        row["weights"] += int(np.prod(matrix_shape(model.config, name)))
        row["bytes"] += model.packed(name).nbytes if name in model.layouts else stored.array.nbytes
        low, high = _scales(model, name)
        row["smallest_scale"] = min(row.get("smallest_scale", low), low)
        row["largest_scale"] = max(row.get("largest_scale", high), high)
    for row in rows.values():
        row["bits_per_weight"] = 8 * row["bytes"] / row["weights"]
    return list(rows.values())


def _scales(model: ModelFolder, name: str) -> tuple[float, float]:
    """The range of |scale| of a matrix of codes, those of zero aside; of floats: of |value|, from a sample."""
    if name not in model.layouts:
        stored = model.tensors[f"{name}.weight"]
        rows = max(1, SAMPLE // max(stored.array.shape[1], 1))
        values = np.abs(stored._replace(array=stored.array[:rows]).float32())
        return 0.0, float(values.max(initial=0))
    if model.layouts[name] in GGML:
        scales = GGML[model.layouts[name]].first_scales(model.packed(name))
        values = np.abs(scales[np.isfinite(scales) & (scales != 0)])
    else:
        values = np.abs(model.packed(name).arrays["weight_scale"].astype(np.float32).reshape(-1))
    return float(values.min(initial=np.inf)), float(values.max(initial=0))


def _tokenizer(model: ModelFolder, odd: list[str]) -> dict[str, Any] | None:
    try:
        tokenizer = model.tokenizer()
    except ValueError as error:
        odd.append(f"its tokenizer cannot be used: {error}")
        return None
    rows, tokens = model.config.vocab_size, len(tokenizer)
    if tokens < rows:
        odd.append(f"the embedding has {rows} rows for {tokens} tokens: {rows - tokens} are padding")
    if not tokenizer.stop_ids:
        odd.append("its tokenizer has no end-of-text token: generation never stops by itself")
    return {
        "kind": type(tokenizer.inner.model).__name__,
        "tokens": tokens,
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "stops_at": sorted(tokenizer.stop_ids),
        "chat_template": bool(tokenizer.chat_template),
    }


def _odd(model: ModelFolder) -> Iterator[str]:
    """What a user may want to know before using it."""
    for name, tensor in model.tensors.items():
        broken = nonfinite(model, name, tensor)
        if broken:
            yield f"{name} has {broken} not finite: the file is damaged"
    yield from _extras(model)
    ternary = [n for n in linear_names(model.config) if model.layouts.get(n, "").startswith(("tq", "i2_s"))]
    if ternary and model.config.weights is None:
        yield (
            f"{len(ternary)} linears have ternary codes, but not all of them, or with several scales in one: it runs "
            "as weights in blocks, with activations in groups of 32"
        )
    if any(layout.startswith("i2_s") for layout in model.layouts.values()):
        order = next(layout for layout in model.layouts.values() if layout.startswith("i2_s")).removeprefix("i2_s_")
        yield f"its I2_S codes are in the {order} order; bitnet.cpp on another kind of CPU reads them as garbage"
    if model.config.weights == "ternary" and not model.is_packed:
        yield "its linears are latent floats: they are rounded when it runs, and tritkit pack rounds them for good"
    if model.container == "folder" and model.hf.get("quantization_config", {}).get("linear_class") == "bitlinear":
        yield "its ternary scales divide (bitlinear); those of autobitlinear multiply"


def _extras(model: ModelFolder) -> Iterator[str]:
    """Rounded inputs and adapters, which no other container has."""
    for kind, count in Counter(model.inputs.values()).items():
        yield f"{count} linears round their inputs to {kind}"
    if model.adapters:
        of_all = f"{len(model.adapters)} of {model.config.num_hidden_layers}"
        yield f"{of_all} layers have an adapter: y = layer(x) + W x + b"


def _can(model: ModelFolder, tokenizer: dict[str, Any] | None) -> list[str]:
    """Verbs that work on it."""
    verbs = ["bench"]
    if tokenizer is not None:
        verbs = ["generate", *(["chat"] if tokenizer["chat_template"] else []), "eval", "bench"]
    native = "mxfp4" not in model.layouts.values()  # the one type of ggml that engine.load refuses to the native one
    native = native and not any(kind.endswith(OUTLIERS) or kind == "a4" for kind in model.inputs.values())
    can = [f"{', '.join(verbs)}, with {'the native or the torch engine' if native else '--engine torch'}"]
    if model.container != "folder":
        can.append("import to a model folder")
    if not model.is_packed and model.container == "folder":
        can.append("train: go on from its weights")
    if model.config.weights and not model.is_packed:
        can.append("pack")
    if model.adapters or model.inputs:
        return can  # no other container holds these
    ternary = model.config.weights == "ternary"
    types = ", ".join(kind for kind in gguf_plan.WRITTEN if ternary or kind not in gguf_plan.TERNARY)
    kept = f", and as it is: {model.layout}" if model.layout and {*model.layouts.values()} <= {*GGML} else ""
    can.append(f"export to GGUF: {types}{kept}")
    forms = (*hf_export.LAYOUT_OF, *hf_export.DTYPES) if ternary else tuple(hf_export.DTYPES)
    if model.layout == "dense" and not ternary:
        forms += hf_export.FOREIGN_KINDS
    can.append(f"export to transformers: --to {', '.join(forms)}")
    return can


def _stranger(path: Path) -> dict[str, Any] | None:
    """What can be said of a file that tritkit does not run as a model; None where it has no weights."""
    if not path.is_file():
        return None
    try:
        if path.suffix == ".safetensors":
            tensors = TensorFile(path)
            stored = {n: (tensors[n].dtype.lower(), tensors[n].array.shape, tensors[n].array.nbytes) for n in tensors}
            facts = {"tensors": len(tensors)}
            return {"kind": "safetensors file", "facts": facts, "matrices": _counted(stored)}
        file = GGUFFile(path)
    except ValueError:
        return None
    meta = {
        key: f"{len(value)} values" if isinstance(value, Strings | np.ndarray) else str(value)[:80]
        for key, value in file.metadata.items()
        if not key.startswith("tokenizer.chat_template")
    }
    shapes = {n: (file.type_of(n), file.shape_of(n), file.bytes_of(n)) for n in file}
    return {"kind": "GGUF file", "facts": {"tensors": len(file), **meta}, "matrices": _counted(shapes)}


def _counted(shapes: Mapping[str, tuple[str, tuple[int, ...], int | None]]) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = defaultdict(lambda: {"place": "tensors", "count": 0, "weights": 0, "bytes": 0})
    for kind, shape, nbytes in shapes.values():
        row = rows[kind]
        row["layout"] = kind
        row["count"] += 1
        row["weights"] += int(np.prod(shape, dtype=np.int64))
        row["bytes"] = None if nbytes is None or row["bytes"] is None else row["bytes"] + nbytes
    for row in rows.values():
        known = row["bytes"] is not None and row["weights"]
        row["bits_per_weight"] = 8 * row["bytes"] / row["weights"] if known else None
    return list(rows.values())
