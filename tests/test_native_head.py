"""The output head in fewer bits, and screened: against the head of floats."""

import numpy as np
import pytest

import tritkit
from tritkit import _native
from tritkit.engine import Job
from tritkit.engine.load import decoder_weights
from tritkit.engine.native import HEADS, NativeEngine, default_head

ISAS = _native.available_isas()
# Of a weight's share of its row's largest: half a step of the code.
HALF_STEP = {"int8": 0.5 / 127, "int6": 0.5 / 31}


@pytest.fixture
def weights(make_folder):
    from tritkit.checkpoint import open_folder

    return decoder_weights(open_folder(make_folder("b158")))


def logits(engine, want="last"):
    sequence = engine.new()
    tokens = np.arange(3, 40, dtype=np.int32)
    if want == "all":
        return engine.step([Job(sequence, tokens, "all")])[0]
    return np.array([engine.step([Job(sequence, token[None], "last")])[0] for token in tokens])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("head", ["int8", "int6", "int4"])
def test_a_quantized_head_is_near_the_float_one(weights, head, isa):
    exact = logits(NativeEngine(weights, threads=1, isa=isa, head="float"))
    found = logits(NativeEngine(weights, threads=1, isa=isa, head=head))
    error = np.abs(found - exact)
    rows = np.asarray(weights.embedding.data if weights.head is None else weights.head.data)
    largest = np.abs(
        rows.view(np.float32) if rows.dtype == np.float32 else (rows.astype(np.uint32) << 16).view(np.float32)
    ).max(axis=1)
    if head in HALF_STEP:
        # Each weight is off by half a step at most, each activation (RMS 1, norm weights near 1) by nothing visible.
        bound = HALF_STEP[head] * largest * weights.shape.hidden_size * 2
        assert (error <= bound + 1e-4).all()
    assert 0 < error.mean() < {"int8": 0.02, "int6": 0.08, "int4": 0.4}[head] * exact.std()


@pytest.mark.parametrize("head", [h for h in HEADS if h != "float"])
def test_every_isa_and_number_of_threads_gives_the_same_bits(weights, head):
    if head == "screen":
        pytest.skip("its exact part is a sum of floats, in an order of the instruction set")
    expected = logits(NativeEngine(weights, threads=1, isa="avx2" if "avx2" in ISAS else "scalar", head=head))
    for isa in ISAS:
        if isa != "scalar":
            assert np.array_equal(logits(NativeEngine(weights, threads=1, isa=isa, head=head)), expected), isa
    if _native.usable_cores() > 1:
        assert np.array_equal(
            logits(NativeEngine(weights, threads=2, head=head)), logits(NativeEngine(weights, threads=1, head=head))
        )


def test_a_screened_head_is_exact_where_it_matters(weights):
    exact, quick = (NativeEngine(weights, threads=1, head=head) for head in ("float", "screen"))
    expected, found = logits(exact), logits(quick)
    assert 1 <= quick.rescored_rows <= weights.shape.vocab_size
    best = expected.argmax(axis=1)
    assert (found.argmax(axis=1) == best).all()
    at = np.arange(len(best))
    assert np.array_equal(found[at, best], expected[at, best])
    assert np.array_equal(logits(quick, "all"), logits(exact, "all"))


def test_likelihoods_of_a_screened_head_are_exact(weights):
    tokens, targets = np.arange(20, dtype=np.int32), np.arange(1, 21, dtype=np.int32)
    found = []
    for head in ("float", "screen"):
        engine = NativeEngine(weights, threads=1, head=head)
        found.append(engine.step([Job(engine.new(), tokens, "nll", targets)])[0])
    assert np.array_equal(*found)


def test_refused(weights, make_folder):
    with pytest.raises(ValueError, match="head is 'int5', expected one of float, int8, int6, int4, screen"):
        NativeEngine(weights, head="int5")
    with pytest.raises(ValueError, match="the torch engine keeps the output head as it is"):
        tritkit.load(make_folder("b158"), "torch", head="int8")
    with pytest.raises(ValueError, match="layout is 't16_9', expected t16_2, t16_3, l64_3 or None"):
        NativeEngine(weights, layout="t16_9")


def test_rows_that_are_not_finite_are_refused(weights):
    import dataclasses

    table = weights.embedding
    data = np.array(table.data)
    data.view(np.uint16).reshape(-1)[-1] = 0x7FC0 if data.dtype == np.uint16 else 0xFFFF
    broken = dataclasses.replace(weights, embedding=dataclasses.replace(table, data=data), head=None)
    with pytest.raises(ValueError, match="not finite"):
        NativeEngine(broken, head="int8")


@pytest.mark.parametrize("layout", ["t16_2", "t16_3"])
def test_ternary_layouts_give_the_same_bits(weights, layout):
    engine = NativeEngine(weights, threads=1, layout=layout, head="float")
    assert engine.layout == layout
    assert np.array_equal(logits(engine), logits(NativeEngine(weights, threads=1, head="float")))


def test_small_heads_stay_as_they_are(weights):
    assert default_head(weights) == "float"
    assert NativeEngine(weights, threads=1).head == "float"
