"""BitNet b1.58 weights: {-1, 0, +1} times one scale. https://arxiv.org/abs/2402.17764"""

from dataclasses import dataclass

from torch import Tensor

from .base import EPSILON, Format, Grid


@dataclass(frozen=True)
class Ternary(Format):
    """RoundClip(W / mean|W|, -1, 1), as in the authors' code: multiply by 1 / mean|W|, round half to even."""

    name: str = "ternary"
    lo: int = -1
    hi: int = 1
    group: str | int = "tensor"
    layout: str = "hf_autobitlinear"

    def fit(self, w_rgk: Tensor, importance: Tensor | None = None) -> Grid:
        return Grid.from_scale(w_rgk.abs().mean(-1, keepdim=True).clamp(min=EPSILON))  # absmean
