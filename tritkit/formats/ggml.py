"""The formats of ggml, q4_0 to q6_k and the ternary tq types: grids that llama.cpp's own search chooses.

``quantize`` gives the bytes of llama.cpp, taken apart. ``fit`` keeps their grid alone, so that GPTQ can choose other
codes on it, and ``encode`` is the rounding with which ggml's k-quants end: the nearest code at the scales as stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layouts import GGML, Packed, Unpacked
from ..layouts.search import SEARCHES, quantize
from .base import Format, Grid, QTensor


@dataclass(frozen=True)
class Ggml(Format):
    """``group`` weights share a scale; a ``block`` of them is searched together and stored together."""

    @property
    def has_offset(self) -> bool:
        return self.lo == 0

    @property
    def block(self) -> int:
        return GGML[self.layout].block

    @property
    def bits_per_weight(self) -> float:
        """With all that a block stores."""
        return 8 * GGML[self.layout].block_bytes / self.block

    def split(self, w: Tensor) -> Tensor:
        """View w [..., in] as [rows, groups, k]; ValueError where rows are no whole blocks."""
        if w.shape[-1] % self.block:
            raise ValueError(
                f"{self.name} has blocks of {self.block} weights of a row, but a row has {w.shape[-1]} weights"
            )
        return super().split(w)

    def fit(self, w_rgk: Tensor, importance: Tensor | None = None) -> Grid:
        """The grid that ggml's search chooses; importance float32 [groups, k]: llama.cpp's importance matrix."""
        return self._grid(self._searched(w_rgk, importance), w_rgk.device)

    def encode(self, w_rgk: Tensor, grid: Grid) -> Tensor:
        """Divides, as ggml does. Where a scale is zero all codes mean the same, and 0 is taken."""
        shifted = w_rgk if grid.offset is None else w_rgk - grid.offset
        codes = (shifted / grid.scale).round_().clamp_(self.lo, self.hi)
        return torch.where(grid.scale == 0, 0.0, codes)

    def quantize(self, w: Tensor, importance: Tensor | None = None) -> QTensor:
        """The bytes of llama.cpp, taken apart. importance: float32, one number a column."""
        w_rgk = self.split(w.detach().float())
        found = self._searched(w_rgk, importance)
        codes = torch.from_numpy(found.codes).reshape(w_rgk.shape).to(w.device)
        return QTensor(self, codes, self._grid(found, w.device), tuple(w.shape))

    def _searched(self, w_rgk: Tensor, importance: Tensor | None) -> Unpacked:
        rows = w_rgk.detach().float().reshape(len(w_rgk), -1).cpu().numpy()
        columns = None if importance is None else importance.detach().float().reshape(-1).cpu().numpy()
        packed = Packed({"weight": quantize(self.name, rows, columns)})
        return GGML[self.layout].unpack(packed, rows.shape)

    def _grid(self, found: Unpacked, device: torch.device) -> Grid:
        scale = torch.from_numpy(found.scale)[..., None].to(device)
        offset = None if found.offset is None else torch.from_numpy(found.offset)[..., None].to(device)
        inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
        return Grid(scale, inverse, offset, levels=found.levels)


def ggml_formats() -> dict[str, Format]:
    """One format for each quantiser."""
    found: dict[str, Format] = {}
    for name in SEARCHES:
        layout = GGML[name]
        found[name] = Ggml(name, layout.lo, layout.hi, layout.group, name)
    return found
