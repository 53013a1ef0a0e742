"""What GGUF metadata say of the tokens of a model, and what llama.cpp knows of them by their text. Imports no torch."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import numpy as np

from .jsonfile import shown
from .spm import LONGEST_TOKEN

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of tokens
CUT_OUT = (UNKNOWN, CONTROL, USER_DEFINED)  # found in a text before anything else happens to it

# Tokens that end an answer whatever the metadata says of them, and those that are markers, not text, if there is no
# metadata on them. llama.cpp goes by these texts, so we do.
ENDS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~[",
})  # fmt: skip
FILL_ENDS = {  # of texts with a gap that the model fills in
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
FILL = {
    f"fim_{short}": (
        f"<|fim_{name}|>", f"<fim-{name}>", f"<fim_{name}>", f"<\uff5cfim\u2581{deepseek}\uff5c>",
        f"<{short.upper()}>", f"\u2581<{short.upper()}>", f"<|code_{name}|>", f"<|{name}|>",
    )
    for short, name, deepseek in (("pre", "prefix", "begin"), ("suf", "suffix", "hole"), ("mid", "middle", "end"))
}  # fmt: skip
SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
FLAG = (bool, np.bool_)
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot", "eom": "eom"}  # in the keys


class Fields:
    """GGUF metadata under tokenizer.ggml, by short name and of the type asked for; ValueError where it is not."""

    def __init__(self, fields: Mapping[str, Any]):
        self.fields = fields

    def get(self, name: str, kind: type | tuple[type, ...], what: str, prefix: str = "tokenizer.ggml.") -> Any:
        value = self.fields.get(prefix + name)
        if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not FLAG)):
            raise ValueError(f"{prefix}{name} is {type(value).__name__}, expected {what}")
        return value

    def flag(self, name: str, otherwise: bool) -> bool:
        value = self.get(name, FLAG, "true or false")
        return otherwise if value is None else bool(value)

    def id(self, role: str, size: int) -> int | None:
        value = self.get(f"{role}_token_id", (int, np.integer), "the number of a token")
        if value is not None and not 0 <= value < size:
            raise ValueError(f"tokenizer.ggml.{role}_token_id is {value}, but there are {size} tokens")
        return None if value is None else int(value)

    def texts(self, name: str) -> list[str]:
        value = self.fields.get(f"tokenizer.ggml.{name}")
        value = value.tolist() if isinstance(value, np.ndarray) else value
        if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
            raise ValueError(f"tokenizer.ggml.{name} is {'missing' if value is None else 'no list of texts'}")
        return list(value)

    def numbers(self, name: str, size: int, kinds: str) -> np.ndarray | None:
        value = self.fields.get(f"tokenizer.ggml.{name}")
        if value is None:
            return None
        try:
            array = np.asarray(value)
        except ValueError:  # a ragged list
            array = np.empty(0, object)
        if array.ndim != 1 or len(array) < size or array.dtype.kind not in kinds:
            raise ValueError(f"tokenizer.ggml.{name} is no list of {size} numbers, one a token")
        return array[:size]


def check_tokens(tokens: list[str]) -> None:
    if not tokens:
        raise ValueError("tokenizer.ggml.tokens is empty")
    seen: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if len(token) > LONGEST_TOKEN:
            raise ValueError(f"token {i} is {len(token)} characters long, at most {LONGEST_TOKEN} are expected")
        if seen.setdefault(token, i) != i:
            raise ValueError(f"tokens {seen[token]} and {i} are the same: {shown(token)}")


def token_types(read: Fields, tokens: list[str]) -> np.ndarray:
    """The kind of each token; some are known by their text, whatever the file says."""
    found = read.numbers("token_type", len(tokens), "iu")
    types = np.full(len(tokens), NORMAL) if found is None else found.astype(np.int64)
    ids = {token: i for i, token in enumerate(tokens)}
    named = [t for t in ENDS if t in ids]
    for role, texts in (FILL | FILL_ENDS).items():
        if read.fields.get(f"tokenizer.ggml.{role}_token_id") is None:
            named += [t for t in texts if t in ids][:1]
    types[[ids[t] for t in named]] = CONTROL
    types[[ids[t] for t in SHOWN if t in ids]] = USER_DEFINED
    return types


def ends_by_text(tokens: Container[str]) -> set[str]:
    """The tokens at which llama.cpp stops where no metadata says so."""
    fill = {next((t for t in texts if t in tokens), "") for texts in FILL_ENDS.values()}
    return {t for t in ENDS | fill if t in tokens}


def stop_ids(read: Fields, tokens: list[str], types: np.ndarray, roles: dict[str, int | None]) -> list[int]:
    """Tokens that end an answer: those named by the file and those known by their text."""
    ids = {token: i for i, token in enumerate(tokens)}
    stops = {ids[t] for t in ENDS if t in ids} | {roles[r] for r in ("eos", "eot", "eom")}
    for role, texts in FILL_ENDS.items():
        at = read.id(role, len(tokens))
        stops.add(next((ids[t] for t in texts if t in ids), None) if at is None else at)
    known = {tokens[i] for i in stops if i is not None}
    if "<|end|>" in known and known & {"<|call|>", "<|calls|>"} and known & {"<|return|>", "<|flush|>"}:
        stops.discard(ids["<|end|>"])  # there it only ends a part of an answer
        types[ids["<|end|>"]] = USER_DEFINED
    return sorted(i for i in stops if i is not None)


def without_padding(tokens: list[str], types: np.ndarray, used: set[int | None]) -> list[str]:
    """Converters fill the vocabulary up to the rows of the embedding; those are no tokens."""
    size = len(tokens)
    while size > 1 and types[size - 1] == UNUSED and tokens[size - 1] == f"[PAD{size - 1}]" and size - 1 not in used:
        size -= 1
    return tokens[:size]


def scores_of_tokens(read: Fields, size: int) -> list[float]:
    scores = read.numbers("scores", size, "if")
    if scores is None or not (np.abs(scores) <= np.finfo(np.float32).max).all():
        what = "is missing" if scores is None else "holds numbers that are not finite"
        raise ValueError(f"tokenizer.ggml.scores {what}")
    return scores.astype(np.float32).tolist()
