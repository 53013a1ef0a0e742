r"""How a text is cut before byte-level BPE: the names of llama.cpp (`tokenizer.ggml.pre`) and what each stands for.

A cut is a list of regular expressions, applied one after the other: each splits every piece that is there so far into
its matches and what lies between them. They are llama.cpp's, in the words of tokenizers' regex engine. Two differ from
the expressions of the original models, on purpose, because llama.cpp encodes that way: it knows upper and lower case
only within ASCII (tekken, gpt-4o).

`ignore_merges` says that a piece which is a token is that token, whatever the merges would make of it.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from tokenizers import pre_tokenizers

from .jsonfile import shown

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES
QWEN35 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + SPACES
MINICPM5 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES
SEED_CODER = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|" + SPACES
NOT_LOWER, NOT_UPPER = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"  # of ASCII
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{NOT_LOWER}*{NOT_UPPER}+%s|[^\r\n\p{{L}}\p{{N}}]?{NOT_LOWER}+{NOT_UPPER}*%s"
TEKKEN = CASED % ("", "") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES
GPT4O = CASED % (CONTRACTIONS + "?", CONTRACTIONS + "?") + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES
DEEPSEEK_LETTERS = (  # \s?[cased letters]+ of the Unicode of its time, spelt out
    r"\s?["
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
    "]+"
)
DEEPSEEK_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
) + SPACES
CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
# Spaces among these characters are spaces only, to llama.cpp.
POINTED = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3001\u3002]+"
ASIAN = "(?:(?=\\S)[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff])+"
DEEPSEEK_LLM = (
    r"[\r\n]",
    DEEPSEEK_LETTERS,
    POINTED,
    r"\s+\z",
    ASIAN,
    r"\p{N}+",
)
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", ASIAN, r"\p{N}")
DEEPSEEK_V3 = (r"\p{N}{1,3}", CJK, DEEPSEEK_WORDS)
FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")
DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")
DIGITS_GPT2 = (r"\p{N}", GPT2)
POINTS = "\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c"
BLOOM = r" ?[^(\s|.,!?" + POINTS + ")]+"


@dataclass(frozen=True)
class Cut:
    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False  # where the file does not say


# The first name of a cut is the one that is written.
PRETOKENIZERS = {
    "gpt-2": Cut((GPT2,)),
    "llama-bpe": Cut((LLAMA3,), ignore_merges=True, add_bos=True),
    "qwen2": Cut((QWEN2,)),
    "qwen35": Cut((QWEN35,)),
    "smollm": Cut(DIGITS_GPT2),
    "tekken": Cut((TEKKEN,), ignore_merges=True, add_bos=True),
    "falcon": Cut(FALCON),
    "default": Cut(DEFAULT),
    "deepseek-llm": Cut(DEEPSEEK_LLM),
    "deepseek-coder": Cut(DEEPSEEK_CODER),
    "deepseek-v3": Cut(DEEPSEEK_V3),
    "gpt-4o": Cut((GPT4O,)),
    "smaug-bpe": Cut((LLAMA3,)),
    "glm4": Cut((LLAMA3,), ignore_merges=True),
    "minicpm5": Cut((r"\p{N}{1,3}", MINICPM5), ignore_merges=True),
    "seed-coder": Cut((SEED_CODER,)),
    "ufakzeka": Cut((QWEN2.removeprefix(CONTRACTIONS + "|"),)),
    "bloom": Cut((BLOOM,)),
    "viking": Cut((BLOOM, r"\p{N}")),
}
SAME = {
    "gpt-2": "phi-2 gigachat a.x-4.0 mellum modern-bert exaone4 mpt olmo jais trillion granite-docling",
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
    "qwen2": "deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
    "smollm": "starcoder refact command-r codeshell exaone minerva-7b mellum2",
    "deepseek-v3": "hunyuan-dense joyai-llm hy_v4",
    "gpt-4o": "llama4 kanana2 talkie minimax-m2",
    "smaug-bpe": "dbrx chatglm-bpe",
    "glm4": "glm5",
    "bloom": "poro-chat gpt3-finnish",
}
PRETOKENIZERS |= {name: PRETOKENIZERS[cut] for cut, names in SAME.items() for name in names.split()}

# How the original models' tokenizer.json files spell the same.
ANY_CASE = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
HF_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%s"
SPELLINGS = {
    GPT2.removesuffix(r"|\s+"): GPT2,
    **{p.replace(CONTRACTIONS, ANY_CASE): p for p in (LLAMA3, QWEN2, QWEN35, MINICPM5, SEED_CODER)},
    TEKKEN.replace(CASED % ("", ""), HF_CASED % ("", "")): TEKKEN,
    GPT4O.replace(CASED % ((CONTRACTIONS + "?",) * 2), HF_CASED % ((ANY_CASE + "?",) * 2)): GPT4O,
    r"\s+$": r"\s+\z",
    POINTED.replace("\u3001\u3002", "\u3000-\u3002"): POINTED,
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+": ASIAN,
}


def cut_of(name: str) -> Cut:
    if name not in PRETOKENIZERS:
        raise ValueError(f"the pre-tokenizer {shown(name)} is not known; known are {', '.join(PRETOKENIZERS)}")
    return PRETOKENIZERS[name]


def missing_bytes(vocabulary: Container[str]) -> str:
    """The bytes of UTF-8, as printable characters, that are no tokens: lost, and nothing joins across them."""
    never = "\u00c0\u00c1\u00f5\u00f6\u00f7\u00f8\u00f9\u00fa\u00fb\u00fc\u00fd\u00fe\u00ff"  # not in UTF-8
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return "".join(c for c in alphabet if c not in vocabulary and c not in never)


def to_json(cut: Cut, missing: str) -> dict[str, Any]:
    """The cut, then bytes as printable characters, then without the missing ones, as tokenizer.json writes it."""
    *first, last = cut.patterns
    splits = first if last == GPT2 else cut.patterns
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in splits
    ]
    steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": last == GPT2})
    if missing:
        steps.append(
            {"type": "Split", "pattern": {"Regex": f"[{re.escape(missing)}]"}, "behavior": "Removed", "invert": False}
        )
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


def patterns_of(tree: dict[str, Any] | None) -> tuple[str, ...]:
    """The other way: the expressions of a tokenizer.json's pre-tokenizer that ends in bytes. ValueError if it does
    anything else."""
    steps = [] if tree is None else tree["pretokenizers"] if tree["type"] == "Sequence" else [tree]
    if steps and (steps[-1].get("behavior"), steps[-1].get("invert")) == ("Removed", False):
        steps = steps[:-1]  # of bytes that are no tokens: ``to_json`` puts it there
    if not steps or steps[-1]["type"] != "ByteLevel":
        raise ValueError("its pre-tokenizer does not end in bytes (ByteLevel)")
    found = []
    for i, step in enumerate(steps):
        last = i == len(steps) - 1
        kept = (step.get("behavior"), step.get("invert")) in (("Isolated", False), ("Removed", True))
        if step["type"] == "Split" and "Regex" in step["pattern"] and kept:
            spelt = step["pattern"]["Regex"].replace("\r", "\\r").replace("\n", "\\n")
            found.append(SPELLINGS.get(spelt, spelt))
        elif step["type"] == "Digits":
            found.append(r"\p{N}" if step["individual_digits"] else r"\p{N}+")
        elif step["type"] == "ByteLevel" and last and not step["add_prefix_space"]:
            found += [GPT2] if step["use_regex"] else []
        else:
            raise ValueError(f"its pre-tokenizer has a step that GGUF has no name for: {shown(step)}")
    return tuple(found)


def names_of(patterns: tuple[str, ...]) -> dict[bool, str]:
    """The names of a cut, by ignore_merges. ValueError if llama.cpp has none."""
    found: dict[bool, str] = {}
    for name, cut in PRETOKENIZERS.items():
        if cut.patterns == patterns:
            found.setdefault(cut.ignore_merges, name)
    if not found:
        cuts = shown(" then ".join(patterns))
        raise ValueError(f"its pre-tokenizer cuts by expressions that GGUF has no name for: {cuts}")
    return found
