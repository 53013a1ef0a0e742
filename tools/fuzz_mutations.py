"""Ways to damage a file: bytes, numbers, JSON values, and the parts of a safetensors or GGUF file by name."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np

INTEGERS = (0, 1, 2, 7, 8, 31, 32, 127, 255, 256, 4096, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63,
            2**64 - 32, 2**64 - 1)  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**40, 0.0, -0.5, 1e-300, 1e308, float("nan"), float("inf"), "",
    "x", "\n", "\0", "\ud800", "é" * 50, "x" * 5000, "../../etc/passwd", "(a+)+$", ".?" * 40 + "x", "a{99999999999}",
    "[[a]", "linear", "yarn", "llama3", "ternary", "int4_g32", "a8", "q4_0", "tq2_0", "hf_bitlinear", "dense",
    "Sequence", [], {}, [None], [[]], ["lm_head"], {"type": "x"}, [0] * 3000, ["a"] * 1000, {"a": {"a": {}}},
)  # fmt: skip
DEPTHS = (20, 200, 2000, 20_000)
LARGEST = 1 << 16  # bytes; what grows beyond is cut, so that an input stays fast


def damage_bytes(raw: bytes, chance: Random) -> bytes:
    """One to four of the usual damages."""
    data = bytearray(raw)
    for _ in range(chance.choice((1, 1, 2, 4))):
        size = len(data)
        at = chance.randrange(size) if size else 0
        if chance.random() < 0.5:
            at = min(at, chance.randrange(1 + min(size, 400)))  # heads are where the sense is
        what, length = chance.randrange(8), 1 << chance.randrange(8)
        if what == 0 and size:
            data[at % size] ^= 1 << chance.randrange(8)
        elif what == 1 and size:
            data[at % size] = chance.randrange(256)
        elif what == 2:
            width = chance.choice((1, 2, 4, 8))
            data[at : at + width] = (chance.choice(INTEGERS) & (1 << 8 * width) - 1).to_bytes(width, "little")
        elif what == 3:
            del data[at : at + length]
        elif what == 4:
            start = chance.randrange(size) if size else 0
            data[at:at] = data[start : start + length]
        elif what == 5:
            start = chance.randrange(size) if size else 0
            data[at : at + length] = data[start : start + length]
        elif what == 6 and chance.random() < 0.3:
            del data[at:]
        elif what == 7:
            data[at:at] = bytes(chance.randrange(256) for _ in range(min(length, 16)))
    return bytes(data[: len(raw) + LARGEST])


def _places(tree: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value; of long lists only their ends."""
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    for key in keys if len(keys) < 40 else (*keys[:4], *keys[-4:]):
        found.append((tree, key))
        if isinstance(tree[key], dict | list):
            _places(tree[key], found)
    return found


def odd_value(chance: Random, old: Any) -> Any:
    if isinstance(old, int | float) and not isinstance(old, bool) and chance.random() < 0.5:
        changes: tuple[Callable[[], Any], ...] = (
            lambda: old + 1,
            lambda: old - 1,
            lambda: -old,
            lambda: old * 2,
            lambda: old // 2,
            lambda: float(old),
            lambda: str(old),
            lambda: chance.choice(INTEGERS),
        )
        try:
            return chance.choice(changes)()
        except (OverflowError, ValueError):
            return 0
    return copy.deepcopy(chance.choice(ODD_VALUES))  # some are changed later


def damage_json(raw: bytes, chance: Random) -> bytes:
    """Values replaced, removed, doubled, exchanged, nested, keys twice."""
    if chance.random() < 0.2:
        return damage_bytes(raw, chance)
    tree = json.loads(raw)
    twice = False
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        places = _places(tree, [])
        if not places:
            break
        box, key = chance.choice(places)
        what = chance.randrange(10)
        if what < 6:
            box[key] = odd_value(chance, box[key])
        elif what == 6:
            del box[key]
        elif what == 7:
            other, theirs = chance.choice(places)
            box[key] = json.loads(json.dumps(other[theirs]))
        elif what == 8 and isinstance(box, dict):
            box[chance.choice((str(key) + "x", "type", "", "weight", "\ud800"))] = box[key]
        else:
            twice = True
    text = json.dumps(tree, ensure_ascii=chance.random() < 0.8)
    if twice and isinstance(tree, dict) and tree:
        key = chance.choice(list(tree))
        text = "{" + json.dumps(key) + ":" + json.dumps(chance.choice(ODD_VALUES)) + "," + text[1:]
    if chance.random() < 0.05:
        depth = chance.choice(DEPTHS)
        open_, close = chance.choice((("[", "]"), ('{"a":', "}")))
        nest = open_ * depth + "1" + (close * depth if chance.random() < 0.7 else "")
        text = '{"x":' + nest + "," + text[1:] if chance.random() < 0.5 else text.replace("null", nest, 1)
    return text.encode("utf-8", "surrogatepass")[: len(raw) + LARGEST]


def damage_safetensors(raw: bytes, chance: Random) -> bytes:
    """Its header as JSON, with a length that fits it most of the time, or its bytes."""
    if chance.random() < 0.3:
        return damage_bytes(raw, chance)
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = raw[8 : 8 + length], raw[8 + length :]
    if chance.random() < 0.8:
        header = damage_json(header, chance)
    if chance.random() < 0.3:
        data = damage_bytes(data, chance)
    size = len(header) if chance.random() < 0.95 else chance.choice(INTEGERS)
    return struct.pack("<Q", size) + header + data


# GGUF: (key, type of the value, type of an array's values, value), and (name, sides, type, offset)
ODD_NAMES = (
    b"blk.0.attn_q.bias", b"blk.00.attn_q.weight", "blk.²⁰.attn_q.weight".encode(), b"rope_freqs.weight", b"", b"\n",
    b"blk.99999999999999999999.attn_q.weight", b"blk.7.attn_norm.weight",
)  # fmt: skip
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}


class _Reader:
    def __init__(self, raw: bytes):
        self.raw, self.at = raw, 24

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from("<" + form, self.raw, self.at)
        self.at += struct.calcsize("<" + form)
        return value

    def text(self) -> bytes:
        length = self.number("Q")
        self.at += length
        return self.raw[self.at - length : self.at]

    def value(self, kind: int) -> Any:
        return self.text() if kind == 8 else self.number(SCALARS[kind])


def parts_of_gguf(raw: bytes) -> tuple[list[list[Any]], list[list[Any]], bytes]:
    """Keys, tensors and data of a good file."""
    tensors, keys = struct.unpack_from("<QQ", raw, 8)
    read = _Reader(raw)
    pairs, entries = [], []
    for _ in range(keys):
        key, kind = read.text(), read.number("I")
        if kind == 9:
            inner, count = read.number("I"), read.number("Q")
            pairs.append([key, kind, inner, [read.value(inner) for _ in range(count)]])
        else:
            pairs.append([key, kind, 0, read.value(kind)])
    for _ in range(tensors):
        name, sides = read.text(), read.number("I")
        shape = [read.number("Q") for _ in range(sides)]
        entries.append([name, shape, read.number("I"), read.number("Q")])
    return pairs, entries, raw[-(-read.at // 32) * 32 :]


def join_gguf(pairs: list[list[Any]], entries: list[list[Any]], data: bytes, counts: tuple[int, int]) -> bytes:
    """A file of such parts; numbers that do not fit are wrapped."""

    def number(form: str, value: Any) -> bytes:
        if form in "fd":
            with np.errstate(over="ignore"):
                return (np.float32 if form == "f" else np.float64)(float(value)).tobytes()
        size = struct.calcsize("<" + form)
        return (int(value) & (1 << 8 * size) - 1).to_bytes(size, "little")

    def text(value: Any) -> bytes:
        raw = value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")
        return struct.pack("<Q", len(raw)) + raw

    def one(kind: int, value: Any) -> bytes:
        if kind == 8:
            return text(value)
        try:
            return number(SCALARS.get(kind, "I"), value)
        except (ValueError, TypeError, OverflowError):
            return number(SCALARS.get(kind, "I"), 3)

    out = [b"GGUF", struct.pack("<IQQ", 3, *(count % 2**64 for count in counts))]
    for key, kind, inner, value in pairs:
        out += [text(key), struct.pack("<I", kind)]
        if kind == 9:
            values = value if isinstance(value, list) else [value]
            out += [struct.pack("<IQ", inner, len(values)), *(one(inner, v) for v in values)]
        else:
            out.append(one(kind, value if not isinstance(value, list) else len(value)))
    for name, shape, kind, offset in entries:
        out += [text(name), struct.pack("<I", len(shape)), *(number("Q", side) for side in shape)]
        out += [number("I", kind), number("Q", offset)]
    head = b"".join(out)
    return head + bytes(-len(head) % 32) + data


def damage_gguf(raw: bytes, chance: Random) -> bytes:
    """Keys and tensors changed by name, or bytes."""
    if chance.random() < 0.3:
        return damage_bytes(raw, chance)
    pairs, entries, data = parts_of_gguf(raw)
    counts = [0, 0]
    for _ in range(chance.choice((1, 1, 2, 3))):
        what = chance.randrange(14)
        pair, entry = chance.choice(pairs), chance.choice(entries)
        if what < 3:
            pair[3] = chance.choice(INTEGERS) if chance.random() < 0.4 else odd_value(chance, pair[3])
        elif what == 3:
            pair[1:3] = chance.randrange(14), chance.randrange(14)
        elif what == 4 and len(pairs) > 1:
            pairs.remove(pair)
        elif what == 5:
            pairs.append([*pair])
        elif what == 6:
            pair[0] = chance.choice((b"llama.attention.novelty", b"", b"general.alignment", b"\xff", pairs[0][0]))
        elif what == 7 and isinstance(pair[3], list) and pair[3]:
            items = pair[3] = [*pair[3]]
            at = chance.randrange(len(items))
            if chance.random() < 0.3:
                del items[at:]
            elif chance.random() < 0.5:
                items[at] = chance.choice((items[0], b"", b"\xff\xfe", "▁", "x" * 3000, -5, float("nan"), 2**63))
            else:
                items += [items[at]] * chance.choice((1, 1000))
        elif what == 8:
            entry[1][chance.randrange(len(entry[1]) + 1) :] = [
                chance.choice(INTEGERS) for _ in range(chance.randrange(4))
            ]
        elif what == 9:
            entry[2] = chance.choice((0, 1, 2, 8, 12, 24, 30, 34, 35, 36, 39, 99))
        elif what == 10:
            entry[3] = chance.choice((*INTEGERS, entry[3] + 1, entry[3] + 32, entries[0][3]))
        elif what == 11:
            entry[0] = chance.choice((*ODD_NAMES, entries[-1][0]))
        elif what == 12:
            entries.append([chance.choice((entry[0], entry[0] + b"x", b"blk.1.ffn_up.bias")), [*entry[1]], *entry[2:]])
        else:
            counts[chance.randrange(2)] = chance.choice((-1, 1, *INTEGERS))
    if chance.random() < 0.3:
        data = damage_bytes(data, chance)
    return join_gguf(pairs, entries, data, (len(entries) + counts[0], len(pairs) + counts[1]))


def damage(name: str, raw: bytes, chance: Random) -> bytes:
    """A file of that name, damaged."""
    if name.endswith(".json"):
        return damage_json(raw, chance)
    if name.endswith(".safetensors"):
        return damage_safetensors(raw, chance)
    if name.endswith(".gguf"):
        return damage_gguf(raw, chance)
    return damage_bytes(raw, chance)
