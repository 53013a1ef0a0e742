"""Bit fields of bytes in the order that ggml and bitnet.cpp lay them: lane by lane, field after field."""

import numpy as np

NIBBLES, CRUMBS, BITS = (0, 4), (0, 2, 4, 6), tuple(range(8))  # shifts of fields of 4, 2 and 1 bits


def split(byte: np.ndarray, lanes: int, shifts: tuple[int, ...]) -> np.ndarray:
    """Fields of uint8 [n, m] as uint8 [n, m * len(shifts)].

    The bytes come in runs of ``lanes``; a run gives its fields at shifts[0], all lanes of them, then those at
    shifts[1], and so on.
    """
    runs = byte.reshape(len(byte), -1, 1, lanes) >> np.array(shifts, np.uint8)[:, None]
    return (runs & np.uint8((1 << 8 // len(shifts)) - 1)).reshape(len(byte), -1)


def join(fields: np.ndarray, lanes: int, shifts: tuple[int, ...]) -> np.ndarray:
    """The bytes that ``split`` takes apart. Fields are uint8 and no wider than their place."""
    runs = fields.reshape(len(fields), -1, len(shifts), lanes)
    byte = np.zeros((*runs.shape[:2], lanes), np.uint8)
    for i, shift in enumerate(shifts):
        byte |= runs[:, :, i] << np.uint8(shift)
    return byte.reshape(len(fields), -1)
