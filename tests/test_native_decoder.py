"""The native decoder against plain numpy, and against itself: however the tokens are cut, the numbers are the same."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise

import numpy as np
import pytest
from decoder_reference import random_decoder

from tritkit import _native
from tritkit.engine import Job, native
from tritkit.engine.native import CHUNK, NativeEngine

# float32 against float64: about 100 operations in a row on values near 1, each off by at most 6e-8.
FLOAT_TOLERANCE = 2e-5
# With int8 activations a value near a half may round to the other neighbour, which moves one input of a linear by
# 1/127 of the largest. Such a flip is seldom; it spreads, so the bound on the typical logit is the sharp one.
FLIP_TOLERANCE = 0.05
MEDIAN_TOLERANCE = 2e-5

MODELS = [("llama", "f32"), ("llama", "f16"), ("llama", "bf16"), ("llama", "ternary"), ("llama", "binary"),
          ("bitnet", "ternary"), ("bitnet", "binary"), ("bitnet", "f32"),
          ("all", "ternary"), ("all", "bf16")]  # fmt: skip


@pytest.fixture(params=MODELS, ids="-".join, scope="module")
def model(request):
    return random_decoder(*request.param)


@pytest.fixture(scope="module")
def engine(model):
    return NativeEngine(model[0], threads=2)


def tokens_of(n: int, seed: int = 1, vocab: int = 97) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, n).astype(np.int32)


def run(engine: NativeEngine, tokens: np.ndarray, want="all", targets=None) -> np.ndarray:
    sequence = engine.new()
    (result,) = engine.step([Job(sequence, tokens, want, targets)])
    engine.free(sequence)
    return result


@pytest.mark.parametrize("isa", _native.available_isas())
def test_logits_are_those_of_the_definition(model, isa):
    weights, reference = model
    tokens = tokens_of(70)
    found, expected = run(NativeEngine(weights, threads=1, isa=isa, kv_bits=32), tokens), reference(tokens)
    assert found.dtype == np.float32 and found.shape == (70, 97)
    difference = np.abs(found - expected)
    is_integer = weights.layers[0].q.activations is not None
    assert np.median(difference) <= MEDIAN_TOLERANCE
    assert difference.max() <= (FLIP_TOLERANCE if is_integer else FLOAT_TOLERANCE)


def test_one_step_is_many_steps(engine):
    tokens = tokens_of(CHUNK + 9)
    at_once = run(engine, tokens)
    sequence = engine.new()
    cuts = [0, 1, 2, 5, 64, 65, CHUNK - 1, len(tokens)]
    parts = [engine.step([Job(sequence, tokens[a:b], "all")])[0] for a, b in pairwise(cuts)]
    assert engine.length(sequence) == len(tokens)
    np.testing.assert_array_equal(np.concatenate(parts), at_once)
    np.testing.assert_array_equal(run(engine, tokens, "last"), at_once[-1])
    engine.free(sequence)


def test_a_batch_is_each_sequence_alone(engine):
    texts = [tokens_of(n, seed=n) for n in (1, 7, 150, 130, 2)]
    wants = ["last", "all", "last", "none", "all"]
    alone = [run(engine, text, want) for text, want in zip(texts, wants, strict=True)]
    jobs = [Job(engine.new(), text, want) for text, want in zip(texts, wants, strict=True)]
    together = engine.step(jobs)
    assert together[3] is None
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a, b)
    following = engine.step([Job(job.sequence, tokens_of(1)) for job in jobs])
    for text, logits in zip(texts, following, strict=True):
        np.testing.assert_array_equal(run(engine, np.append(text, tokens_of(1)), "last"), logits)
    for job in jobs:
        engine.free(job.sequence)


def test_threads_change_nothing(model, monkeypatch):
    monkeypatch.setattr(native, "usable_cores", lambda: 5)
    tokens = tokens_of(90)
    one, two, five = (run(NativeEngine(model[0], threads=n), tokens) for n in (1, 2, 5))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one, five)


def test_likelihood_is_that_of_the_logits(engine):
    tokens, targets = tokens_of(CHUNK + 30), tokens_of(CHUNK + 30, seed=2)
    targets[::3] = -1
    logits = run(engine, tokens).astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.where(targets >= 0, -log_p[np.arange(len(tokens)), targets], 0)
    found = run(engine, tokens, "nll", targets)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)  # the result is rounded to float32
    assert (found[::3] == 0).all()


@pytest.mark.parametrize("n", [1, 63, 64, 65, 130])
def test_fork_truncate_free(engine, n):
    start, left, right = tokens_of(n), tokens_of(70, seed=2), tokens_of(70, seed=3)
    a = engine.new()
    engine.step([Job(a, start, "none")])
    b = engine.fork(a)
    assert engine.length(b) == n
    logits_a, logits_b = engine.step([Job(a, left), Job(b, right)])
    np.testing.assert_array_equal(logits_a, run(engine, np.append(start, left), "last"))
    np.testing.assert_array_equal(logits_b, run(engine, np.append(start, right), "last"))

    c = engine.fork(a)  # shares pages with a that it will write to after the cut
    engine.truncate(c, n // 2 + 1)
    (logits_c,) = engine.step([Job(c, right)])
    np.testing.assert_array_equal(logits_c, run(engine, np.append(start[: n // 2 + 1], right), "last"))
    (more,) = engine.step([Job(a, right)])
    np.testing.assert_array_equal(more, run(engine, np.concatenate([start, left, right]), "last"))

    for sequence in (a, b, c):
        engine.free(sequence)
    with pytest.raises(ValueError, match=f"sequence {a} does not exist"):
        engine.length(a)
    assert engine.new() != a


def test_mistakes_name_what_is_wrong(engine):
    sequence = engine.new()
    engine.step([Job(sequence, tokens_of(10), "none")])
    wrong = [
        (Job(sequence, tokens_of(391)), "401 tokens.*400"),
        (Job(sequence, np.array([5, 97], np.int32)), "token 97.*97"),
        (Job(sequence, np.array([-1], np.int32)), "token -1"),
        (Job(sequence, tokens_of(0)), "without tokens"),
        (Job(sequence, np.array([1.0])), "float64"),
        (Job(sequence, tokens_of(3), "most"), "'most'"),
        (Job(sequence, tokens_of(3), "nll"), "targets is None"),
        (Job(sequence, tokens_of(3), "nll", tokens_of(2)), r"targets has shape \[2\], expected \[3\]"),
        (Job(sequence, tokens_of(3), "nll", np.array([0, 1, 97])), "target 97"),
        (Job(10**6, tokens_of(3)), "sequence 1000000 does not exist"),
    ]
    for job, message in wrong:
        with pytest.raises(ValueError, match=message):
            engine.step([job])
        assert engine.length(sequence) == 10
    with pytest.raises(ValueError, match="two jobs"):
        engine.step([Job(sequence, tokens_of(3)), Job(sequence, tokens_of(3))])
    with pytest.raises(ValueError, match=r"cannot truncate sequence .* to 11 tokens, it has 10"):
        engine.truncate(sequence, 11)
    assert engine.step([]) == []


def test_tensors_that_do_not_fit_are_named(model):
    weights = model[0]
    layer = weights.layers[1]

    def change(**fields):
        changed = [weights.layers[0], dataclasses.replace(layer, **fields), weights.layers[2]]
        return dataclasses.replace(weights, layers=changed)

    q = layer.q
    wrong = [
        (change(q=dataclasses.replace(q, rows=44)), r"layers\[1\].q has shape \[44, 40\], expected \[40, 40\]"),
        (change(q=dataclasses.replace(q, data=q.data[:-1])), r"layers\[1\].q has data"),
        (change(q=dataclasses.replace(q, data=q.data.astype(np.int64))), r"layers\[1\].q has data int64"),
        (change(q=dataclasses.replace(q, layout="tq9")), "'tq9', expected one of hf_autobitlinear"),
        (change(q=dataclasses.replace(q, activations="a3")), "'a3'"),
        (change(q=dataclasses.replace(q, bias=np.zeros(3, np.float32))), r"q.bias is float32 \[3\]"),
        (change(input_norm=np.zeros(3, np.float32)), r"layers\[1\].input_norm is float32 \[3\], expected .*\[40\]"),
        (dataclasses.replace(weights, layers=weights.layers[:2]), "2 layers, expected 3"),
    ]
    for changed, message in wrong:
        with pytest.raises(ValueError, match=message):
            NativeEngine(changed)


def test_properties(model):
    engine = NativeEngine(model[0], threads=2, isa="scalar")
    assert (engine.name, engine.isa, engine.threads) == ("native", "scalar", 2)
    assert (engine.vocab_size, engine.context_length) == (97, 400)
    packed = sum(getattr(layer, name).data.nbytes for layer in model[0].layers for name in ("q", "gate", "down"))
    assert packed < engine.bytes_per_token
    assert NativeEngine(model[0]).threads == len(os.sched_getaffinity(0))
    with pytest.raises(ValueError, match="isa is 'mmx', expected one that this CPU can run: scalar"):
        NativeEngine(model[0], isa="mmx")
    with pytest.raises(ValueError, match="threads is -1"):
        NativeEngine(model[0], threads=-1)


def test_many_python_threads_share_an_engine(engine):
    texts = [tokens_of(40, seed=n) for n in range(6)]
    expected = [run(engine, text, "last") for text in texts]
    found = [None] * len(texts)

    def work(i):
        found[i] = run(engine, texts[i], "last")

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(texts))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_interrupted_prefill_leaves_no_trace():
    weights, _ = random_decoder("llama", "ternary", context_length=200_000)
    engine = NativeEngine(weights, threads=1, isa="scalar")
    sequence = engine.new()
    engine.step([Job(sequence, tokens_of(5), "none")])
    timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
    # A process that was started in the background may have been told to ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    started = time.monotonic()
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            engine.step([Job(sequence, tokens_of(100_000), "none")])
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - started < 5
    assert engine.length(sequence) == 5


def test_no_torch():
    code = "import sys, tritkit.engine.native, tritkit.engine.sampling; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
