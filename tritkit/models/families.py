"""The model families: what config.json's model_type decides, and what transformers takes where config.json is silent.

All are one decoder (transformer.py, csrc/decoder.cpp); a row says where a family differs from llama.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    architecture: str  # the class that transformers loads
    hidden_act: str = "silu"
    other_acts: tuple[str, ...] = ()  # that it may have as well
    sub_norms: bool = False  # norms before o_proj and down_proj
    qk_norms: bool = False  # norms of each query and key head, before they are rotated
    qkv_bias: bool = False  # q, k and v always have biases
    biases: tuple[str, ...] = ()  # which entries of config.json give it biases
    window: str | None = None  # which entry of config.json must be true for sliding_window to count; "": it always does
    defaults: dict[str, Any] = field(default_factory=dict)


# model_type to family. The defaults are those of transformers' configuration classes.
FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        biases=("attention_bias", "mlp_bias"),
        defaults={"max_position_embeddings": 2048},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        window="",
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        qkv_bias=True,
        window="use_sliding_window",
        defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        qk_norms=True,
        biases=("attention_bias",),
        window="use_sliding_window",
        defaults={
            **{"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
            "head_dim": 128,
        },
    ),
    "bitnet": Family(
        "BitNetForCausalLM",
        hidden_act="relu2",
        other_acts=("silu",),  # the models of 1bitLLM, and all that mainline llama.cpp calls bitnet
        sub_norms=True,
        biases=("attention_bias",),
        defaults={
            **{"num_key_value_heads": 5, "max_position_embeddings": 2048},
            **{"rms_norm_eps": 1e-5, "rope_theta": 500000.0},
        },
    ),
}
COMMON_DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "max_window_layers": 28}

# Entries that other architectures have: in a config.json that calls itself one of the families, any other value than
# these would be maths that neither transformers' class nor ours computes.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"), (None, 1)),
    **dict.fromkeys(("scale_emb", "embedding_scale", "scale_depth"), (None, 1)),
    **dict.fromkeys(("attention_multiplier", "query_pre_attn_scalar", "clip_qkv", "dim_model_base"), (None, False)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "logit_softcapping"), (None, 0, False)),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), (None, 0, 1)),
    **dict.fromkeys(("use_parallel_residual", "alibi", "no_rope_layers", "attention_chunk_size"), (None, False)),
}
