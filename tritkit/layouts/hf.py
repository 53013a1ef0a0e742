"""Hugging Face's packed BitNet weights: four ternary codes a byte, strided over the output rows (FACTS 5.3).

Byte [r, c] of uint8 [out/4, in] holds code + 1 of row i * out/4 + r in bits 2i and 2i+1. Two linear classes of
transformers read the same bytes with opposite scales: `bitlinear` divides by weight_scale, `autobitlinear` multiplies.
"""

import numpy as np

from .base import Layout, Packed, Unpacked


class HFBitNet(Layout):
    def __init__(self, name: str, divides: bool):
        self.name = name
        self.divides = divides

    def pack(self, matrix: Unpacked) -> Packed:
        out = matrix.codes.shape[0]
        if out % 4:
            raise ValueError(f"{self.name} packs four rows in a byte, so the rows must be a multiple of 4, not {out}")
        self._require_codes(matrix.codes, (-1, 0, 1))
        fields = (matrix.codes + 1).astype(np.uint8).reshape(4, out // 4, -1)
        scale = self._one_scale(matrix)
        return Packed(
            {
                "weight": fields[0] | fields[1] << 2 | fields[2] << 4 | fields[3] << 6,
                "weight_scale": 1 / scale if self.divides else scale,
            }
        )

    def unpack(self, packed: Packed, shape: tuple[int, int]) -> Unpacked:
        byte = self._array(packed, "weight", (-(-shape[0] // 4), shape[1]))
        if shape[0] % 4:
            raise ValueError(f"{self.name} packs four rows in each of its bytes, so {shape[0]} rows cannot be")
        fields = np.stack([(byte >> shift) & 3 for shift in (0, 2, 4, 6)])
        if (fields == 3).any():
            raise ValueError(f"{self.name} holds the codes -1, 0 and 1, but its bytes have a fourth code")
        scale = self._stored_scale(packed)
        if self.divides and not scale.all():
            raise ValueError(f"{self.name} divides by weight_scale, but it is 0")
        return Unpacked(fields.reshape(shape).astype(np.int16) - 1, 1 / scale if self.divides else scale)
