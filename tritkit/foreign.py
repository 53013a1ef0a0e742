"""Folders that GPTQ or compressed-tensors wrote, read as ours: their linears become matrices in the layout ``dense``.

Codes, zero points and scales stay what they are; only their order in the bytes changes, when a tensor is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .jsonfile import shown
from .layouts import LAYOUTS, Packed
from .layouts import compressed as compressed_layout
from .layouts import gptq as gptq_layout
from .layouts.compressed import PackQuantized
from .layouts.gptq import Gptq
from .layouts.words import WORD, count
from .models.config import ModelConfig
from .models.shapes import matrix_names, matrix_shape
from .tensorfile import FLOATS, StoredTensor

DTYPES = {np.dtype(np.uint8): "U8", np.dtype(np.int16): "I16", np.dtype(np.float16): "F16", np.dtype(np.float32): "F32"}
VERSIONS = {"gptq": 1, "gptq_v2": 2}


def read_foreign(
    path: Path, q: Mapping[str, Any], config: ModelConfig, tensors: Mapping[str, StoredTensor]
) -> tuple[dict[str, str], Mapping[str, StoredTensor]]:
    """Layouts and tensors of such a folder, as ModelFolder has them; q: its quantization_config.

    ValueError for what the engines do not run: activations that are rounded, groups of columns that are no neighbours.
    """
    read = _gptq if q["quant_method"] == "gptq" else _compressed
    matrices: dict[str, _Matrix] = {}
    for name in matrix_names(config):
        try:
            found = read(q, name, matrix_shape(config, name), tensors)
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from None
        if found is not None:
            matrices[name] = found
    if not matrices:
        raise ValueError(f"{path} should hold weights of {q['quant_method']}, but has no tensors of them")
    return dict.fromkeys(matrices, "dense"), _Translated(matrices, _used(config, tensors))


class _Matrix:
    """One matrix of theirs. names: its tensors; suffixes: of the tensors that it becomes."""

    def __init__(self, layout: Gptq | PackQuantized, name: str, shape: tuple[int, int], stored: Packed, offset: bool):
        self.layout, self.name, self.shape, self.stored = layout, name, shape, stored
        self.suffixes = ("weight", "weight_scale", "weight_code", *(("weight_zero",) if offset else ()))

    def dense(self) -> Packed:
        try:
            return LAYOUTS["dense"].pack(self.layout.unpack(self.stored, self.shape))
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None


class _Translated(Mapping[str, StoredTensor]):
    """The tensors under our names. Those of the matrix that was asked for last are kept."""

    def __init__(self, matrices: dict[str, _Matrix], others: dict[str, StoredTensor]):
        self.others = others
        self.places = {f"{name}.{suffix}": (m, suffix) for name, m in matrices.items() for suffix in m.suffixes}
        self._dense = lru_cache(maxsize=1)(_Matrix.dense)

    def __getitem__(self, name: str) -> StoredTensor:
        if name in self.places:
            matrix, suffix = self.places[name]
            array = self._dense(matrix).arrays[suffix]
            return StoredTensor(DTYPES[array.dtype], array)
        if name not in self.others:
            raise ValueError(f"no file of this model has a tensor {shown(name)}")
        return self.others[name]

    def __contains__(self, name: object) -> bool:
        return name in self.places or name in self.others

    def __iter__(self) -> Iterator[str]:
        yield from self.places
        yield from self.others

    def __len__(self) -> int:
        return len(self.places) + len(self.others)


def _stored(name: str, kinds: tuple[str, ...], tensors: Mapping[str, StoredTensor]) -> Packed:
    """The tensors of a matrix; floats as float32, all others as they are, which have to be integers."""
    arrays = {}
    for kind in kinds:
        if f"{name}.{kind}" in tensors:
            tensor = tensors[f"{name}.{kind}"]
            is_float = kind in ("scales", "weight_scale")
            if is_float != (tensor.dtype in FLOATS) or (not is_float and tensor.dtype not in ("I32", "I64")):
                raise ValueError(f"{kind} has dtype {tensor.dtype}, expected {'floats' if is_float else 'I32'}")
            arrays[kind] = tensor.float32() if is_float else tensor.array
            if is_float and not np.isfinite(arrays[kind]).all():
                raise ValueError(f"{kind} has {int((~np.isfinite(arrays[kind])).sum())} values that are not finite")
    return Packed(arrays)


def _gptq(
    q: Mapping[str, Any], name: str, shape: tuple[int, int], tensors: Mapping[str, StoredTensor]
) -> _Matrix | None:
    """Bits and groups follow from the shapes, which holds for folders with several of them, too."""
    version = q.get("checkpoint_format") or q.get("format") or "gptq"
    if not isinstance(version, str) or version not in VERSIONS:
        raise ValueError(f"its checkpoint_format is {shown(version)}; known are {', '.join(VERSIONS)}")
    stored = _stored(name, gptq_layout.NAMES, tensors)
    if "qweight" not in stored.arrays:
        return None
    for kind in ("qzeros", "scales"):
        if kind not in stored.arrays:
            raise ValueError(f"it has qweight, but no {kind}")
    rows, cols = shape
    words = len(stored.arrays["qweight"])
    bits = next((b for b in gptq_layout.BITS if count(cols, b) == words), None)
    if bits is None:
        raise ValueError(
            f"qweight is {stored.arrays['qweight'].shape}, which is no {rows} x {cols} matrix of 2, 3, 4 or 8 bits"
        )
    if rows * bits % WORD:
        raise ValueError(f"GPTQ packs words of {WORD} bits, which {rows} rows of {bits} do not fill")
    layout = Gptq(bits, VERSIONS[version])
    groups = len(stored.arrays["scales"])
    if not groups or cols % groups:
        raise ValueError(f"it has {groups} groups, which do not share out {cols} columns")
    gptq_layout.require_neighbours(stored.arrays.get("g_idx"), cols, groups)
    symmetric = layout.is_symmetric(stored, rows)
    if q.get("sym") is True and not symmetric:
        raise ValueError("its zero points are not in the middle, but its config says that the weights are symmetric")
    if bits == 3 and not symmetric and layout.version == 1 and _is_gptqmodels(q):
        raise ValueError("what its zero points of 3 bits mean depends on the release of GPTQModel that wrote them; "
                         "convert it to gptq_v2 there")  # fmt: skip
    return _Matrix(layout, name, shape, stored, not symmetric)


def _is_gptqmodels(q: Mapping[str, Any]) -> bool:
    meta = q.get("meta")
    return isinstance(meta, dict) and "gptqmodel" in str(meta.get("quantizer")).lower()


def _compressed(
    q: Mapping[str, Any], name: str, shape: tuple[int, int], tensors: Mapping[str, StoredTensor]
) -> _Matrix | None:
    """Bits follow from the width of the words, and have to be among those that the config names."""
    known = _known_bits(q)
    stored = _stored(name, compressed_layout.NAMES, tensors)
    if "weight_packed" not in stored.arrays:
        if f"{name}.weight_scale" in tensors:
            raise ValueError("it has weight_scale, but no weight_packed; of compressed-tensors pack-quantized is read")
        return None
    if "weight_scale" not in stored.arrays:
        raise ValueError("it has weight_packed, but no weight_scale")
    packed = stored.arrays["weight_packed"]
    if packed.ndim != 2:
        raise ValueError(f"weight_packed is {packed.shape}, expected a matrix")
    cols = shape[1]
    bits = next((b for b in sorted(known) if count(cols, b) == packed.shape[1]), min(known))
    layout = PackQuantized(bits)
    if "weight_g_idx" in stored.arrays:
        groups = stored.arrays["weight_scale"].shape[-1]
        gptq_layout.require_neighbours(stored.arrays["weight_g_idx"], cols, groups)
    return _Matrix(layout, name, shape, stored, "weight_zero_point" in stored.arrays)


def _known_bits(q: Mapping[str, Any]) -> set[int]:
    """The widths of weights that quantization_config of compressed-tensors names."""
    groups = q.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(g, dict) for g in groups.values()):
        raise ValueError("its quantization_config has no config_groups")
    if q.get("kv_cache_scheme"):
        raise ValueError("its cached keys and values are quantised in a way of their own, which neither engine runs")
    transforms = q.get("transform_config") or {}
    if not isinstance(transforms, dict) or transforms.get("config_groups"):
        raise ValueError("its weights are rotated (transform_config), which neither engine undoes")
    found = set()
    for group in groups.values():
        form = group.get("format") or q.get("format")
        if form not in ("pack-quantized", None):
            raise ValueError(f"its format is {shown(form)}; of compressed-tensors pack-quantized is read")
        if group.get("input_activations") or group.get("output_activations"):
            raise ValueError("its activations are rounded as compressed-tensors does it, which neither engine runs")
        weights = group.get("weights")
        bits = weights.get("num_bits") if isinstance(weights, dict) else None
        if not isinstance(weights, dict) or weights.get("type", "int") != "int" or type(bits) is not int:
            raise ValueError(f"its weights are {shown(weights)}, expected integers of a number of bits")
        if not 2 <= bits <= 8:
            raise ValueError(f"its weights have {bits} bits; 2 to 8 are read")
        found.add(bits)
    return found


def _used(config: ModelConfig, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """What belongs to no matrix of codes. GPTQ gives every linear a bias: where the model has none it is all zeros."""
    kinds = {*gptq_layout.NAMES, *compressed_layout.NAMES, "weight_global_scale"}
    matrices = set(matrix_names(config))
    found = {}
    for key in tensors:
        module, _, kind = key.rpartition(".")
        if module in matrices and kind in kinds:
            continue
        if module in matrices and kind == "bias" and not (config.has_bias(module) or tensors[key].float32().any()):
            continue
        found[key] = tensors[key]
    return found
