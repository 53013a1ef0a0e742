"""Tokenizers between GGUF, llama2.c and folders: llama.cpp's encoding is the truth, token for token."""

import ctypes
import json
import os
import random
import struct
import unicodedata
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from tritkit import spm
from tritkit.gguf_tokenizer import tokenizer_from_gguf, tokenizer_from_llama2c, tokenizer_to_gguf
from tritkit.pretokenizers import PRETOKENIZERS, patterns_of, to_json
from tritkit.tokenizer import BOS, EOS, Tokenizer

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
PARAGRAPHS = [
    "",
    " ",
    "  ",
    "\n",
    "Hello",
    " Hello ",
    "  two  spaces \n\n\n",
    "a\r\n b\t\tc \n d",
    "The capital of France is Paris. It's 3.14159, isn't it? WE'LL SEE; I'M sure they'Ve gone'd 're 'Tis",
    "' '' ''' 's 'S '\u017f 'LL 'll 'rE 'tis\u00a0\u00a0't",
    "def f(x: int) -> str:\n    return f\"{x!r:>10}\"  # comment\n\n\nif __name__ == '__main__':\n\tf(12345678)\n",
    "1 12 123 1234 12345 123456 1,234,567.89 \u00bd \u00b2 \u0663 \u096a\u096b\u096c \u2167 \u2460",
    "Caf\u00e9 na\u00efve \u00dcn\u00efc\u00f6d\u00e9 \u00df \u0130 \u0131 \ufb01 \u212a \u212b \u00c9COLE \u00e9cole camelCase \u01c5 \u02b0",
    "日本語の文章です。漢字カタカナ\u3000全角スペース！？ 한국어 문장입니다. 中文，标点。",
    "العربية هنا ١٢٣ עברית हिन्दी में पाठ ไทย ကို",
    "👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 🇫🇷 🤷🏽\u200d♀️ e\u0301\u0327 a\u0308 \u0300x",
    "\x00\x01\x7f\x80\x85\ufeff\ufffd\uffff\U0010ffff \x0b\x0c\u2028\u2029\u200b\u00a0x\u202fy\u1680z",
    "\u2581 \u2581\u2581a \u2581b a\u2581 <0x41> <0x0A>",
    "<s> </s>  <unk><|endoftext|><|im_start|>user\nhi<|im_end|>\n <|eot_id|>x<s>y </s> z<|begin_of_text|> [INST]",
    "[PAD5] <|end_of_text|>  <|endoftext|>  ",
    "xyz   \n   \n\n   abc   ",
    "!!!???...---===+++~~~```$$$^^^|||\\\\//@#%&*()[]{}<>\u201cq\u201d\u2018s\u2019\u2014\u2013\u2026\u2022",
    "https://www.example.com/a?b=c&d=e#f user@host C:\\dir\\file.txt",
    "\t\t\t\t    \t" + " " * 70 + "\n" * 33 + " " * 9,
    "a" * 300,
]
ALPHABET = [
    *" \n\t\r'sStTlLdDmMrReEvV09aAzZ.,!?-_<>|$+^~`\\/",
    *"▁éÉßñ中あ한ا३²ⅷ🙂،。…",
    *"\u0301\u00a0\u3000\u0085\u200d\u2029\x0b",
]


def fuzz(seed: int, length: int = 120) -> str:
    """Every other text of few characters that meet often; the others of any that Python's Unicode knows.

    llama.cpp's tables are of Unicode 15, tokenizers' of 16: what 16 brought is other to them.
    """
    chance = random.Random(seed)
    if seed % 2:
        return "".join(chance.choices(ALPHABET, k=length))
    ranges = [(0, 0x7F), (0x20, 0x7E), (9, 13), (0x80, 0x7FF), (0x800, 0xD7FF), (0x2000, 0x2060), (0xE000, 0x1FFFF)]
    drawn = (chr(chance.randint(*chance.choice(ranges))) for _ in range(length))
    return "".join(c for c in drawn if unicodedata.category(c) not in ("Cn", "Cs"))


FUZZ = [fuzz(seed) for seed in range(60)]
TEXTS = PARAGRAPHS + FUZZ


def write_vocab(path: Path, fields: Mapping) -> Path:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, value.tolist() if isinstance(value, np.ndarray) else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


class Peer:
    """llama.cpp's tokenizer of a GGUF file."""

    def __init__(self, path: Path):
        llama_cpp = pytest.importorskip("llama_cpp")
        self.llama = llama_cpp.Llama(model_path=str(path), vocab_only=True, verbose=False)
        vocab = llama_cpp.llama_model_get_vocab(self.llama._model.model)
        size = llama_cpp.llama_vocab_n_tokens(vocab)
        self.stops = [i for i in range(size) if llama_cpp.llama_vocab_is_eog(vocab, i)]

    def encode(self, text: str) -> list[int]:
        return self.llama.tokenize(text.encode(), add_bos=True, special=True)


def read_fields(path: Path) -> dict:
    import gguf

    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def agrees(tokenizer: Tokenizer, peer: Peer, texts=TEXTS) -> None:
    for text in texts:
        assert tokenizer.encode(text) == peer.encode(text), repr(text)
    assert tokenizer.stop_ids == peer.stops


@pytest.fixture(scope="session")
def byte_level() -> dict:
    """GGUF fields of a byte-level vocabulary whose tokens cross every border that a pre-tokenizer could cut at."""
    inner = HFTokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=3000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, max_token_length=12
    )
    inner.train_from_iterator(PARAGRAPHS + [fuzz(seed) for seed in range(1000, 1400)], trainer)
    model = json.loads(inner.to_str())["model"]
    special = ["<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "[INST]"]
    tokens = sorted(model["vocab"], key=model["vocab"].get) + special
    types = [NORMAL] * len(model["vocab"]) + [CONTROL] * 5 + [USER]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": tokens.index("<s>"),
        "tokenizer.ggml.eos_token_id": tokens.index("</s>"),
    }


@pytest.fixture(scope="session")
def stories(shared_data) -> Tokenizer:
    return tokenizer_from_llama2c(shared_data / "stories260K" / "tok512.bin", 512)


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PRETOKENIZERS)
def test_every_pretokenizer_cuts_as_llama_cpp_does(name, byte_level, tmp_path):
    fields = byte_level | {"tokenizer.ggml.pre": name}
    tokenizer = tokenizer_from_gguf(fields)
    agrees(tokenizer, Peer(write_vocab(tmp_path / "vocab.gguf", fields)))
    for text in FUZZ:
        assert tokenizer.decode(tokenizer.encode(text, special=False)) == text
