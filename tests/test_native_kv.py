"""The KV cache at every width: what is lost, what is not, and that nothing else changes a result."""

from itertools import pairwise

import numpy as np
import pytest
from decoder_reference import random_decoder

import tritkit
from tritkit import _native
from tritkit.engine import Job, native
from tritkit.engine.native import NativeEngine

THETA = 10000.0
WIDTHS = (32, 16, 8, 4, 3)
ISAS = _native.available_isas()
# Query heads, kv heads, head_dim: grouped; one kv head; groups of one; no multiple of 16; more than a block of rows.
SHAPES = ((4, 2, 10), (6, 1, 18), (3, 3, 34), (4, 1, 128), (40, 1, 16))


def tokens_of(n: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 97, n).astype(np.int32)


def run(engine: NativeEngine, tokens: np.ndarray) -> np.ndarray:
    sequence = engine.new()
    (logits,) = engine.step([Job(sequence, tokens, "all")])
    engine.free(sequence)
    return logits


def decoder(heads=(4, 2, 16), **changes):
    names = ("num_heads", "num_kv_heads", "head_dim")
    return random_decoder("bitnet", "ternary", **dict(zip(names, heads, strict=True)), **changes)


@pytest.fixture(scope="module")
def weights():
    return decoder()[0]


@pytest.fixture(scope="module", params=WIDTHS)
def engine(request, weights):
    return NativeEngine(weights, threads=2, kv_bits=request.param)


# --- The rounding itself, through one attention layer.


def rounded(x: np.ndarray, bits: int) -> np.ndarray:
    """Rows as the cache gives them back, written from the definition."""
    if bits == 32:
        return x
    if bits == 16:
        return x.astype(np.float16).astype(np.float64)
    most = 2**bits - 1
    scale = (2 * np.abs(x).max(-1, keepdims=True) / most).astype(np.float32).astype(np.float16).astype(np.float64)
    return scale * (np.clip(np.rint(x / np.maximum(scale, 1e-30) + most / 2), 0, most) - most / 2)


def frequencies(d: int) -> np.ndarray:
    return (THETA ** (-np.arange(0, d, 2) / d)).astype(np.float32)


def rotate(x: np.ndarray) -> np.ndarray:
    angles = (np.arange(len(x), dtype=np.float32)[:, None] * frequencies(x.shape[-1])).astype(np.float64)[:, None]
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], -1)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, bits: int) -> np.ndarray:
    """[t, heads, d] of rotated q, k: softmax over the past, the cache rounded to `bits`, the first token to 8."""
    group = q.shape[1] // k.shape[1]
    keys, values = (np.concatenate([rounded(x[:1], max(bits, 8)), rounded(x[1:], bits)]) for x in (k, v))
    keys, values = np.repeat(keys, group, 1), np.repeat(values, group, 1)
    if bits <= 8:  # int8 queries
        step = np.abs(q).max(-1, keepdims=True) / 127
        q = step * np.rint(q / step)
    scores = np.einsum("qhd,khd->hqk", q, keys) / np.sqrt(q.shape[-1])
    scores = np.where(np.tri(len(q), dtype=bool), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), values)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_that_of_the_rounded_cache(isa, bits, shape):
    heads, kv_heads, d = shape
    rng, n = np.random.default_rng(d), 300
    q, k, v = (rng.standard_normal((n, h, d)).astype(np.float32) for h in (heads, kv_heads, kv_heads))
    found = _native.attention(q, k, v, frequencies(d), bits, 2, isa)
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    expected = attention(rotate(q), rotate(k), v, bits)
    # float32 sums of 128 products, and a value in a while that falls to the other side of a half, one step of one of d.
    most, typical = {32: (3e-6, 3e-7), 16: (1e-4, 3e-7)}.get(bits, (4e-3 if bits == 8 else 0.1, 2e-5))
    # Codes are multiplied with softmax weights of 14 bits: 256 of them, each off by at most 1 / 32766 of the largest.
    off = np.abs(found - expected)
    assert (float(off.max()) <= most, float(np.median(off)) <= typical) == (True, True)


@pytest.mark.parametrize("bits", (16, 8, 4, 3))
def test_a_single_position_comes_back_within_half_a_step(bits):
    """Attention over one position returns its value: of the first token at 8 bits, later ones as they are stored."""
    rng = np.random.default_rng(bits)
    v = rng.standard_normal((2, 3, 64)).astype(np.float32) * np.array([1.0, 1e-3, 300.0], np.float32)[:, None]
    k = np.zeros_like(v)
    k[1] = 100.0  # the second position wins the softmax by far
    found = _native.attention(100 * np.ones_like(v), k, v, frequencies(64), bits, 1, "")
    absmax = np.abs(v).max(-1, keepdims=True)
    for position, width in ((0, max(bits, 8)), (1, bits)):
        # Half a step, and what a float16 scale can be off by at the largest value.
        step = 2.0**-11 if width == 16 else 1 / (2**width - 1) + 2.0**-11
        error = np.abs(found[position] - v[position]) / absmax[position]
        assert error.max() <= step * 1.001
        assert width == 16 or error.max() >= 0.4 / (2**width - 1)  # and it is really stored at so few bits


@pytest.mark.parametrize("bits", WIDTHS)
def test_extreme_values(bits):
    """Zeros, the ends of float16 and beyond: finite, and nothing overflows an int32 where all codes are the largest."""
    n, d = 300, 256
    ones = np.ones((n, 1, d), np.float32)
    for size in (0.0, 1e-30, 1.0, 7e4):
        found = _native.attention(ones, ones * size, ones * size, frequencies(d), bits, 1, "")
        expected = 0.0 if bits <= 16 and size == 1e-30 else min(size, 65504.0) if bits == 16 else size
        np.testing.assert_allclose(found, expected, rtol=1e-3)
        np.testing.assert_allclose(
            _native.attention(-ones, ones * size, -ones * size, frequencies(d), bits, 1, ""), -expected, rtol=1e-3
        )


# --- The whole engine.


@pytest.mark.parametrize("bits", WIDTHS)
def test_cuts_threads_and_batches_change_nothing(weights, bits, monkeypatch):
    monkeypatch.setattr(native, "usable_cores", lambda: 3)
    tokens = tokens_of(330)
    whole = run(NativeEngine(weights, threads=1, kv_bits=bits), tokens)
    engine = NativeEngine(weights, threads=3, kv_bits=bits)
    np.testing.assert_array_equal(run(engine, tokens), whole)
    sequence, other = engine.new(), engine.new()
    cuts = [0, 1, 2, 33, 64, 65, 190, 256, 257, 329, 330]
    parts = []
    for a, b in pairwise(cuts):
        # Another sequence in the same step; it is not there at all in the first run.
        parts.append(engine.step([Job(sequence, tokens[a:b], "all"), Job(other, tokens_of(7, seed=b), "none")])[0])
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 130, 257])
def test_fork_and_truncate(engine, n):
    start, left, right = tokens_of(n), tokens_of(70, seed=2), tokens_of(70, seed=3)
    a = engine.new()
    engine.step([Job(a, start, "none")])
    b = engine.fork(a)
    logits_a, logits_b = engine.step([Job(a, left), Job(b, right)])
    np.testing.assert_array_equal(logits_a, run(engine, np.append(start, left))[-1])
    np.testing.assert_array_equal(logits_b, run(engine, np.append(start, right))[-1])
    c = engine.fork(a)
    for keep in (n // 2 + 1, 0):  # 0: the first token is replaced too, which a still has at 8 bits
        engine.truncate(c, keep)
        (logits_c,) = engine.step([Job(c, right)])
        np.testing.assert_array_equal(logits_c, run(engine, np.append(start[:keep], right))[-1])
    (more,) = engine.step([Job(a, right)])
    np.testing.assert_array_equal(more, run(engine, np.concatenate([start, left, right]))[-1])
    for sequence in (a, b, c):
        engine.free(sequence)


def test_fewer_bits_are_further_off(weights):
    tokens = tokens_of(200)
    exact = run(NativeEngine(weights, kv_bits=32), tokens)
    off = [np.abs(run(NativeEngine(weights, kv_bits=bits), tokens) - exact).mean() for bits in WIDTHS]
    assert off[0] == 0 and all(a < b for a, b in pairwise(off))


@pytest.mark.parametrize(("bits", "head_dim", "expected"), [
    (32, 128, 32), (16, 128, 16), (8, 128, 8 + 16 / 128), (4, 128, 4 + 16 / 128), (3, 128, 3 + 16 / 128), (3, 64, 3.25),
])  # fmt: skip
def test_bytes_are_the_real_ones(bits, head_dim, expected):
    """Codes and one float16 scale for each token, head and of key and value; nothing else where sizes fit."""
    weights, _ = decoder((4, 2, head_dim))
    values = 2 * weights.shape.num_layers * weights.shape.num_kv_heads * head_dim
    assert NativeEngine(weights, kv_bits=bits).kv_bytes_per_position * 8 / values == expected


def test_a_width_that_is_not_there(weights):
    for bits in (0, 5, -1):
        with pytest.raises(ValueError, match=f"kv_bits is {bits}, expected 32, 16, 8, 4 or 3"):
            NativeEngine(weights, kv_bits=bits)
    assert NativeEngine(weights).kv_bits == 16


def test_the_option(make_folder, capsys):
    from tritkit.cli import main

    folder = make_folder("b158")
    assert tritkit.load(folder, kv_bits=4).engine.kv_bits == 4
    with pytest.raises(ValueError, match="kv_bits is 8, but the torch engine keeps keys and values at 32 bits"):
        tritkit.load(folder, "torch", kv_bits=8)
    assert main(["generate", str(folder), "--kv-bits", "5"]) == 2
    assert "--kv-bits: invalid choice: 5 (choose from 32, 16, 8, 4, 3)" in capsys.readouterr().err
    assert main(["bench", str(folder), "--kv-bits", "3", "--prompt", "4", "--tokens", "2", "--repeat", "1"]) == 0
    from tritkit import results

    run = results.read(folder)[-1]
    assert run["settings"]["kv_bits"] == 3 and run["metrics"]["native_kv_bits"] == 3
