"""Which type each matrix gets in llama.cpp's mixes: Q4_K_M is mostly q4_k, with more bits where they matter most.

The rules are those of llama-quant.cpp inside llama-cpp-python 0.3.36 for dense models (FACTS 9.5): values and down
projections get more bits, above all in the first and last eighth of the layers, and the output head most. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..layouts import GGML
from ..models.config import ModelConfig
from ..models.shapes import EMBEDDING, HEAD, linear_names, matrix_names, matrix_shape

# Where rows are no whole blocks of 256, and then none of 32.
FALLBACKS = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


@dataclass(frozen=True)
class Where:
    """What the rules ask of a linear's layer and model."""

    layer: int
    layers: int
    grouped: bool  # at least four queries share a key
    importance: bool  # there is an importance matrix

    @property
    def first_eighth(self) -> bool:
        return self.layer < self.layers // 8

    @property
    def matters(self) -> bool:
        """The first eighth of the layers, the last, and every third between them."""
        ends = self.first_eighth or self.layer >= 7 * self.layers // 8
        return ends or (self.layer - self.layers // 8) % 3 == 2


Rule = Callable[[Where], str]


@dataclass(frozen=True)
class Mix:
    """``base`` for all linears but those of a rule."""

    base: str
    v_proj: Rule | None = None
    down_proj: Rule | None = None
    o_proj: str | None = None


def _more(base: str) -> Rule:
    return lambda where: "q6_k" if where.matters else base


MIXES: dict[str, Mix] = {
    "q4_0": Mix("q4_0", down_proj=lambda w: "q4_1" if w.importance and w.first_eighth else "q4_0"),
    "q4_1": Mix("q4_1"),
    "q5_0": Mix("q5_0", down_proj=lambda w: "q5_1" if w.importance and w.first_eighth else "q5_0"),
    "q5_1": Mix("q5_1"),
    "q8_0": Mix("q8_0"),
    "q2_k": Mix("q2_k", lambda w: "q4_k" if w.grouped else "q3_k", lambda w: "q3_k", "q3_k"),
    "q3_k_s": Mix("q3_k"),
    "q3_k_m": Mix(
        "q3_k",
        lambda w: "q5_k" if w.layer < 2 else "q4_k",
        lambda w: "q5_k" if w.layer < w.layers // 16 else "q4_k",
        "q4_k",
    ),
    "q3_k_l": Mix("q3_k", lambda w: "q5_k", lambda w: "q5_k", "q5_k"),
    "q4_k_s": Mix(
        "q4_k",
        lambda w: "q5_k" if w.layer < 4 else "q4_k",
        lambda w: "q5_k" if w.first_eighth else "q4_k",
    ),
    "q4_k_m": Mix("q4_k", _more("q4_k"), _more("q4_k")),
    "q5_k_s": Mix("q5_k"),
    "q5_k_m": Mix("q5_k", _more("q5_k"), _more("q5_k")),
    "q6_k": Mix("q6_k"),
}


def mix_types(config: ModelConfig, mix: str, has_importance: bool) -> dict[str, str]:
    """The type of every matrix, by Hugging Face's name: of layouts, or f16 where no block fits its rows.

    mix: a row of MIXES; ValueError for another. has_importance: whether llama.cpp would have an importance matrix.
    """
    wanted = wanted_types(config, mix, has_importance)
    return {name: fallback(kind, matrix_shape(config, name)[1]) for name, kind in wanted.items()}


def wanted_types(config: ModelConfig, mix: str, has_importance: bool) -> dict[str, str]:
    """The same before anything falls back because of its rows."""
    if mix not in MIXES:
        raise ValueError(f"there is no mix {mix!r}; known are {', '.join(MIXES)}")
    chosen = MIXES[mix]
    whole = config.hidden_size % GGML[chosen.base].block == 0
    head = "q6_k" if whole and chosen.base != "q8_0" else "q8_0"  # also where the embedding is the head
    found = {EMBEDDING: head if config.tie_word_embeddings else chosen.base, HEAD: head}
    grouped = config.num_attention_heads // config.num_key_value_heads >= 4
    for name in linear_names(config):
        where = Where(int(name.split(".")[2]), config.num_hidden_layers, grouped, has_importance)
        found[name] = _linear_type(config, chosen, name.rpartition(".")[2], where)
    return {name: found[name] for name in matrix_names(config)}


def fallback(kind: str, columns: int) -> str:
    """What a type becomes where a row is no whole number of its blocks: f16 in the end."""
    for candidate in (kind, FALLBACKS.get(kind, kind)):
        if columns % GGML[candidate].block == 0:
            return candidate
    return "f16"


def _linear_type(config: ModelConfig, mix: Mix, projection: str, where: Where) -> str:
    if projection == "o_proj" and mix.o_proj is not None:
        return mix.o_proj
    if projection == "down_proj" and mix.down_proj is not None:
        return mix.down_proj(where)
    if projection != "v_proj":
        return mix.base
    kind = mix.base if mix.v_proj is None else mix.v_proj(where)
    # In models of 70 billion parameters eight heads share a value, so that the matrix is small.
    return "q5_k" if kind in ("q3_k", "q4_k") and _is_70b(config) else kind


def _is_70b(config: ModelConfig) -> bool:
    """As llama.cpp recognises it: by 80 layers."""
    shared = config.num_attention_heads != config.num_key_value_heads
    return config.num_hidden_layers == 80 and (config.family == "qwen2" or (config.family == "llama" and shared))
