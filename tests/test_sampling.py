"""Sampling against a plain numpy version of each filter, and against the frequencies that it should have."""

import numpy as np
import pytest

from tritkit.engine.sampling import Sampler, Sampling

# exp and sums in float64 in another order; float32 logits divided by the temperature in float32.
TOLERANCE = 1e-6


def reference(logits, history=(), temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """The distribution, by sorting the vocabulary."""
    x = logits.astype(np.float32).copy()
    for token in set(history):
        x[token] = x[token] / repetition_penalty if x[token] > 0 else x[token] * repetition_penalty
    x = (x / np.float32(temperature)).astype(np.float64)
    if top_k:
        x[x < np.sort(x)[-min(top_k, len(x))]] = -np.inf
    p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]  # mass of the more likely ones
    if top_p < 1:
        p[order[before >= top_p]] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


def random_logits(n: int, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(n) * 3).astype(np.float32)


SETTINGS = [
    {},
    {"temperature": 0.3},
    {"temperature": 1.7},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 10**6},
    {"top_p": 0.001},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 0.9999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.1},
    {"temperature": 2.5, "top_p": 0.99},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("vocab", [1, 5, 100, 3001])
def test_the_distribution_is_that_of_the_plain_version(vocab, settings):
    for seed in range(5):
        logits = random_logits(vocab, seed)
        history = np.random.default_rng(seed).integers(0, vocab, 20).tolist()
        found = Sampler(Sampling(**{"temperature": 1.0, **settings})).distribution(logits, history)
        expected = reference(logits, history, **settings)
        np.testing.assert_array_equal(found > 0, expected > 0)
        np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=0)


def test_equal_logits():
    logits = np.array([1, 2, 2, 2, 0], np.float32)
    sampler = Sampler(Sampling(temperature=1.0, top_k=2))
    assert (sampler.distribution(logits) > 0).tolist() == [False, True, True, True, False]  # ties stay
    assert Sampler(Sampling(temperature=0)).sample(logits) == 1  # the first of them
    assert Sampler(Sampling(temperature=1.0, top_p=0.01)).sample(logits) == 1


@pytest.mark.parametrize("settings", [{}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1}], ids=str)
def test_frequencies(settings):
    logits, draws = random_logits(30, 4), 20_000
    sampler = Sampler(Sampling(temperature=1.2, seed=1, **settings))
    counts = np.bincount([sampler.sample(logits) for _ in range(draws)], minlength=30)
    p = sampler.distribution(logits)
    assert (counts[p == 0] == 0).all()
    expected = p[p > 0] * draws
    chi_square, freedom = ((counts[p > 0] - expected) ** 2 / expected).sum(), len(expected) - 1
    # Mean `freedom`, variance 2 * freedom; five standard deviations are passed once in a million seeds or so.
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_a_seed_is_a_sequence():
    logits = random_logits(1000, 0)

    def draw(seed):
        sampler = Sampler(Sampling(temperature=1.0, seed=seed))
        return [sampler.sample(logits) for _ in range(50)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert draw(None) != draw(None)
    assert draw(2**64 - 1) != draw(0)


def test_greedy_is_the_largest_after_the_penalty():
    logits = np.array([3.0, 2.9, -1.0], np.float32)
    assert Sampler(Sampling(temperature=0)).sample(logits) == 0
    assert Sampler(Sampling(temperature=0, repetition_penalty=1.5)).sample(logits, [0]) == 1
    assert Sampler(Sampling(temperature=0, repetition_penalty=1.5)).sample(logits, [0, 0, 0]) == 1
    assert Sampler(Sampling(temperature=0, top_k=1, top_p=0.1)).sample(logits) == 0
    assert Sampler(Sampling(temperature=0)).distribution(logits).tolist() == [1, 0, 0]


def test_forbidden_tokens_are_never_drawn():
    logits = random_logits(50, 0)
    logits[np.arange(50) % 2 == 0] = -np.inf
    sampler = Sampler(Sampling(temperature=5.0, seed=0))
    assert all(sampler.sample(logits) % 2 for _ in range(500))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"seed": -1},
        {"seed": 2**64},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}, expected"):
        Sampling(**settings)


def test_broken_input_is_refused():
    sampler = Sampler(Sampling())
    for bad in ([np.nan, 1], [np.inf, 1], [-np.inf, -np.inf]):
        with pytest.raises(ValueError, match="logits must be finite or -inf"):
            sampler.sample(np.array(bad, np.float32))
    with pytest.raises(ValueError, match=r"shape \[2, 3\], expected \[vocab\]"):
        sampler.sample(np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match="token 9 of the history is outside the vocabulary of 4"):
        Sampler(Sampling(repetition_penalty=1.1)).sample(np.zeros(4, np.float32), [9])
