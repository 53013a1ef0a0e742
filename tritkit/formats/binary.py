"""BitNet (b1) weights: the sign of the centred weight times one scale. https://arxiv.org/abs/2310.11453"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import EPSILON, Format, Grid


@dataclass(frozen=True)
class Binary(Format):
    """Eq. 1-2: W~ = Sign(W - alpha), alpha = mean W; zero goes to -1; scale beta = mean|W| of the uncentred W."""

    name: str = "binary"
    lo: int = -1
    hi: int = 1
    group: str | int = "tensor"
    layout: str = "binary_rows"

    def fit(self, w_rgk: Tensor) -> Grid:
        return Grid.from_scale(w_rgk.abs().mean(-1, keepdim=True).clamp(min=EPSILON))

    def encode(self, w_rgk: Tensor, grid: Grid) -> Tensor:
        alpha = w_rgk.mean(-1, keepdim=True)
        return torch.where(w_rgk > alpha, 1.0, -1.0)  # torch.sign would send 0 to 0

    def bits(self) -> float:
        return 1.0  # the code 0 is never used
