"""The shape of a model, in the words of Hugging Face's config.json. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

# What of config.json decides the family: the activation, where norms sit, and the class that transformers loads.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_act": "silu", "sub_norms": False, "architectures": ["LlamaForCausalLM"]},
    "bitnet": {"hidden_act": "relu2", "sub_norms": True, "architectures": ["BitNetForCausalLM"]},
}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# What transformers takes where config.json is silent.
HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    "bitnet": {"rms_norm_eps": 1e-5, "rope_theta": 500000.0},
}


@dataclass(frozen=True)
class ModelConfig:
    """A decoder. Sizes are in values; ``weights`` and ``activations`` name the formats of its linears (None: full)."""

    family: str = "bitnet"
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    max_position_embeddings: int = 512
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    weights: str | None = None
    activations: str | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"unknown model family {self.family!r}; known are {', '.join(FAMILIES)}")
        for name in (*SIZES, "num_key_value_heads", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, not {getattr(self, name)}")
        if self.activations is not None and self.weights is None:
            raise ValueError(f"model.activations is {self.activations!r}, but model.weights names no format")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model.hidden_size {self.hidden_size} is no multiple of model.num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"model.num_attention_heads {self.num_attention_heads} is no multiple of model.num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"rotary embedding needs an even head size, but hidden_size / heads is {self.head_dim}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def hidden_act(self) -> str:
        return FAMILIES[self.family]["hidden_act"]

    @property
    def sub_norms(self) -> bool:
        return FAMILIES[self.family]["sub_norms"]

    def to_hf(self) -> dict[str, Any]:
        """The entries of config.json, without quantization_config (the container knows how it is stored)."""
        own = {"family", "weights", "activations", "rope_theta"}
        values = {k: v for k, v in asdict(self).items() if k not in own}
        return {
            "model_type": self.family,
            "architectures": FAMILIES[self.family]["architectures"],
            "hidden_act": self.hidden_act,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "rope_theta": self.rope_theta,
            "attention_bias": False,
            **values,
        }

    def with_vocab(self, vocab_size: int) -> ModelConfig:
        return replace(self, vocab_size=vocab_size)


def config_from_hf(hf: dict[str, Any], weights: str | None, activations: str | None) -> ModelConfig:
    """Read config.json; ValueError names what this version cannot run."""
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"config.json has model_type {family!r}; tritkit runs {', '.join(FAMILIES)}")
    act = hf.get("hidden_act", FAMILIES[family]["hidden_act"])
    if act != FAMILIES[family]["hidden_act"]:
        raise ValueError(
            f"config.json has hidden_act {act!r}; the {family} family has {FAMILIES[family]['hidden_act']!r}"
        )
    for flag in ("attention_bias", "mlp_bias"):
        if hf.get(flag):
            raise ValueError(f"config.json has {flag} = true, which tritkit does not run yet")
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json has rope_parameters {rope!r}, which is no table")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"config.json has rope scaling {kind!r}, which tritkit does not run yet")
    for name in SIZES:
        if hf.get(name) is None:
            raise ValueError(f"config.json has no {name}")
    default = ModelConfig()
    known = {f.name for f in fields(ModelConfig)} - {"family", "weights", "activations"}
    values = {"tie_word_embeddings": False, "max_position_embeddings": 2048, **HF_DEFAULTS[family]}
    values["num_key_value_heads"] = hf["num_attention_heads"]
    values |= {k: v for k, v in {**hf, **rope}.items() if k in known and v is not None}
    for name, value in values.items():
        kind = type(getattr(default, name))
        if not (type(value) is kind or (kind is float and type(value) is int)):
            raise ValueError(f"config.json has {name} {value!r}, which is no {kind.__name__}")
        values[name] = kind(value)
    config = ModelConfig(family=family, weights=weights, activations=activations, **values)
    if hf.get("head_dim") not in (None, config.head_dim):
        raise ValueError(f"config.json has head_dim {hf['head_dim']}, but tritkit needs hidden_size / heads")
    return config
