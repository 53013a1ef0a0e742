"""bitnet.cpp's I2_S: two bits a weight (code + 1) in the order of the CPU that wrote it, one float32 scale.

    i2_s_x86: 128 columns in 32 bytes; byte m = t[m] << 6 | t[m + 32] << 4 | t[m + 64] << 2 | t[m + 96]
    i2_s_arm:  64 columns in 16 bytes; byte m = t[m] << 6 | t[m + 16] << 4 | t[m + 32] << 2 | t[m + 48]

A weight is scale * code. In a file the bytes of a matrix are followed by the scale and 28 bytes of no meaning.
bitnet.cpp's converter in Python and the model that Microsoft publishes have the x86 order, and ik_llama.cpp reads no
other; the ARM order comes from quantising on an ARM CPU. bitnet.cpp multiplies whole blocks of a row, so that rows of
other widths are refused.

Nothing in a file names its order, and one matrix cannot tell: the two readings differ in the order of the columns,
the same for each row. But columns stand for channels whose order other tensors know: see ``detect_i2s``.
"""

import numpy as np

from .base import Layout, Packed, Unpacked
from .fields import join, split

LANES = {"i2_s_x86": 32, "i2_s_arm": 16}  # bytes of a block
HIGH_FIRST = (6, 4, 2, 0)
TAIL = 32  # bytes after the codes: the scale, and padding


class I2S(Layout):
    def __init__(self, name: str):
        self.name = name
        self.lanes = LANES[name]
        self.block = 4 * self.lanes

    def row_bytes(self, cols: int) -> int:
        if cols % self.block:
            raise ValueError(f"{self.name} has blocks of {self.block} columns, but a row has {cols}")
        return cols // 4

    def stored_bytes(self, shape: tuple[int, int]) -> int:
        """Size of a matrix in a GGUF file."""
        return shape[0] * self.row_bytes(shape[1]) + TAIL

    def pack(self, matrix: Unpacked) -> Packed:
        self._require_codes(matrix.codes, (-1, 0, 1))
        row_bytes = self.row_bytes(matrix.codes.shape[1])
        byte = join((matrix.codes + 1).astype(np.uint8), self.lanes, HIGH_FIRST)
        return Packed({"weight": byte.reshape(len(matrix.codes), row_bytes), "weight_scale": self._one_scale(matrix)})

    def unpack(self, packed: Packed, shape: tuple[int, int]) -> Unpacked:
        byte = self._array(packed, "weight", (shape[0], self.row_bytes(shape[1])))
        t = split(byte, self.lanes, HIGH_FIRST)
        if (t == 3).any():
            raise ValueError(f"{self.name} holds the codes -1, 0 and 1, but its bytes have a fourth code")
        return Unpacked(t.reshape(shape).astype(np.int16) - 1, self._stored_scale(packed))

    def to_stored(self, packed: Packed) -> np.ndarray:
        """The bytes of a GGUF tensor: codes, scale, zeros."""
        scale = self._stored_scale(packed).astype("<f4").reshape(1).view(np.uint8)
        return np.concatenate([packed.arrays["weight"].ravel(), scale, np.zeros(TAIL - 4, np.uint8)])

    def from_stored(self, byte: np.ndarray, shape: tuple[int, int]) -> Packed:
        """The arrays of a GGUF tensor; the codes are a view."""
        if byte.shape != (self.stored_bytes(shape),):
            raise ValueError(
                f"{self.name} has {self.stored_bytes(shape)} bytes for a {shape[0]} x {shape[1]} matrix, "
                f"but there are {byte.size}"
            )
        codes, tail = byte[:-TAIL], byte[-TAIL:]
        return Packed({"weight": codes.reshape(shape[0], -1), "weight_scale": tail[:4].copy().view("<f4")})


def row_activity(byte: np.ndarray) -> np.ndarray:
    """Share of the weights of each row that are not zero: float64 [rows]. The order of the columns does not matter."""
    used = sum(np.count_nonzero((byte >> shift & 3) != 1, axis=1) for shift in HIGH_FIRST)
    return used / max(4 * byte.shape[1], 1)


def column_activity(byte: np.ndarray) -> dict[str, np.ndarray]:
    """Share of the weights of each column that are not zero, in each of the two orders: float64 [cols]."""
    used = np.stack([np.count_nonzero((byte >> shift & 3) != 1, axis=0) for shift in HIGH_FIRST]) / max(len(byte), 1)
    return {name: used.reshape(4, -1, lanes).swapaxes(0, 1).ravel() for name, lanes in LANES.items()}


def detect_i2s(evidence: list[tuple[np.ndarray, list[np.ndarray]]]) -> str | None:
    """Which order the I2_S matrices of one model are in, "i2_s_x86" or "i2_s_arm"; None where it cannot be told.

    ``evidence`` has the bytes of matrices [rows, cols / 4], each with references: any numbers for its input channels in
    their true order, as the norm in front of it, or ``row_activity`` of a matrix that makes these channels or adds to
    them. Training ties such a number to how many weights read the channel, so it correlates with ``column_activity``
    in the right order and mostly does not in the wrong one, where three columns of four are elsewhere.

    A reference with correlation r over n columns is n/2 * log(1 / (1 - r^2)) in favour of an order, the likelihood
    ratio of a straight line. Where nothing is related that is about a half, give or take as much, so the verdict wants
    a lead that chance does not make over so many, and an order that explains at least twice what the other does.
    """
    total = dict.fromkeys(LANES, 0.0)
    count = 0
    for byte, references in evidence:
        cols = 4 * byte.shape[1]
        if cols % 128:
            continue  # here the two orders do not differ by one order of columns
        activity = column_activity(byte)
        for reference in references:
            if len(reference) != cols:
                continue  # it belongs to other channels
            count += 1
            for name in total:
                r = _correlation(activity[name], reference)
                total[name] -= 0.5 * cols * np.log1p(-min(r * r, 1 - 1e-12))
    best, other = sorted(total, key=lambda name: -total[name])
    lead = total[best] - total[other]
    return best if lead > 20 + 5 * count**0.5 and lead > total[other] else None


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b.astype(np.float64) - b.mean()
    norm = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / norm if norm > 0 and np.isfinite(norm) else 0.0


# The tensors of one layer that know the order of a linear's input channels: norms in front of it, and linears whose
# rows are these channels.
NORMS = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "self_attn.o_proj": "self_attn.attn_sub_norm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
    "mlp.down_proj": "mlp.ffn_sub_norm",
}
RESIDUAL = ("self_attn.o_proj", "mlp.down_proj")  # their rows add to the channels that q, k, v, gate and up read
MAKERS = {name: RESIDUAL for name in NORMS if name not in RESIDUAL} | {
    "mlp.down_proj": ("mlp.gate_proj", "mlp.up_proj")
}


def layer_evidence(
    linears: dict[str, np.ndarray], norms: dict[str, np.ndarray]
) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """What ``detect_i2s`` wants of one layer: bytes of its linears and its norms, under their names in the layer.

    ``linears["mlp.down_proj"]`` is uint8 [rows, cols / 4]; ``norms["input_layernorm"]`` is float [cols].
    """
    rows = {name: row_activity(byte) for name, byte in linears.items()}
    found = []
    for name, byte in linears.items():
        references = [rows[maker] for maker in MAKERS.get(name, ()) if maker in rows]
        if NORMS.get(name) in norms:
            references.append(norms[NORMS[name]])
        found.append((byte, references))
    return found
