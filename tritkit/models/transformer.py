"""The decoder, top to bottom: all the families (families.py) in one transformer.

They differ from llama, which mistral is too, in few places, marked below: bitnet gates its MLP with relu(x)^2 instead
of silu, and normalises once more before o_proj and before down_proj (sub-norms, FACTS 5.1); qwen2 has biases on q, k
and v; qwen3 normalises each head of q and k. b1, b1.58 and a4.8 are the bitnet family with other formats on its
linears. Modules bear Hugging Face's names, so a state dict needs no translation.

Shapes: b batch, t new tokens, s tokens seen so far (cache included), h heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.floats import linear
from ..layers import Adapter, Linear, RMSNorm, linear_for
from ..stored import StoredEmbedding, StoredLinear, StoredMatrix
from .config import ModelConfig

SHORT_CONTEXT = 1024  # up to here a full matrix of attention scores is affordable

MakeLinear = Callable[[str, int, int, bool], Any]  # (name, in, out, bias) to a module that has prepare()


class KVCache:
    """Keys and values of one layer, [b, kv heads, s, d], grown by doubling."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + k.shape[2]
        if self.keys is None or self.values is None or self.keys.shape[2] < end:
            room = (*k.shape[:2], max(2 * end, 64), k.shape[3])
            keys, values = k.new_empty(room), v.new_empty(room)
            if self.keys is not None and self.values is not None:
                keys[:, :, : self.length] = self.keys[:, :, : self.length]
                values[:, :, : self.length] = self.values[:, :, : self.length]
            self.keys, self.values = keys, values
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [b, h, t, d] turned by its position, cos and sin [t, d]: rotary embedding of Su et al. 2021 in the half-split
    (NeoX) order."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, past: int) -> Tensor:
    """Causal attention, [b, h, t, d] from q [b, h, t, d] and k, v [b, h, past + t, d]."""
    t, s = q.shape[2], k.shape[2]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and t <= SHORT_CONTEXT:
        # torch's fused CPU attention runs bfloat16 at a fraction of the matmul rate: two plain products are
        # 2.5x faster forward and backward at 256 tokens (docs/log.md).
        masked = torch.full((t, s), float("-inf"), dtype=q.dtype).triu(past + 1)
        scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[3] ** -0.5 + masked
        return torch.matmul(scores.softmax(-1), v)
    mask = None
    if past and t > 1:  # new token i sees the past and the new tokens up to itself
        mask = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(past)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=past == 0 and t > 1)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, at: str, linear: MakeLinear):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        hidden, q, kv = config.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim

        def projection(name: str, inputs: int, outputs: int):
            # qwen2: q, k and v have biases; others may have them on all four
            return linear(f"{at}.{name}", inputs, outputs, config.has_bias(name))

        self.q_proj = projection("q_proj", hidden, q)
        self.k_proj = projection("k_proj", hidden, kv)
        self.v_proj = projection("v_proj", hidden, kv)
        self.o_proj = projection("o_proj", q, hidden)
        # qwen3: each head of the queries and keys is normalised before it is rotated
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norms else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norms else None
        # bitnet: attention's output is normalised before o_proj
        self.attn_sub_norm = RMSNorm(q, config.rms_norm_eps) if config.sub_norms else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        return self.o_proj(self.mix(x, cos, sin, cache))

    def mix(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        """What o_proj reads: the values of all heads, [b, t, heads * d]."""
        b, t, _ = x.shape
        x = self.q_proj.prepare(x)  # rounded once for q, k and v
        q = self.q_proj(x).view(b, t, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        past = 0
        if cache is not None:
            past = cache.length
            k, v = cache.append(k, v)
        if self.kv_heads != self.heads:
            k, v = (kv.repeat_interleave(self.heads // self.kv_heads, dim=1) for kv in (k, v))
        y = attend(q, k, v, past).transpose(1, 2).reshape(b, t, -1)
        return y if self.attn_sub_norm is None else self.attn_sub_norm(y)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, at: str, linear: MakeLinear):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = linear(f"{at}.gate_proj", hidden, inner, config.mlp_bias)
        self.up_proj = linear(f"{at}.up_proj", hidden, inner, config.mlp_bias)
        self.down_proj = linear(f"{at}.down_proj", inner, hidden, config.mlp_bias)
        # bitnet: relu(x)^2, and its product is normalised before down_proj
        self.activation = {"silu": F.silu, "relu2": lambda x: F.relu(x).square()}[config.hidden_act]
        self.ffn_sub_norm = RMSNorm(config.intermediate_size, config.rms_norm_eps) if config.sub_norms else None

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gated(x))

    def gated(self, x: Tensor) -> Tensor:
        """What down_proj reads, [b, t, inner]."""
        x = self.gate_proj.prepare(x)
        y = self.activation(self.gate_proj(x)) * self.up_proj(x)
        return y if self.ffn_sub_norm is None else self.ffn_sub_norm(y)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, at: str, linear: MakeLinear):
        super().__init__()
        self.self_attn = Attention(config, f"{at}.self_attn", linear)
        self.mlp = MLP(config, f"{at}.mlp", linear)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.adapter: Adapter | None = None  # what after-training correction adds: + W x + b of the layer's input

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        y = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        y = y + self.mlp(self.post_attention_layernorm(y))
        return y if self.adapter is None else y + self.adapter(x)


class Decoder(nn.Module):
    """Embedding, layers, final norm. ``Transformer`` puts the output head on it."""

    def __init__(self, config: ModelConfig, linear: MakeLinear, embedding: nn.Module | None = None):
        super().__init__()
        self.embed_tokens = embedding or nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, f"model.layers.{i}", linear) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """tokens int64 [b, t] to logits float32 [b, t, vocabulary].

    embedding, head: what to use instead of tables of floats; a tied model has no head.
    """

    def __init__(
        self,
        config: ModelConfig,
        linear: MakeLinear,
        embedding: StoredEmbedding | None = None,
        head: StoredLinear | None = None,
    ):
        super().__init__()
        self.config = config
        self.model = Decoder(config, linear, embedding)
        self.lm_head: Linear | StoredLinear | None = None
        if not config.tie_word_embeddings:
            self.lm_head = head or Linear(config.hidden_size, config.vocab_size)
        frequencies, self.attention_factor = config.rope_frequencies()
        self.frequencies = nn.Buffer(torch.from_numpy(frequencies), persistent=False)  # [d / 2]

    def hidden(self, tokens: Tensor, cache: list[KVCache] | None = None) -> Tensor:
        """What the output head reads: float32 [b, t, hidden]. ValueError where the sequence outgrows the model."""
        start = cache[0].length if cache else 0
        end = start + tokens.shape[1]
        if end > self.config.max_position_embeddings:
            raise ValueError(
                f"the sequence has {end} tokens, but the model's context is {self.config.max_position_embeddings}"
            )
        x = self.model.embed_tokens(tokens)
        angles = torch.arange(start, end, dtype=torch.float32, device=x.device)[:, None] * self.frequencies
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = angles.cos() * self.attention_factor, angles.sin() * self.attention_factor
        for i, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, cache[i] if cache else None)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Output head, float32 [..., vocabulary]."""
        head: Any = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return head.product(hidden) if isinstance(head, StoredMatrix) else linear(hidden, head.weight).float()

    def forward(self, tokens: Tensor, cache: list[KVCache] | None = None) -> Tensor:
        return self.logits(self.hidden(tokens, cache))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats over targets; -1 is not counted. tokens, targets int64 [b, t]."""
        logits = self.logits(self.hidden(tokens))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def new_cache(self) -> list[KVCache]:
        return [KVCache() for _ in self.model.layers]

    def linears(self) -> dict[str, nn.Module]:
        """The linears of the layers by name, in order of computation: what formats apply to."""
        names = [
            *(f"self_attn.{p}_proj" for p in "qkvo"),
            *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
        ]
        return {
            f"model.layers.{i}.{name}": layer.get_submodule(name)
            for i, layer in enumerate(self.model.layers)
            for name in names
        }


def linears_of(config: ModelConfig) -> MakeLinear:
    """The linears that train: in the config's formats, but for those that it leaves in full precision."""
    low_bit = linear_for(config.weights, config.activations, config.linear_norm_eps)

    def make(name: str, inputs: int, outputs: int, bias: bool) -> Linear:
        return (low_bit if config.is_low_bit(name) else Linear)(inputs, outputs, bias)

    return make


def build(
    config: ModelConfig,
    linear: MakeLinear | None = None,
    seed: int | None = None,
    embedding: StoredEmbedding | None = None,
    head: StoredLinear | None = None,
) -> Transformer:
    """A model of that config with its linears' class chosen at birth; ``seed`` initialises it, N(0, range^2)."""
    model = Transformer(config, linear or linears_of(config), embedding, head)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=config.initializer_range, generator=generator)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)
    return model
