"""Byte layouts: how codes and scales lie in a file. numpy only. One file and one row in LAYOUTS each."""

from .base import Layout, Packed, TwoLevels, Unpacked
from .codebook import E2M1, NF4, Codebook, DoubleCodebook
from .dense import BinaryRows, Dense
from .ggml import GgmlBlocks, GgmlQuantizer
from .ggml_k import Q2K, Q3K, Q4K, Q5K, Q6K
from .ggml_legacy import GgmlLegacy
from .ggml_mx import MXFP4
from .ggml_tq import TQ1, TQ2
from .hf import HFBitNet
from .i2s import I2S, detect_i2s, layer_evidence

LAYOUTS: dict[str, Layout] = {
    "hf_bitlinear": HFBitNet("hf_bitlinear", divides=True),
    "hf_autobitlinear": HFBitNet("hf_autobitlinear", divides=False),
    "binary_rows": BinaryRows(),
    "dense": Dense(),
    "nf4": Codebook("nf4", NF4),
    "nf4_dq": DoubleCodebook("nf4_dq", NF4),
    "fp4": Codebook("fp4", E2M1),
    "q4_0": GgmlLegacy(4, has_min=False),
    "q4_1": GgmlLegacy(4, has_min=True),
    "q5_0": GgmlLegacy(5, has_min=False),
    "q5_1": GgmlLegacy(5, has_min=True),
    "q8_0": GgmlLegacy(8, has_min=False),
    "q2_k": Q2K(),
    "q3_k": Q3K(),
    "q4_k": Q4K(),
    "q5_k": Q5K(),
    "q6_k": Q6K(),
    "mxfp4": MXFP4(),
    "tq1_0": TQ1(),
    "tq2_0": TQ2(),
    "i2_s_x86": I2S("i2_s_x86"),
    "i2_s_arm": I2S("i2_s_arm"),
}
GGML = {name: layout for name, layout in LAYOUTS.items() if isinstance(layout, GgmlBlocks)}

__all__ = [
    "GGML",
    "I2S",
    "LAYOUTS",
    "GgmlBlocks",
    "GgmlQuantizer",
    "Layout",
    "Packed",
    "TwoLevels",
    "Unpacked",
    "detect_i2s",
    "layer_evidence",
]
