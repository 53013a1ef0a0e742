"""The model that ships with tritkit: its size, that it tells a story, and that it beats what needs no network."""

import lzma
import re
from collections import Counter

import pytest

from tritkit.engine.load import bundled_folder, load
from tritkit.engine.sampling import Sampling
from tritkit.engine.text import Request, stream_text
from tritkit.evals.ngram import xz_bits_per_byte
from tritkit.evals.perplexity import evaluate, held_out_text

LARGEST = 8_000_000  # bytes of the whole packed folder
KNOWN_WORDS = 0.95
SAMPLES, TOKENS = 4, 250  # 1,000 tokens in all
BOOKS = ("kids_train.txt.xz", "books_train_0.txt.xz", "books_train_1.txt.xz", "books_train_2.txt.xz")

pytestmark = pytest.mark.skipif(not bundled_folder().is_dir(), reason="the bundled model is not in this checkout")


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())


@pytest.fixture(scope="module")
def story() -> str:
    model = load()
    prompts = ("Once upon a time", "The old king", "It was a dark night", "Chapter one")
    parts = []
    for seed, prompt in enumerate(prompts[:SAMPLES]):
        parts.append(prompt + "".join(stream_text(model, Request(prompt, TOKENS, Sampling(0.8, seed=seed)))))
    return "\n".join(parts)


def test_it_is_small_and_packed():
    folder = load().folder
    assert folder.layout == "hf_autobitlinear" and folder.config.weights == "ternary"
    assert sum(f.stat().st_size for f in folder.path.iterdir()) <= LARGEST
    assert 2.0 <= folder.bits_per_weight() < 2.01


def test_it_does_not_repeat_itself(story):
    text = words(story)
    assert len(text) > 500
    repeats = Counter(tuple(text[i : i + 8]) for i in range(len(text) - 7))
    assert max(repeats.values()) <= 2


@pytest.mark.slow
def test_its_words_are_words(story, shared_data):
    known: set[str] = set()
    for name in BOOKS:
        with lzma.open(shared_data / "books_pd" / name, "rt", encoding="utf-8") as file:
            for line in file:
                known.update(words(line))
    text = words(story)
    unknown = [w for w in text if w not in known]
    assert len(unknown) <= (1 - KNOWN_WORDS) * len(text), unknown


def test_it_beats_xz_on_books_it_never_saw():
    bits = evaluate(load())["bits_per_byte"]
    with lzma.open(held_out_text()) as file:
        assert bits < xz_bits_per_byte(None, file.read())
