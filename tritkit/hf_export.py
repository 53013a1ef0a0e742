"""``tritkit export MODEL FOLDER --to ...``: a model as a folder that transformers loads where tritkit is not installed.

Ternary linears in transformers' own packing, or every matrix as plain floats. The folder is written beside its place,
read back, compared with the model, and only then it gets its name.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import EXTRAS, ModelFolder, open_folder
from .files import atomic_open
from .folderwriter import HF_FORMATS, as_dtype, copy_companions, write_folder
from .foreign_export import KINDS as FOREIGN_KINDS
from .foreign_export import ForeignLinears
from .gguf_check import SAMPLE, rows_of
from .layouts import GGML, LAYOUTS, Packed, Unpacked
from .layouts.translate import TERNARY, Translated, one_scale, pack_ternary, ternary_codes, translate
from .models.config import ModelConfig
from .models.shapes import EMBEDDING, HEAD, linear_names, matrix_names, matrix_shape
from .newfolder import beside, require_finite, require_new, require_no_extras
from .progress import progress
from .tensorfile import LazyTensor, StoredTensor

LAYOUT_OF = {"hf-bitlinear": "hf_bitlinear", "hf-autobitlinear": "hf_autobitlinear"}
DTYPES = {"bf16": "BF16", "float16": "F16", "float32": "F32"}
KINDS = (*LAYOUT_OF, *DTYPES, *FOREIGN_KINDS)
# How far rounding to a dtype may be from a value: half of the last bit, and float16's smallest step.
ROUNDING = {"BF16": (2.0**-8, 0.0), "F16": (2.0**-11, 2.0**-25), "F32": (0.0, 0.0)}
SCALE_ROUNDING = 2.0**-22  # a reciprocal of a reciprocal in float32
PER_TOKEN = ("bos_token_id", "eos_token_id", "pad_token_id")


def export_hf(source: ModelFolder, out: Path | str, to: str, overwrite: bool = False) -> dict[str, Any]:
    """Write ``source`` into the folder ``out`` and return a report: what the matrices are, notes, bytes.

    to: hf-bitlinear (scales that divide, as Falcon-E and Llama3-8B-1.58 have them), hf-autobitlinear (scales that
    multiply, as BitNet-b1.58-2B-4T has them), or bf16, float16, float32, or gptq, gptq_v2, compressed-tensors for
    integers in groups or rows. ValueError for what transformers cannot
    represent so; OSError where what was written does not read back as it should, and then it is not there.
    """
    out = Path(out)
    if to not in KINDS:
        raise ValueError(f"there is no form {to!r} of a folder for transformers; known are {', '.join(KINDS)}")
    require_new(out, overwrite, source.path)
    require_no_extras(source, "a folder for transformers")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {out.absolute().parent} to write {out.name} into")
    words = source.tokenizer()
    plan = _plan(source, to)
    tensors = plan.tensors()
    with beside(out) as folder, progress(f"export {out.name}", 2 * len(tensors), "tensors") as advance:
        for name, tensor in source.tensors.items():
            require_finite(source, name, tensor)
        write_folder(folder, plan.config, tensors, words, plan.said_layouts, advance)
        _write_companions(source, folder)
        plan.write_config(folder)
        _verify(plan, open_folder(folder), advance)
    kinds = [to] if to in FOREIGN_KINDS else plan.layouts.values()
    shown = dict.fromkeys(kinds, len(plan.layouts))
    floats = len(matrix_names(plan.config)) - len(plan.layouts)
    return {
        "types": {**shown, **({plan.dtype.lower(): floats} if floats else {})},
        "file_bytes": (out / "model.safetensors").stat().st_size,
        "notes": plan.notes(),
    }


def _plan(source: ModelFolder, to: str) -> _Plan:
    if to in FOREIGN_KINDS:
        return _Integers(source, to)
    return _Ternary(source, LAYOUT_OF[to]) if to in LAYOUT_OF else _Floats(source, DTYPES[to])


class _Plan:
    """What becomes of each tensor. layouts: what the linears read back as."""

    def __init__(self, source: ModelFolder, dtype: str):
        self.source, self.dtype = source, dtype
        self.config: ModelConfig = source.config
        self.layouts: dict[str, str] = {}

    def tensors(self) -> dict[str, StoredTensor | LazyTensor]:
        """Everything in the file, each made when its turn has come."""
        found: dict[str, StoredTensor | LazyTensor] = {}
        for name in matrix_names(self.config):
            found |= self.matrix(name)
        matrices = set(matrix_names(self.config)) | {HEAD}
        for name, tensor in self.source.tensors.items():
            module, _, kind = name.rpartition(".")
            if kind == "bias" or (kind == "weight" and module not in matrices):
                found[name] = self.floats(name, tensor.array.shape, tensor.float32)
        return found

    @property
    def said_layouts(self) -> Mapping[str, str]:
        """What the folder is written with: its config.json says of the layouts what we say."""
        return self.layouts

    def write_config(self, folder: Path) -> None:
        """What config.json says besides."""

    def holds(self, name: str, written: ModelFolder) -> bool:
        """Whether the codes of a linear read back as they are."""
        raise NotImplementedError

    def matrix(self, name: str) -> dict[str, StoredTensor | LazyTensor]:
        """The tensors of one matrix by their names: floats, here."""
        return {f"{name}.weight": self.floats(name, matrix_shape(self.config, name), lambda: self.values(name))}

    def values(self, name: str) -> np.ndarray:
        """What a matrix is, before it is rounded to the dtype: float32 [rows, columns]."""
        return self.source.floats(name)

    def rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Some rows of the same."""
        return rows_of(self.source, name, rows)

    def floats(self, name: str, shape: tuple[int, ...], values: Callable[[], np.ndarray]) -> LazyTensor:
        return LazyTensor(self.dtype, shape, lambda: as_dtype(name, values(), self.dtype))

    def notes(self) -> list[str]:
        """What a user should know, a sentence each."""
        found = []
        for name in (EMBEDDING, HEAD):
            if self.source.layouts.get(name) in GGML and self.dtype != "F32":
                found.append(f"{name} was {self.source.layouts[name].upper()} and is {self.dtype.lower()} now.")
        return found


class _Floats(_Plan):
    """Every matrix as floats; those of low-bit models as the values that their codes stand for."""

    def __init__(self, source: ModelFolder, dtype: str):
        super().__init__(source, dtype)
        c = source.config
        if c.linear_norm_eps:
            raise ValueError(
                f"the low-bit linears of {source.path} begin with a norm, which transformers has in its packed forms "
                "alone: --to hf-bitlinear or hf-autobitlinear"
            )
        self.config = replace(c, weights=None, activations=None, full_precision=())
        self.latent = set() if source.is_packed else {name for name in linear_names(c) if c.is_low_bit(name)}

    def values(self, name: str) -> np.ndarray:
        values = self.source.floats(name)
        if name not in self.latent:
            return values
        import torch

        from .formats import format_of

        return format_of(str(self.source.config.weights)).quantize(torch.from_numpy(values)).dequantize().numpy()

    def rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        return self.values(name)[rows] if name in self.latent else super().rows(name, rows)

    def notes(self) -> list[str]:
        found = super().notes()
        if self.source.config.activations is not None:
            found.insert(
                0, "The model was trained with rounded activations; transformers runs this folder with floats."
            )
        return found


class _Ternary(_Plan):
    """Linears as transformers packs ternary ones; ValueError for a model that is not ternary."""

    def __init__(self, source: ModelFolder, layout: str):
        c = source.config
        if c.weights is not None and c.activations != HF_FORMATS[1]:
            raise ValueError(
                f"transformers runs ternary weights with activations in {HF_FORMATS[1]} alone, but {source.path} has "
                f"{c.activations}; --to bf16 makes plain floats of its weights"
            )
        stored = {source.tensors[f"{name}.weight"].dtype for name in (EMBEDDING, "model.norm")}
        super().__init__(source, "F32" if stored == {"F32"} else "BF16")
        self.config = replace(c, weights=HF_FORMATS[0], activations=HF_FORMATS[1])
        self.layout = layout
        self.layouts = {name: layout for name in linear_names(c) if self.config.is_low_bit(name)}
        self.latent: dict[str, Packed] = {}
        if c.weights is not None and not source.is_packed:
            from .pack import pack_linears

            self.latent, self.latent_layout = pack_linears(source)
        self.translated = lru_cache(maxsize=1)(self._translated)  # weight and scale come one after the other
        for name in self.layouts:  # all of them, before anything is written
            if name not in self.latent and source.layouts.get(name) not in TERNARY:
                self.translated(name)

    def _translated(self, name: str) -> Translated:
        shape = matrix_shape(self.config, name)
        try:
            if name in self.latent:
                return translate(self.latent[name], self.latent_layout, self.layout, shape)
            own = self.source.layouts.get(name)
            if own in TERNARY:
                return translate(self.source.packed(name), str(own), self.layout, shape)
            return pack_ternary(ternary_codes(self.source.floats(name)), self.layout)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def matrix(self, name: str) -> dict[str, StoredTensor | LazyTensor]:
        if name not in self.layouts:
            return super().matrix(name)
        rows, cols = matrix_shape(self.config, name)
        if rows % 4:
            raise ValueError(
                f"{name} has {rows} rows, but transformers packs four in a byte: they must be a multiple of 4"
            )

        def array(key: str) -> np.ndarray:
            return self.translated(name).packed.arrays[key]

        return {
            f"{name}.weight": LazyTensor("U8", (rows // 4, cols), partial(array, "weight")),
            f"{name}.weight_scale": LazyTensor("F32", (1,), partial(array, "weight_scale")),
        }

    def codes(self, name: str) -> Unpacked:
        """What the source has, for the comparison with what was written."""
        if name in self.latent:
            return LAYOUTS[self.latent_layout].unpack(self.latent[name], matrix_shape(self.config, name))
        return self.source.codes(name) if name in self.source.layouts else ternary_codes(self.source.floats(name))

    def holds(self, name: str, written: ModelFolder) -> bool:
        wanted, found = one_scale(self.codes(name)), one_scale(written.codes(name))
        scales = float(wanted.scale[0, 0]), float(found.scale[0, 0])
        return np.array_equal(wanted.codes, found.codes) and math.isclose(*scales, rel_tol=SCALE_ROUNDING)

    def notes(self) -> list[str]:
        found = super().notes()
        if self.source.config.activations is None:
            found.append(
                "transformers rounds the activations of such a folder to 8 bits a token, which the model had not."
            )
        embedding = self.source.tensors[f"{EMBEDDING}.weight"].dtype
        if embedding in ("F16", "F32") and self.dtype == "BF16":
            found.append(f"What is not ternary is bfloat16 now; the embedding was {embedding.lower()}.")
        return found


class _Integers(_Plan):
    """Linears as GPTQ or compressed-tensors packs integers; everything else as floats."""

    def __init__(self, source: ModelFolder, to: str):
        stored = source.tensors[f"{EMBEDDING}.weight"].dtype
        super().__init__(source, stored if stored in ("F16", "F32") else "BF16")
        self.linears = ForeignLinears(source, to)
        self.config = replace(source.config, weights=None, activations=None, full_precision=())
        self.layouts = dict.fromkeys(self.linears.names, "dense")

    @property
    def said_layouts(self) -> Mapping[str, str]:
        return {}

    def write_config(self, folder: Path) -> None:
        self.linears.write_config(folder)

    def matrix(self, name: str) -> dict[str, StoredTensor | LazyTensor]:
        return self.linears.tensors(name) if name in self.layouts else super().matrix(name)

    def holds(self, name: str, written: ModelFolder) -> bool:
        return self.linears.same(name, written.codes(name))

    def notes(self) -> list[str]:
        return super().notes() + self.linears.notes()


def _write_companions(source: ModelFolder, out: Path) -> None:
    """Tokenizer and generation settings as the source has them, and which tokens begin, end and pad a text."""
    if not source.path.is_dir():
        return
    copy_companions(source.path, out)
    tree = json.loads((out / "config.json").read_text(encoding="utf-8"))
    tree |= {key: source.hf[key] for key in PER_TOKEN if source.hf.get(key) is not None}
    with atomic_open(out / "config.json") as file:
        json.dump(tree, file, indent=2)
    for extra in sorted(source.path.glob("LICENSE*")):
        shutil.copyfile(extra, out / extra.name)


def _verify(plan: _Plan, written: ModelFolder, advance: Callable[[], None]) -> None:
    """Some rows of each matrix, and all of everything else, as a stranger reads them; OSError says what differs."""
    generator = np.random.default_rng(0)
    relative, absolute = ROUNDING[plan.dtype]
    for name, tensor in written.tensors.items():
        module, _, kind = name.rpartition(".")
        advance()
        if kind in EXTRAS:
            continue
        if module in plan.layouts and kind == "weight":
            if not plan.holds(module, written):
                raise OSError(f"{name} does not read back as it was written; the folder was removed")
            continue
        matrix = kind == "weight" and module in matrix_names(plan.config)
        if matrix:
            rows = np.sort(generator.permutation(len(tensor.array))[:SAMPLE])
            found, wanted = tensor._replace(array=tensor.array[rows]).float32(), plan.rows(module, rows)
        else:
            found, wanted = tensor.float32(), plan.source.tensors[name].float32()
        if found.shape != wanted.shape or not (np.abs(found - wanted) <= np.abs(wanted) * relative + absolute).all():
            raise OSError(f"{name} does not read back as it was written; the folder was removed")
    written_config, config = (replace(c, full_precision=()) for c in (written.config, plan.config))
    if written_config != config or written.layouts != plan.layouts:  # whose layouts say what is full precision
        raise OSError("config.json does not read back as it was written; the folder was removed")
