"""Byte-level BPE: nothing is lost, streaming is decoding, and a folder keeps it."""

import json
import random

import pytest
import tokenizers
from tokenizers import decoders, pre_tokenizers, trainers

from tritkit.data import documents
from tritkit.tokenizer import BOS, EOS, Tokenizer, _pieces

TEXTS = [
    "The cat sat on a mat.",
    "  leading, trailing  \n\n\ttabs\r\n",
    "Café — naïve? Ünïcödé ß İ ı ﬁ",
    "日本語 العربية हिन्दी 한국어 עברית",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 e\u0301\u0327",
    "\u0000\u0001\u007f\u0080\ufeff\ufffd\uffff\U0010ffff",
    "",
]


def anything(seed: int, length=200) -> str:
    """Code points of every size, surrogates aside, which no UTF-8 has."""
    chance = random.Random(seed)
    ranges = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    return "".join(chr(chance.randint(*chance.choice(ranges))) for _ in range(length))


ALL = TEXTS + [anything(seed) for seed in range(20)]


def test_nothing_is_lost(tokenizer):
    for text in ALL:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode(text, special=False)) == text


def test_begin_of_text_is_added(tokenizer):
    ids = tokenizer.encode("the cat")
    assert ids[0] == tokenizer.bos_id and ids[1:] == tokenizer.encode("the cat", special=False)
    assert tokenizer.encode("") == [tokenizer.bos_id]
    assert tokenizer.encode_batch(["the cat", ""]) == [ids[1:], []]
    assert tokenizer.inner.id_to_token(tokenizer.eos_id) == EOS and tokenizer.inner.id_to_token(tokenizer.bos_id) == BOS
    assert len(tokenizer) == 320


def test_streaming_is_decoding(tokenizer):
    """Whatever the tokens, also where they split a character or are no UTF-8 at all."""
    for text in ALL:
        ids = tokenizer.encode(text)
        parts = list(tokenizer.stream(ids))
        assert "".join(parts) == text
    chance = random.Random(0)
    for _ in range(200):
        ids = [chance.randrange(320) for _ in range(chance.randint(0, 40))]
        assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids)


def test_streaming_shows_characters_when_they_are_whole(tokenizer):
    ids = tokenizer.encode("a🌙b", special=False)
    assert len(ids) == 6  # four bytes of the moon, untrained
    assert list(tokenizer.stream(ids)) == ["a", "🌙", "b"]
    seen = []

    def watched():
        for i in tokenizer.encode("the cat sat", special=False):
            yield i
            seen.append(i)

    first = next(iter(tokenizer.stream(watched())))
    assert first and len(seen) == 0  # shown before the next token is asked for
    assert list(tokenizer.stream(ids[:3])) == ["a", "\ufffd"]


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for source in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        loaded = Tokenizer.load(source)
        assert [loaded.encode(t) for t in ALL] == [tokenizer.encode(t) for t in ALL]
        assert (loaded.bos_id, loaded.eos_id, len(loaded)) == (tokenizer.bos_id, tokenizer.eos_id, 320)
    assert loaded.chat_template is None
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert Tokenizer.load(tmp_path).chat_template == "{{ messages }}"


def test_training_is_that_of_the_library(text_file, tokenizer):
    """The same text in one piece, by the tokenizers library alone: the same vocabulary and the same ids."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(documents([text_file]), trainer)
    assert inner.get_vocab() == tokenizer.inner.get_vocab()
    assert all(inner.encode(t).ids == tokenizer.encode(t, special=False) for t in ALL)


def test_training_twice_gives_the_same(text_file, tokenizer):
    assert Tokenizer.train(documents([text_file]), 320).inner.to_str() == tokenizer.inner.to_str()


def test_pieces_keep_every_character():
    for text in ("", "no end", "a\nb\n" * 50, "x" * 100 + "\n" + "y" * 5, "\n\n\n"):
        for size in (1, 7, 64):
            pieces = list(_pieces([text], size))
            assert "".join(pieces) == text and all(p.endswith("\n") for p in pieces[:-1])


@pytest.mark.parametrize("size", [257, 10, 0, -1])
def test_a_vocabulary_that_is_too_small(size):
    with pytest.raises(ValueError, match=f"at least 258 tokens .*not {size}"):
        Tokenizer.train(iter(["text"]), size)


def test_the_smallest_vocabulary():
    smallest = Tokenizer.train(iter(["text"]), 258)
    assert len(smallest) == 258 and smallest.decode(smallest.encode(TEXTS[3])) == TEXTS[3]


BROKEN = {
    "empty": "",
    "no JSON": "{",
    "other JSON": "{}",
    "a list": "[1, 2]",
    "odd model": '{"model": {"type": "Nope"}}',
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_refused(tmp_path, what):
    (tmp_path / "tokenizer.json").write_text(BROKEN[what])
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", "\xff"])
def test_a_broken_config_is_refused(tokenizer, tmp_path, content):
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        Tokenizer.load(tmp_path)


def test_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_special_tokens_may_be_written_as_objects(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    config = {"bos_token": {"content": BOS, "lstrip": False}, "eos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.bos_id == tokenizer.bos_id and loaded.eos_id is None
