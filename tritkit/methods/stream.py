"""A decoder that is read from its folder layer by layer, so that one layer at a time is in memory in float32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoint import ModelFolder
from ..kernels.floats import linear
from ..layers import Linear
from ..models.shapes import EMBEDDING, HEAD
from ..models.transformer import Layer
from .blocks import Walk

STRIP = 256  # positions whose logits are in memory at the same time


class DecoderStream:
    """The float model of a folder: embed, layers, logits. Tokens int64 [b, t], hidden states float32 [b, t, hidden]."""

    def __init__(self, model: ModelFolder):
        self.model, self.config = model, model.config
        frequencies, self.attention_factor = self.config.rope_frequencies()
        self.frequencies = torch.from_numpy(frequencies)
        self._output: Tensor | None = None  # the head in float32, once it was asked for
        self._rotary: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, number: int) -> Layer:
        """Layer ``number`` with its weights in float32."""
        at = f"model.layers.{number}"
        with torch.device("meta"):
            layer = Layer(self.config, at, lambda name, inputs, outputs, bias: Linear(inputs, outputs, bias))
        layer.to_empty(device="cpu")
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(False)
            module, _, kind = f"{at}.{name}".rpartition(".")
            parameter.data = torch.from_numpy(
                self.model.floats(module) if kind == "weight" and module in self.model.layouts
                else self.model.tensors[f"{at}.{name}"].float32()
            )  # fmt: skip
        return layer.eval()

    def call(self, block: nn.Module, chunk: int, x: Tensor) -> Tensor:
        """The layer on hidden states that begin at position 0."""
        return block(x, *self._turns(x.shape[1]), None)

    def walk(self, block: nn.Module, chunk: int, x: Tensor) -> Walk:
        """``call`` in stages: yields which linears come next and what they read; returns the layer's output. What is
        held between two stages is what the rest of the layer needs."""
        assert isinstance(block, Layer)
        attention, mlp = block.self_attn, block.mlp
        inner = block.input_layernorm(x)
        yield (attention.q_proj, attention.k_proj, attention.v_proj), inner
        inner = attention.mix(inner, *self._turns(x.shape[1]), None)
        yield (attention.o_proj,), inner
        y = x + attention.o_proj(inner)
        inner = block.post_attention_layernorm(y)
        yield (mlp.gate_proj, mlp.up_proj), inner
        inner = mlp.gated(inner)
        yield (mlp.down_proj,), inner
        y = y + mlp.down_proj(inner)
        return y if block.adapter is None else y + block.adapter(x)

    def embed(self, tokens: Tensor, table: np.ndarray | None = None) -> Tensor:
        """Rows of the embedding; ``table``: of one that was quantised, float32."""
        if table is None:
            stored = self.model.tensors[f"{EMBEDDING}.weight"]
            if EMBEDDING in self.model.layouts:
                table = self.model.floats(EMBEDDING)
            else:
                used, where = np.unique(tokens.numpy(), return_inverse=True)
                rows = torch.from_numpy(stored._replace(array=stored.array[used]).float32())
                return rows[torch.from_numpy(where.reshape(tokens.shape))]
        return torch.from_numpy(table)[tokens]

    def log_probabilities(self, hidden: Tensor) -> Iterator[Tensor]:
        """log softmax of the output head for hidden states [..., hidden]: float32 [STRIP, vocabulary] one by one."""
        head, norm = self._head(), self.model.tensors["model.norm.weight"].float32()
        wide = hidden.flatten(0, -2).float()
        wide = torch.from_numpy(norm) * (
            wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        )
        for begin in range(0, len(wide), STRIP):
            yield linear(wide[begin : begin + STRIP], head).log_softmax(-1)

    def finish(self, states: Iterable[Tensor], first: int) -> list[Tensor]:
        """Hidden states behind the float layers from ``first`` on."""
        found = list(states)
        for number in range(first, self.config.num_hidden_layers):
            layer = self.layer(number)
            found = [self.call(layer, i, x) for i, x in enumerate(found)]
        return found

    def divergence(self, reference: Iterable[Iterable[Tensor]], states: Iterable[Tensor]) -> float:
        """Mean over positions of KL(reference || states) in nats. reference: strips of log-probabilities, as
        ``log_probabilities`` gives them; states: hidden states behind the last layer."""
        total, count = 0.0, 0
        for wanted, found in zip(reference, states, strict=True):
            for strip, q in zip(wanted, self.log_probabilities(found), strict=True):
                p = strip.float()
                total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
                count += len(p)
        return total / max(count, 1)

    def _head(self) -> Tensor:
        if self._output is None:
            self._output = self._read_head()
        return self._output

    def _read_head(self) -> Tensor:
        name = EMBEDDING if self.config.tie_word_embeddings else HEAD
        return torch.from_numpy(self.model.floats(name))

    def _turns(self, length: int) -> tuple[Tensor, Tensor]:
        if length not in self._rotary:
            angles = torch.arange(length, dtype=torch.float32)[:, None] * self.frequencies
            angles = torch.cat([angles, angles], dim=-1)
            self._rotary[length] = angles.cos() * self.attention_factor, angles.sin() * self.attention_factor
        return self._rotary[length]
