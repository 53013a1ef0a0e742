"""GGUF files: metadata and tensors as bytes, read by memory map. numpy only. gguf_writer.py writes them.

Layout of the file (little-endian): "GGUF", u32 version, u64 tensors, u64 keys; the keys, each a string, a u32 type and
a value; the tensors, each a name, u32 dimensions, u64 sizes (columns first), u32 type and u64 offset; then, from the
next multiple of ``general.alignment``, the data. A string is a u64 length and UTF-8.

A file is data from a stranger: every count is held against the bytes that are left before anything is made of it, so
that neither time nor memory grows beyond the file.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .jsonfile import shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # they differ in nothing that little-endian files have
ALIGNMENT = 32
MOST_DIMENSIONS = 4
LONGEST_NAME = 1 << 16
MOST_KEYS, MOST_TENSORS = 10_000, 100_000  # some hundreds and some thousands in the largest models that there are
LARGEST_TENSOR = 1 << 56


class GGMLType(NamedTuple):
    """A tensor type of ggml: values in a block, and bytes of one."""

    name: str
    block: int
    nbytes: int


# By the number in the file. 36 is I2_S of Microsoft's fork (bitnet.cpp): 4 codes a byte, one float32 scale in the 32
# bytes behind all of them (FACTS 6.4).
I2_S = 36
TYPES = {
    0: GGMLType("f32", 1, 4),
    1: GGMLType("f16", 1, 2),
    2: GGMLType("q4_0", 32, 18),
    3: GGMLType("q4_1", 32, 20),
    6: GGMLType("q5_0", 32, 22),
    7: GGMLType("q5_1", 32, 24),
    8: GGMLType("q8_0", 32, 34),
    9: GGMLType("q8_1", 32, 40),
    10: GGMLType("q2_k", 256, 84),
    11: GGMLType("q3_k", 256, 110),
    12: GGMLType("q4_k", 256, 144),
    13: GGMLType("q5_k", 256, 176),
    14: GGMLType("q6_k", 256, 210),
    15: GGMLType("q8_k", 256, 292),
    16: GGMLType("iq2_xxs", 256, 66),
    17: GGMLType("iq2_xs", 256, 74),
    18: GGMLType("iq3_xxs", 256, 98),
    19: GGMLType("iq1_s", 256, 50),
    20: GGMLType("iq4_nl", 32, 18),
    21: GGMLType("iq3_s", 256, 110),
    22: GGMLType("iq2_s", 256, 82),
    23: GGMLType("iq4_xs", 256, 136),
    24: GGMLType("i8", 1, 1),
    25: GGMLType("i16", 1, 2),
    26: GGMLType("i32", 1, 4),
    27: GGMLType("i64", 1, 8),
    28: GGMLType("f64", 1, 8),
    29: GGMLType("iq1_m", 256, 56),
    30: GGMLType("bf16", 1, 2),
    34: GGMLType("tq1_0", 256, 54),
    35: GGMLType("tq2_0", 256, 66),
    I2_S: GGMLType("i2_s", 4, 1),
    39: GGMLType("mxfp4", 32, 17),
    40: GGMLType("nvfp4", 64, 36),
    41: GGMLType("q1_0", 128, 18),
}
NUMBERS = {t.name: number for number, t in TYPES.items()}

# Numbers of metadata types: how struct and numpy see them.
SCALARS: dict[int, tuple[str, Any]] = {
    0: ("<B", np.uint8),
    1: ("<b", np.int8),
    2: ("<H", np.uint16),
    3: ("<h", np.int16),
    4: ("<I", np.uint32),
    5: ("<i", np.int32),
    6: ("<f", np.float32),
    7: ("<?", np.bool_),
    10: ("<Q", np.uint64),
    11: ("<q", np.int64),
    12: ("<d", np.float64),
}
STRING, ARRAY = 8, 9


# Float types: safetensors' name, and how numpy sees them.
FLOAT_TYPES = {"f32": ("F32", np.float32), "f16": ("F16", np.float16), "bf16": ("BF16", np.uint16)}


def tensor_bytes(kind: GGMLType, shape: Sequence[int]) -> int:
    """Bytes of a tensor; ValueError where its columns are no whole number of blocks."""
    values = math.prod(shape)
    if kind.name == "i2_s":
        if shape and shape[-1] % kind.block:
            raise ValueError(f"i2_s has {kind.block} columns in a byte, but a row has {shape[-1]}")
        return -(-values // 4) + 32
    if shape and shape[-1] % kind.block:
        raise ValueError(f"{kind.name} has blocks of {kind.block} columns, but a row has {shape[-1]}")
    return values // kind.block * kind.nbytes


class Strings(Sequence[str]):
    """An array of strings that stays in the file; each is decoded when it is asked for."""

    def __init__(self, data: memoryview, starts: np.ndarray):
        self._data, self._starts = data, starts

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index):  # type: ignore[override]
        if isinstance(index, slice):
            return [self._at(int(start)) for start in self._starts[index]]
        return self._at(int(self._starts[index]))

    def _at(self, start: int) -> str:
        (length,) = struct.unpack_from("<Q", self._data, start)
        return str(self._data[start + 8 : start + 8 + length], "utf-8", "replace")

    def __iter__(self) -> Iterator[str]:
        return map(self._at, self._starts.tolist())


class GGUFTensor(NamedTuple):
    """type: ggml's, lower case. shape: [rows, columns], or [n]. data: its bytes, a read-only view into the file."""

    type: str
    shape: tuple[int, ...]
    data: np.ndarray


class _Cursor:
    """Reads forward through the header and never beyond the file."""

    def __init__(self, path: Path, data: memoryview):
        self.path, self.data, self.at = path, data, 0

    def refuse(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is not a GGUF file that can be read: {what}")

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def number(self, form: str) -> Any:
        size = struct.calcsize(form)
        if self.left < size:
            raise self.refuse("it ends within its header")
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += size
        return value

    def text(self, longest: int | None = None) -> str:
        length = self.number("<Q")
        if length > self.left or (longest is not None and length > longest):
            raise self.refuse(f"a string of {length} bytes at byte {self.at}")
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            if longest is None:
                return str(raw, "utf-8", "replace")  # a value, as some tools write them; names have to be right
            raise self.refuse(f"a name at byte {self.at - length} that is not UTF-8") from None

    def value(self, key: str) -> Any:
        kind = self.number("<I")
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.number(self._scalar(kind, key)[0])
        kind, count = self.number("<I"), self.number("<Q")
        if kind == STRING:
            return self._strings(count, key)
        if kind == ARRAY:
            raise self.refuse(f"{shown(key)[1:-1]} is an array of arrays")
        dtype = np.dtype(self._scalar(kind, key)[1])
        if count > self.left // dtype.itemsize:
            raise self.refuse(f"{shown(key)[1:-1]} claims {count} values, but {self.left} bytes are left")
        values = np.frombuffer(self.data, dtype, count, self.at)
        self.at += values.nbytes
        return values

    def _scalar(self, kind: int, key: str) -> tuple[str, Any]:
        if kind not in SCALARS:
            raise self.refuse(f"{shown(key)[1:-1]} has a value of the unknown type {kind}")
        return SCALARS[kind]

    def _strings(self, count: int, key: str) -> Strings:
        if count > self.left // 8:
            raise self.refuse(f"{shown(key)[1:-1]} claims {count} strings, but {self.left} bytes are left")
        starts = np.empty(count, np.uint64)
        at, end, length_at = self.at, len(self.data), struct.Struct("<Q").unpack_from
        for i in range(count):
            if end - at < 8:
                raise self.refuse(f"it ends within {shown(key)[1:-1]}")
            starts[i] = at
            (length,) = length_at(self.data, at)
            at += 8 + length
            if at > end:
                raise self.refuse(f"{shown(key)[1:-1]} has a string of {length} bytes that goes beyond the file")
        self.at = at
        return Strings(self.data, starts)


class _Entry(NamedTuple):
    type: int
    shape: tuple[int, ...]
    offset: int


class GGUFFile(Mapping[str, GGUFTensor]):
    """The tensors of a GGUF file by their names there. ``metadata``: its keys; arrays are numpy arrays or ``Strings``.

    ValueError, one sentence, for whatever is not as the format wants it: cut off, counts or sizes beyond the file,
    names that occur twice, tensors that overlap.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size < 24:
            raise ValueError(f"{path} is not a GGUF file: it has {size} bytes")
        self._bytes = np.memmap(self.path, np.uint8, "r")
        cursor = _Cursor(self.path, self._bytes.data)
        if bytes(cursor.data[:4]) != MAGIC:
            raise ValueError(f"{path} is not a GGUF file: it begins with {bytes(cursor.data[:4])!r}")
        cursor.at = 4
        self.version: int = cursor.number("<I")
        if self.version not in VERSIONS:
            swapped = int.from_bytes(self.version.to_bytes(4, "little"), "big") in VERSIONS
            raise cursor.refuse("it is big-endian" if swapped else f"it has version {self.version}, known are 2 and 3")
        tensors, keys = cursor.number("<Q"), cursor.number("<Q")
        if tensors > min(cursor.left // 24, MOST_TENSORS) or keys > min(cursor.left // 12, MOST_KEYS):
            raise cursor.refuse(f"it claims {tensors} tensors and {keys} keys in {size} bytes")
        self.metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = cursor.text(LONGEST_NAME)
            if key in self.metadata:
                raise cursor.refuse(f"the key {shown(key)} occurs twice")
            self.metadata[key] = cursor.value(key)
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise cursor.refuse(f"general.alignment is {shown(alignment)}, which is no power of two from 8")
        self._entries: dict[str, _Entry] = {}
        for _ in range(tensors):
            self._read_entry(cursor)
        self._start = -(-cursor.at // alignment) * alignment
        self._check_places(cursor)

    def _read_entry(self, cursor: _Cursor) -> None:
        name = cursor.text(LONGEST_NAME)
        dimensions = cursor.number("<I")
        if name in self._entries:
            raise cursor.refuse(f"the tensor {shown(name)} occurs twice")
        if dimensions > MOST_DIMENSIONS:
            raise cursor.refuse(f"the tensor {shown(name)} has {dimensions} dimensions")
        shape = tuple(cursor.number("<Q") for _ in range(dimensions))[::-1]
        if math.prod(max(side, 1) for side in shape) > LARGEST_TENSOR:
            raise cursor.refuse(f"the tensor {shown(name)} has the shape {shape}")
        self._entries[name] = _Entry(cursor.number("<I"), shape, cursor.number("<Q"))

    def _check_places(self, cursor: _Cursor) -> None:
        """Every tensor of a type with a known size lies within the file, and over no other one."""
        spans = []
        for name, entry in self._entries.items():
            if entry.type not in TYPES:  # its size is not known; asking for it is refused
                continue
            try:
                nbytes = tensor_bytes(TYPES[entry.type], entry.shape)
            except ValueError as error:
                raise cursor.refuse(f"the tensor {shown(name)}: {error}") from None
            begin = self._start + entry.offset
            if begin + nbytes > len(self._bytes):
                raise cursor.refuse(
                    f"the tensor {shown(name)} claims {nbytes} bytes from {begin} of {len(self._bytes)}"
                )
            if nbytes:
                spans.append((begin, begin + nbytes, name))
        spans.sort()
        for (_, end, first), (begin, _, second) in itertools.pairwise(spans):
            if begin < end:
                raise cursor.refuse(f"the tensors {shown(first)} and {shown(second)} overlap")

    def type_of(self, name: str) -> str:
        """ggml's name of a tensor's type, lower case; "type 99" where it is not known."""
        number = self._entries[name].type
        return TYPES[number].name if number in TYPES else f"type {number}"

    def bytes_of(self, name: str) -> int | None:
        """Bytes of a tensor; None where its type is not known."""
        entry = self._entries[name]
        return tensor_bytes(TYPES[entry.type], entry.shape) if entry.type in TYPES else None

    def shape_of(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def __getitem__(self, name: str) -> GGUFTensor:
        if name not in self._entries:
            raise ValueError(f"{self.path} has no tensor {shown(name)}")
        entry = self._entries[name]
        if entry.type not in TYPES:
            raise ValueError(f"{self.path}: the tensor {shown(name)} has the unknown {self.type_of(name)}")
        kind = TYPES[entry.type]
        begin = self._start + entry.offset
        return GGUFTensor(kind.name, entry.shape, self._bytes[begin : begin + tensor_bytes(kind, entry.shape)])

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def plain_metadata(self, prefix: str = "") -> dict[str, Any]:
        """The keys that begin so, their strings as lists."""
        found = {key: value for key, value in self.metadata.items() if key.startswith(prefix)}
        return {key: list(value) if isinstance(value, Strings) else value for key, value in found.items()}


def as_array(tensor: GGUFTensor) -> tuple[str, np.ndarray]:
    """dtype as safetensors names it, and the values of a float tensor or the bytes of each row of blocks."""
    if tensor.type in FLOAT_TYPES:
        dtype, kind = FLOAT_TYPES[tensor.type]
        return dtype, tensor.data.view(kind).reshape(tensor.shape)
    if len(tensor.shape) != 2 or (tensor.type == "i2_s" and tensor.shape[1] % 4):
        raise ValueError(
            f"a tensor of {tensor.type.upper()} has the shape {tensor.shape}, expected rows of whole blocks"
        )
    if tensor.type == "i2_s":
        return "U8", tensor.data[: math.prod(tensor.shape) // 4].reshape(tensor.shape[0], -1)
    return "U8", tensor.data.reshape(tensor.shape[0], -1)
