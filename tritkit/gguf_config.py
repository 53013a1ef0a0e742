"""The metadata of a GGUF file and Hugging Face's config.json: what one says in the words of the other, both ways.

Whatever a file has that would change the result and is not understood is refused by its name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import ModelFolder
from .gguf import GGUFFile, as_array
from .jsonfile import shown
from .models.config import ModelConfig
from .models.rope import Rope, frequencies
from .tensorfile import StoredTensor


@dataclass(frozen=True)
class Architecture:
    """What one of llama.cpp's architectures is here. pairs: whether q and k rows are ordered for neighbouring pairs."""

    family: str
    hidden_act: str
    pairs: bool = False


ARCHITECTURES = {
    "llama": Architecture("llama", "silu", pairs=True),
    "qwen2": Architecture("qwen2", "silu"),
    "qwen3": Architecture("qwen3", "silu"),
    "bitnet": Architecture("bitnet", "silu"),  # llama.cpp's: the models of 1bitLLM
    "bitnet-b1.58": Architecture("bitnet", "relu2"),  # bitnet.cpp's and ik_llama.cpp's: BitNet-b1.58-2B-4T
    "bitnet-25": Architecture("bitnet", "relu2"),  # an older name of the same
}

ROPE_FACTORS = "rope_freqs.weight"  # what llama3's rotary scaling divides each frequency by
LARGEST_NUMBER = 3e38  # what a float32 can be
# general.file_type: what most of a file is.
FILE_TYPES = {
    **{"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "bf16": 32},
    **{"q2_k": 10, "q3_k": 12, "q4_k": 15, "q5_k": 17, "q6_k": 18},  # S, M or L cannot be told: M
    **{"tq1_0": 36, "tq2_0": 37, "mxfp4": 38, "i2_s": 40},
}
# The keys of an architecture that are read, or that say nothing of what is computed. Any other one may change the
# result, unless it is 0 or has the value that leaves things as they are.
READ = {
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "vocab_size",
    "tensor_data_layout",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.attn_factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}
NEUTRAL = {
    "attention.causal": True,
    "rope.scale_linear": 1,
    "rope.scaling.yarn_ext_factor": 1,
    "rope.scaling.yarn_attn_factor": 1,
}


def config_of(file: GGUFFile) -> dict[str, Any]:
    """The metadata as Hugging Face's config.json would say it."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(f"{file.path} has the architecture {shown(name)}; tritkit runs {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[name]
    meta = _Keys(file, name)
    for key in file.metadata:
        inner = key.removeprefix(f"{name}.")
        if inner != key and inner not in READ and meta.get(inner) not in (0, NEUTRAL.get(inner)):
            raise ValueError(f"{file.path} has {shown(key)[1:-1]} = {meta.show(inner)}, which tritkit does not run")
    hidden, heads = meta.count("embedding_length"), meta.count("attention.head_count")
    head_dim = meta.count("attention.key_length", hidden // max(heads, 1))
    context = meta.count("context_length")
    for key, wanted in (("attention.value_length", head_dim), ("rope.dimension_count", head_dim)):
        if meta.count(key, wanted) != wanted:
            raise ValueError(f"{file.path} has {name}.{key} = {meta.show(key)}, but its heads have {head_dim} values")
    vocabulary = file.shape_of("token_embd.weight") if "token_embd.weight" in file else ()
    if len(vocabulary) != 2:
        raise ValueError(f"{file.path} has no matrix token_embd.weight: it holds no whole model")
    base = meta.number("rope.freq_base", 10000.0)
    if base <= 1:
        raise ValueError(f"{file.path} has {name}.rope.freq_base = {base}, expected more than 1")
    return {
        "model_type": architecture.family,
        "hidden_act": architecture.hidden_act,
        "vocab_size": vocabulary[0],
        "hidden_size": hidden,
        "intermediate_size": meta.count("feed_forward_length"),
        "num_hidden_layers": meta.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": base,
        "rope_parameters": {"rope_theta": base, **_rope_scaling(meta, file, base, head_dim, context)},
        "tie_word_embeddings": "output.weight" not in file,
        "sliding_window": meta.get("attention.sliding_window") or None,
        "attention_bias": architecture.family == "llama" and "blk.0.attn_q.bias" in file,
        "mlp_bias": architecture.family == "llama" and "blk.0.ffn_up.bias" in file,
    }


class _Keys:
    """The keys of an architecture, each of the kind that it must be."""

    def __init__(self, file: GGUFFile, architecture: str):
        self.file, self.architecture = file, architecture

    def get(self, key: str) -> Any:
        value = self.file.metadata.get(f"{self.architecture}.{key}")
        if isinstance(value, np.ndarray):  # one for each layer: good where they are the same
            if not len(value) or (value != value[0]).any():
                raise ValueError(f"{self.file.path} has another {self.architecture}.{key} in each layer")
            return value[0].item()
        return value

    def show(self, key: str) -> str:
        value = self.get(key)
        return shown(value).strip("'")

    def count(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        value = default if value is None else value
        if type(value) is not int or value < 0:
            raise ValueError(f"{self.file.path} has {self.architecture}.{key} = {shown(value)}, expected a number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or not abs(value) < LARGEST_NUMBER:
            raise ValueError(f"{self.file.path} has {self.architecture}.{key} = {shown(value)}, expected a number")
        return shortest(float(value))


def shortest(value: float) -> float:
    """The decimal number that a float32 was written from: 1e-5, not 9.99999975e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(meta: _Keys, file: GGUFFile, base: float, head_dim: int, context: int) -> dict[str, Any]:
    """Rotary scaling in Hugging Face's words."""
    kind = meta.get("rope.scaling.type") or "none"
    factor = meta.number("rope.scaling.factor", 1.0) or 1.0
    if factor < 0:
        raise ValueError(
            f"{file.path} has {meta.architecture}.rope.scaling.factor = {factor}, expected a number above 0"
        )
    if ROPE_FACTORS in file:
        if kind not in ("none", "linear") or factor != 1:
            raise ValueError(f"{file.path} has both {ROPE_FACTORS} and rotary scaling {shown(kind)}")
        factors = StoredTensor(*as_array(file[ROPE_FACTORS])).float32()
        return llama3_scaling(factors, base, head_dim, file.path)
    if kind == "none" or (kind == "linear" and factor == 1):
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise ValueError(f"{file.path} has rotary scaling {shown(kind)}; tritkit runs linear, llama3 and yarn")
    found: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": meta.count("rope.scaling.original_context_length", context),
    }
    for theirs, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        if meta.get(f"rope.scaling.{theirs}") is not None:
            found[ours] = meta.number(f"rope.scaling.{theirs}")
    attention = meta.number("rope.scaling.attn_factor", 1.0)  # times what yarn prescribes
    if attention != 1:
        found["attention_factor"] = round(attention * (0.1 * math.log(factor) + 1), 6)
    return found


def llama3_scaling(factors: np.ndarray, base: float, head_dim: int, path: Path) -> dict[str, Any]:
    """llama3's four parameters from what they make of the frequencies; ValueError where no such parameters do."""
    if factors.shape != (head_dim // 2,) or not (np.isfinite(factors) & (factors > 0)).all():
        raise ValueError(f"{path}: {ROPE_FACTORS} has {factors.shape} values, expected {head_dim // 2} above zero")
    factors = factors.astype(np.float64)
    if (factors == 1).all():
        return {"rope_type": "default"}
    factor = float(round(factors.max(), 4))
    if not 0 < factor < 1e6:
        raise ValueError(f"{path}: {ROPE_FACTORS} has values up to {factors.max():g}, expected a number from 1 up")
    for low, high, original in (
        (1.0, 4.0, 8192),
        *((1.0, h, 1 << n) for h in (4.0, 2.0, 8.0, 16.0) for n in range(9, 21)),
    ):
        rope = Rope("llama3", factor, original, low, high)
        if np.allclose(llama3_factors(rope, base, head_dim), factors, rtol=1e-4):
            return rope.to_hf(base)
    raise ValueError(f"{path}: {ROPE_FACTORS} is not what llama3's rotary scaling makes of any usual parameters")


def llama3_factors(rope: Rope, base: float, head_dim: int, max_positions: int = 0) -> np.ndarray:
    """What llama3's scaling divides each frequency by: float32 [head_dim / 2]."""
    plain, _ = frequencies(Rope(), base, head_dim, max_positions)
    scaled, _ = frequencies(rope, base, head_dim, max_positions)
    return plain / scaled


def architecture_of(model: ModelFolder) -> str:
    """llama.cpp's name for what the model is; ValueError where it has none."""
    family, act = model.config.family, model.config.hidden_act
    family = {"mistral": "llama"}.get(family, family)
    for name, architecture in ARCHITECTURES.items():
        if (architecture.family, architecture.hidden_act) == (family, act):
            return name
    raise ValueError(f"GGUF has no architecture for the {family} family with {act!r}")


def keys_of(config: ModelConfig, architecture: str) -> dict[str, Any]:
    """The keys that say what a model is; neither its name nor its tokenizer."""
    own = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        **_scaling_keys(config),
    }
    return {"general.architecture": architecture, **{f"{architecture}.{key}": value for key, value in own.items()}}


def metadata_of(model: ModelFolder, architecture: str, kind: str) -> dict[str, Any]:
    """The keys of the file, tokenizer included."""
    from .gguf_tokenizer import tokenizer_to_gguf

    return {
        **keys_of(model.config, architecture),
        "general.type": "model",
        "general.name": model.path.stem if model.path.is_file() else model.path.name,
        **_provenance(model),
        "general.file_type": FILE_TYPES.get(kind, 0),
        "general.quantization_version": 2,
        "general.quantized_by": "tritkit",
        **tokenizer_to_gguf(model.tokenizer(), model.config.vocab_size),
    }


def _provenance(model: ModelFolder) -> dict[str, Any]:
    """Whose model it is and under which licence, where a GGUF file says so."""
    if model.container != "gguf":
        return {}
    kept = ("name", "license", "organization", "author", "basename", "finetune", "size_label", "languages", "tags")
    found = GGUFFile(model.path).plain_metadata("general.")
    return {key: found[key] for key in (f"general.{k}" for k in kept) if key in found}


def _scaling_keys(config: ModelConfig) -> dict[str, Any]:
    rope = config.rope
    if rope.type in ("default", "llama3"):  # llama3: a tensor says it
        return {}
    assert rope.factor is not None  # the other types need it
    keys: dict[str, Any] = {"rope.scaling.type": rope.type, "rope.scaling.factor": float(rope.factor)}
    if rope.type == "yarn":
        original = rope.original_max_position_embeddings or config.max_position_embeddings
        keys["rope.scaling.original_context_length"] = int(original)
        for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if getattr(rope, ours) is not None:
                keys[f"rope.scaling.{theirs}"] = float(getattr(rope, ours))
        if rope.attention_factor is not None:
            keys["rope.scaling.attn_factor"] = rope.attention_factor / (0.1 * math.log(rope.factor) + 1)
        if rope.mscale or rope.mscale_all_dim or rope.truncate is False:
            raise ValueError("GGUF cannot say what this model's yarn has: mscale, mscale_all_dim or truncate = false")
    return keys


def rope_factors(config: ModelConfig) -> np.ndarray | None:
    """The tensor ROPE_FACTORS of a model, float32 [head_dim / 2]; None where it has no llama3 scaling."""
    if config.rope.type != "llama3":
        return None
    return llama3_factors(config.rope, config.rope_theta, config.head_dim, config.max_position_embeddings)
