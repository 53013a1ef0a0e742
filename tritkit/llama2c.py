"""Checkpoints of llama2.c (version 0): a header of seven int32, then float32 tensors one after the other.

    header: dim, hidden_dim, layers, heads, kv heads, vocabulary (negative: the output head has weights of its own),
            context
    embedding | attention norms | wq | wk | wv | wo | FFN norms | w1 (gate) | w2 (down) | w3 (up) | final norm |
            cosines and sines of the rotary embedding, not used | the head, if it is its own

Each name has the tensors of all layers. llama2.c turns pairs of neighbouring values as llama.cpp does (gguf_model.py).
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np

from .checkpoint import ModelFolder
from .gguf_model import pairs_to_halves
from .models.config import config_from_hf
from .tensorfile import StoredTensor
from .tokenizer import Tokenizer

HEADER = struct.Struct("<7i")
LARGEST = 1 << 24  # no side of a model is longer


def open_llama2c(path: Path | str, tokenizer: Path | str | None = None) -> ModelFolder:
    """A llama2.c checkpoint as a model; ValueError where the file's size does not fit its header."""
    path = Path(path)
    size = path.stat().st_size
    refusal = f"{path} is no model that tritkit knows: neither GGUF nor safetensors, and as a llama2.c checkpoint "
    if size < HEADER.size:
        raise ValueError(f"{refusal}it is too short")
    raw = np.memmap(path, np.uint8, "r")
    dim, hidden, layers, heads, kv_heads, vocabulary, context = HEADER.unpack(raw[: HEADER.size].tobytes())
    tied, vocabulary = vocabulary > 0, abs(vocabulary)
    sides = (dim, hidden, layers, heads, kv_heads, vocabulary, context)
    if min(sides) < 1 or max(sides) > LARGEST or dim % heads or heads % kv_heads:
        raise ValueError(f"{refusal}its header would be {sides}")
    head_dim = dim // heads
    kv = kv_heads * head_dim
    parts: list[tuple[str, tuple[int, ...]]] = [
        ("model.embed_tokens", (vocabulary, dim)),
        ("input_layernorm", (layers, dim)),
        ("self_attn.q_proj", (layers, dim, dim)),
        ("self_attn.k_proj", (layers, kv, dim)),
        ("self_attn.v_proj", (layers, kv, dim)),
        ("self_attn.o_proj", (layers, dim, dim)),
        ("post_attention_layernorm", (layers, dim)),
        ("mlp.gate_proj", (layers, hidden, dim)),
        ("mlp.down_proj", (layers, dim, hidden)),
        ("mlp.up_proj", (layers, hidden, dim)),
        ("model.norm", (dim,)),
        ("", (context, head_dim)),
        *([] if tied else [("lm_head", (vocabulary, dim))]),
    ]
    wanted = HEADER.size + 4 * sum(math.prod(shape) for _, shape in parts)
    if size != wanted:
        raise ValueError(f"{refusal}it would have {wanted} bytes, but it has {size}")
    hf = {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
    }
    config = config_from_hf(hf, None, None)
    values = raw[HEADER.size :].view(np.float32)
    tensors, at = {}, 0
    for name, shape in parts:
        part = values[at : at + math.prod(shape)].reshape(shape)
        at += part.size
        if name.startswith(("model.", "lm_head")):
            tensors[f"{name}.weight"] = StoredTensor("F32", part)
        elif name:
            order = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}.get(name)
            for i, layer in enumerate(part):
                rows = layer if order is None else layer[pairs_to_halves(len(layer), order)]
                tensors[f"model.layers.{i}.{name}.weight"] = StoredTensor("F32", rows)
    return ModelFolder(path, config, hf, {}, tensors, "llama2.c", lambda: _tokenizer(path, vocabulary, tokenizer))


def _tokenizer(path: Path, vocabulary: int, given: Path | str | None) -> Tokenizer:
    from .gguf_tokenizer import tokenizer_from_llama2c

    if given is not None:
        return tokenizer_from_llama2c(given, vocabulary)
    for file in (path.with_name(f"tok{vocabulary}.bin"), path.with_name("tokenizer.bin")):
        if file.is_file():
            return tokenizer_from_llama2c(file, vocabulary)
    raise ValueError(
        f"a llama2.c checkpoint has its tokenizer in another file, and beside {path} there is neither "
        f"tok{vocabulary}.bin nor tokenizer.bin; tritkit import names it with --tokenizer"
    )
