"""The shape of a model, in the words of Hugging Face's config.json. Imports no torch."""

from __future__ import annotations

import re
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..jsonfile import shown
from .families import COMMON_DEFAULTS, FAMILIES, NEUTRAL, Family
from .rope import Rope, frequencies, rope_from_hf

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
LARGEST, MOST_LAYERS = 2**31 - 1, 1000  # what a file may claim before anybody believes it
WIDEST_HEAD = 1 << 16
MOST_EFFORT = 200_000  # to match modules_to_not_convert with the names of all layers: a second, more or less
OWN_ARCHITECTURE = "TritkitForCausalLM"  # in folders that transformers must refuse


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
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    rope: Rope = field(default_factory=Rope)
    attention_bias: bool = False  # biases of q, k, v and o; qwen2 has those of q, k and v anyway
    mlp_bias: bool = False
    full_precision: tuple[str, ...] = ()  # patterns of the linears that stay floats: modules_to_not_convert
    gate: str = ""  # activation of the gate, "silu" or "relu2"; "": the family's
    linear_norm_eps: float = 0.0  # above 0: each low-bit linear normalises its input first (use_rms_norm)

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"unknown model family {self.family!r}; known are {', '.join(FAMILIES)}")
        for name in (*SIZES, "num_key_value_heads", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, not {shown(getattr(self, name))}")
            if getattr(self, name) > (MOST_LAYERS if name == "num_hidden_layers" else LARGEST):
                raise ValueError(f"model.{name} is {shown(getattr(self, name))}, more than any model has")
        if self.activations is not None and self.weights is None:
            raise ValueError(f"model.activations is {shown(self.activations)}, but model.weights names no format")
        # transformers' llama asks for it even where there is a head_dim
        if self.hidden_size % self.num_attention_heads and (self.head_dim == 0 or self.family == "llama"):
            raise ValueError(
                f"model.hidden_size {self.hidden_size} is no multiple of model.num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.head_dim == 0:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"model.num_attention_heads {self.num_attention_heads} is no multiple of model.num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim > WIDEST_HEAD:
            raise ValueError(f"model.head_dim is {shown(self.head_dim)}, more than any model has")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"rotary embedding needs an even head size, but model.head_dim {self.head_dim} is none")
        if self.sub_norms and self.head_dim * self.num_attention_heads != self.hidden_size:
            raise ValueError(
                f"model.head_dim is {self.head_dim}, but the {self.family} family has a norm as wide as the hidden "
                f"size: expected {self.hidden_size} / {self.num_attention_heads} heads"
            )
        if not 1 < self.rope_theta < float("inf"):
            raise ValueError(f"model.rope_theta must be above 1, not {self.rope_theta}")
        if not 0 <= self.rms_norm_eps < 1:
            raise ValueError(f"model.rms_norm_eps must be a small number, not {self.rms_norm_eps}")
        for name in ("attention_bias", "mlp_bias"):
            if getattr(self, name) and name not in FAMILIES[self.family].biases:
                raise ValueError(f"model.{name} is true, but the {self.family} family has no such biases")
        _require_sane(self.full_precision)
        effort = sum(20 ** len(_REPEATS.findall(pattern)) for pattern in self.full_precision)
        if effort * self.num_hidden_layers > MOST_EFFORT:
            raise ValueError(
                f"modules_to_not_convert has {len(self.full_precision)} patterns, too intricate for "
                f"{self.num_hidden_layers} layers"
            )
        acts = (FAMILIES[self.family].hidden_act, *FAMILIES[self.family].other_acts)
        if self.hidden_act not in acts:
            raise ValueError(f"model.gate is {self.gate!r}; the {self.family} family has {' or '.join(acts)}")

    @property
    def hidden_act(self) -> str:
        return self.gate or FAMILIES[self.family].hidden_act

    @property
    def sub_norms(self) -> bool:
        return FAMILIES[self.family].sub_norms

    @property
    def qk_norms(self) -> bool:
        return FAMILIES[self.family].qk_norms

    def has_bias(self, name: str) -> bool:
        """Whether the linear of that name, for instance model.layers.0.self_attn.q_proj, has a bias."""
        last = name.rsplit(".", 1)[-1]
        if last in ("gate_proj", "up_proj", "down_proj"):
            return self.mlp_bias
        return self.attention_bias or (FAMILIES[self.family].qkv_bias and last != "o_proj")

    def is_low_bit(self, name: str) -> bool:
        """Whether the linear of that name carries the format ``weights``."""
        return self.weights is not None and not is_excluded(name, self.full_precision)

    def rope_frequencies(self) -> tuple[NDArray[np.float32], float]:
        """See ``rope.frequencies``."""
        return frequencies(self.rope, self.rope_theta, self.head_dim, self.max_position_embeddings)

    def to_hf(self) -> dict[str, Any]:
        """The entries of config.json, without quantization_config (the container knows how it is stored)."""
        family = FAMILIES[self.family]
        own = {"family", "weights", "activations", "rope", "full_precision", "linear_norm_eps", "gate"}
        own |= {"attention_bias", "mlp_bias"} - set(family.biases)
        values = {k: v for k, v in asdict(self).items() if k not in own}
        rope = self.rope.to_hf(self.rope_theta)
        if self.rope.type != "default":
            values["rope_scaling"] = rope  # as transformers before version 5 spells it
        if family.window is not None:
            values |= {"sliding_window": None} | ({family.window: False} if family.window else {})
        return {
            "model_type": self.family,
            "architectures": [family.architecture],
            "hidden_act": self.hidden_act,
            "rope_parameters": rope,
            **values,
        }

    def with_vocab(self, vocab_size: int) -> ModelConfig:
        return replace(self, vocab_size=vocab_size)


def is_excluded(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern names this module, as transformers matches modules_to_not_convert: the beginning up to a dot
    or the end, plain or as a regular expression, or any end of the name."""
    return name.endswith(patterns) or any(pattern.match(name) for pattern in _compiled(patterns))


_REPEATS = re.compile(r"[*+?{|]")


@lru_cache(maxsize=8)
def _compiled(patterns: tuple[str, ...]) -> list[re.Pattern[str]]:
    return [re.compile(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))") for pattern in patterns]


def _require_sane(patterns: tuple[str, ...]) -> None:
    """ValueError for a pattern that is no regular expression, or one that could take forever."""
    if len(patterns) > 1000:
        raise ValueError(f"modules_to_not_convert has {len(patterns)} patterns, expected at most 1000")
    for pattern in patterns:
        if len(pattern) > 200 or re.search(r"\)[*+?{]|\\\d|\(\?", pattern) or len(_REPEATS.findall(pattern)) > 2:
            raise ValueError(f"modules_to_not_convert has {shown(pattern)}, a pattern too intricate for tritkit")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                re.compile(pattern)
        except (re.error, OverflowError, RecursionError, FutureWarning, DeprecationWarning):
            raise ValueError(f"modules_to_not_convert has {shown(pattern)}, which is no regular expression") from None


def config_from_hf(hf: dict[str, Any], weights: str | None, activations: str | None) -> ModelConfig:
    """Read config.json; ValueError names what this version cannot run."""
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"config.json has model_type {shown(kind)}; tritkit runs {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    defaults = {**COMMON_DEFAULTS, **family.defaults}
    given = {**defaults, **{name: value for name, value in hf.items() if value is not None}}
    _require_known_maths(hf, kind, family)
    for name in SIZES:
        if hf.get(name) is None:
            raise ValueError(f"config.json has no {name}")
    if hf.get("num_key_value_heads", ...) is None or "num_key_value_heads" not in given:
        given["num_key_value_heads"] = given["num_attention_heads"]
    default = ModelConfig()
    names = {f.name for f in fields(ModelConfig)}
    names -= {"family", "weights", "activations", "rope", "full_precision", "linear_norm_eps"}
    names -= {"attention_bias", "mlp_bias"} - set(family.biases)
    values = {name: _typed(name, given[name], type(getattr(default, name))) for name in names if name in given}
    _require_no_window(hf, kind, family, given, values["num_hidden_layers"], values["max_position_embeddings"])
    rope, theta = rope_from_hf(hf, values["max_position_embeddings"])
    values["rope_theta"] = values["rope_theta"] if theta is None else theta
    values |= _quantized_modules(hf, weights)
    act = hf.get("hidden_act") or family.hidden_act
    values["gate"] = "" if act == family.hidden_act else act
    return ModelConfig(family=kind, weights=weights, activations=activations, rope=rope, **values)


def _typed(name: str, value: Any, kind: Any) -> Any:
    if not (type(value) is kind or (kind is float and type(value) is int and abs(value) < LARGEST)):
        raise ValueError(f"config.json has {name} {shown(value)}, which is no {kind.__name__}")
    return kind(value)


def _require_known_maths(hf: dict[str, Any], kind: str, family: Family) -> None:
    act = hf.get("hidden_act") or family.hidden_act
    if act not in (family.hidden_act, *family.other_acts):
        raise ValueError(f"config.json has hidden_act {shown(act)}; the {kind} family has {family.hidden_act!r}")
    architectures = hf.get("architectures") or [family.architecture]
    known = (family.architecture.lower(), OWN_ARCHITECTURE.lower())
    if not isinstance(architectures, list) or str(architectures[0]).lower() not in known:
        raise ValueError(
            f"config.json has architectures {shown(architectures)}; the {kind} family is {family.architecture}"
        )
    for flag in ("attention_bias", "mlp_bias"):
        # Qwen2 has the biases that its relatives call attention_bias whatever the entry says
        if hf.get(flag) and flag not in family.biases and not (family.qkv_bias and flag == "attention_bias"):
            raise ValueError(f"config.json has {flag} = true, but the {kind} family has no such biases")
    for name, neutral in NEUTRAL.items():
        if hf.get(name) not in neutral:
            raise ValueError(f"config.json has {name} {shown(hf[name])}, which the {kind} family does not compute")


def _require_no_window(
    hf: dict[str, Any], kind: str, family: Family, given: dict[str, Any], layers: int, context: int
) -> None:
    """ValueError where attention would see fewer positions than the context has."""
    if family.window is None:
        return
    types = hf.get("layer_types")
    if types is not None and (not isinstance(types, list) or any(t != "full_attention" for t in types)):
        odd = next((t for t in types if t != "full_attention"), types) if isinstance(types, list) else types
        raise ValueError(f"config.json has layer_types with {shown(odd)}; tritkit runs full_attention")
    if family.window:
        first = _typed("max_window_layers", given["max_window_layers"], int)
        slides = bool(hf.get(family.window)) and types is None and first < layers
    else:
        slides = True
    window = hf.get("sliding_window", family.defaults["sliding_window"])
    if not slides or window is None:
        return
    if _typed("sliding_window", window, int) < context:
        raise ValueError(
            f"config.json has sliding_window {window}, shorter than the context of {context}, which tritkit does not "
            f"run; with max_position_embeddings {window} in config.json it runs within the window, where the two are "
            "the same"
        )


def _quantized_modules(hf: dict[str, Any], weights: str | None) -> dict[str, Any]:
    """Which linears quantization_config leaves in full precision, and whether the others begin with a norm."""
    table = hf.get("quantization_config")
    if weights is None or not isinstance(table, dict):
        return {}
    values: dict[str, Any] = {}
    patterns = table.get("modules_to_not_convert")
    if patterns is not None:
        if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
            raise ValueError(f"config.json has modules_to_not_convert {shown(patterns)}, expected a list of names")
        values["full_precision"] = tuple(patterns)
        _require_sane(values["full_precision"])
        if not is_excluded("lm_head", values["full_precision"]):
            raise ValueError(
                f"config.json has modules_to_not_convert {shown(patterns)} without lm_head, which makes the output "
                "head a low-bit linear; tritkit runs heads of floats"
            )
    if table.get("use_rms_norm"):
        eps = table.get("rms_norm_eps", 1e-6)
        if type(eps) is not float or not 0 < eps < 1:
            raise ValueError(f"quantization_config has rms_norm_eps {shown(eps)}, expected a small number")
        values["linear_norm_eps"] = eps
    return values
