"""llama.cpp's importance matrix: how large the inputs of each linear are, column by column, on a calibration text.

For each linear the sum of x^2 over tokens and their number; the mean is the importance of a column (FACTS 9.4). Two
files hold it, and both are read and written here: the older one,

    i32 entries, each { i32 length, name, i32 calls, i32 values, f32 mean * calls }, i32 chunks, i32 length, data set

and GGUF with ``general.type`` "imatrix", the tensors NAME.in_sum2 and NAME.counts and the keys ``imatrix.datasets``,
``imatrix.chunk_count`` and ``imatrix.chunk_size``. Names of tensors are those of GGUF files. numpy only.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..files import atomic_open
from ..gguf import MAGIC, GGUFFile, Strings, as_array
from ..gguf_model import ggml_name
from ..gguf_writer import NewTensor, write_gguf
from ..jsonfile import shown

CHUNK = 512  # tokens; llama-imatrix counts in chunks
SUMS, COUNTS = ".in_sum2", ".counts"
MOST_VALUES = 1 << 24  # in one entry, and most entries below: no model that there is comes near
MOST_ENTRIES = 1 << 16
LARGEST = float(np.finfo(np.float32).max)


@dataclass
class Importance:
    """Sums of squares float64 [columns] and tokens, by the names of GGUF; ``chunk``: tokens that count as one call."""

    sums: dict[str, np.ndarray] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    datasets: list[str] = field(default_factory=list)
    chunk: int = CHUNK

    def update(self, name: str, x: np.ndarray) -> None:
        """Count the inputs x, float32 [tokens, columns], of a linear by Hugging Face's name (without .weight)."""
        self.add(name, np.einsum("tc,tc->c", x, x, dtype=np.float64), len(x))

    def add(self, name: str, squares: np.ndarray, tokens: int) -> None:
        """The same with sums that are there already: float [columns] over so many tokens."""
        key, squares = ggml_name(f"{name}.weight"), np.asarray(squares, np.float64)
        if not np.isfinite(squares).all() or tokens < 0:
            raise ValueError(f"the inputs of {name} are not finite")
        if key in self.sums and len(self.sums[key]) != len(squares):
            raise ValueError(f"{name} has {len(self.sums[key])} columns, but these are sums of {len(squares)}")
        self.sums[key] = self.sums.get(key, 0.0) + squares
        self.tokens[key] = self.tokens.get(key, 0) + tokens

    def __contains__(self, name: object) -> bool:
        return ggml_name(f"{name}.weight") in self.sums

    def of(self, name: str) -> np.ndarray | None:
        """Importance of the columns of a matrix by Hugging Face's name, float32 [columns]; None where there is none."""
        key = ggml_name(f"{name}.weight")
        return self._mean(key) if key in self.sums else None

    def arrays(self) -> dict[str, np.ndarray]:
        """By GGUF's names of tensors: what llama.cpp's quantiser takes."""
        return {key: self._mean(key) for key in self.sums}

    def _mean(self, key: str) -> np.ndarray:
        """Rounded as llama-quantize rounds it, and one where there were no tokens."""
        if not self.tokens[key]:
            return np.ones(len(self.sums[key]), np.float32)
        return self.sums[key].astype(np.float32) / np.float32(self.tokens[key])

    @property
    def chunks(self) -> int:
        return max(self.tokens.values(), default=0) // self.chunk

    def save(self, path: Path | str) -> None:
        """Write a file that llama-quantize reads: the older form where the name ends in .dat, else GGUF."""
        if not self.sums:
            raise ValueError(f"there is no importance to write to {path}: no inputs were counted")
        if Path(path).suffix == ".dat":
            with atomic_open(path, "wb") as file:
                file.writelines(self._legacy_parts())
            return
        metadata = {
            "general.type": "imatrix",
            "imatrix.datasets": self.datasets,
            "imatrix.chunk_count": self.chunks,
            "imatrix.chunk_size": self.chunk,
        }
        tensors = {}
        for key in sorted(self.sums):
            tensors[key + SUMS] = _tensor(self.sums[key][None])
            tensors[key + COUNTS] = _tensor(np.array([[self.tokens[key]]]))
        write_gguf(path, metadata, tensors)

    def _legacy_parts(self) -> Iterator[bytes]:
        keys = sorted(key for key in self.sums if self.tokens[key])
        yield struct.pack("<i", len(keys))
        for key in keys:
            calls = -(-self.tokens[key] // self.chunk)
            yield struct.pack("<i", len(key.encode())) + key.encode()
            yield struct.pack("<ii", calls, len(self.sums[key]))
            yield (self._mean(key) * np.float32(calls)).astype("<f4").tobytes()
        name = (self.datasets[-1] if self.datasets else "").encode()
        yield struct.pack("<ii", self.chunks, len(name)) + name


def _tensor(values: np.ndarray) -> NewTensor:
    return NewTensor("f32", values.shape, lambda: values.astype(np.float32))


def read_importance(path: Path | str) -> Importance:
    """A file of llama-imatrix or of ``Importance.save``; ValueError, one sentence, for what is no such file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    with open(path, "rb") as file:
        is_gguf = file.read(4) == MAGIC
    found = _read_gguf(path) if is_gguf else _read_legacy(path)
    if not found.sums:
        raise ValueError(f"{path} is an importance matrix of nothing")
    return found


def _sums(path: Path, key: str, values: np.ndarray, times: int = 1) -> np.ndarray:
    """float32 sums of a file, ``times`` as large, as float64."""
    if not np.isfinite(values).all() or (values < 0).any() or (values > LARGEST / times).any():
        raise ValueError(f"{path}: the importance of {shown(key)} is not finite or below zero")
    return values.astype(np.float64) * times


def _read_gguf(path: Path) -> Importance:
    file = GGUFFile(path)
    kind = file.metadata.get("general.type")
    if kind != "imatrix":
        raise ValueError(f"{path} is a GGUF file of type {shown(kind)}, expected an importance matrix ('imatrix')")
    datasets, chunk = file.metadata.get("imatrix.datasets", []), file.metadata.get("imatrix.chunk_size", CHUNK)
    found = Importance(datasets=list(datasets) if isinstance(datasets, Strings) else [])
    found.chunk = chunk if type(chunk) is int and chunk > 0 else CHUNK
    for name in file:
        key = name.removesuffix(SUMS)
        if key == name:
            if not name.endswith(COUNTS):
                raise ValueError(f"{path} has the tensor {shown(name)}, which is no part of an importance matrix")
            continue
        sums, counts = file[name], file[key + COUNTS]
        if sums.type != "f32" or counts.type != "f32" or len(sums.shape) != 2:
            raise ValueError(f"{path}: {shown(key)} has sums of {sums.type} {sums.shape}, expected rows of f32")
        if sums.shape[0] != 1 or counts.shape != (1, 1):
            raise ValueError(f"{path}: {shown(key)} belongs to a mixture of experts, which tritkit does not quantise")
        count = float(as_array(counts)[1].item())
        if not 0 <= count < 2**63:
            raise ValueError(f"{path}: {shown(key)} counts {count:g} tokens")
        found.sums[key], found.tokens[key] = _sums(path, key, as_array(sums)[1][0]), round(count)
    return found


def _read_legacy(path: Path) -> Importance:
    data, at = path.read_bytes(), 0

    def take(size: int, what: str) -> bytes:
        nonlocal at
        if not 0 <= size <= len(data) - at:
            raise ValueError(f"{path} is not an importance matrix that can be read: it ends within {what}")
        at += size
        return data[at - size : at]

    def number(what: str) -> int:
        return struct.unpack("<i", take(4, what))[0]

    entries = number("the number of its entries")
    if not 0 < entries <= MOST_ENTRIES:
        raise ValueError(f"{path} is not an importance matrix that can be read: it claims {entries} entries")
    found = Importance()
    for i in range(entries):
        what = f"entry {i + 1} of {entries}"
        name = take(number(what), what).decode("utf-8", "replace")
        calls, values = number(what), number(what)
        if not 0 < values <= MOST_VALUES or name in found.sums:
            raise ValueError(
                f"{path} is not an importance matrix that can be read: {what} is {shown(name)} of {values}"
            )
        sums = np.frombuffer(take(4 * values, what), "<f4")
        # The file does not say how many tokens a call had; only the quotient counts, and 512 does not round it.
        found.sums[name], found.tokens[name] = _sums(path, name, sums, CHUNK), max(calls, 1) * CHUNK
    if at < len(data):
        number("the number of its chunks")
        found.datasets = [take(number("its data set"), "its data set").decode("utf-8", "replace")]
    return found
