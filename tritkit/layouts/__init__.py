"""Byte layouts: how codes and scales lie in a file. numpy only. One file and one row in LAYOUTS each."""

from .base import Layout, Packed, Unpacked
from .dense import BinaryRows, Dense
from .hf import HFBitNet

LAYOUTS: dict[str, Layout] = {
    "hf_bitlinear": HFBitNet("hf_bitlinear", divides=True),
    "hf_autobitlinear": HFBitNet("hf_autobitlinear", divides=False),
    "binary_rows": BinaryRows(),
    "dense": Dense(),
}

__all__ = ["LAYOUTS", "Layout", "Packed", "Unpacked"]
