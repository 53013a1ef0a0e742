"""What keeps the tokenizers library in bounds: it believes every file, and panics or grows without end on odd ones."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tokenizers import Tokenizer as HFTokenizer

from .jsonfile import shown

SEQUENCES = ("normalizers", "decoders", "pretokenizers", "processors")  # where a part keeps its steps
TABLE = re.compile(rb'"precompiled_charsmap"\s*:\s*("[^"]*")')
ESCAPED_TABLE = re.compile(
    b'"' + b"".join(rb"(?:%c|\\u00(?i:%02x))" % (c, c) for c in b"precompiled_charsmap") + rb'"\s*:\s*("[^"]*")'
)
MOST_STEPS = 64  # of a normalizer, a decoder, ...
MOST_GROWTH = 256.0  # characters that one character may become
MOST_AROUND = 4096  # characters or tokens that may be put around a text


_one_at_a_time = threading.RLock()


@contextmanager
def refusing(what: str, quiet: bool = False) -> Iterator[None]:
    """One sentence, ValueError, for whatever the tokenizers library raises: a bare Exception, or a panic of its Rust.

    quiet: nothing of a panic is written to standard error, where Rust reports it. That holds for the whole process.
    """
    try:
        if quiet:
            with _one_at_a_time, _panics_unheard():
                yield
        else:
            yield
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        reason = " ".join(str(error).split())[:500]
        raise ValueError(f"{what}: {reason}") from None


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"


@contextmanager
def _panics_unheard() -> Iterator[None]:
    """Standard error goes to a file, and from there to its place unless there was a panic."""
    try:
        place = os.dup(2)
    except OSError:  # there is none
        yield
        return
    panicked = False
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException as error:
            panicked = _is_panic(error)
            raise
        finally:
            os.dup2(place, 2)
            if not panicked and held.seek(0, os.SEEK_END):
                held.seek(0)
                with suppress(OSError), os.fdopen(os.dup(place), "wb") as out:
                    shutil.copyfileobj(held, out)
            os.close(place)


def require_honest(raw: bytes) -> bytes:
    """A tokenizer.json as it is. ValueError where the table of a Precompiled normalizer claims to be larger than it is:
    the library would take that much memory before it looks."""
    escaped = any(raw.find(rb"\u00%d" % digit) >= 0 for digit in (5, 6, 7))  # letters, as nobody writes them
    for table in (ESCAPED_TABLE if escaped else TABLE).finditer(raw) if escaped or b"charsmap" in raw else ():
        text = json.loads(table[1])
        start = base64.b64decode(text[:8])
        if len(start) < 4 or int.from_bytes(start[:4], "little") > len(text):
            raise ValueError("its precompiled_charsmap claims more bytes than it has")
    return raw


def require_bounded(inner: HFTokenizer) -> None:
    """ValueError where the library would panic on every text, or make a huge one of a short one."""
    for part in (inner.normalizer, inner.decoder, inner.pre_tokenizer, inner.post_processor):
        steps = _steps(part)
        if len(steps) > MOST_STEPS:
            raise ValueError(f"a part of it has {len(steps)} steps, at most {MOST_STEPS} are expected")
        growth, around = 1.0, 0
        for step in steps:
            if step["type"] == "Replace":
                growth *= _growth(step)
            elif step["type"] == "Prepend":
                around += len(step["prepend"])
            elif step["type"] == "TemplateProcessing":
                around += _template_tokens(step)
        if growth > MOST_GROWTH or around > MOST_AROUND:
            raise ValueError("it makes a very long text of a short one")


def _steps(part: Any) -> list[dict[str, Any]]:
    """The steps of a part, those of sequences too."""
    found, left = [], [] if part is None else [json.loads(part.__getstate__())]
    while left:
        step = left.pop()
        inside = [each for key in SEQUENCES for each in step.get(key, ())]
        left += inside
        found += [] if inside else [step]
    return found


def _growth(step: dict[str, Any]) -> float:
    """How much longer a replacement may make a text; an expression may match between any two characters."""
    pattern = step["pattern"].get("String", "")
    return max(1.0, len(step["content"]) / len(pattern) if pattern else 1.0 + len(step["content"]))


def _template_tokens(step: dict[str, Any]) -> int:
    """Tokens that a template puts around a text. ValueError for one that its table lacks: there it would panic."""
    count = 0
    for piece in (*step["single"], *step["pair"]):
        if "SpecialToken" in piece:
            name = piece["SpecialToken"]["id"]
            if name not in step["special_tokens"]:
                raise ValueError(f"its template has a token {shown(name)} that it does not know")
            count += len(step["special_tokens"][name]["ids"])
    return count


def serialized(inner: HFTokenizer) -> str:
    """tokenizer.json. ValueError for ids far beyond the tokens: the library makes a list of all up to the largest, and
    where that finds no memory it ends the process."""
    ids = inner.get_vocab(with_added_tokens=True).values()
    if max(ids, default=0) > 4 * len(ids) + (1 << 16):
        raise ValueError(f"the tokenizer has {len(ids)} tokens, but one of them has the number {max(ids)}")
    return inner.to_str()
