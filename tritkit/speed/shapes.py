"""Models that are only a shape: real model folders with random weights, to measure speed without a download.

A folder is written piece by piece, so that a large one costs disk, not memory. Its linears are uniform over
{-1, 0, +1} (bitnet) or normal (llama), scaled so that no activation grows from layer to layer; norms are one.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist

import numpy as np

from ..files import ended_politely
from ..folderwriter import float_to_bf16
from ..models.config import ModelConfig
from ..models.shapes import linear_names, linear_shape, norm_sizes
from ..progress import Advance, progress
from ..tensorfile import DTYPES, tensor_header


def _shape(family: str, sizes: tuple[int, int, int, int, int], vocab: int, context: int = 2048) -> ModelConfig:
    """sizes: hidden, intermediate, layers, heads, heads for keys and values."""
    formats = {"bitnet": ("ternary", "a8"), "llama": (None, None)}[family]
    return ModelConfig(family, vocab, *sizes, context, weights=formats[0], activations=formats[1])


# The models of the b1.58 paper (as published on Hugging Face), their full-precision twins, and BitNet-b1.58-2B-4T.
SIZES = {
    "700m": (1536, 4096, 24, 16, 16),
    "1.3b": (2048, 5460, 24, 32, 32),
    "3b": (3200, 8640, 26, 32, 32),
}
SHAPES: dict[str, ModelConfig] = {
    "bitnet-2b4t": _shape("bitnet", (2560, 6912, 30, 20, 5), 128256, 4096),
    **{f"bitnet-{name}": _shape("bitnet", sizes, 32000) for name, sizes in SIZES.items()},
    **{f"llama-{name}": _shape("llama", sizes, 32000) for name, sizes in SIZES.items()},
    "bitnet-tiny": _shape("bitnet", (256, 768, 2, 4, 2), 512),  # for tests
    "llama-tiny": _shape("llama", (256, 768, 2, 4, 2), 512),
}

# Gives the likeliest of 128,256 tokens a probability of 0.67 on average: some stand out, as they do with a language
# model on text. Where none does (with a deviation of 1) a screened head has to compute every logit again.
LOGIT_SPREAD = 5.0
PIECE = 96 << 14  # words that are drawn at a time: whole blocks of every layout


def shape_named(name: str, positions: int = 0) -> ModelConfig:
    """A row of SHAPES with room for so many positions; a shape has no trained context that could be exceeded."""
    if name not in SHAPES:
        raise ValueError(f"there is no shape {name!r}; known are {', '.join(SHAPES)}")
    config = SHAPES[name]
    return replace(config, max_position_embeddings=max(config.max_position_embeddings, positions))


@contextmanager
def temporary_folder(bytes_needed: int, what: str) -> Iterator[Path]:
    """An empty folder that is removed at the end, whatever the end is. ValueError where the disk is too small."""
    with (
        ended_politely(),
        tempfile.TemporaryDirectory(prefix="tritkit-bench-", ignore_cleanup_errors=True) as folder,
    ):
        free = shutil.disk_usage(folder).free
        if free < bytes_needed:
            raise ValueError(
                f"{what} needs {bytes_needed / 1e9:.2f} GB in {tempfile.gettempdir()}, which has {free / 1e9:.2f} GB "
                "free; TMPDIR names another place"
            )
        yield Path(folder)


@contextmanager
def random_folder(name: str, config: ModelConfig) -> Iterator[Path]:
    """A model folder of that shape, for as long as the context lasts."""
    plan = _plan(config)
    size = sum(p.nbytes for p in plan.values())
    with temporary_folder(size, f"the shape {name} with random weights") as folder:
        with progress(f"random weights for {name}", size, "B") as advance:
            _write(folder, config, plan, advance)
        yield folder


def linear_spread(config: ModelConfig, name: str) -> float:
    """Standard deviation of a linear's weights: its outputs have variance one for inputs of variance one, and those
    that are added to the residual stream share that among the layers."""
    added = name.endswith(("o_proj", "down_proj"))
    return 1 / math.sqrt(linear_shape(config, name)[1] * (2 * config.num_hidden_layers if added else 1))


def embedding_spread(config: ModelConfig) -> float:
    """That of the embedding, which is the output head too: logits of deviation LOGIT_SPREAD."""
    return LOGIT_SPREAD / math.sqrt(config.hidden_size)


def normal_values() -> np.ndarray:
    """65536 values that are distributed as N(0, 1)."""
    normal = NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)], np.float32)


def ternary_words() -> np.ndarray:
    """65536 words of eight codes in two bits each, as even over all 3^8 as that number allows."""
    byte = np.array([a | b << 2 | c << 4 | d << 6 for a, b, c, d in itertools.product(range(3), repeat=4)])
    pairs = np.arange(65536) * 81**2 // 65536
    return (byte[pairs // 81] | byte[pairs % 81] << 8).astype(np.uint16)


def draw(chance: np.random.BitGenerator, count: int, table: np.ndarray) -> Iterator[np.ndarray]:
    """``count`` random rows of a table of 65536, a piece at a time."""
    while count:
        size = min(PIECE, count)
        yield table[chance.random_raw(-(-size // 4)).view(np.uint16)[:size]]
        count -= size


@dataclass(frozen=True)
class _Tensor:
    """What is to be written: random words of two bytes from a table, or ones times ``value``."""

    dtype: str
    shape: tuple[int, ...]
    table: np.ndarray | None = None
    value: float = 1.0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize

    def pieces(self, chance: np.random.BitGenerator) -> Iterator[np.ndarray]:
        if self.table is not None:
            return draw(chance, self.nbytes // 2, self.table)
        return iter([np.full(self.shape, self.value, DTYPES[self.dtype])])


def _plan(config: ModelConfig) -> dict[str, _Tensor]:
    values, words = normal_values(), ternary_words()
    plan = {}
    for name in linear_names(config):
        (rows, columns), spread = linear_shape(config, name), linear_spread(config, name)
        if config.weights:
            plan[f"{name}.weight"] = _Tensor("U8", (rows // 4, columns), words)
            plan[f"{name}.weight_scale"] = _Tensor("F32", (1,), value=spread / math.sqrt(2 / 3))
        else:
            plan[f"{name}.weight"] = _Tensor("BF16", (rows, columns), float_to_bf16(spread * values))
    table = float_to_bf16(embedding_spread(config) * values)
    plan["model.embed_tokens.weight"] = _Tensor("BF16", (config.vocab_size, config.hidden_size), table)
    return plan | {f"{name}.weight": _Tensor("F32", (size,)) for name, size in norm_sizes(config).items()}


def _write(folder: Path, config: ModelConfig, plan: dict[str, _Tensor], advance: Advance) -> None:
    tree = config.to_hf()
    if config.weights:
        offline = {"linear_class": "autobitlinear", "quantization_mode": "offline"}
        tree["quantization_config"] = {"quant_method": "bitnet", **offline}
    (folder / "config.json").write_text(json.dumps(tree), encoding="utf-8")
    chance = np.random.SFC64(0)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(tensor_header({name: (t.dtype, t.shape) for name, t in plan.items()}, {}))
        for tensor in plan.values():
            for piece in tensor.pieces(chance):
                file.write(piece.data)
                advance(piece.nbytes)
