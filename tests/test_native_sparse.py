"""What a ReLU^2 gate makes zero is not read, and that changes no bit of the result."""

import dataclasses

import numpy as np
import pytest
from decoder_reference import random_decoder

from tritkit import _native
from tritkit.engine import Job
from tritkit.engine.native import NativeEngine

ISAS = _native.available_isas()


def sized(hidden: int, inner: int, seed: int = 0):
    return random_decoder("bitnet", "ternary", seed, hidden_size=hidden, intermediate_size=inner)[0]


def changed(weights, name: str, change):
    """The weights with one linear of every layer changed."""
    layers = [dataclasses.replace(layer, **{name: change(getattr(layer, name))}) for layer in weights.layers]
    return dataclasses.replace(weights, layers=layers)


def logits(engine: NativeEngine, together: int = 5) -> np.ndarray:
    """A prompt, then decoding with 1, 2 ... sequences at a time."""
    chance = np.random.default_rng(1)
    sequences = [engine.new() for _ in range(together)]
    found = [engine.step([Job(s, chance.integers(0, 97, 9).astype(np.int32), "all")])[0] for s in sequences]
    for n in (*range(1, together + 1), 1, 1):
        ids = chance.integers(0, 97, (n, 1)).astype(np.int32)
        found += engine.step([Job(s, row, "all") for s, row in zip(sequences, ids, strict=False)])
    return np.concatenate(found)


def both(weights, isa: str, threads: int = 2) -> tuple[np.ndarray, np.ndarray, NativeEngine]:
    sparse = NativeEngine(weights, threads=threads, isa=isa, layout="l64_3")
    with NativeEngine(weights, threads=1, isa=isa, layout="t16_2") as dense:
        return logits(sparse), logits(dense), sparse


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("hidden, inner", [(48, 80), (8, 7), (320, 640), (324, 1001)])
def test_the_logits_are_those_of_reading_everything(isa, hidden, inner):
    found, expected, engine = both(sized(hidden, inner), isa)
    np.testing.assert_array_equal(found, expected)
    up, down = engine.density
    assert 0.1 < down <= up < 0.9
    read, there = engine.ffn_bytes
    assert there > read > there / 4


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bias, share", [(-1e6, 0.0), (1e6, 1.0)])
def test_nothing_active_and_all_active(isa, bias, share):
    weights = changed(sized(64, 96), "gate", lambda w: dataclasses.replace(w, bias=np.full(w.rows, bias, np.float32)))
    found, expected, engine = both(weights, isa)
    np.testing.assert_array_equal(found, expected)
    assert np.isfinite(found).all()
    assert engine.density[0] == share


def test_biases_of_up_and_down():
    rng = np.random.default_rng(0)
    weights = sized(48, 80)
    for name in ("up", "down"):
        weights = changed(
            weights, name, lambda w: dataclasses.replace(w, bias=rng.standard_normal(w.rows).astype(np.float32))
        )
    found, expected, _ = both(weights, ISAS[-1])
    np.testing.assert_array_equal(found, expected)


def test_threads_change_nothing():
    weights = sized(320, 700)
    one, many = (both(weights, ISAS[-1], threads)[0] for threads in (1, 2))
    np.testing.assert_array_equal(one, many)


def test_the_default_layout():
    def layout(isa: str, hidden: int, **options) -> str:
        return NativeEngine(sized(hidden, 64), threads=1, isa=isa, **options).layout

    assert layout("scalar", 320) == "t16_2"
    assert layout("scalar", 320, layout="l64_3") == "l64_3+t16_2"
    if "avx512" in ISAS:
        assert layout("avx512", 320) == "l64_3+t16_3"
        assert layout("avx512", 324) == "t16_3"  # lines of 640 would be half empty


def test_a_forced_density():
    weights = sized(320, 1000)
    engine = NativeEngine(weights, threads=2, layout="l64_3", density=(0.2, 0.1))
    sequence = engine.new()
    for token in range(60):
        engine.step([Job(sequence, np.array([token], np.int32), "last")])
    np.testing.assert_allclose(engine.density, (0.2, 0.1), atol=0.03)
    read, there = engine.ffn_bytes
    assert read / there == pytest.approx((1 + sum(engine.density)) / 3, abs=0.02)


def test_refusals():
    with pytest.raises(ValueError, match="density can be forced only on ternary models"):
        NativeEngine(sized(64, 96), layout="t16_2", density=(0.5, 0.5))
    with pytest.raises(ValueError, match="density can be forced only on ternary models"):
        NativeEngine(random_decoder("llama", "ternary")[0], layout="l64_3", density=(0.5, 0.5))
    with pytest.raises(ValueError, match="1 >= up >= down >= 0"):
        NativeEngine(sized(64, 96), layout="l64_3", density=(0.2, 0.5))
    with pytest.raises(ValueError, match="expected t16_2, t16_3, l64_3 or None"):
        NativeEngine(sized(64, 96), layout="t16_9")
