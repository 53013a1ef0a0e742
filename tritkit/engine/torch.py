"""The model in torch behind the engine interface: the float32 truth that the native engine is tested against."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from ..checkpoint import ModelFolder
from ..formats import format_of
from ..inputs import input_format
from ..layers import Adapter, PackedLinear
from ..layouts import LAYOUTS
from ..layouts.translate import one_scale
from ..models.shapes import EMBEDDING, HEAD, matrix_shape
from ..models.transformer import KVCache, Transformer, build, linears_of
from ..newfolder import require_finite
from ..stored import InputQuantizer, StoredEmbedding, StoredLinear
from . import Job, checked


class TorchEngine:
    """Runs jobs one after the other, each on its own cache. ``model`` is any Transformer in evaluation."""

    name = "torch"
    kv_bits = 32

    def __init__(self, model: Transformer):
        self.model = model.eval()
        self.device = model.frequencies.device
        self.vocab_size = model.config.vocab_size
        self.context_length = model.config.max_position_embeddings
        self._caches: dict[int, list[KVCache]] = {}
        self._numbers = count()

    @classmethod
    def open(cls, folder: ModelFolder, threads: int = 0) -> TorchEngine:
        if threads:
            torch.set_num_threads(threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model_of(folder).to(device))

    def new(self) -> int:
        number = next(self._numbers)
        self._caches[number] = self.model.new_cache()
        return number

    def _cache(self, sequence: int) -> list[KVCache]:
        if sequence not in self._caches:
            raise ValueError(f"sequence {sequence} does not exist")
        return self._caches[sequence]

    @torch.inference_mode()
    def step(self, jobs: Sequence[Job]) -> list[NDArray[np.float32] | None]:
        """See `Engine.step`."""
        jobs = checked(jobs, self)
        lengths = {job.sequence: self.length(job.sequence) for job in jobs}
        try:
            return [self._run(job) for job in jobs]
        except BaseException:
            for sequence, n in lengths.items():
                self.truncate(sequence, n)
            raise

    def _run(self, job: Job) -> NDArray[np.float32] | None:
        tokens = torch.from_numpy(np.asarray(job.tokens, np.int64)).to(self.device)[None]
        hidden = self.model.hidden(tokens, self._cache(job.sequence))[0]
        if job.want == "none":
            return None
        if job.want == "last":
            return self.model.logits(hidden[-1]).cpu().numpy()
        logits = self.model.logits(hidden)
        if job.want == "all":
            return logits.cpu().numpy()
        targets = torch.from_numpy(np.asarray(job.targets, np.int64)).to(self.device)
        return F.cross_entropy(logits.double(), targets, ignore_index=-1, reduction="none").float().cpu().numpy()

    def fork(self, sequence: int) -> int:
        number = self.new()
        for new, old in zip(self._caches[number], self._cache(sequence), strict=True):
            if old.keys is not None and old.values is not None:
                new.append(old.keys[:, :, : old.length], old.values[:, :, : old.length])
        return number

    def truncate(self, sequence: int, n: int) -> None:
        if not 0 <= n <= self.length(sequence):
            raise ValueError(f"sequence {sequence} holds {self.length(sequence)} tokens and cannot keep {n}")
        for cache in self._cache(sequence):
            cache.length = n

    def free(self, sequence: int) -> None:
        self._cache(sequence)
        del self._caches[sequence]

    def length(self, sequence: int) -> int:
        return self._cache(sequence)[0].length


def model_of(folder: ModelFolder) -> Transformer:
    """The torch model of a folder: latent linears as BitLinear, ternary and binary codes on their integer product,
    every other matrix of codes in its own bits, floats as floats."""
    config = folder.config
    latent = linears_of(config)

    def make(name: str, inputs: int, outputs: int, bias: bool) -> nn.Module:
        empty = torch.empty(outputs) if bias else None
        if name not in folder.layouts:
            return latent(name, inputs, outputs, bias)
        if not config.is_low_bit(name):
            return StoredLinear(*_stored(folder, name), empty, input_quantizer(folder, name))
        matrix = one_scale(folder.codes(name), f"{name} in {config.weights}")
        codes, scale = torch.from_numpy(matrix.codes.astype(np.int8)), torch.tensor(float(matrix.scale[0, 0]))
        return PackedLinear(codes, scale, format_of(str(config.activations)), empty, config.linear_norm_eps)

    embedding = StoredEmbedding(*_stored(folder, EMBEDDING)) if EMBEDDING in folder.layouts else None
    head = StoredLinear(*_stored(folder, HEAD)) if HEAD in folder.layouts else None
    model = build(config, make, embedding=embedding, head=head)
    for i in folder.adapters:
        model.model.layers[i].adapter = Adapter(config.hidden_size)  # type: ignore[union-attr]
    with torch.no_grad():
        for name, p in model.named_parameters():
            stored = torch.from_numpy(folder.tensors[name].float32())
            if stored.shape != p.shape:
                raise ValueError(
                    f"{name} has the shape {tuple(stored.shape)}, but config.json asks for {tuple(p.shape)}"
                )
            p.copy_(stored)
    return model


def _stored(folder: ModelFolder, name: str) -> tuple[str, dict[str, np.ndarray], tuple[int, int]]:
    """Layout, arrays and shape of a matrix of codes; ValueError where the arrays are odd."""
    layout, packed, shape = folder.layouts[name], folder.packed(name), matrix_shape(folder.config, name)
    try:
        first = LAYOUTS[layout].rows(packed, shape, slice(0, 1))
        LAYOUTS[layout].unpack(packed if first is None else first, shape if first is None else (1, shape[1]))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    for suffix in packed.arrays:
        require_finite(folder, f"{name}.{suffix}", folder.tensors[f"{name}.{suffix}"])
    return layout, packed.arrays, shape


def input_quantizer(folder: ModelFolder, name: str) -> InputQuantizer | None:
    """What rounds the inputs of a linear of the folder; None where they stay floats."""
    if name not in folder.inputs:
        return None
    inputs = input_format(folder.inputs[name])
    scale, zero = folder.input_grid(name) or (None, None)
    return InputQuantizer(inputs.name, scale, zero, folder.outlier_threshold if inputs.has_outliers else None)
