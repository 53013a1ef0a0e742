"""Products of floats on a CPU. torch's own go through MKL, which on AMD's processors leaves half of the machine unused;
oneDNN, which torch also holds, does not (benchmarks/float_products.py, docs/log.md)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 32  # fewer are ruled by reading the weights, which both do alike

# present in every build of torch with oneDNN; what the compiler of torch lowers linears to
_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in] transposed, plus bias [out]: [..., out], as F.linear. Where nothing is trained
    and all is float32 on a CPU, by the quicker library."""
    if _onednn is None or x.numel() < ROWS * x.shape[-1] or not _plain(x, weight):
        return F.linear(x, weight, bias)
    return _onednn(x, weight, bias, "none", [], "")


def second_moment(rows: Tensor) -> Tensor:
    """rows^T rows of float32 [n, in]: [in, in]."""
    if _onednn is None or len(rows) < ROWS or not _plain(rows, rows):
        return rows.t() @ rows
    columns = rows.t().contiguous()
    return _onednn(columns, columns, None, "none", [], "")


def _plain(x: Tensor, weight: Tensor) -> bool:
    if torch.is_autocast_enabled("cpu") or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        return False
    kinds = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
    return kinds and x.layout == torch.strided and type(x) in _KINDS and type(weight) in _KINDS


_KINDS = (Tensor, torch.nn.Parameter)  # fakes of a compiler and the like take torch's own way
