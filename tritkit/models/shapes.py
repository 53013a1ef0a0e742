"""The matrices and norms of a decoder by their Hugging Face names, and their shapes. Torch-free."""

from __future__ import annotations

from .config import ModelConfig

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def linear_names(config: ModelConfig) -> list[str]:
    """The linears of the layers, in order of computation."""
    inside = [*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down"))]
    return [f"model.layers.{i}.{name}" for i in range(config.num_hidden_layers) for name in inside]


def linear_shape(config: ModelConfig, name: str) -> tuple[int, int]:
    """[out, in] of a linear by its name."""
    heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = {
        "q_proj": (heads, config.hidden_size),
        "k_proj": (kv, config.hidden_size),
        "v_proj": (kv, config.hidden_size),
        "o_proj": (config.hidden_size, heads),
        "gate_proj": (config.intermediate_size, config.hidden_size),
        "up_proj": (config.intermediate_size, config.hidden_size),
        "down_proj": (config.hidden_size, config.intermediate_size),
    }
    return shapes[name.rsplit(".", 1)[1]]


def matrix_names(config: ModelConfig) -> list[str]:
    """Everything that may be stored as codes: the embedding, the linears of the layers, the head if it has its own."""
    return [EMBEDDING, *linear_names(config), *(() if config.tie_word_embeddings else (HEAD,))]


def matrix_shape(config: ModelConfig, name: str) -> tuple[int, int]:
    """[rows, columns] of a matrix by its name."""
    return (config.vocab_size, config.hidden_size) if name in (EMBEDDING, HEAD) else linear_shape(config, name)


def norm_sizes(config: ModelConfig) -> dict[str, int]:
    """The norms between the linears by name."""
    heads = config.num_attention_heads * config.head_dim
    sizes = {"input_layernorm": config.hidden_size, "post_attention_layernorm": config.hidden_size}
    if config.sub_norms:
        sizes |= {"self_attn.attn_sub_norm": heads, "mlp.ffn_sub_norm": config.intermediate_size}
    if config.qk_norms:
        sizes |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
    norms = {f"model.layers.{i}.{n}": size for i in range(config.num_hidden_layers) for n, size in sizes.items()}
    return norms | {"model.norm": config.hidden_size}
