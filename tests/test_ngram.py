"""Kneser-Ney against its equations, written once more with dicts; the compressor; the command."""

import json
import lzma
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tritkit.data import SEPARATOR, documents
from tritkit.evals import ngram
from tritkit.evals.ngram import KneserNey, modified_discounts, xz_bits_per_byte
from tritkit.tokenizer import EOS
from tritkit.tokenizer import Tokenizer as OurTokenizer

EXACT = 1e-9  # float64 sums of a few hundred terms

NOUNS, VERBS = ["cat", "dog", "hen", "old man", "king"], ["saw", "fed", "chased", "sang to"]


def sentences(count: int, seed: int) -> str:
    """English of one grammar; it takes four tokens of context to know who may follow."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        i, j, v = rng.integers(5), rng.integers(5), rng.integers(4)
        lines.append(f"The {NOUNS[i]} {VERBS[v]} the {NOUNS[j]} and the {NOUNS[(i + v) % 5]} laughed.")
    return "\n".join(lines)


def zipf(length: int, vocab_size: int, seed: int) -> np.ndarray:
    """Random tokens, some frequent and some not, in which each token depends on the one before it."""
    rng = np.random.default_rng(seed)
    jumps = np.minimum(rng.zipf(1.6, length), vocab_size) - 1
    return (np.cumsum(jumps) % vocab_size).astype(np.uint16)


class Reference:
    """Chen & Goodman's equations as they stand, one n-gram at a time."""

    def __init__(self, tokens: list[int], vocab_size: int, order: int, bos: int | None = None):
        self.vocab_size, self.order = vocab_size, order
        stream = tokens if bos is None else [bos, *tokens]
        self.counts = {}
        for n in range(1, order + 1):
            starts = range(1 if n == 1 and bos is not None else 0, len(stream) - n + 1)
            if n == order:
                self.counts[n] = Counter(tuple(stream[i : i + n]) for i in starts)
                continue
            left = defaultdict(set)
            for i in starts:
                left[tuple(stream[i : i + n])].add(stream[i - 1] if i else "start")
            self.counts[n] = {gram: len(tokens) for gram, tokens in left.items()}
        self.discounts = {n: self.discount(Counter(c.values())) for n, c in self.counts.items()}
        self.followers = defaultdict(list)
        for c in self.counts.values():
            for gram, count in c.items():
                self.followers[gram[:-1]].append(count)

    @staticmethod
    def discount(n: Counter) -> list[float]:
        if not (n[1] and n[2] and n[3]):
            return [0.0, 0.5, 1.0, 1.5]
        y = n[1] / (n[1] + 2 * n[2])
        d = [0.0, 1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3]]
        return d if all(0 <= d[k] <= k for k in range(4)) else [0.0, 0.5, 1.0, 1.5]

    def probability(self, context: tuple[int, ...], token: int) -> float:
        context = context[max(0, len(context) - self.order + 1) :]
        lower = self.probability(context[1:], token) if context else 1 / self.vocab_size
        followers = self.followers.get(context)
        if not followers:
            return lower
        n, total = len(context) + 1, sum(followers)
        d = self.discounts[n]
        backoff = sum(d[min(c, 3)] for c in followers) / total
        count = self.counts[n].get((*context, token), 0)
        return (count - d[min(count, 3)]) / total + backoff * lower


def distribution(model: KneserNey, context: list[int]) -> np.ndarray:
    return np.array([np.exp(-model.nll(np.array([*context, w]))[-1]) for w in range(model.vocab_size)])


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("bos", [None, 0])
def test_probabilities_sum_to_one(order, bos):
    tokens = zipf(400, 12, seed=1)
    tokens = tokens[tokens != 7]  # one token of the vocabulary never occurs
    model = KneserNey.fit(tokens, 12, order, bos)
    seen = [tokens[i : i + 4].tolist() for i in (0, 100, len(tokens) - 4)]
    unseen = [[7, 7, 7, 7], [*seen[1][:3], 7], [7, *seen[1][1:]], []]
    for context in seen + unseen:
        p = distribution(model, context)
        assert (p > 0).all()
        assert p.sum() == pytest.approx(1, abs=EXACT)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("bos", [None, 3])
@pytest.mark.parametrize("source", ["random", "text"])
def test_equals_the_equations(order, bos, source):
    if source == "random":
        tokens, held_out, vocab_size = zipf(3000, 30, seed=2), zipf(500, 30, seed=3), 31
    else:
        tokens, held_out = (np.frombuffer(sentences(60, s).encode(), np.uint8).astype(np.int32) for s in (1, 2))
        vocab_size = 256
    before = [] if bos is None else [bos]
    model = KneserNey.fit(tokens, vocab_size, order, bos)
    reference = Reference(tokens.tolist(), vocab_size, order, bos)
    np.testing.assert_allclose(model.discounts, [reference.discounts[n][1:] for n in range(1, order + 1)], rtol=EXACT)
    stream = before + held_out.tolist()
    expected = [-np.log(reference.probability(tuple(stream[:i]), stream[i])) for i in range(len(before), len(stream))]
    np.testing.assert_allclose(model.nll(held_out), expected, rtol=0, atol=EXACT)


def test_equals_kenlm():
    """log10 p by `lmplz -o 3 --discount_fallback` and `query` (kpu/kenlm) of one line of 400 words, then 12 others.

    Token 20 is KenLM's </s>; 21 is its <s>, and its <unk> where the uniform distribution is concerned.
    """
    x, draws = 1, []
    for _ in range(2 * 412):
        x = (1103515245 * x + 12345) % 2**31
        draws.append((x >> 16) % 20)
    words = np.minimum(draws[::2], draws[1::2])
    model = KneserNey.fit(np.append(words[:400], 20), vocab_size=22, order=3, bos=21)
    kenlm = """-1.4602145 -1.0173438 -0.7994628 -1.8314661 -1.223897 -1.1991599 -1.588361 -1.5675462 -1.4841253
               -0.6945002 -1.4151592 -1.8350815 -1.6307964"""
    log10 = -model.nll(np.append(words[400:], 20)) / np.log(10)
    np.testing.assert_allclose(log10, [float(x) for x in kenlm.split()], rtol=0, atol=2e-7)  # it counts in float32
    np.testing.assert_allclose(model.discounts[1], [0.492386, 1.23188, 1.78797], rtol=1e-5)


def test_a_bigram_model_by_hand():
    """a b a c a b: n-grams of every order have too few counts-of-counts, so D = 0.5, 1, 1.5.

    Left neighbours: a {start, b, c} = 3, b {a} = 1, c {a} = 1; total 5.
    p(b) = 0.5/5 + backoff 2.5/5 * 1/4 = 0.225.
    c(ab) = 2, c(ac) = 1, so p(b | a) = (2 - 1)/3 + (1 + 0.5)/3 * p(b) and p(d | a) = 0.5 * (2.5/5 * 1/4).
    """
    model = KneserNey.fit(np.array([0, 1, 0, 2, 0, 1]), vocab_size=4, order=2)
    assert np.exp(-model.nll(np.array([1]))) == pytest.approx([0.225], abs=EXACT)
    assert np.exp(-model.nll(np.array([0, 1])))[1] == pytest.approx(1 / 3 + 0.5 * 0.225, abs=EXACT)
    assert np.exp(-model.nll(np.array([0, 3])))[1] == pytest.approx(0.5 * 0.125, abs=EXACT)
    assert np.exp(-model.nll(np.array([3, 1])))[1] == pytest.approx(0.225, abs=EXACT)  # context never seen


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([1, 1, 1, 1, 2, 2, 3, 4, 9], [0.5, 1.25, 1.0]),  # n = 4, 2, 1, 1: Y = 4/8
        ([1, 1, 1, 1, 2, 2, 3], [0.5, 1.25, 3.0]),  # n_4 = 0 is defined
        ([1, 1, 1], [0.5, 1.0, 1.5]),  # n_2 = 0
        ([7, 8, 9], [0.5, 1.0, 1.5]),  # n_1 = 0
        ([1, 2, 3, 3, 3], [0.5, 1.0, 1.5]),  # D2 = 2 - 3 (1/3) 3/1 < 0
    ],
)
def test_discounts(counts, expected):
    np.testing.assert_allclose(modified_discounts(np.array(counts)), expected, rtol=EXACT)


def test_perplexity_falls_with_the_order():
    train, held_out = (np.frombuffer(sentences(n, s).encode(), np.uint8) for n, s in ((600, 1), (60, 2)))
    nll = [KneserNey.fit(train, 256, order).nll(held_out).mean() for order in (1, 2, 3, 5)]
    assert all(a - b > 0.1 for a, b in pairwise(nll))


def test_many_ngrams_of_a_large_vocabulary():
    tokens = np.random.default_rng(0).integers(0, 65536, 40_000).astype(np.uint16)  # 40,000 * 65,536 > 2^31
    model, reference = KneserNey.fit(tokens, 65536, order=3), Reference(tokens.tolist(), 65536, 3)
    held_out = tokens[-30:].tolist()
    expected = [-np.log(reference.probability(tuple(held_out[:i]), held_out[i])) for i in range(30)]
    np.testing.assert_allclose(model.nll(tokens[-30:]), expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("length", [1, 2])
def test_order_above_the_length(length):
    model = KneserNey.fit(np.arange(length), vocab_size=3, order=5)
    assert distribution(model, [0, 1, 2]).sum() == pytest.approx(1, abs=EXACT)
    assert model.nll(np.empty(0, np.int32)).shape == (0,)


@pytest.mark.parametrize(
    ("tokens", "order", "message"),
    [([], 2, "empty"), ([1, 4], 2, "Token 4 .* 0 to 3"), ([-1, 2], 2, "Token -1"), ([1], 0, "order is 0")],
)
def test_fit_refuses(tokens, order, message):
    with pytest.raises(ValueError, match=message):
        KneserNey.fit(np.array(tokens, np.int32), 4, order)


def test_nll_refuses_foreign_tokens():
    with pytest.raises(ValueError, match="Token 9 is outside"):
        KneserNey.fit(np.array([1, 2]), 4).nll(np.array([9]))


def test_xz_counts_what_the_text_adds():
    text = np.random.default_rng(0).bytes(20_000)
    alone = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    assert xz_bits_per_byte(None, text) == alone > 8  # noise, and a header
    assert xz_bits_per_byte(text, text) < 0.2  # said before
    assert xz_bits_per_byte(text[::-1], text) == pytest.approx(8, abs=0.05)
    with pytest.raises(ValueError, match="held-out text is empty"):
        xz_bits_per_byte(text, b"")


@pytest.fixture(params=["ours", "another's"])
def tokenizer(request, tmp_path) -> str:
    """A tokenizer.json: ours, whose folder names the begin and the end of a text, or one with <|endoftext|> alone."""
    if request.param == "ours":
        OurTokenizer.train([sentences(100, 1)], 300).save(tmp_path)
        return str(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[SEPARATOR], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([sentences(100, 1)], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


def test_command(tmp_path, tokenizer, capsys):
    train, held_out = tmp_path / "train.txt.xz", tmp_path / "held_out.txt"
    with lzma.open(train, "wt", encoding="utf-8") as file:
        file.writelines(f"{sentences(50, seed)}\n{SEPARATOR}\n" for seed in range(8))
    held_out.write_text(f"The hen sang to the cät.\n{SEPARATOR}\nThe king fed the dog.", encoding="utf-8")
    command = ["--tokenizer", tokenizer, "--train", str(train), "--held-out", str(held_out), "--order", "3"]

    ngram.main([*command, "--json"])
    rows = {row["model"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == ["xz -9e", "Kneser-Ney 3-gram", "xz -9e after train"]

    encoder = Tokenizer.from_file(tokenizer)
    (end,) = {encoder.token_to_id(name) for name in (EOS, SEPARATOR)} - {None}
    held = list(documents([held_out]))
    streams = [
        np.concatenate([[*encoder.encode(d, add_special_tokens=False).ids, end] for d in documents([f])])
        for f in (train, held_out)
    ]
    assert (streams[0] == end).sum() == 8 and (streams[1] == end).sum() == 2
    nll = KneserNey.fit(streams[0], encoder.get_vocab_size(), 3, end).nll(streams[1])
    row = rows["Kneser-Ney 3-gram"]
    assert row["tokens_seen"] == len(streams[0])
    assert row["perplexity"] == pytest.approx(np.exp(nll.mean()))
    assert row["bits_per_byte"] == pytest.approx(nll.sum() / np.log(2) / len("".join(held).encode()))

    ngram.main([*command, "--limit-train-tokens", "1000"])
    table = capsys.readouterr().out
    assert "bits/byte" in table and "1,000" in table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--order": "0"}, "order is 0"),
        ({"--held-out": "nowhere.txt"}, "nowhere.txt"),
        ({"--tokenizer": "nowhere.json"}, "nowhere.json has no tokenizer.json"),
    ],
)
def test_command_names_the_mistake(tmp_path, tokenizer, capsys, change, message):
    text = tmp_path / "text.txt"
    text.write_text("The king laughed.", encoding="utf-8")
    arguments = {"--tokenizer": tokenizer, "--train": str(text), "--held-out": str(text)} | change
    with pytest.raises(SystemExit, match="2"):
        ngram.main([word for pair in arguments.items() for word in pair])
    assert message in capsys.readouterr().err
