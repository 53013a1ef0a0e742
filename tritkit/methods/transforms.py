"""Scales that move difficulty between inputs and weights and are folded into the neighbours, so that the float model
stays what it is: AWQ (arXiv 2306.00978) and SmoothQuant (arXiv 2211.10438).

With s a positive factor for each input channel, W x = (W diag(s)) (diag(s)^-1 x); the second factor goes into whatever
makes x: the norm in front of the linears, or the rows of the linear before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers import RMSNorm
from ..models.config import ModelConfig
from .blocks import matrix_of, parameter_of
from .recipe import Plan, Recipe
from .rtn import fit
from .stats import InputStats

LARGEST_CHANGE = 1e-4  # of the block's output, relative: rounding of float32 sums, no more
SMALLEST = 1e-4  # of a scale


@dataclass(frozen=True)
class Fold:
    """source makes the inputs that all of ``readers`` (names inside the layer) share, and nobody else reads."""

    source: str
    readers: tuple[str, ...]


def folds(config: ModelConfig) -> list[Fold]:
    """Where scales can go in a layer. Not from o into v where query heads share values, nor through a sub-norm into a
    linear: the norm itself takes them."""
    attention = "self_attn.attn_sub_norm" if config.sub_norms else None
    if attention is None and config.num_attention_heads == config.num_key_value_heads:
        attention = "self_attn.v_proj"
    found = [
        Fold("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        *([Fold(attention, ("self_attn.o_proj",))] if attention else []),
        Fold("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        Fold("mlp.ffn_sub_norm" if config.sub_norms else "mlp.up_proj", ("mlp.down_proj",)),
    ]
    return found


@torch.no_grad()
def apply(layer: nn.Module, fold: Fold, scale: Tensor) -> None:
    """Multiply the columns of the readers by ``scale`` and divide what they read by it."""
    source = layer.get_submodule(fold.source)
    parameter_of(source).div_(scale if isinstance(source, RMSNorm) else scale[:, None])
    bias = getattr(source, "bias", None)
    if bias is not None:
        bias.div_(scale)
    for name in fold.readers:
        parameter_of(layer.get_submodule(name)).mul_(scale)


def scale_of(
    layer: nn.Module, fold: Fold, stats: InputStats, plans: Mapping[str, Plan], recipe: Recipe
) -> Tensor | None:
    """The scale that the recipe's transform chooses for a fold, float32 [in]; None: none helps."""
    weights = {name: matrix_of(layer.get_submodule(name)) for name in fold.readers}
    if recipe.transform == "smoothquant":
        return smoothquant(weights, stats, recipe.smoothquant.alpha)
    return awq(weights, stats, {name: plans[name] for name in fold.readers}, recipe.awq.steps)


def smoothquant(weights: Mapping[str, Tensor], stats: InputStats, alpha: float) -> Tensor:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), equation 4 of the paper."""
    largest = torch.stack([w.abs().amax(0) for w in weights.values()]).amax(0)
    scale = stats.largest.clamp(min=SMALLEST) ** alpha / largest.clamp(min=SMALLEST) ** (1 - alpha)
    return scale.clamp(min=SMALLEST)


def awq(weights: Mapping[str, Tensor], stats: InputStats, plans: Mapping[str, Plan], steps: int) -> Tensor | None:
    """s = mean|X|^a with the a of a grid in [0, 1] that makes |Q(W s) s^-1 X - W X|^2 smallest, section 3.2."""
    quantised = {name: plan for name, plan in plans.items() if plan.format is not None}
    if not quantised:
        return None
    size = stats.mean_absolute().clamp(min=SMALLEST)
    best, least = None, None
    for step in range(steps):
        scale = size ** (step / steps)
        scale = (scale / torch.sqrt(scale.max() * scale.min())).clamp(min=SMALLEST)
        error = 0.0
        for name, plan in quantised.items():
            assert plan.format is not None
            w_rgk = plan.format.split(weights[name] * scale)
            grid = fit(w_rgk, plan.format, plan)
            rounded = plan.format.decode(plan.format.encode(w_rgk, grid), grid).reshape(weights[name].shape)
            error += stats.output_error(rounded / scale - weights[name])
        if least is None or error < least:
            least, best = error, (scale if step else None)
    return best


def require_same(before: Tensor, after: Tensor, name: str) -> None:
    """ValueError where the transformed block does not compute what it did."""
    change = float((after - before).norm() / before.norm().clamp(min=1e-12))
    if not change <= LARGEST_CHANGE:
        raise ValueError(f"{name}: the transformed weights change the output by {change:.2g}, more than rounding does")
