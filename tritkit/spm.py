"""SentencePiece's BPE as llama.cpp and llama2.c run it, and the same as a model of the tokenizers library.

They keep no merges: of all neighbours whose concatenation is a token, the pair with the highest score is joined, the
leftmost of equals. tokenizers wants a list of merges by rank, so every way to split a token in two tokens becomes one,
ranked by the score of the whole. That is exact but where two tokens of the same score could both be joined at once:
then llama.cpp takes the leftmost, and a list has to prefer one of the two.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from .jsonfile import shown

SPACE = "\u2581"  # what SentencePiece writes for a space
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
UNSAID = "its merges cannot be said by scores of tokens, as GGUF's SentencePiece kind does"
LONGEST_TOKEN = 1024  # characters; real ones have up to 256


def merges_of(tokens: Sequence[str], scores: Sequence[float], skip: Collection[str] = ()) -> list[tuple[str, str]]:
    """Merges, best first. ``skip``: tokens that no merge makes, since they are cut out of a text before.

    ValueError for a token that llama.cpp joins from a character that is no token: tokenizers has only bytes for it.
    """
    ids = {token: i for i, token in enumerate(tokens)}
    found = []
    room = (1 << 20) + 8 * sum(map(len, tokens))  # characters; vocabularies of real models take 2 times theirs
    for i, token in enumerate(tokens):
        if token in skip:
            continue
        if room < 0:
            raise ValueError("the tokens can be split into two tokens in more ways than those of any language can")
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                found.append((-scores[i], i, left, right))
                room -= len(token)
            elif (left is not None or cut == 1) and (right is not None or cut == len(token) - 1):
                raise ValueError(f"token {i} ({shown(token)}) is made of a character that is no token itself")
    return [(tokens[left], tokens[right]) for _, _, left, right in sorted(found)]


def scores_of(tokens: Sequence[str], merges: Sequence[tuple[str, str]], skip: Collection[str]) -> list[float]:
    """Scores from which the same merges follow. ValueError where no scores say what the merges say."""
    rank: dict[str, int] = {}
    last = ""
    for i, (left, right) in enumerate(merges):
        whole = left + right
        if whole in skip:
            continue
        if whole in rank and whole != last:
            raise ValueError(f"{UNSAID}: {shown(whole)} is made by merges of different rank")
        rank.setdefault(whole, i)
        last = whole
    lowest = float(-len(merges) - 1)
    scores = [float(-rank[token]) if token in rank else lowest for token in tokens]
    there = set(merges)
    for left, right in merges_of(tokens, scores, skip):
        if (left, right) not in there:
            raise ValueError(f"{UNSAID}: {shown(left)} and {shown(right)} make a token but have no merge")
    return scores


def to_json(
    tokens: Sequence[str], merges: Sequence[tuple[str, str]], unknown: str | None, prefix: bool
) -> dict[str, Any]:
    """Normalizer, model and decoder as tokenizer.json writes them. prefix: a text begins with a space of its own."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    before = [{"type": "Prepend", "prepend": SPACE}]
    decoders = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*(before if prefix else []), replace]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [*decoders, *(strip if prefix else [])]},
        "model": {
            "type": "BPE",
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def has_prefix(tree: dict[str, Any]) -> bool:
    """Whether a tokenizer.json of this kind puts a space before a text. ValueError if it does anything else to it."""

    def steps(part: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
        return [] if part is None else part[inside] if part["type"] == "Sequence" else [part]

    prefix = replaced = False
    for step in steps(tree["normalizer"], "normalizers"):
        if step["type"] == "Prepend" and step["prepend"] in (SPACE, " ") and not prefix:
            prefix = True
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE:
            replaced = True
        else:
            raise ValueError(f"its normalizer changes a text in a way that GGUF has no name for: {shown(step)}")
    for step in steps(tree["pre_tokenizer"], "pretokenizers"):
        if step["type"] != "Metaspace" or step["replacement"] != SPACE or step["split"]:
            raise ValueError(f"its pre-tokenizer has a step that GGUF has no name for: {shown(step)}")
        prefix, replaced = prefix or step["prepend_scheme"] != "never", True
    if not replaced:
        raise ValueError(f"it does not write {SPACE!r} for a space, which GGUF's SentencePiece kind does")
    return prefix


def read_llama2c(path: Path | str, vocab_size: int) -> tuple[list[str], list[float]]:
    """Tokens and scores of a llama2.c tokenizer file, in SentencePiece's words. ValueError if it is none.

    The file: int32 longest token, then for each token a float32 score, an int32 length and that many bytes. llama2.c
    writes plain spaces, and puts <s> and </s> between line ends.
    """
    data = Path(path).read_bytes()
    tokens, scores, at = [], [], 4
    for i in range(vocab_size):
        if at + 8 > len(data):
            raise ValueError(f"{path} is no llama2.c tokenizer of {vocab_size} tokens: it ends within token {i}")
        score, length = struct.unpack_from("<fi", data, at)
        at += 8
        if not 0 < length <= min(LONGEST_TOKEN, len(data) - at):
            raise ValueError(f"{path} is no llama2.c tokenizer of {vocab_size} tokens: token {i} has {length} bytes")
        try:
            text = data[at : at + length].decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{path} is no llama2.c tokenizer of {vocab_size} tokens: token {i} is no UTF-8") from None
        at += length
        text = text.strip("\n") if text in ("\n<s>\n", "\n</s>\n") else text.replace(" ", SPACE)
        tokens.append(text)
        scores.append(score)
    if at != len(data):
        raise ValueError(f"{path} has {len(data) - at} bytes after its first {vocab_size} tokens")
    if tokens[3 : 3 + 256] != BYTES:
        raise ValueError(f"{path} is no llama2.c tokenizer: tokens 3 to 258 are not the 256 bytes")
    return tokens, scores
