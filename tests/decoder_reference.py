"""A decoder in plain numpy, written from the definition, and small random weights for it. No code of tritkit's."""

from dataclasses import replace
from itertools import count

import numpy as np
from grouped_reference import GGML, dequantize, dequantize_activations, ggml_floats, random_blocks

from tritkit.engine.weights import DecoderShape, DecoderWeights, Groups, LayerWeights, LinearWeights


def pack_ternary(codes: np.ndarray) -> np.ndarray:
    """[rows, cols] in {-1, 0, 1} to transformers' uint8 [ceil(rows / 4), cols]."""
    packed_rows = -(-len(codes) // 4)
    padded = np.ones((4 * packed_rows, codes.shape[1]), np.uint8)
    padded[: len(codes)] = codes + 1
    a, b, c, d = padded.reshape(4, packed_rows, -1)
    return a | b << 2 | c << 4 | d << 6


def pack_binary(codes: np.ndarray) -> np.ndarray:
    return np.packbits(codes > 0, axis=1, bitorder="little")


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Bits of float32 cut to bfloat16."""
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def random_linear(rng: np.random.Generator, format: str, rows: int, cols: int, bias: bool = False):
    """A LinearWeights and the same matrix in float64."""
    values = (rng.standard_normal((rows, cols)) / np.sqrt(cols)).astype(np.float32)
    vector = rng.standard_normal(rows).astype(np.float32) if bias else None
    scale, activations = 1.0, None
    if format == "grouped":  # 5 bits and a zero point, 16 columns a group
        data = rng.integers(0, 32, (rows, cols), dtype=np.uint8)
        count = (rows, -(-cols // 16))
        scales = (rng.uniform(0.5, 1.5, count) / 9 / np.sqrt(cols)).astype(np.float16)
        groups = Groups(5, 16, scales, zeros=rng.integers(12, 20, count).astype(np.uint8))
        weights = LinearWeights("grouped", data, rows, cols, scale, "a8_g32", vector, groups)
        return weights, dequantize(data, groups)
    if format.upper() in GGML:
        name = format.upper()
        spread = ggml_floats(name, random_blocks(np.random.default_rng(0), name, 16, 256)).std()
        data = random_blocks(rng, name, rows, cols, float(0.01 / spread / np.sqrt(cols)))
        values = ggml_floats(name, data).astype(np.float64)
        return LinearWeights(format, data, rows, cols, 1.0, "a8_g32", vector), values
    if format in ("ternary", "binary"):
        codes = rng.integers(-1, 2, (rows, cols)) if format == "ternary" else rng.choice([-1, 1], (rows, cols))
        scale = float(np.float32(1.3 / np.sqrt(cols)))
        activations = "a8" if format == "ternary" else "a8_q128"
        layout = "hf_autobitlinear" if format == "ternary" else "binary_rows"
        data, values = (pack_ternary if format == "ternary" else pack_binary)(codes.astype(np.int8)), codes
    elif format == "bf16":
        layout, data = "bf16", to_bf16(values)
        values = from_bf16(data)
    elif format == "f16":
        layout, data = "f16", values.astype(np.float16).view(np.uint16)
        values = data.view(np.float16)
    else:
        layout, data = "f32", values
    return LinearWeights(layout, data, rows, cols, scale, activations, vector), values.astype(np.float64)


def random_decoder(family: str, format: str, seed: int = 0, **changes):
    """DecoderWeights and the function tokens -> float64 logits [t, vocab] that they stand for. format: of all linears,
    or "blocks": one layout of ggml after the other. The family "all" has everything that some family has: norms of
    heads and of single linears, biases, and cos and sin that are scaled."""
    bitnet, has_all = family == "bitnet", family == "all"
    sizes = {"vocab_size": 97, "hidden_size": 40, "intermediate_size": 72, "num_layers": 3, "context_length": 400}
    sizes |= {"num_heads": 4, "num_kv_heads": 2, "head_dim": 10, **changes}
    d = sizes["head_dim"]
    shape = DecoderShape(
        **sizes,
        inverse_frequencies=(10000.0 ** (-np.arange(0, d, 2) / d)).astype(np.float32),
        rms_norm_eps=1e-5,
        activation="relu2" if bitnet else "silu",
        sub_norms=bitnet or has_all,
        attention_factor=1.25 if has_all else 1.0,
        qk_norms=has_all,
        linear_norm_eps=1e-3 if has_all else 0.0,
    )
    rng = np.random.default_rng(seed)
    matrices: dict[int, np.ndarray] = {}

    turn = count()

    def linear(rows, cols, format=format, bias=False):
        if format == "blocks":
            format = list(GGML)[next(turn) % len(GGML)].lower()
        weights, values = random_linear(rng, format, rows, cols, bias)
        if has_all and rows != shape.vocab_size:
            weights = replace(weights, norm=norm(cols), bias=rng.standard_normal(rows).astype(np.float32))
        matrices[id(weights)] = values
        return weights

    def norm(n):
        return (1 + 0.1 * rng.standard_normal(n)).astype(np.float32)

    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    hidden, inner = shape.hidden_size, shape.intermediate_size
    head_format = format if format in ("f32", "f16", "bf16", "blocks") else "bf16"
    layers = [
        LayerWeights(
            q=linear(q, hidden, bias=not bitnet),
            k=linear(kv, hidden, bias=not bitnet),
            v=linear(kv, hidden),
            o=linear(hidden, q),
            gate=linear(inner, hidden),
            up=linear(inner, hidden),
            down=linear(hidden, inner),
            input_norm=norm(hidden),
            post_attention_norm=norm(hidden),
            attn_sub_norm=norm(q) if shape.sub_norms else None,
            ffn_sub_norm=norm(inner) if shape.sub_norms else None,
            q_norm=norm(shape.head_dim) if has_all else None,
            k_norm=norm(shape.head_dim) if has_all else None,
        )
        for _ in range(shape.num_layers)
    ]
    weights = DecoderWeights(
        shape=shape,
        embedding=linear(shape.vocab_size, hidden, head_format),
        layers=layers,
        final_norm=norm(hidden),
        head=None if bitnet else linear(shape.vocab_size, hidden, head_format),
    )
    return weights, lambda tokens: forward(weights, matrices, tokens)


def forward(weights: DecoderWeights, matrices: dict[int, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    s, eps, n = weights.shape, weights.shape.rms_norm_eps, len(tokens)

    def apply(w: LinearWeights, x: np.ndarray) -> np.ndarray:
        x = norm(x, w.norm, s.linear_norm_eps)
        if w.activations == "a8_g32":
            x = dequantize_activations(x.astype(np.float32))
        elif w.activations:
            levels = {"a8": 127, "a8_q128": 128}[w.activations]
            inverse = levels / np.maximum(np.abs(x).max(-1, keepdims=True), 1e-5)
            x = np.clip(np.rint(x * inverse), -128, 127) / inverse
        return x @ matrices[id(w)].T * w.scale + (0 if w.bias is None else w.bias)

    def norm(x, weight, eps=eps):
        return x if weight is None else x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight

    angles = np.arange(n, dtype=np.float32)[:, None, None] * s.inverse_frequencies  # t, 1, half
    angles = angles.astype(np.float64)
    cos, sin = s.attention_factor * np.cos(angles), s.attention_factor * np.sin(angles)

    def rotate(x):
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = matrices[id(weights.embedding)][tokens]
    for layer in weights.layers:
        h = norm(x, layer.input_norm)
        q, k, v = (apply(w, h).reshape(n, -1, s.head_dim) for w in (layer.q, layer.k, layer.v))
        q, k = norm(q, layer.q_norm), norm(k, layer.k_norm)
        group = s.num_heads // s.num_kv_heads
        k, v = np.repeat(rotate(k), group, 1), np.repeat(v, group, 1)
        scores = np.einsum("qhd,khd->hqk", rotate(q), k) * s.head_dim**-0.5
        scores = np.where(np.tri(n, dtype=bool), scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        attended = np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v).reshape(n, -1)
        x = x + apply(layer.o, norm(attended, layer.attn_sub_norm))
        h = norm(x, layer.post_attention_norm)
        gate, up = apply(layer.gate, h), apply(layer.up, h)
        gate = gate / (1 + np.exp(-gate)) if s.activation == "silu" else np.maximum(gate, 0) ** 2
        x = x + apply(layer.down, norm(gate * up, layer.ffn_sub_norm))
    return apply(weights.head or weights.embedding, norm(x, weights.final_norm))
