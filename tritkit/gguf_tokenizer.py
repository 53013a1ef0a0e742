"""Tokenizers between GGUF metadata, llama2.c's file and a model folder. Imports no torch and no transformers.

Two kinds: byte-level BPE ("gpt2") with one of llama.cpp's pre-tokenizers, and SentencePiece's BPE ("llama"). Read from
GGUF, a tokenizer encodes as llama.cpp does, special tokens in the text included, and what llama.cpp assumes where a file
says nothing holds here too. docs/containers.md says where that is not the last word on the original model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as HFTokenizer

from . import pretokenizers, spm
from .tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of tokens
CUT_OUT = (UNKNOWN, CONTROL, USER_DEFINED)  # found in a text before anything else happens to it

# Tokens that end an answer whatever the metadata says of them, and those that are markers, not text, if there is no
# metadata on them. llama.cpp goes by these texts, so we do.
ENDS = frozenset(
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<｜end▁of▁sentence｜>",
        "[e~[",
    ]
)
FILL_ENDS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
FILL = {
    "fim_pre": [
        "<|fim_prefix|>",
        "<fim-prefix>",
        "<fim_prefix>",
        "<｜fim▁begin｜>",
        "<PRE>",
        "▁<PRE>",
        "<|code_prefix|>",
        "<|prefix|>",
    ],
    "fim_suf": [
        "<|fim_suffix|>",
        "<fim-suffix>",
        "<fim_suffix>",
        "<｜fim▁hole｜>",
        "<SUF>",
        "▁<SUF>",
        "<|code_suffix|>",
        "<|suffix|>",
    ],
    "fim_mid": [
        "<|fim_middle|>",
        "<fim-middle>",
        "<fim_middle>",
        "<｜fim▁end｜>",
        "<MID>",
        "▁<MID>",
        "<|code_middle|>",
        "<|middle|>",
    ],
}
SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
FLAG = (bool, np.bool_)
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot", "eom": "eom"}  # in the keys


class _Fields:
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


def tokenizer_from_gguf(fields: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that GGUF metadata (plain Python values by key) describe. ValueError if they describe none."""
    read = _Fields(fields)
    model = read.get("model", str, "a text")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(read.texts("tokens"))]
    _check_tokens(tokens)
    types = _types(read, tokens)
    if model == "gpt2":
        cut = pretokenizers.cut_of(read.get("pre", str, "a text") or "default")
        default = 11 if len(tokens) > 11 and types[11] == CONTROL else None  # Falcon's, of which it all began
        defaults = {"bos": default, "eos": default}
        add_bos = cut.add_bos
    elif model == "llama":
        defaults = {role: i for i, role in enumerate(("unk", "bos", "eos")) if i < len(tokens)}
        add_bos = True
    else:
        raise ValueError(
            f"the tokenizer is of kind {model!r}; known are 'gpt2' (byte-level BPE) and 'llama' (SentencePiece's BPE)"
        )
    ids = {role: read.id(key, len(tokens)) for role, key in ROLES.items()}
    ids = {role: defaults.get(role) if i is None else i for role, i in ids.items()}
    around = []
    for role, otherwise in (("bos", add_bos), ("eos", False)):
        wanted = read.flag(f"add_{role}_token", otherwise)
        if wanted and ids[role] is None:
            raise ValueError(f"tokenizer.ggml.add_{role}_token is true, but no token is named as {role}")
        around.append(ids[role] if wanted else None)
    stops = _stop_ids(read, tokens, types, ids)
    tokens = _without_padding(tokens, types, {*ids.values(), *stops})
    if model == "gpt2":
        parts = _byte_level(tokens, read.texts("merges"), cut)
    else:
        scores = read.numbers("scores", len(tokens), "if")
        parts = _sentencepiece(tokens, types, scores, ids["unk"], read.flag("add_space_prefix", True))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for role in ("bos", "eos", "unk", "pad"):
        at = ids[role]
        if at is not None:
            config[f"{role}_token"] = tokens[at]
    template = read.get("chat_template", str, "a text", prefix="tokenizer.")
    if template is not None:
        config["chat_template"] = template
    return Tokenizer(_assemble(parts, tokens, types, around[0], around[1]), config, stops)


def _check_tokens(tokens: list[str]) -> None:
    if not tokens:
        raise ValueError("tokenizer.ggml.tokens is empty")
    seen: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if len(token) > spm.LONGEST_TOKEN:
            raise ValueError(f"token {i} is {len(token)} characters long, at most {spm.LONGEST_TOKEN} are expected")
        if seen.setdefault(token, i) != i:
            raise ValueError(f"tokens {seen[token]} and {i} are the same: {token!r}")


def _types(read: _Fields, tokens: list[str]) -> np.ndarray:
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


def _stop_ids(read: _Fields, tokens: list[str], types: np.ndarray, roles: dict[str, int | None]) -> list[int]:
    """Tokens that end an answer: those named by the file and those known by their text."""
    ids = {token: i for i, token in enumerate(tokens)}
    stops = {ids[t] for t in ENDS if t in ids} | {roles[r] for r in ("eos", "eot", "eom")}
    for role, texts in FILL_ENDS.items():
        at = read.id(role, len(tokens))
        stops.add(next((ids[t] for t in texts if t in ids), None) if at is None else at)
    texts = {tokens[i] for i in stops if i is not None}
    if "<|end|>" in texts and texts & {"<|call|>", "<|calls|>"} and texts & {"<|return|>", "<|flush|>"}:
        stops.discard(ids["<|end|>"])  # there it only ends a part of an answer
        types[ids["<|end|>"]] = USER_DEFINED
    if "</s>" in texts and texts & {"<|tool_response>", "<|plamo:eos|>"}:
        stops.discard(ids["</s>"])
        types[ids["</s>"]] = NORMAL
    return sorted(i for i in stops if i is not None)


def _without_padding(tokens: list[str], types: np.ndarray, used: set[int | None]) -> list[str]:
    """Converters fill the vocabulary up to the rows of the embedding; those are no tokens."""
    size = len(tokens)
    while size > 1 and types[size - 1] == UNUSED and tokens[size - 1] == f"[PAD{size - 1}]" and size - 1 not in used:
        size -= 1
    return tokens[:size]


def _byte_level(tokens: list[str], merges: list[str], cut: pretokenizers.Cut) -> dict[str, Any]:
    ids = {token: i for i, token in enumerate(tokens)}
    pairs: dict[tuple[str, str], None] = {}  # in order; of equal ones the first counts
    for i, merge in enumerate(merges):
        left, space, right = merge.partition(" ")
        if not (space and left in ids and right in ids and left + right in ids):
            raise ValueError(f"merge {i} does not make a token of two tokens: {merge[:100]!r}")
        pairs.setdefault((left, right))
    return {
        "normalizer": None,
        "pre_tokenizer": pretokenizers.to_json(cut, pretokenizers.missing_bytes(ids)),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": ids, "merges": list(pairs), "ignore_merges": cut.ignore_merges},
    }


def _sentencepiece(
    tokens: list[str], types: np.ndarray, scores: np.ndarray | None, unknown: int | None, prefix: bool
) -> dict[str, Any]:
    if scores is None or not np.isfinite(scores).all():
        what = "is missing" if scores is None else "holds numbers that are not finite"
        raise ValueError(f"tokenizer.ggml.scores {what}")
    cut_out = {t for t, kind in zip(tokens, types, strict=False) if kind in CUT_OUT and spm.SPACE not in t}
    merges = spm.merges_of(tokens, np.float32(scores).tolist(), cut_out)
    return spm.to_json(tokens, merges, None if unknown is None else tokens[unknown], prefix)


def _assemble(
    parts: dict[str, Any], tokens: list[str], types: np.ndarray, before: int | None, after: int | None
) -> HFTokenizer:
    """``before`` and ``after`` are the tokens that are put around a text."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": token, **flags, "special": bool(types[i] != USER_DEFINED)}
        for i, token in enumerate(tokens)
        if types[i] in CUT_OUT
    ]

    def template(*texts: str) -> list[dict[str, Any]]:
        one = [{"SpecialToken": {"id": tokens[before], "type_id": 0}}] if before is not None else []
        end = [{"SpecialToken": {"id": tokens[after], "type_id": 0}}] if after is not None else []
        return [*one, *({"Sequence": {"id": text, "type_id": 0}} for text in texts), *end]

    named = {tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in (before, after) if i is not None}
    post = {"type": "TemplateProcessing", "single": template("A"), "pair": template("A", "B"), "special_tokens": named}
    tree = {"version": "1.0", "added_tokens": added, "post_processor": post if named else None, **parts}
    try:
        return HFTokenizer.from_str(json.dumps(tree))
    except Exception as error:  # tokenizers raises a bare Exception for whatever is wrong
        raise ValueError(f"the tokenizers library refuses this tokenizer: {error}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # what a panic of its Rust becomes
            raise
        raise ValueError(f"the tokenizers library refuses this tokenizer: {error}") from None


def tokenizer_from_llama2c(path: Path | str, vocab_size: int) -> Tokenizer:
    """The tokenizer in a llama2.c file (tok512.bin and the like). ValueError if it is none of ``vocab_size`` tokens."""
    tokens, scores = spm.read_llama2c(path, vocab_size)
    return tokenizer_from_gguf(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(tokens) - 259)],
        }
    )


def tokenizer_to_gguf(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """GGUF metadata for a tokenizer, with unused tokens up to ``vocab_size``.

    ValueError for what GGUF and llama.cpp cannot express, in one sentence.
    """
    try:
        return _to_gguf(tokenizer, vocab_size)
    except ValueError as error:
        raise ValueError(f"this tokenizer cannot be written to GGUF: {error}") from None


def _to_gguf(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    tree = json.loads(tokenizer.inner.to_str())
    model = tree["model"]
    if model["type"] != "BPE":
        raise ValueError(f"it is {model['type']}, and only BPE can be")
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(setting):
            raise ValueError(f"its {setting} is {model[setting]!r}, and GGUF has no such setting")
    tokens, types = _listed(tree, vocab_size)
    merges = [tuple(m.split(" ", 1) if isinstance(m, str) else m) for m in model["merges"]]
    special = {token["content"] for token in tree["added_tokens"]}
    fields: dict[str, Any]
    if model.get("byte_fallback"):
        prefix = spm.has_prefix(tree)
        scores = spm.scores_of([t for t, kind in zip(tokens, types, strict=True) if kind != UNUSED], merges, special)
        ids = {token: i for i, token in enumerate(tokens)}
        if not ids.keys() >= set(spm.BYTES):
            raise ValueError("it has no token for every byte, and GGUF's SentencePiece kind needs them")
        types[[ids[b] for b in spm.BYTES]] = BYTE
        if model["unk_token"] is not None:
            types[ids[model["unk_token"]]] = UNKNOWN
        fields = {"model": "llama", "pre": "default", "add_space_prefix": prefix}
        fields["scores"] = _spread(scores, types)
    else:
        if any(step["type"] != "NFC" for step in _steps(tree["normalizer"])):
            raise ValueError(f"its normalizer changes a text in a way that GGUF has no name for: {tree['normalizer']}")
        names = pretokenizers.names_of(pretokenizers.patterns_of(tree["pre_tokenizer"]))
        fields = {"model": "gpt2", "pre": _pre(names, bool(model.get("ignore_merges")), tree)}
        fields["merges"] = [" ".join(pair) for pair in merges]
        if any(" " in part for pair in merges for part in pair):
            raise ValueError("one of its merges has a space in it")
    fields |= {"tokens": tokens, "token_type": types.astype(np.int32)} | _roles(tokenizer, model)
    found = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    if tokenizer.chat_template is not None:
        if not isinstance(tokenizer.chat_template, str):
            raise ValueError("it has several chat templates, name one in tokenizer_config.json")
        found["tokenizer.chat_template"] = tokenizer.chat_template
    return found


def _steps(normalizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if normalizer is None:
        return []
    return normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]


def _listed(tree: dict[str, Any], vocab_size: int) -> tuple[list[str], np.ndarray]:
    """The text and kind of every id below vocab_size; ids that have no token are unused ones."""
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = np.full(vocab_size, UNUSED)
    texts = {text: (i, NORMAL) for text, i in tree["model"]["vocab"].items()}
    for token in tree["added_tokens"]:
        for flag in ("lstrip", "rstrip", "single_word"):
            if token[flag]:
                raise ValueError(f"its token {token['content']!r} is {flag}, and GGUF has no such setting")
        texts[token["content"]] = (token["id"], CONTROL if token["special"] else USER_DEFINED)
    for text, (i, kind) in texts.items():
        if i >= vocab_size:
            raise ValueError(f"its token {i} ({text!r}) has no row in the embedding of {vocab_size} rows")
        if types[i] != UNUSED:
            raise ValueError(f"its tokens {tokens[i]!r} and {text!r} have the same id {i}")
        tokens[i], types[i] = text, kind
    if len(set(tokens)) != len(tokens):
        raise ValueError("a token has the text of an unused one, [PAD...]")
    return tokens, types


def _spread(scores: Iterable[float], types: np.ndarray) -> np.ndarray:
    """Scores of the tokens that are there, in a list that has the unused ones too."""
    found = np.full(len(types), -10000.0, np.float32)
    found[types != UNUSED] = np.fromiter(scores, np.float32)
    return found


def _pre(names: dict[bool, str], ignore_merges: bool, tree: dict[str, Any]) -> str:
    if ignore_merges in names:
        return names[ignore_merges]
    plain = HFTokenizer.from_str(json.dumps({**tree, "model": {**tree["model"], "ignore_merges": False}})).model
    for token in tree["model"]["vocab"].keys() - {t["content"] for t in tree["added_tokens"]}:
        if len(plain.tokenize(token)) != 1:
            raise ValueError(
                f"ignore_merges is {str(ignore_merges).lower()}, which llama.cpp does not do for a pre-tokenizer like "
                f"this, and it matters: the merges do not make the token {token!r}"
            )
    return names[not ignore_merges]


def _roles(tokenizer: Tokenizer, model: dict[str, Any]) -> dict[str, Any]:
    """Which tokens begin, end, pad, and which are put around a text."""
    inner = tokenizer.inner

    def named(role: str) -> int | None:
        token = tokenizer.config.get(f"{role}_token")
        text = token.get("content") if isinstance(token, dict) else token
        return inner.token_to_id(text) if isinstance(text, str) else None

    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": named("pad"), "unk": named("unk")}
    if ids["unk"] is None and model.get("unk_token") is not None:
        ids["unk"] = inner.token_to_id(model["unk_token"])
    around, alone = tokenizer.encode("a"), tokenizer.encode("a", special=False)
    at = next((n for n in range(len(around)) if around[n : n + len(alone)] == alone), None)
    if at is None:
        raise ValueError("it changes a text when it adds special tokens")
    flags = {}
    for role, put in (("bos", around[:at]), ("eos", around[at + len(alone) :])):
        if put and ids[role] is None:
            ids[role] = put[0]
        if put not in ([], [ids[role]]):
            raise ValueError(f"it puts the tokens {put} around a text, and GGUF can only put BOS before, EOS after it")
        flags[f"add_{role}_token"] = bool(put)
    others = [i for i in tokenizer.stop_ids if i != ids["eos"] and inner.id_to_token(i) not in ENDS]
    if ids["eos"] is None and others:
        ids["eos"] = others.pop(0)
    if ids["eos"] is None:
        raise ValueError("it names no end-of-text token (eos_token in tokenizer_config.json), and llama.cpp takes one")
    if len(others) > 2:
        raise ValueError(f"it has {len(others) + 1} tokens that end an answer, and GGUF can name three")
    ids |= dict(zip(("eot", "eom"), others, strict=False))
    return {f"{ROLES[role]}_token_id": i for role, i in ids.items() if i is not None} | flags
