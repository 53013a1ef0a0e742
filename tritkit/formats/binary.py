"""BitNet (b1) weights: the sign of the centred weight times one scale. https://arxiv.org/abs/2310.11453"""

from dataclasses import dataclass, replace

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

    def fit(self, w_rgk: Tensor, importance: Tensor | None = None) -> Grid:
        grid = Grid.from_scale(w_rgk.abs().mean(-1, keepdim=True).clamp(min=EPSILON))
        return replace(grid, threshold=w_rgk.mean(-1, keepdim=True))  # alpha

    def encode(self, w_rgk: Tensor, grid: Grid) -> Tensor:
        assert grid.threshold is not None
        return torch.where(w_rgk > grid.threshold, 1.0, -1.0)  # torch.sign would send 0 to 0

    def bits(self) -> float:
        return 1.0  # the code 0 is never used
