"""Tokenizers of strangers, in GGUF metadata and llama2.c files: what is odd about them is said in a sentence."""

import random
import struct

import numpy as np
import pytest

from tritkit.gguf_tokenizer import tokenizer_from_gguf, tokenizer_from_llama2c

SMALL = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>"],
    "tokenizer.ggml.token_type": np.array([1, 1, 1, 3], np.int32),
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 3,
    "tokenizer.ggml.eos_token_id": 3,
}
SMALL_SPM = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a", "b", "ab"],
    "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -2.0, -3.0, -1.0],
    "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1],
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "of kind None"),
        ({"model": 7}, "expected a text"),
        ({"model": "t5"}, "of kind 't5'"),
        ({"pre": "kimi-k2"}, "'kimi-k2' is not known; known are gpt-2"),
        ({"pre": b"gpt-2"}, "expected a text"),
        ({"tokens": None}, "tokens is missing"),
        ({"tokens": []}, "tokens is empty"),
        ({"tokens": "abc"}, "no list of texts"),
        ({"tokens": ["a", "b", "ab", 5]}, "no list of texts"),
        ({"tokens": np.arange(4)}, "no list of texts"),
        ({"tokens": ["a", "b", "ab", "a"]}, "tokens 0 and 3 are the same"),
        ({"tokens": ["a", "b", "ab", "x" * 100_000]}, "100000 characters"),
        ({"tokens": ["a", "b", "ab", "\ud800"]}, "refuses this tokenizer"),
        ({"merges": None}, "merges is missing"),
        ({"merges": ["a c"]}, "merge 0 does not make a token"),
        ({"merges": ["ab"]}, "merge 0 does not make a token"),
        ({"merges": ["b a"]}, "merge 0 does not make a token"),
        ({"merges": {"a": "b"}}, "no list of texts"),
        ({"token_type": [1, 1]}, "no list of 4 numbers"),
        ({"token_type": [1.0, 1.0, 1.0, 3.0]}, "no list of 4 numbers"),
        ({"token_type": [[1], [1, 2], [1], [3]]}, "no list of 4 numbers"),
        ({"token_type": "1113"}, "no list of 4 numbers"),
        ({"bos_token_id": 4}, "is 4, but there are 4 tokens"),
        ({"bos_token_id": -1}, "is -1, but"),
        ({"eos_token_id": 2**64}, "but there are 4 tokens"),
        ({"eos_token_id": "3"}, "expected the number of a token"),
        ({"eos_token_id": True}, "expected the number of a token"),
        ({"fim_pad_token_id": 9}, "but there are 4 tokens"),
        ({"add_bos_token": 1}, "expected true or false"),
        ({"add_bos_token": True, "bos_token_id": None}, "no token is named as bos"),
    ],
)
def test_hostile_metadata_is_refused_in_a_sentence(changes, message):
    with pytest.raises(ValueError, match=message):
        tokenizer_from_gguf(SMALL | {f"tokenizer.ggml.{name}": value for name, value in changes.items()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "scores is missing"),
        ({"scores": [0.0]}, "no list of 6 numbers"),
        ({"scores": [0.0, 0.0, 0.0, 1.0, float("nan"), 2.0]}, "not finite"),
        ({"scores": [0.0, 0.0, 0.0, 1.0, float("inf"), 2.0]}, "not finite"),
        ({"scores": ["a"] * 6}, "no list of 6 numbers"),
        ({"tokens": ["<unk>", "<s>", "</s>", "a", "c", "ab"]}, "a character that is no token"),
        ({"add_space_prefix": "yes"}, "expected true or false"),
    ],
)
def test_hostile_sentencepiece_is_refused_in_a_sentence(changes, message):
    with pytest.raises(ValueError, match=message):
        tokenizer_from_gguf(SMALL_SPM | {f"tokenizer.ggml.{name}": value for name, value in changes.items()})
    assert tokenizer_from_gguf(SMALL_SPM).encode("ab") == [1, 0, 5]


def test_chance_metadata_is_a_tokenizer_or_refused():
    """Values of any type in any place: a tokenizer that encodes, or a ValueError of one sentence."""
    chance = random.Random(0)
    values = [None, 0, 3, -1, 2**70, 1.5, True, "", "a", "a b", "gpt2", "llama", "default", b"x", [], ["a"], {}, [None]]
    values += [
        ["", "a", "b", "ab"],
        ["a b"],
        [0.0] * 6,
        [1e39] * 6,
        np.zeros((2, 2)),
        np.array(["a", "b"]),
        [9] * 6,
        "\x00",
    ]
    kept = 0
    for _ in range(3000):
        fields = dict(chance.choice([SMALL, SMALL_SPM]))
        for _ in range(chance.randint(1, 3)):
            name = chance.choice([*fields, *(f"tokenizer.ggml.add_{n}" for n in ("bos_token", "space_prefix"))])
            fields[name] = chance.choice(values)
        try:
            tokenizer = tokenizer_from_gguf(fields)
            tokenizer.decode(tokenizer.encode("ab \n<s>é"))
            kept += 1
        except ValueError as error:
            assert len(str(error)) < 2000 and "\n" not in str(error)
    assert 100 < kept < 2900


def test_gigantic_vocabularies_do_not_outgrow_their_file():
    """Half a megabyte of tokens, each splittable everywhere: every split would take a gigabyte."""
    tokens = ["<unk>", "<s>", "</s>", *("a" * n for n in range(1, 1025))]
    scores = [float(-i) for i in range(len(tokens))]
    fields = {"tokens": tokens, "scores": scores, "token_type": None}
    with pytest.raises(ValueError, match="more ways than"):
        tokenizer_from_gguf(SMALL_SPM | {f"tokenizer.ggml.{name}": value for name, value in fields.items()})


def test_a_hostile_llama2c_file_is_refused(tmp_path, shared_data):
    good = (shared_data / "stories260K" / "tok512.bin").read_bytes()
    path = tmp_path / "tok.bin"
    cases = [
        (b"", "ends within token 0"),
        (good[:1000], "ends within|bytes"),
        (good + b"x", "has 1 bytes after"),
        (good[:8] + struct.pack("<i", 2**31 - 1) + good[12:], "token 0 has 2147483647 bytes"),
        (good[:8] + struct.pack("<i", -5) + good[12:], "token 0 has -5 bytes"),
        (good.replace(b"<0x05>", b"<0x\xff5>"), "no UTF-8"),
        (good.replace(b"<0x05>", b"<0y05>"), "not the 256 bytes"),
        (good[:4] + struct.pack("<f", float("nan")) + good[8:], "not finite"),
    ]
    for data, message in cases:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            tokenizer_from_llama2c(path, 512)
