"""JSON from strangers: of bounded size, depth and memory, no key twice. What is refused is refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LARGEST = 64 << 20  # bytes of a file; tokenizer.json, which is larger, is not read here
ROOM = 16 << 20  # memory that any file may take, however small it is
VALUE = 96  # bytes that a value takes at least, say an empty list and its place in another one
SHOWN = 200  # characters of a stranger's text in a message


def shown(value: Any) -> str:
    """A value as a message shows it: in one line, cut where it is long."""
    try:
        text = " ".join(repr(value).split())  # arrays of numpy have lines
    except (ValueError, RecursionError):  # an integer of thousands of digits
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def parse(raw: bytes, what: str, file_bytes: int | None = None) -> Any:
    """The value in a JSON text. ValueError, which begins with ``what``, where it is none or has a key twice, or where
    its values could take more memory than ROOM and 4 times ``file_bytes`` (none: the text itself)."""
    values = sum(map(raw.count, (b",", b":", b"[", b"{")))
    characters = 1 if raw.isascii() else 4  # one character outside ASCII may make all of a text that wide
    room = ROOM + 4 * (len(raw) if file_bytes is None else file_bytes)
    if VALUE * values + 2 * characters * len(raw) > room:
        raise ValueError(f"{what} has JSON of {len(raw)} bytes with {values} values, more than any model needs")
    try:
        return json.loads(str(raw, "utf-8"), object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(f"{what} is not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{what} is not JSON: {error}") from None


def read(path: Path) -> Any:
    """The JSON value in a file."""
    size = path.stat().st_size
    if size > LARGEST:
        raise ValueError(f"{path} has {size} bytes, more than any file of its kind needs")
    return parse(path.read_bytes(), str(path))


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    tree = read(path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds no JSON object")
    return tree


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} occurs twice")
    return found
