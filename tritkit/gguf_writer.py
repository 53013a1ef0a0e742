"""Writing GGUF files as a stream: one tensor in memory at a time. numpy only."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .files import atomic_open
from .gguf import ALIGNMENT, ARRAY, MAGIC, NUMBERS, SCALARS, STRING, TYPES, Strings, tensor_bytes


class NewTensor(NamedTuple):
    """A tensor to write. make: its bytes, as any array, made when their turn has come, so that one is in memory."""

    type: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def write_gguf(
    path: Path | str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, NewTensor],
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Write a GGUF file atomically. Python's ints are stored as uint32, or 64 bits where they are too large; floats as
    float32; lists of str, numpy arrays and numpy scalars as what they are. ``advance`` is called after each tensor.
    """
    header = bytearray(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        header += _text(key) + _value(key, value)
    alignment, offset, sizes = int(metadata.get("general.alignment", ALIGNMENT)), 0, []
    for name, tensor in tensors.items():
        sizes.append(tensor_bytes(TYPES[NUMBERS[tensor.type]], tensor.shape))
        header += _text(name) + struct.pack("<I", len(tensor.shape))
        header += struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape[::-1])
        header += struct.pack("<IQ", NUMBERS[tensor.type], offset)
        offset += -(-sizes[-1] // alignment) * alignment
    with atomic_open(path, "wb") as file:
        file.write(header + bytes(-len(header) % alignment))
        for (name, tensor), size in zip(tensors.items(), sizes, strict=True):
            data = np.ascontiguousarray(tensor.make()).reshape(-1).view(np.uint8)
            if data.nbytes != size:
                raise ValueError(f"{name} has {data.nbytes} bytes, but {tensor.type} of {tensor.shape} takes {size}")
            file.write(data.data)
            file.write(bytes(-size % alignment))
            advance()


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, list | tuple | Strings):
        if not all(isinstance(v, str) for v in value):
            raise ValueError(f"{key}: a list of metadata holds strings; give numbers as a numpy array")
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_text, value))
    if isinstance(value, np.ndarray):
        number = _number_of(key, value.dtype)
        return struct.pack("<IIQ", ARRAY, number, value.size) + np.ascontiguousarray(value).tobytes()
    if isinstance(value, bool):
        value = np.bool_(value)
    elif isinstance(value, int):
        value = (np.uint32 if value < 1 << 32 else np.uint64)(value) if value >= 0 else np.int32(value)
    elif isinstance(value, float):
        value = np.float32(value)
    return struct.pack("<I", _number_of(key, value.dtype)) + value.tobytes()


def _number_of(key: str, dtype: np.dtype) -> int:
    for number, (_, known) in SCALARS.items():
        if np.dtype(known) == dtype:
            return number
    raise ValueError(f"{key}: GGUF has no values of dtype {dtype}")
