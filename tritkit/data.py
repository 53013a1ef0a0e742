"""Text files to documents, documents to memory-mapped tokens, tokens to the batch of a step."""

from __future__ import annotations

import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from .files import atomic_open
from .tokenizer import Tokenizer
from .tokenizer_guard import serialized

SEPARATOR = "<|endoftext|>"  # a line of this text ends a document of a plain text file
SUFFIXES = (".txt", ".txt.xz", ".txt.gz", ".txt.zst", ".jsonl", ".jsonl.xz", ".jsonl.gz", ".jsonl.zst")


def find_files(sources: Sequence[str]) -> list[Path]:
    """Files, folders (searched to the bottom) and globs to a sorted list. ValueError where one holds nothing."""
    found: list[Path] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
            if not inside:
                raise ValueError(f"the folder {source} holds no text: expected {', '.join(SUFFIXES[:5])}")
        elif path.is_file():
            if not path.name.endswith(SUFFIXES):
                raise ValueError(f"{source} is no text file that tritkit reads: expected {', '.join(SUFFIXES[:5])}")
            inside = [path]
        else:
            found_here = (Path(p) for p in glob.glob(source, recursive=True) if p.endswith(SUFFIXES))
            inside = sorted(p for p in found_here if p.is_file())
            if not inside:
                raise ValueError(f"there is no file {source}")
        found += inside
    return list(dict.fromkeys(found))


def text_size(file: Path) -> int:
    """Bytes of its text; a guess where it is compressed, for a progress bar."""
    return file.stat().st_size * (3 if file.suffix in (".xz", ".gz", ".zst") else 1)


def documents(files: Sequence[Path | str], text_field: str = "text") -> Iterator[str]:
    """The documents of text files (split at lines of ``<|endoftext|>``) and of JSON Lines (one a line)."""
    for file in files:
        path = Path(file)
        before = 0
        for document in _jsonl(path, text_field) if ".jsonl" in path.suffixes else _plain(path):
            if document.strip():
                before += 1
                yield document
        if not before:
            raise ValueError(f"{path} is empty")


def _open(path: Path) -> IO[str]:
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    if path.suffix == ".zst":
        return io.TextIOWrapper(io.BufferedReader(_Zstandard(path)), encoding="utf-8")
    return path.open(encoding="utf-8")


class _Zstandard(io.RawIOBase):
    """The bytes of a .zst file. The library's own reader takes a file that was cut off for one that ends there."""

    def __init__(self, path: Path):
        import zstandard

        self.error = zstandard.ZstdError
        self.new = zstandard.ZstdDecompressor().decompressobj
        self.file = path.open("rb")
        self.decoder, self.held = self.new(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[override]
        while not self.held:
            rest = self.decoder.unused_data if self.decoder.eof else b""
            chunk = rest or self.file.read(1 << 16)
            if self.decoder.eof:  # another frame may follow
                if not chunk:
                    return 0
                self.decoder = self.new()
            elif not chunk:
                raise EOFError("the compressed data ends before its end mark")
            try:
                self.held = self.decoder.decompress(chunk)
            except self.error as error:
                raise EOFError(str(error)) from None
        part = self.held[: len(buffer)]
        self.held = self.held[len(part) :]
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        self.file.close()
        super().close()


def _lines(path: Path) -> Iterator[str]:
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):  # noqa: B007
                if "\0" in line:
                    raise ValueError(f"{path} is not text: it holds zero bytes")
                yield line
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} somewhere after line {number}") from None
    except (lzma.LZMAError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or not compressed as its name says: {error}") from None


def _plain(path: Path) -> Iterator[str]:
    held: list[str] = []
    for line in _lines(path):
        if line.rstrip("\r\n") == SEPARATOR:
            yield "".join(held)
            held = []
        else:
            held.append(line)
    yield "".join(held)


def _jsonl(path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error.msg}") from None
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            here = f"its fields are {', '.join(record)}" if isinstance(record, dict) else "it is no object"
            raise ValueError(f"{path} line {number} has no text in the field {field!r} ({here}); see --text-field")
        yield record[field]


@dataclass(frozen=True)
class Tokens:
    """A memory-mapped stream: BOS document EOS BOS document EOS ... ids: uint16 or uint32 [n]; size of its text."""

    ids: np.ndarray
    documents: int
    utf8_bytes: int


def text_key(files: Sequence[Path], how: str, tokenizer: Tokenizer | None) -> str:
    """Changes whenever the same files read in the same way would give other tokens."""
    facts = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    vocabulary = None if tokenizer is None else serialized(tokenizer.inner)
    return hashlib.sha256(json.dumps([facts, how, vocabulary]).encode()).hexdigest()


def holdout(texts: Iterator[str], share: float, held_out: bool) -> Iterator[str]:
    """Split documents by their content into held-out ones (about ``share``) and the others; yields one side.

    The same document always falls on the same side; so that there is any, the one of the first 50 that comes nearest
    to it is held out too. Where fewer than 50 documents make chance too coarse, the last share of every document is
    held out instead, cut at a line end where one is near.
    """
    first = list(itertools.islice(texts, 50))
    if len(first) < 50:
        for text in first:
            aim = int(len(text) * (1 - share))
            cut = text.rfind("\n", max(2 * aim - len(text), 0), aim) + 1 or aim
            yield text[cut:] if held_out else text[:cut]
        return
    limit = max(share * 2**32, 1 + min(zlib.crc32(text.encode()) for text in first))
    for text in itertools.chain(first, texts):
        if (zlib.crc32(text.encode()) < limit) == held_out:
            yield text


def tokenize(
    texts: Iterator[str], tokenizer: Tokenizer, path: Path, key: str, advance: Callable[[int], None] = lambda n: None
) -> Tokens:
    """Write the token stream of ``texts`` to path.bin and path.json, or map the one that is there for the same key.

    advance is told the UTF-8 bytes of each piece of work done.
    """
    data, about = path.with_suffix(".bin"), path.with_suffix(".json")
    kind = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    facts = json.loads(about.read_text()) if about.is_file() else {}
    if facts.get("key") != key or not data.is_file():
        count = size = length = 0
        begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        with atomic_open(data, "wb") as file:
            for group in _grouped(texts):
                for text, ids in zip(group, tokenizer.encode_batch(group), strict=True):
                    np.asarray(begin + ids + end, kind).tofile(file)
                    length += len(begin) + len(ids) + len(end)
                    count += 1
                    size += len(text.encode())
                advance(sum(len(text.encode()) for text in group))
        facts = {"key": key, "tokens": length, "documents": count, "utf8_bytes": size, "dtype": np.dtype(kind).name}
        with atomic_open(about) as file:
            json.dump(facts, file)
    if not facts["tokens"]:  # an empty file cannot be mapped
        return Tokens(np.zeros(0, kind), 0, 0)
    stream = np.memmap(data, np.dtype(facts["dtype"]), "r", shape=(facts["tokens"],))
    return Tokens(stream, facts["documents"], facts["utf8_bytes"])


def _grouped(texts: Iterator[str], characters: int = 1 << 21) -> Iterator[list[str]]:
    """Lists of whole texts, of about so many characters: enough work for all cores, little enough for memory."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group


@dataclass(frozen=True)
class Batches:
    """Batch of step t: a pure function of (seed, t, batch size), so resume, accumulation and ranks see the same data.

    The stream is cut into windows of ``length`` + 1 tokens that overlap by one; each epoch starts at another offset
    and visits its windows in another order, every one of them once.
    """

    ids: np.ndarray
    length: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self._windows < 1:
            raise ValueError(
                f"the training text has {len(self.ids)} tokens, too few for one sequence of {self.length}; "
                "give more text or a smaller train.sequence_length"
            )

    @property
    def _windows(self) -> int:
        """Windows of an epoch, whatever its offset."""
        return max((len(self.ids) - 1 - (self.length - 1)) // self.length, 0)

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, int64 [batch, length]."""
        rows = [self._window(step * self.batch_size + j) for j in range(self.batch_size)]
        window = np.stack(rows).astype(np.int64)
        return window[:, :-1], window[:, 1:]

    def _window(self, number: int) -> np.ndarray:
        epoch, place = divmod(number, self._windows)
        offset, order = _epoch(self.seed, epoch, self._windows, self.length)
        start = offset + int(order[place]) * self.length
        return self.ids[start : start + self.length + 1]


@functools.lru_cache(maxsize=8)
def _epoch(seed: int, epoch: int, windows: int, length: int) -> tuple[int, np.ndarray]:
    generator = np.random.default_rng((seed, epoch))
    return int(generator.integers(length)), generator.permutation(windows)
