"""Fields of 1 to 8 bits as a stream in little-endian 32-bit words, lowest bit first: what GPTQ and compressed-tensors
files are made of. Fields may lie over the edge of two words."""

import numpy as np

WORD = 32


def count(fields: int, bits: int) -> int:
    """Words that so many fields take."""
    return -(-fields * bits // WORD)


def to_words(fields: np.ndarray, bits: int) -> np.ndarray:
    """int32 [n, count] of uint8 fields [n, m], each less than 2^bits; the last word is filled up with zeros."""
    n, m = fields.shape
    if not 1 <= bits <= 8 or int(fields.max(initial=0)) >> bits:
        raise ValueError(f"fields of {bits} bits cannot hold {int(fields.max(initial=0))}")
    if WORD % bits == 0:
        per = WORD // bits
        padded = np.zeros((n, count(m, bits) * per), np.uint32)
        padded[:, :m] = fields
        shifts = np.arange(0, WORD, bits, dtype=np.uint32)
        return np.bitwise_or.reduce(padded.reshape(n, -1, per) << shifts, axis=2).view(np.int32)
    stream = np.unpackbits(fields[..., None], axis=-1, bitorder="little")[..., :bits].reshape(n, m * bits)
    stream = np.pad(stream, ((0, 0), (0, count(m, bits) * WORD - m * bits)))
    return np.packbits(stream, axis=1, bitorder="little").view("<i4").astype(np.int32, copy=False)


def from_words(words: np.ndarray, bits: int, fields: int) -> np.ndarray:
    """uint8 [n, fields] of int32 [n, count]."""
    n = len(words)
    if WORD % bits == 0:
        shifts = np.arange(0, WORD, bits, dtype=np.uint32)
        parts = np.ascontiguousarray(words).view(np.uint32)[:, :, None] >> shifts & np.uint32((1 << bits) - 1)
        return parts.astype(np.uint8).reshape(n, -1)[:, :fields]
    byte = np.ascontiguousarray(words.astype("<i4", copy=False)).view(np.uint8)
    stream = np.unpackbits(byte, axis=1, bitorder="little")[:, : fields * bits]
    padded = np.zeros((n, fields, 8), np.uint8)
    padded[..., :bits] = stream.reshape(n, fields, bits)
    return np.packbits(padded, axis=-1, bitorder="little")[..., 0]
