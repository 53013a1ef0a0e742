"""Tokenizers between GGUF metadata, llama2.c's file and a model folder. Imports no torch and no transformers.

Two kinds: byte-level BPE ("gpt2") with one of llama.cpp's pre-tokenizers, and SentencePiece's BPE ("llama"). Read from
GGUF, a tokenizer encodes as llama.cpp does, special tokens in the text included, and what llama.cpp assumes where a
file says nothing holds here too. The ways in which llama.cpp is not the original model: it does not normalize (Qwen
composes accents, NFC), and its special tokens take no spaces beside them with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as HFTokenizer

from . import pretokenizers, spm
from .gguf_vocab import (
    BYTE,
    CONTROL,
    CUT_OUT,
    NORMAL,
    ROLES,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Fields,
    check_tokens,
    ends_by_text,
    scores_of_tokens,
    stop_ids,
    token_types,
    without_padding,
)
from .jsonfile import shown
from .tokenizer import Tokenizer
from .tokenizer_guard import refusing, serialized


def tokenizer_from_gguf(fields: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that GGUF metadata (plain Python values by key) describe. ValueError if they describe none."""
    read = Fields(fields)
    model = read.get("model", str, "a text")
    if any(phi in str(fields.get("general.name")).lower() for phi in ("phi-3", "phi3")):
        raise ValueError("special tokens of Phi-3 swallow the spaces after them, which is not supported")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(read.texts("tokens"))]
    check_tokens(tokens)
    types = token_types(read, tokens)
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
            f"the tokenizer is of kind {shown(model)}; known are 'gpt2' (byte-level BPE) and "
            "'llama' (SentencePiece's BPE)"
        )
    ids = {role: read.id(key, len(tokens)) for role, key in ROLES.items()}
    ids = {role: defaults.get(role) if i is None else i for role, i in ids.items()}
    around = []
    for role, otherwise in (("bos", add_bos), ("eos", False)):
        wanted = read.flag(f"add_{role}_token", otherwise)
        if wanted and ids[role] is None:
            raise ValueError(f"tokenizer.ggml.add_{role}_token is true, but no token is named as {role}")
        around.append(ids[role] if wanted else None)
    stops = stop_ids(read, tokens, types, ids)
    tokens = without_padding(tokens, types, {*ids.values(), *stops})
    if model == "gpt2":
        parts = _byte_level(tokens, read.texts("merges"), cut)
    else:
        parts = _sentencepiece(
            tokens, types, scores_of_tokens(read, len(tokens)), ids["unk"], read.flag("add_space_prefix", True)
        )
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for role in ("bos", "eos", "unk", "pad"):
        at = ids[role]
        if at is not None:
            config[f"{role}_token"] = tokens[at]
    template = read.get("chat_template", str, "a text", prefix="tokenizer.")
    if template is not None:
        config["chat_template"] = template
    return Tokenizer(_assemble(parts, tokens, types, around[0], around[1]), config, stops)


def _byte_level(tokens: list[str], merges: list[str], cut: pretokenizers.Cut) -> dict[str, Any]:
    ids = {token: i for i, token in enumerate(tokens)}
    pairs: dict[tuple[str, str], None] = {}  # in order; of equal ones the first counts
    for i, merge in enumerate(merges):
        left, space, right = merge.partition(" ")
        if not (space and left in ids and right in ids and left + right in ids):
            raise ValueError(f"merge {i} does not make a token of two tokens: {shown(merge[:100])}")
        pairs.setdefault((left, right))
    return {
        "normalizer": None,
        "pre_tokenizer": pretokenizers.to_json(cut, pretokenizers.missing_bytes(ids)),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": ids, "merges": list(pairs), "ignore_merges": cut.ignore_merges},
    }


def _sentencepiece(
    tokens: list[str], types: np.ndarray, scores: list[float], unknown: int | None, prefix: bool
) -> dict[str, Any]:
    cut_out = {t for t, kind in zip(tokens, types, strict=False) if kind in CUT_OUT and spm.SPACE not in t}
    merges = spm.merges_of(tokens, scores, cut_out)
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
    with refusing("the tokenizers library refuses this tokenizer"):
        return HFTokenizer.from_str(json.dumps(tree))


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
    tree = json.loads(serialized(tokenizer.inner))
    model = tree["model"]
    if model["type"] != "BPE":
        raise ValueError(f"it is {model['type']}, and only BPE can be")
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(setting):
            raise ValueError(f"its {setting} is {shown(model[setting])}, and GGUF has no such setting")
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
            if model["unk_token"] not in ids:
                raise ValueError(f"its unknown token {shown(model['unk_token'])} is no token")
            types[ids[model["unk_token"]]] = UNKNOWN
        fields = {"model": "llama", "pre": "default", "add_space_prefix": prefix}
        fields["scores"] = _spread(scores, types)
    else:
        if any(step["type"] != "NFC" for step in _steps(tree["normalizer"])):
            change = shown(tree["normalizer"])
            raise ValueError(f"its normalizer changes a text in a way that GGUF has no name for: {change}")
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
                raise ValueError(f"its token {shown(token['content'])} is {flag}, and GGUF has no such setting")
        texts[token["content"]] = (token["id"], CONTROL if token["special"] else USER_DEFINED)
    for text, (i, kind) in texts.items():
        if i >= vocab_size:
            raise ValueError(f"its token {i} ({shown(text)}) has no row in the embedding of {vocab_size} rows")
        if types[i] != UNUSED:
            raise ValueError(f"its tokens {shown(tokens[i])} and {shown(text)} have the same id {i}")
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
                f"this, and it matters: the merges do not make the token {shown(token)}"
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
            raise ValueError(
                f"it puts the tokens {shown(put)} around a text, and GGUF can only put BOS before, EOS after it"
            )
        flags[f"add_{role}_token"] = bool(put)
    known = {inner.token_to_id(t) for t in ends_by_text(inner.get_vocab())}
    others = [i for i in tokenizer.stop_ids if i != ids["eos"] and i not in known]
    if ids["eos"] is None and others:
        ids["eos"] = others.pop(0)
    if ids["eos"] is None:
        raise ValueError("it names no end-of-text token (eos_token in tokenizer_config.json), and llama.cpp takes one")
    if len(others) > 2:
        raise ValueError(f"it has {len(others) + 1} tokens of its own that end an answer, and GGUF can name three")
    ids |= dict(zip(("eot", "eom"), others, strict=False))
    return {f"{ROLES[role]}_token_id": i for role, i in ids.items() if i is not None} | flags
