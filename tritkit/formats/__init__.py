"""Number formats: which numbers a weight or an activation may be. One file and one row in FORMATS each."""

from ..jsonfile import shown
from .base import Format, Grid, QTensor, fake_quantize
from .binary import Binary
from .codebook import codebook, parse_codebook
from .ggml import ggml_formats
from .integer import AbsmaxActivation, AbsmeanActivation, integer, parse_integer
from .ternary import Ternary

FORMATS: dict[str, Format] = {
    "binary": Binary(),
    "ternary": Ternary(),
    "a8": AbsmaxActivation("a8", -128, 127, "row"),
    "a8_q128": AbsmaxActivation("a8_q128", -128, 127, "row", peak=128.0),
    "a8_g32": AbsmaxActivation("a8_g32", -127, 127, 32),  # what the native engine makes of inputs without a format
    "a4": AbsmeanActivation("a4", -8, 7, "row"),
    **ggml_formats(),  # q4_0 ... q6_k, tq1_0, tq2_0
    **{name: codebook(name) for name in ("nf4", "nf4_dq", "fp4")},
}


def format_of(name: str) -> Format:
    """A row of FORMATS, int{2..8}[_g{N}|_row|_tensor][_asym], nf4[_g{N}][_dq] or fp4[_g{N}]."""
    found = FORMATS.get(name) or parse_integer(name) or parse_codebook(name)
    if found is None:
        known = ", ".join(FORMATS)
        raise ValueError(
            f"unknown format {shown(name)}; known are {known} and int2..int8 with _gN, _row or _tensor, _asym"
        )
    return found


__all__ = ["FORMATS", "Format", "Grid", "QTensor", "fake_quantize", "format_of", "integer"]
