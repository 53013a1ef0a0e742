"""A GGUF file as a model: its metadata as Hugging Face's config, its tensors under Hugging Face's names.

llama.cpp turns pairs of neighbouring values in its architecture "llama" where Hugging Face turns a value and the one
half a head away, so there the rows of q and k lie in another order. They are re-ordered here as they are read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from .checkpoint import OWN, ModelFolder, require_complete
from .folderwriter import quantization_config
from .gguf import FLOAT_TYPES, GGUFFile, Strings, as_array
from .gguf_config import ARCHITECTURES, ROPE_FACTORS, config_of
from .jsonfile import shown
from .layouts import GGML, Packed
from .layouts.i2s import detect_i2s, layer_evidence
from .models.config import ModelConfig, config_from_hf
from .models.shapes import linear_names
from .tensorfile import StoredTensor

# Names of tensors: ggml's within a layer, Hugging Face's within a layer.
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_sub_norm": "self_attn.attn_sub_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = re.compile("0|[1-9][0-9]{0,5}")  # a number that no other name of a tensor could mean


def hf_name(name: str) -> str | None:
    """Hugging Face's name of one of ggml's tensors, with its end (.weight, .bias); None where there is none."""
    stem, _, end = name.rpartition(".")
    if stem in OUTSIDE:
        return f"{OUTSIDE[stem]}.{end}"
    block, _, inner = stem.partition(".")
    number, _, inner = inner.partition(".")
    if block == "blk" and LAYER.fullmatch(number) and inner in IN_LAYER:
        return f"model.layers.{int(number)}.{IN_LAYER[inner]}.{end}"
    return None


def ggml_name(name: str) -> str:
    """The other way."""
    for table, prefix in ((OUTSIDE, ""), (IN_LAYER, "model.layers.")):
        for theirs, ours in table.items():
            if not prefix and name.startswith(f"{ours}."):
                return theirs + name.removeprefix(ours)
            number, _, rest = name.removeprefix(prefix).partition(".")
            if prefix and name.startswith(prefix) and rest.startswith(f"{ours}."):
                return f"blk.{number}.{theirs}{rest.removeprefix(ours)}"
    raise ValueError(f"GGUF has no name for the tensor {name}")


def pairs_to_halves(rows: int, heads: int) -> np.ndarray:
    """Where each row of Hugging Face's q or k lies in llama.cpp's: int64 [rows]."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def halves_to_pairs(rows: int, heads: int) -> np.ndarray:
    """The other way: where each row of llama.cpp's q or k lies in Hugging Face's."""
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


class _Tensors(Mapping[str, StoredTensor]):
    """The tensors of a GGUF file under Hugging Face's names; codes as uint8 [rows, bytes of a row]."""

    def __init__(self, file: GGUFFile, orders: dict[str, int]):
        self.file, self.orders = file, orders
        self.names: dict[str, str] = {}
        for name in file:
            ours = hf_name(name)
            if ours is not None:
                self.names[ours] = name
            elif name != ROPE_FACTORS:
                raise ValueError(f"{file.path} has the tensor {shown(name)}, which tritkit does not know how to use")

    def __getitem__(self, name: str) -> StoredTensor:
        stem, _, end = name.rpartition(".")
        if end == "weight_scale" and f"{stem}.weight" in self.names:  # I2_S keeps it behind the codes
            tensor = self.file[self.names[f"{stem}.weight"]]
            codes = math.prod(tensor.shape) // 4
            return StoredTensor("F32", tensor.data[codes : codes + 4].view(np.float32))
        if name not in self.names:
            raise ValueError(f"{self.file.path} has no tensor {shown(name)}")
        tensor = self.file[self.names[name]]
        dtype, array = as_array(tensor)
        heads = self.orders.get(stem.rpartition(".")[2])
        if heads is None:
            return StoredTensor(dtype, array)
        if not array.ndim or len(array) % (2 * heads):
            raise ValueError(f"{self.file.path}: {name} has the shape {array.shape}, which {heads} heads cannot share")
        return StoredTensor(dtype, array[pairs_to_halves(len(array), heads)])

    def __contains__(self, name: object) -> bool:
        stem, _, end = str(name).rpartition(".")
        if end == "weight_scale":
            return f"{stem}.weight" in self.names and self.file.type_of(self.names[f"{stem}.weight"]) == "i2_s"
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        for name in self.names:
            yield name
            scale = name.removesuffix("weight") + "weight_scale"
            if name.endswith(".weight") and scale in self:
                yield scale

    def __len__(self) -> int:
        return sum(1 for _ in self)


def open_gguf(path: Path | str, i2_s: str | None = None) -> ModelFolder:
    """A GGUF file as a model; ValueError says what it has that tritkit cannot run.

    i2_s: the layout of I2_S codes, "x86" or "arm", where the file's content does not tell.
    """
    file = GGUFFile(path)
    hf = config_of(file)
    name = str(file.metadata.get("general.architecture"))
    base = config_from_hf(hf, None, None)
    heads = {"q_proj": base.num_attention_heads, "k_proj": base.num_key_value_heads}
    tensors = _Tensors(file, heads if ARCHITECTURES[name].pairs else {})
    layouts = {}
    if any(file.type_of(theirs) == "i2_s" for theirs in file):
        i2_s = i2_s or _i2_s_order(tensors)
    for ours, theirs in tensors.names.items():
        kind = file.type_of(theirs)
        if not math.prod(file.shape_of(theirs)):
            raise ValueError(f"{path}: the tensor {shown(theirs)} is empty: its shape is {file.shape_of(theirs)}")
        if kind in FLOAT_TYPES:
            continue
        if len(file.shape_of(theirs)) != 2 or not ours.endswith(".weight"):
            raise ValueError(f"{path}: the tensor {shown(theirs)} is {kind} {file.shape_of(theirs)}, expected floats")
        layouts[ours.removesuffix(".weight")] = _layout_of(file, theirs, i2_s)
    weights = _weights_of(base, tensors, layouts)
    config = config_from_hf(hf, weights, None if weights is None else "a8")
    q = quantization_config(config, layouts)
    if q is not None:
        hf = {**hf, "quantization_config": q}
        if q["quant_method"] == "tritkit":
            hf |= {"model_type": OWN + config.family, "architectures": ["TritkitForCausalLM"]}
    opened = ModelFolder(Path(path), config, hf, layouts, tensors, "gguf", lambda: _tokenizer(file, config.vocab_size))
    require_complete(opened)
    return opened


def _tokenizer(file: GGUFFile, rows: int):
    from .gguf_tokenizer import tokenizer_from_gguf

    listed = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(listed, Strings) and len(listed) > rows:  # before anything is made of them
        raise ValueError(f"{file.path} has {len(listed)} tokens, but its embedding has {rows} rows")
    try:
        return tokenizer_from_gguf(file.plain_metadata("tokenizer."))
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None


def _layout_of(file: GGUFFile, name: str, i2_s: str | None) -> str:
    kind = file.type_of(name)
    if kind == "i2_s":
        return f"i2_s_{i2_s}"
    if kind not in GGML:
        known = ", ".join(k.upper() for k in (*FLOAT_TYPES, *GGML, "i2_s"))
        raise ValueError(
            f"{file.path}: the tensor {shown(name)} has the type {kind.upper()}, which tritkit does not run; "
            f"it runs {known}"
        )
    return kind


def _i2_s_order(tensors: _Tensors) -> str:
    """ "x86" or "arm", by the content; ValueError where that does not tell."""
    found: dict[str, tuple[dict, dict]] = {}  # linears and norms by layer
    for name in tensors.names:
        if not name.startswith("model.layers.") or not name.endswith(".weight"):
            continue
        number, _, inner = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
        linears, norms = found.setdefault(number, ({}, {}))
        if inner.endswith("norm"):
            norms[inner] = tensors[name].float32()
        elif tensors.file.type_of(tensors.names[name]) == "i2_s":
            linears[inner] = tensors[name].array
    evidence = [each for linears, norms in found.values() for each in layer_evidence(linears, norms)]
    order = detect_i2s(evidence)
    if order is None:
        raise ValueError(
            f"{tensors.file.path} has I2_S codes, and their order, which depends on the CPU of who wrote them, cannot "
            "be told from the content: import it with --i2-s x86 (bitnet.cpp's converter and published files) or arm"
        )
    return order.removeprefix("i2_s_")


def _weights_of(config: ModelConfig, tensors: _Tensors, layouts: Mapping[str, str]) -> str | None:
    """ "ternary" where every linear of the layers is that, with one scale; else None: formats of weights alone."""
    linears = linear_names(config)
    if not all(layouts.get(name, "").startswith(("tq", "i2_s")) for name in linears):
        return None
    scales = (shared_scale(layouts[name], tensors[f"{name}.weight"].array) for name in linears)
    return "ternary" if all(scale is not None for scale in scales) else None


def shared_scale(layout: str, blocks: np.ndarray) -> float | None:
    """The scale that all blocks of a TQ matrix share, blocks without weights aside; None where they differ.

    blocks: uint8 [rows, bytes of a row]. I2_S has one scale by itself, which is not in the blocks: 1.
    """
    if not layout.startswith("tq"):
        return 1.0
    blocks = blocks.reshape(-1, GGML[layout].block_bytes)
    scales = np.ascontiguousarray(blocks[:, -2:]).view(np.float16)[:, 0]
    empty = blocks[scales == 0]
    if len(empty) and GGML[layout].unpack(Packed({"weight": empty}), (len(empty), GGML[layout].block)).codes.any():
        return None  # codes that a scale of zero makes zero
    scales = scales[scales != 0]
    if not len(scales):
        return 0.0
    return float(scales[0]) if (scales == scales[0]).all() else None
