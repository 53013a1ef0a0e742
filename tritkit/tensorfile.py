"""safetensors files, read as memory-mapped numpy arrays. bfloat16 comes as raw uint16, so no torch is needed."""

from __future__ import annotations

import itertools
import json
import math
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .files import atomic_open
from .jsonfile import parse, shown

# How numpy sees each dtype of the file; BF16 has no numpy dtype and stays raw.
DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
FLOATS = ("F64", "F32", "F16", "BF16")
LARGEST_HEADER = 100_000_000  # the limit of the safetensors library itself
LARGEST_TENSOR, MOST_SIDES = 1 << 56, 32  # what numpy can shape


class StoredTensor(NamedTuple):
    """dtype: the file's word ("F32", "BF16", ...); array: a read-only view into the file."""

    dtype: str
    array: np.ndarray

    def float32(self) -> np.ndarray:
        """The values as a new float32 array; ValueError where they are no floats."""
        if self.dtype == "BF16":
            return (self.array.astype(np.uint32) << 16).view(np.float32)
        if self.dtype not in ("F64", "F32", "F16"):
            raise ValueError(f"a tensor of dtype {self.dtype} holds codes, not floats")
        with np.errstate(over="ignore", invalid="ignore"):  # numbers beyond float32 and odd NaNs, which others report
            return self.array.astype(np.float32)


class LazyTensor(NamedTuple):
    """A tensor to write whose array is made when its turn has come, so that only one is in memory."""

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


class TensorFile(Mapping[str, StoredTensor]):
    """The tensors of one safetensors file by name. A file is data: every bound is checked before it is believed."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size < 8:
            raise ValueError(f"{path} is not a safetensors file: it has {size} bytes")
        self._bytes = np.memmap(self.path, np.uint8, "r")
        (length,) = struct.unpack("<Q", self._bytes[:8].tobytes())
        if length > min(size - 8, LARGEST_HEADER):
            raise ValueError(f"{path} is not a safetensors file: its header claims {length} of {size} bytes")
        header = parse(self._bytes[8 : 8 + length].tobytes(), f"{path} is not a safetensors file: its header", size)
        if not isinstance(header, dict):
            raise ValueError(f"{path} is not a safetensors file: its header is not a JSON object")
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        if not isinstance(self.metadata, dict) or not all(isinstance(v, str) for v in self.metadata.values()):
            raise ValueError(f"{path} is not a safetensors file: its metadata is not a table of texts")
        self._start = 8 + length
        self._header: dict[str, dict] = header
        spans = sorted((*self._span(name), name) for name in header)
        for (_, end, _), (begin, _, name) in itertools.pairwise(spans):
            if begin < end:
                raise ValueError(f"{self.path}: tensor {shown(name)} lies over another one")

    def _span(self, name: str) -> tuple[int, int]:
        """First byte and end of a tensor, or ValueError where its entry is odd."""
        entry = self._header[name]
        try:
            size = np.dtype(DTYPES[entry["dtype"]]).itemsize
            shape, (begin, end) = entry["shape"], entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{self.path}: tensor {shown(name)} has an entry that is not understood") from None
        numbers = (
            isinstance(shape, list)
            and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
            and len(shape) <= MOST_SIDES
        )
        if not numbers or math.prod(max(side, 1) for side in shape) > LARGEST_TENSOR:
            raise ValueError(f"{self.path}: tensor {shown(name)} has an entry that is not understood")
        if not begin <= end <= len(self._bytes) - self._start or end - begin != math.prod(shape) * size:
            claim = f"claims bytes {shown(begin)} to {shown(end)}, which do not fit {shown(shape)}"
            raise ValueError(f"{self.path}: tensor {shown(name)} {claim}")
        return begin, end

    def _view(self, name: str) -> StoredTensor:
        begin, end = self._span(name)
        dtype, shape = self._header[name]["dtype"], self._header[name]["shape"]
        raw = self._bytes[self._start + begin : self._start + end]
        return StoredTensor(dtype, raw.view(DTYPES[dtype]).reshape(shape))

    def __getitem__(self, name: str) -> StoredTensor:
        if name not in self._header:
            raise ValueError(f"{self.path} has no tensor {shown(name)}")
        return self._view(name)

    def __contains__(self, name: object) -> bool:
        return name in self._header

    def __iter__(self):
        return iter(self._header)

    def __len__(self) -> int:
        return len(self._header)

    def checksum(self) -> int:
        """CRC-32 of all tensor bytes, in the file's order."""
        return zlib.crc32(self._bytes[self._start :].data)


def write_tensors(
    path: Path | str,
    tensors: Mapping[str, StoredTensor | LazyTensor],
    metadata: dict[str, str],
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Write a safetensors file atomically. ``metadata`` gets "format": "pt", which transformers asks for; ``advance``
    is called after each tensor.

    By hand, since the library's own writer takes no raw bfloat16 from numpy; tests read it back with the library.
    """
    entries = {n: (t.dtype, t.shape if isinstance(t, LazyTensor) else t.array.shape) for n, t in tensors.items()}
    with atomic_open(path, "wb") as file:
        file.write(tensor_header(entries, metadata))
        for name, tensor in tensors.items():
            array = tensor.make() if isinstance(tensor, LazyTensor) else tensor.array
            if (np.dtype(DTYPES[tensor.dtype]), entries[name][1]) != (array.dtype, array.shape):
                raise ValueError(f"{name} is {array.dtype} {array.shape}, but was announced as {entries[name]}")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            advance()


def tensor_header(entries: Mapping[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """What a file of tensors with these names, dtypes and shapes begins with; their bytes follow in this order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, (dtype, shape) in entries.items():
        begin, end = end, end + math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
