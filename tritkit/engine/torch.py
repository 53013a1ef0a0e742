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
from ..layers import Linear, PackedLinear
from ..models.transformer import KVCache, Transformer, build, linears_of
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
    """The torch model of a folder: ternary and binary linears as codes, latent ones as BitLinear, all others as floats.

    Weights in the layouts of ggml are expanded to float32 here: torch runs them with float activations.
    """
    config = folder.config
    latent = linears_of(config)

    def make(name: str, inputs: int, outputs: int, bias: bool) -> nn.Module:
        if name not in folder.layouts:
            return latent(name, inputs, outputs, bias)
        if config.weights is None:
            return Linear(inputs, outputs, bias)
        matrix = folder.codes(name)
        scale = torch.tensor(float(matrix.scale.max()))  # blocks without weights may have a scale of zero
        codes, empty = torch.from_numpy(matrix.codes.astype(np.int8)), torch.empty(outputs) if bias else None
        return PackedLinear(codes, scale, format_of(str(config.activations)), empty, config.linear_norm_eps)

    model = build(config, make)
    with torch.no_grad():
        for name, p in model.named_parameters():
            module, _, kind = name.rpartition(".")
            in_codes = kind == "weight" and module in folder.layouts
            stored = torch.from_numpy(folder.floats(module) if in_codes else folder.tensors[name].float32())
            if stored.shape != p.shape:
                raise ValueError(
                    f"{name} has the shape {tuple(stored.shape)}, but config.json asks for {tuple(p.shape)}"
                )
            p.copy_(stored)
    return model
