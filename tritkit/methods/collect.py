"""The importance matrix of a model, collected on its float weights, as llama-imatrix does."""

from __future__ import annotations

import torch

from ..checkpoint import ModelFolder
from ..models.shapes import linear_names
from ..progress import progress
from .blocks import BlockJob, collect, stages_of
from .calibration import Calibration
from .importance import Importance
from .recipe import Plan, Recipe
from .stream import DecoderStream


@torch.no_grad()
def collect_importance(model: ModelFolder, data: Calibration) -> Importance:
    """Sums of squares of the inputs of all linears of the layers over the calibration tokens."""
    stream, found = DecoderStream(model), Importance(datasets=list(data.sources))
    states = [stream.embed(tokens[None]) for tokens in data.fit]
    names = linear_names(model.config)
    with progress(f"importance of {model.path.name}", model.config.num_hidden_layers, "layers") as advance:
        for number in range(model.config.num_hidden_layers):
            at, layer = f"model.layers.{number}.", stream.layer(number)
            linears = {n: layer.get_submodule(n[len(at) :]) for n in names if n.startswith(at)}
            job = BlockJob(layer, linears, dict.fromkeys(linears, Plan()), Recipe(), stream.call, states)
            states = []
            for name, stats in collect(job, stages_of(job, linears), states, paired=False).items():
                found.add(name, stats.squares.numpy(), stats.tokens)
            advance()
    return found
