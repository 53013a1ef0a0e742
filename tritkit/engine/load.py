"""A model folder to a running engine. The native one never imports torch for a packed or full-precision folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..checkpoint import CODEBOOKS, ModelFolder
from ..gguf_model import shared_scale
from ..inputs import input_format
from ..jsonfile import shown
from ..layouts import GGML
from ..models.config import ModelConfig
from ..models.shapes import EMBEDDING, HEAD, linear_names, linear_shape
from ..sources import bundled_folder as bundled_folder
from ..sources import open_model
from ..tensorfile import StoredTensor
from ..tokenizer import Tokenizer
from . import Engine
from .codes import NotNative, grouped, inputs_of, rows_of
from .weights import BLOCKS, DecoderShape, DecoderWeights, Inputs, LayerWeights, LinearWeights

FLOAT_LAYOUTS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
OWN_CODES = ("dense", *CODEBOOKS)
LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Model:
    """What ``tritkit.load`` returns: an engine, the tokenizer that belongs to it, and the folder of both."""

    folder: ModelFolder
    engine: Engine
    tokenizer: Tokenizer


def load(
    folder: Path | str | None = None,
    engine: str = "native",
    threads: int = 0,
    kv_bits: int | None = None,
    head: str | None = None,
) -> Model:
    """Open a model folder or a GGUF file (none: the bundled model) with the ``native`` or the ``torch`` engine.

    threads: 0 uses all usable cores. kv_bits: width of the cached keys and values, 32, 16, 8, 4 or 3; none: 16 with the
    native engine, 32 with torch, which has no other. head: form of the output head, float, int8, int6, int4 or screen;
    none: int8 where it is large, with the native engine, else float. ValueError where the folder is no model, the
    tokenizer does not fit it, or the engine cannot run it (NotNative where torch can).
    """
    opened = open_model(folder if folder is not None else bundled_folder())
    tokenizer = opened.tokenizer()
    if engine == "native":
        from .native import NativeEngine

        bits = 16 if kv_bits is None else kv_bits
        return Model(opened, NativeEngine(decoder_weights(opened), threads, kv_bits=bits, head=head), tokenizer)
    if engine == "torch":
        if kv_bits not in (None, 32):
            raise ValueError(f"kv_bits is {kv_bits}, but the torch engine keeps keys and values at 32 bits")
        if head not in (None, "float"):
            raise ValueError(f"head is {head!r}, but the torch engine keeps the output head as it is: float")
        from .torch import TorchEngine

        return Model(opened, TorchEngine.open(opened, threads=threads), tokenizer)
    raise ValueError(f"unknown engine {engine!r}; known are 'native' and 'torch'")


def decoder_weights(folder: ModelFolder) -> DecoderWeights:
    """The arrays of a folder as the native engine takes them, as views into the file wherever that is possible."""
    c = folder.config
    inverse_frequencies, attention_factor = c.rope_frequencies()
    shape = DecoderShape(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_layers=c.num_hidden_layers,
        num_heads=c.num_attention_heads,
        num_kv_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        inverse_frequencies=inverse_frequencies,
        attention_factor=attention_factor,
        rms_norm_eps=c.rms_norm_eps,
        activation=c.hidden_act,
        sub_norms=c.sub_norms,
        context_length=c.max_position_embeddings,
        qk_norms=c.qk_norms,
        linear_norm_eps=c.linear_norm_eps,
    )
    linears = _linears(folder)
    layers = []
    for i in range(c.num_hidden_layers):
        at = f"model.layers.{i}."
        layers.append(
            LayerWeights(
                **{short: linears[at + name] for short, name in LINEARS.items()},
                input_norm=_norm(folder, at + "input_layernorm"),
                post_attention_norm=_norm(folder, at + "post_attention_layernorm"),
                attn_sub_norm=_norm(folder, at + "self_attn.attn_sub_norm") if c.sub_norms else None,
                ffn_sub_norm=_norm(folder, at + "mlp.ffn_sub_norm") if c.sub_norms else None,
                q_norm=_norm(folder, at + "self_attn.q_norm") if c.qk_norms else None,
                k_norm=_norm(folder, at + "self_attn.k_norm") if c.qk_norms else None,
                adapter=_adapter(folder, at + "adapter") if i in folder.adapters else None,
            )
        )
    table = (c.vocab_size, c.hidden_size)
    return DecoderWeights(
        shape=shape,
        embedding=_matrix(folder, EMBEDDING, table),
        layers=layers,
        final_norm=_norm(folder, "model.norm"),
        head=None if c.tie_word_embeddings else _matrix(folder, HEAD, table),
    )


def _norm(folder: ModelFolder, name: str) -> np.ndarray:
    return np.ascontiguousarray(folder.tensors[f"{name}.weight"].float32())


def _matrix(folder: ModelFolder, name: str, shape: tuple[int, int]) -> LinearWeights:
    """A matrix as the engine takes it: floats, or codes in the layout that they are stored in."""
    if name not in folder.layouts:
        return _float_linear(folder.tensors[f"{name}.weight"], shape, name)
    return _packed_linear(name, folder.layouts[name], folder.packed(name).arrays, shape, folder.config)


def _adapter(folder: ModelFolder, name: str) -> LinearWeights:
    weight, hidden = folder.tensors[f"{name}.weight"], folder.config.hidden_size
    return replace(_float_linear(weight, (hidden, hidden), name), bias=folder.tensors[f"{name}.bias"].float32())


def _float_linear(tensor: StoredTensor, shape: tuple[int, int], name: str) -> LinearWeights:
    if tensor.dtype not in FLOAT_LAYOUTS or tensor.array.shape != shape:
        raise ValueError(f"{name}.weight is {tensor.dtype} {tensor.array.shape}, expected floats of shape {shape}")
    raw = tensor.array.view(np.uint16) if tensor.dtype == "F16" else tensor.array
    return LinearWeights(FLOAT_LAYOUTS[tensor.dtype], raw, *shape)


def _linears(folder: ModelFolder) -> dict[str, LinearWeights]:
    config = folder.config
    latent = _latent_linears(folder) if config.weights and not folder.is_packed else {}
    found = {}
    for name in linear_names(config):
        linear = latent[name] if name in latent else _matrix(folder, name, linear_shape(config, name))
        bias = folder.tensors[f"{name}.bias"].float32() if config.has_bias(name) else None
        norm = _norm(folder, f"{name}.rms_norm") if config.linear_norm_eps and config.is_low_bit(name) else None
        found[name] = replace(linear, bias=bias, norm=norm, inputs=_inputs(folder, name))
    return found


def _inputs(folder: ModelFolder, name: str) -> Inputs | None:
    """What a linear's inputs are rounded to where the folder says so; without a word it is a8_g32."""
    own = folder.layouts.get(name) in OWN_CODES and folder.config.is_low_bit(name)
    format = folder.config.activations if own else folder.inputs.get(name)
    if format is None:
        return None
    rows = rows_of(folder.layouts[name], folder.packed(name).arrays, linear_shape(folder.config, name))
    return inputs_of(name, input_format(format), folder.input_grid(name), rows)


def _latent_linears(folder: ModelFolder) -> dict[str, LinearWeights]:
    """Latent weights rounded as training rounds them. The one native path that imports torch: formats live there."""
    from ..pack import pack_linears

    packed, layout = pack_linears(folder)
    c = folder.config
    return {name: _packed_linear(name, layout, p.arrays, linear_shape(c, name), c) for name, p in packed.items()}


def _packed_linear(
    name: str, layout: str, arrays: dict[str, np.ndarray], shape: tuple[int, int], config: ModelConfig
) -> LinearWeights:
    """Codes. ggml's blocks have their scales inside, and run on activations in groups of 32, as in llama.cpp, unless
    the model is a ternary one, whose matrices have one scale and whose activations have one a token."""
    if layout in GGML and layout not in BLOCKS:
        raise NotNative(f"{name} is {layout}, which only the torch engine runs")
    if layout in OWN_CODES:
        try:
            data, groups, common = grouped(layout, arrays, shape)
        except ValueError as error:
            raise type(error)(f"{name}: {error}") from None
        return LinearWeights("grouped", data, *shape, scale=common, activations="a8_g32", groups=groups)
    if layout in GGML:
        if not config.is_low_bit(name) or name in (EMBEDDING, HEAD):
            return LinearWeights(layout, arrays["weight"], *shape, activations="a8_g32")
        scale = shared_scale(layout, arrays["weight"])
        if scale is None:
            raise ValueError(f"{name} should be {config.weights} with one scale, but its blocks have several")
        return LinearWeights(layout, arrays["weight"], *shape, scale=scale, activations=config.activations)
    scales = arrays["weight_scale"].reshape(-1)
    if not len(scales) or not np.isfinite(scales).all() or (layout == "hf_bitlinear" and not scales.all()):
        raise ValueError(f"{name}.weight_scale should be a finite number, but it is {shown(scales)}")
    activations = config.activations
    if activations is None:  # a matrix of a model that is no ternary one
        if layout not in BLOCKS:
            raise NotNative(
                f"{name} is {layout} in a model whose activations are floats, which only the torch engine runs"
            )
        activations = "a8_g32"
    factor = np.float32(scales[0])
    if layout == "hf_bitlinear":  # this one divides; the engine multiplies
        factor = np.float32(1) / factor
    return LinearWeights(layout, arrays["weight"], *shape, scale=float(factor), activations=activations)
