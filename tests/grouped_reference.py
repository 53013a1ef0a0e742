"""Matrices with scales for groups of columns, in plain numpy float64, and the blocks of ggml taken apart into them."""

import gguf
import numpy as np

from tritkit.engine.weights import Groups

SPAN = 256  # columns that share d and dmin
FLOAT_ROUNDING = 2.0**-24  # of one float32 operation, relative to its result


def dequantize(codes: np.ndarray, groups: Groups) -> np.ndarray:
    """float64 [rows, cols], as the definition of Groups says."""
    cols = codes.shape[1]
    column = np.arange(cols)
    group, span = column // groups.size, column // SPAN

    def of(array: np.ndarray, at: np.ndarray) -> np.ndarray:
        return array.astype(np.float64)[:, at]

    scale = of(groups.scales, group)
    if groups.d is not None:
        scale = scale * of(groups.d, span)
    if groups.table is not None:
        return scale * groups.table.astype(np.float64)[codes]
    values = codes.astype(np.float64)
    if groups.zeros is not None:
        return scale * (values - of(groups.zeros, group))
    if groups.offsets is not None:
        return scale * values + of(groups.offsets, group)
    if groups.mins is not None and groups.dmin is not None:
        return scale * values - of(groups.dmin, span) * of(groups.mins, group)
    return scale * (values - 2 ** (groups.bits - 1))


def quantize_activations(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a8_g32: int8 codes [tokens, cols] and float32 scales [tokens, strips of 32] of float32 x."""
    tokens, cols = x.shape
    strips = -(-cols // 32)
    padded = np.zeros((tokens, strips * 32), np.float32)
    padded[:, :cols] = x
    padded = padded.reshape(tokens, strips, 32)
    inverse = np.float32(127) / np.maximum(np.abs(padded).max(-1), np.float32(1e-5))
    codes = np.clip(np.rint(padded * inverse[..., None]), -127, 127).astype(np.int8)
    return codes.reshape(tokens, -1)[:, :cols], np.float32(1) / inverse


def dequantize_activations(x: np.ndarray) -> np.ndarray:
    codes, scales = quantize_activations(x)
    return codes.astype(np.float64) * np.repeat(scales, 32, axis=1)[:, : x.shape[1]]


def check_product(found: np.ndarray, x: np.ndarray, codes: np.ndarray, groups: Groups, scale: float = 1.0) -> None:
    """Against float64. The bound follows every rounding: three for a unit of at least 16 columns, and the sum's."""
    w, activations = dequantize(codes, groups), dequantize_activations(x)
    bare = Groups(**{**vars(groups), "zeros": None, "offsets": None, "mins": None, "dmin": None})
    parts = np.abs(w) + np.abs(dequantize(codes, bare)) + np.abs(w - dequantize(codes, bare))
    bound = (np.abs(activations) @ parts.T) * FLOAT_ROUNDING * (2 * codes.shape[1] / 16 + 5) * abs(scale)
    error = np.abs(found - activations @ w.T * scale)
    assert (error <= bound + 1e-30).all(), f"{(error / (bound + 1e-30)).max()} times the bound"


# --- ggml's blocks, uint8 [rows, bytes of a row], as codes and Groups. Layouts: ggml-quants.c of llama.cpp.


def _halves(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at a byte of every block: [rows, blocks]."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16)[..., 0]


def _bits(packed: np.ndarray, width: int) -> np.ndarray:
    """[..., bytes] to [..., 8 / width, bytes]: field f is bits f * width ... of each byte."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    return packed[..., None, :] >> shifts & ((1 << width) - 1)


def _flat(codes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(codes.reshape(len(codes), -1).astype(np.uint8))


def _fifth_bits(blocks: np.ndarray) -> np.ndarray:
    """32 bits, little-endian, as [..., 32]."""
    return np.unpackbits(np.ascontiguousarray(blocks), axis=-1, bitorder="little")


def _q4_0(b: np.ndarray) -> tuple[np.ndarray, Groups]:
    return _flat(_bits(b[..., 2:], 4)), Groups(4, 32, _halves(b, 0))


def _q4_1(b: np.ndarray) -> tuple[np.ndarray, Groups]:
    return _flat(_bits(b[..., 4:], 4)), Groups(4, 32, _halves(b, 0), offsets=_halves(b, 2))


def _q5_0(b: np.ndarray) -> tuple[np.ndarray, Groups]:
    low = _bits(b[..., 6:], 4).reshape(*b.shape[:2], 32)
    return _flat(low | _fifth_bits(b[..., 2:6]) << 4), Groups(5, 32, _halves(b, 0))


def _q5_1(b: np.ndarray) -> tuple[np.ndarray, Groups]:
    low = _bits(b[..., 8:], 4).reshape(*b.shape[:2], 32)
    return _flat(low | _fifth_bits(b[..., 4:8]) << 4), Groups(5, 32, _halves(b, 0), offsets=_halves(b, 2))


def _q8_0(b: np.ndarray) -> tuple[np.ndarray, Groups]:
    return _flat(b[..., 2:] ^ 128), Groups(8, 32, _halves(b, 0))  # code + 128


def _q2_k(b: np.ndarray) -> tuple[np.ndarray, Groups]:
    codes = _bits(b[..., 16:80].reshape(*b.shape[:2], 2, 32), 2)
    scales, mins = b[..., :16] & 15, b[..., :16] >> 4
    groups = Groups(2, 16, _flat(scales).view(np.int8), d=_halves(b, 80), mins=_flat(mins), dmin=_halves(b, 82))
    return _flat(codes), groups


def _q3_k(b: np.ndarray) -> tuple[np.ndarray, Groups]:
    low = _bits(b[..., 32:96].reshape(*b.shape[:2], 2, 32), 2).reshape(*b.shape[:2], 8, 32)
    codes = low | _bits(b[..., :32], 1) << 2  # the set bit is worth 4, and so is what is subtracted
    packed = b[..., 96:108]
    four = np.concatenate([packed[..., :8] & 15, packed[..., :8] >> 4], -1)
    two = _bits(packed[..., 8:], 2).reshape(*b.shape[:2], 16)
    scales = (four | two << 4).astype(np.int8) - 32
    return _flat(codes), Groups(3, 16, scales.reshape(len(b), -1), d=_halves(b, 108))


def _scales_and_mins(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """8 scales and 8 mins of 6 bits in 12 bytes."""
    a, m, high = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([a & 63, (high & 15) | (a >> 6) << 4], -1)
    mins = np.concatenate([m & 63, (high >> 4) | (m >> 6) << 4], -1)
    return _flat(scales).view(np.int8), _flat(mins)


def _q4_k(b: np.ndarray) -> tuple[np.ndarray, Groups]:
    codes = _bits(b[..., 16:].reshape(*b.shape[:2], 4, 32), 4)
    scales, mins = _scales_and_mins(b[..., 4:16])
    return _flat(codes), Groups(4, 32, scales, d=_halves(b, 0), mins=mins, dmin=_halves(b, 2))


def _q5_k(b: np.ndarray) -> tuple[np.ndarray, Groups]:
    low = _bits(b[..., 48:].reshape(*b.shape[:2], 4, 32), 4).reshape(*b.shape[:2], 8, 32)
    scales, mins = _scales_and_mins(b[..., 4:16])
    codes = low | _bits(b[..., 16:48], 1) << 4
    return _flat(codes), Groups(5, 32, scales, d=_halves(b, 0), mins=mins, dmin=_halves(b, 2))


def _q6_k(b: np.ndarray) -> tuple[np.ndarray, Groups]:
    low = _bits(b[..., :128].reshape(*b.shape[:2], 2, 64), 4)  # [.., half, low or high nibble, 64]
    high = _bits(b[..., 128:192].reshape(*b.shape[:2], 2, 32), 2)  # [.., half, field, 32]
    codes = low.reshape(high.shape) | high << 4
    return _flat(codes), Groups(6, 16, _flat(b[..., 192:208]).view(np.int8), d=_halves(b, 208))


def _ternary(codes: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, Groups]:
    return _flat(codes), Groups(2, 256, d, zeros=np.ones(d.shape, np.uint8))


def _trits(packed: np.ndarray, count: int) -> np.ndarray:
    """[..., bytes] to [..., count, bytes]: a byte is a fraction of 256 in base 3, its first digit first."""
    powers = 3 ** np.arange(count, dtype=np.uint16)[:, None]
    return packed[..., None, :] * powers % 256 * 3 >> 8


def _tq1_0(b: np.ndarray) -> tuple[np.ndarray, Groups]:
    parts = [(b[..., :32], 5), (b[..., 32:48], 5), (b[..., 48:52], 4)]
    return _ternary(
        np.concatenate([_trits(p.astype(np.uint16), n).reshape(*b.shape[:2], -1) for p, n in parts], -1), _halves(b, 52)
    )


def _tq2_0(b: np.ndarray) -> tuple[np.ndarray, Groups]:
    return _ternary(_bits(b[..., :64].reshape(*b.shape[:2], 2, 32), 2), _halves(b, 64))


GGML = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
}
HALVES = {  # bytes of a block where its float16 scales are
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}


def from_ggml(name: str, rows: np.ndarray, block_bytes: int) -> tuple[np.ndarray, Groups]:
    """Codes and Groups of uint8 [rows, bytes of a row]."""
    return GGML[name](rows.reshape(len(rows), -1, block_bytes))


def random_blocks(rng: np.random.Generator, name: str, rows: int, cols: int, d: float = 0.01) -> np.ndarray:
    """uint8 [rows, bytes of a row] of random codes, scales and mins; d and m up to `d` in size."""
    block_columns, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    blocks = rng.integers(0, 256, (rows, cols // block_columns, block_bytes), dtype=np.uint8)
    for at in HALVES[name]:
        halves = rng.uniform(-d, d, blocks.shape[:2]).astype(np.float16)
        blocks[..., at : at + 2] = halves[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def ggml_floats(name: str, rows: np.ndarray) -> np.ndarray:
    return gguf.dequantize(rows, gguf.GGMLQuantizationType[name])


def pack_i2_s(codes: np.ndarray, lanes: int) -> np.ndarray:
    """Codes -1, 0, 1 to blocks of 4 * lanes columns; lanes: 32 for x86, 16 for ARM."""
    q = (codes + 1).astype(np.uint8).reshape(len(codes), -1, 4, lanes)
    return (q[:, :, 0] << 6 | q[:, :, 1] << 4 | q[:, :, 2] << 2 | q[:, :, 3]).reshape(len(codes), -1)
