"""Integers in groups or rows as folders of GPTQ or compressed-tensors, which vLLM, transformers and others load."""

from __future__ import annotations

import json
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__
from .checkpoint import ModelFolder
from .files import atomic_open
from .layouts import Packed, Unpacked
from .layouts.compressed import PackQuantized
from .layouts.gptq import BITS, Gptq
from .layouts.words import count
from .models.shapes import linear_names, matrix_shape
from .tensorfile import LazyTensor, StoredTensor

KINDS = ("gptq", "gptq_v2", "compressed-tensors")


class ForeignLinears:
    """How the linears of a model lie in such a folder. ValueError where it cannot hold them.

    quantization: what config.json says of them. bits, groups and symmetry follow from what is stored; GPTQ has one of
    each for the whole model, compressed-tensors as many as there are.
    """

    def __init__(self, source: ModelFolder, to: str):
        self.source, self.to = source, to
        self.names = linear_names(source.config)
        for name in self.names:
            if source.layouts.get(name) != "dense":
                found = source.layouts.get(name) or source.tensors[f"{name}.weight"].dtype.lower()
                raise ValueError(
                    f"{to} holds linears of integers with scales for groups or rows, but {name} is {found}; quantize "
                    "to int4_g64, for instance"
                )
        self.schemes = {name: _scheme(source, name) for name in self.names}
        self.layouts: dict[str, Gptq | PackQuantized]
        if to == "compressed-tensors":
            self.layouts = {name: PackQuantized(max(bits, 2)) for name, (bits, _, _) in self.schemes.items()}
            self.quantization = self._compressed_config()
        else:
            bits, group, symmetric = self._one_scheme()
            layout = Gptq(bits, 1 if to == "gptq" else 2)
            self.layouts = dict.fromkeys(self.names, layout)
            self.quantization = _gptq_config(bits, group, symmetric, to)
        self.packed = lru_cache(maxsize=1)(self._packed)

    def tensors(self, name: str) -> dict[str, StoredTensor | LazyTensor]:
        """The tensors of one linear, made when their turn has come."""
        rows, cols = matrix_shape(self.source.config, name)
        _, groups, symmetric = self.schemes[name]
        bits = self.layouts[name].bits
        kinds: dict[str, tuple[str, tuple[int, ...]]]
        if self.to == "compressed-tensors":
            kinds = {
                "weight_packed": ("I32", (rows, count(cols, bits))),
                "weight_scale": (self._scale(name).dtype, (rows, groups)),
                "weight_shape": ("I64", (2,)),
            }
            if not symmetric:
                kinds["weight_zero_point"] = ("I32", (count(rows, bits), groups))
        else:
            kinds = {
                "qweight": ("I32", (count(cols, bits), rows)),
                "qzeros": ("I32", (groups, count(rows, bits))),
                "scales": ("F16", (groups, rows)),
                "g_idx": ("I32", (cols,)),
            }
        return {
            f"{name}.{kind}": LazyTensor(dtype, shape, partial(self._array, name, kind))
            for kind, (dtype, shape) in kinds.items()
        }

    def write_config(self, folder: Path) -> None:
        """Say in config.json, and for GPTQ in quantize_config.json, what the linears are."""
        tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        with atomic_open(folder / "config.json") as file:
            json.dump({**tree, "quantization_config": self.quantization}, file, indent=2)
        if self.to != "compressed-tensors":
            with atomic_open(folder / "quantize_config.json") as file:
                json.dump(self.quantization, file, indent=2)

    def same(self, name: str, written: Unpacked) -> bool:
        """Whether a linear reads back as it is, scales in the precision of the file."""
        matrix = self.source.codes(name)
        groups = matrix.scale.shape[1]
        scale = np.broadcast_to(matrix.scale, (len(matrix.codes), groups))
        if self.to != "compressed-tensors":
            scale = scale.astype(np.float16).astype(np.float32)
        if matrix.offset is None:
            return (
                written.offset is None
                and np.array_equal(matrix.codes, written.codes)
                and np.array_equal(scale, written.scale)
            )
        some = np.where(scale == 0, 1, scale)  # where it is 0 all weights are, whatever the codes
        zero = np.rint(-matrix.offset / np.where(matrix.scale == 0, 1, matrix.scale))
        given = np.zeros((1, 1)) if written.offset is None else np.rint(-written.offset / some)
        apart = matrix.codes.reshape(len(scale), groups, -1) - zero[..., None]
        there = written.codes.reshape(len(scale), groups, -1) - given[..., None]
        alike = (apart == there).all(-1) | (scale == 0)
        return bool(alike.all()) and np.array_equal(scale, written.scale)

    def notes(self) -> list[str]:
        """How far float16 is from the scales that are float32."""
        if self.to == "compressed-tensors":
            return []
        worst = 0.0
        for scale in (self._scale(name).array for name in self.names):
            if scale.dtype == np.float32 and (scale != 0).any():
                some = scale[scale != 0]
                worst = max(worst, float(np.abs(some.astype(np.float16).astype(np.float32) / some - 1).max()))
        return [f"Scales were float32 and are float16 now, at most {worst:.2g} of their size off."] if worst else []

    def _scale(self, name: str) -> StoredTensor:
        return self.source.tensors[f"{name}.weight_scale"]

    def _packed(self, name: str) -> Packed:
        try:
            return self.layouts[name].pack(self.source.codes(name))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def _array(self, name: str, kind: str) -> np.ndarray:
        return self.packed(name).arrays[kind]

    def _one_scheme(self) -> tuple[int, int, bool]:
        """Bits, group size (-1: the row) and whether all are symmetric."""
        widest = max(bits for bits, _, _ in self.schemes.values())
        sizes = {name: _group_size(self.source, name, groups) for name, (_, groups, _) in self.schemes.items()}
        first = self.names[0]
        odd = next((name for name in self.names if sizes[name] != sizes[first]), None)
        if odd is not None:
            said = {
                name: "a scale for each row" if sizes[name] < 0 else f"groups of {sizes[name]}" for name in (first, odd)
            }
            raise ValueError(
                f"GPTQ has one group size for all linears, but {first} has {said[first]} and {odd} {said[odd]}; "
                "--to compressed-tensors holds both"
            )
        symmetric = all(s for _, _, s in self.schemes.values())
        return next(b for b in BITS if b >= widest), sizes[first], symmetric

    def _compressed_config(self) -> dict[str, Any]:
        kinds: dict[tuple[int, int, bool], list[str]] = {}
        for name, (_, groups, symmetric) in self.schemes.items():
            key = self.layouts[name].bits, _group_size(self.source, name, groups), symmetric
            kinds.setdefault(key, []).append(name)
        groups_ = {}
        for i, ((bits, size, symmetric), names) in enumerate(kinds.items()):
            weights = {
                "num_bits": bits,
                "type": "int",
                "symmetric": symmetric,
                "strategy": "channel" if size < 0 else "group",
                "group_size": None if size < 0 else size,
                "dynamic": False,
                "observer": "minmax",
            }
            groups_[f"group_{i}"] = {
                "targets": ["Linear"] if len(kinds) == 1 else names,
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups_,
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
        }


def _scheme(source: ModelFolder, name: str) -> tuple[int, int, bool]:
    """Bits, number of groups, whether it is symmetric."""
    arrays = source.packed(name).arrays
    bits, low = (int(v) for v in arrays["weight_code"])
    symmetric = "weight_zero" not in arrays
    # symmetric codes of which none is negative begin at 0; others use half of the numbers for these
    return bits + (symmetric and low == 0), arrays["weight_scale"].shape[1], symmetric


def _group_size(source: ModelFolder, name: str, groups: int) -> int:
    return -1 if groups == 1 else matrix_shape(source.config, name)[1] // groups


def _gptq_config(bits: int, group: int, symmetric: bool, version: str) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": False,
        "sym": symmetric,
        "lm_head": False,
        "checkpoint_format": version,
        "format": version,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"tritkit:{__version__}"]},
    }
