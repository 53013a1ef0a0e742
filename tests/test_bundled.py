"""The model that ships with tritkit: its size, that it tells a story, and that it beats what needs no network."""

import itertools
import lzma
import math
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from tritkit.data import documents
from tritkit.engine.load import bundled_folder, load
from tritkit.engine.sampling import Sampling
from tritkit.engine.text import stream_ids
from tritkit.evals.ngram import KneserNey, encode_documents, end_of_document, xz_bits_per_byte
from tritkit.evals.perplexity import evaluate, held_out_text
from tritkit.trainer import load_settings

LARGEST = 8_000_000  # bytes of the whole packed folder
KNOWN_WORDS = 0.95
TOKENS, LONGEST = 1000, 250  # sampled tokens in all, and of one text at most
PROMPTS = ("Once upon a time", "The old king", "It was a dark night", "Chapter one")
BOOKS = ("kids_train.txt.xz", "books_train_0.txt.xz", "books_train_1.txt.xz", "books_train_2.txt.xz")

pytestmark = pytest.mark.skipif(not bundled_folder().is_dir(), reason="the bundled model is not in this checkout")


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())


@pytest.fixture(scope="module")
def stories() -> list[list[str]]:
    """The words of texts of exactly TOKENS sampled tokens, without those of the prompts (nor their ends: king|dom)."""
    model = load()
    found, made = [], 0
    for seed, prompt in zip(range(100), itertools.cycle(PROMPTS)):  # a text may end early, so more than four
        begin = model.tokenizer.encode(prompt)
        ids = list(stream_ids(model, begin, min(LONGEST, TOKENS - made), Sampling(0.8, seed=seed)))
        made += len(ids)
        found.append(words(model.tokenizer.decode([*begin, *ids]))[len(words(prompt)) :])
        if made == TOKENS:
            return found
    raise AssertionError(f"a hundred texts gave {made} tokens")


def test_it_is_small_and_packed():
    folder = load().folder
    assert folder.layout == "hf_autobitlinear" and folder.config.weights == "ternary"
    assert sum(f.stat().st_size for f in folder.path.iterdir()) <= LARGEST
    assert 2.0 <= folder.bits_per_weight() < 2.01


def test_it_does_not_repeat_itself(stories):
    assert sum(len(text) for text in stories) > 500
    repeats = Counter(tuple(text[i : i + 8]) for text in stories for i in range(len(text) - 7))
    assert max(repeats.values()) <= 2


@pytest.mark.slow
def test_its_words_are_words(stories, shared_data):
    known: set[str] = set()
    for name in BOOKS:
        with lzma.open(shared_data / "books_pd" / name, "rt", encoding="utf-8") as file:
            for line in file:
                known.update(words(line))
    text = [word for story in stories for word in story]
    unknown = [w for w in text if w not in known]
    assert len(unknown) <= (1 - KNOWN_WORDS) * len(text), unknown


def test_it_beats_xz_on_books_it_never_saw():
    bits = evaluate(load())["bits_per_byte"]
    with lzma.open(held_out_text()) as file:
        assert bits < xz_bits_per_byte(None, file.read())


@pytest.mark.slow
def test_it_beats_five_grams_of_as_many_tokens(shared_data):
    """Kneser-Ney fitted on a random choice of its books, as many tokens as training read; 2 GiB, a minute or two."""
    model = load()
    configs = Path(__file__).parent.parent / "configs"
    stages = [load_settings(configs / f"{name}.toml").train for name in ("bundled", "bundled-2")]
    seen = sum(t.steps * t.batch_size * t.sequence_length for t in stages)
    assert seen == 15_155_200
    books = list(documents([shared_data / "books_pd" / name for name in BOOKS]))
    random.Random(0).shuffle(books)
    tokens, _ = encode_documents(model.tokenizer, books, seen)
    held_out, text = encode_documents(model.tokenizer, documents([held_out_text()]), None)
    five_grams = KneserNey.fit(tokens, len(model.tokenizer), 5, end_of_document(model.tokenizer))
    bits = five_grams.nll(held_out).sum() / math.log(2) / len(text)
    assert evaluate(model)["bits_per_byte"] < bits
