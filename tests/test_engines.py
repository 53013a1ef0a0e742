"""The native engine against the torch model in float32: what DESIGN calls equal across engines.

One unit in the last place can flip the rounding of an activation to int8, so single logits may differ; the bounds are
on the median, on the mean KL divergence and on the agreement of the likeliest token over many positions.
"""

import subprocess
import sys

import numpy as np
import pytest

from tritkit.checkpoint import open_folder
from tritkit.engine import Job
from tritkit.engine.load import load
from tritkit.pack import pack

MEDIAN_LOGIT, MEAN_KL, TOP_1 = 1e-5, 1e-5, 0.999
FULL_PRECISION = 1e-4  # no rounding to flip: only the order of sums differs
POSITIONS = 1024


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def teacher_forced(engine, tokens: np.ndarray, context: int) -> np.ndarray:
    parts = []
    for start in range(0, len(tokens), context):
        sequence = engine.new()
        parts.append(engine.step([Job(sequence, tokens[start : start + context], "all")])[0])
        engine.free(sequence)
    return np.concatenate(parts)


def both(folder, tokens, context=128):
    return [teacher_forced(load(folder, name).engine, tokens, context) for name in ("native", "torch")]


def check_close(native: np.ndarray, torch_: np.ndarray) -> None:
    p, q = log_softmax(torch_), log_softmax(native)
    assert np.median(np.abs(native - torch_)) <= MEDIAN_LOGIT
    assert (np.exp(p) * (p - q)).sum(-1).mean() <= MEAN_KL
    assert (p.argmax(-1) == q.argmax(-1)).mean() >= TOP_1


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(0, 320, POSITIONS).astype(np.int32)


@pytest.mark.parametrize("kind", ["b158", "b1"])
@pytest.mark.parametrize("form", ["latent", "packed"])
def test_native_equals_torch(make_folder, tmp_path, tokens, kind, form):
    folder = make_folder(kind, initializer_range=0.02)
    if form == "packed":
        pack(folder, tmp_path / "packed")
        folder = tmp_path / "packed"
    check_close(*both(folder, tokens))


@pytest.mark.parametrize("tied", [True, False])
def test_native_equals_torch_in_full_precision(make_folder, tokens, tied):
    native, torch_ = both(make_folder("llama", tie_word_embeddings=tied), tokens)
    assert np.abs(native - torch_).max() < FULL_PRECISION


@pytest.mark.parametrize("kind", ["b158", "b1"])
def test_packed_equals_latent_but_for_bfloat16_of_the_rest(make_folder, tmp_path, tokens, kind):
    """With the unquantised tensors kept in float32 nothing at all may change."""
    folder = make_folder(kind)
    pack(folder, tmp_path / "packed", dtype="float32")
    latent, packed = (teacher_forced(load(f).engine, tokens, 128) for f in (folder, tmp_path / "packed"))
    assert np.array_equal(latent, packed)


@pytest.mark.parametrize("kind", ["b158", "b1"])
def test_integer_sums_are_equal(make_folder, kind):
    """Fed the same activation codes, each native linear gives torch's integers exactly."""
    import torch

    from tritkit import _native
    from tritkit.checkpoint import linear_names, linear_shape
    from tritkit.kernels import integer_product
    from tritkit.layouts import LAYOUTS
    from tritkit.pack import pack_linears

    folder = open_folder(make_folder(kind))
    packed, layout = pack_linears(folder)
    random = np.random.default_rng(1)
    for name in linear_names(folder.config):
        rows, cols = linear_shape(folder.config, name)
        x = random.integers(-128, 128, (5, cols)).astype(np.int8)
        codes = LAYOUTS[layout].unpack(packed[name], (rows, cols)).codes.astype(np.int8)
        expected = integer_product(torch.from_numpy(x), torch.from_numpy(codes), "reference").numpy()
        for isa in _native.available_isas():
            got = _native.integer_product(layout, packed[name].arrays["weight"], rows, cols, x, isa)
            assert np.array_equal(got, expected), (name, isa)


def test_engines_agree_on_the_interface(make_folder, tokens):
    """Steps in pieces, forks and truncations give both engines the same continuation."""
    folder = make_folder("llama")
    outcomes = []
    for name in ("native", "torch"):
        engine = load(folder, name).engine
        a = engine.new()
        engine.step([Job(a, tokens[:20], "none")])
        b = engine.fork(a)
        first, second = engine.step([Job(a, tokens[20:25], "last"), Job(b, tokens[30:37], "all")])
        engine.truncate(a, 10)
        targets = tokens[41:51].copy()
        targets[:3] = -1
        nll = engine.step([Job(a, tokens[40:50], "nll", targets)])[0]
        assert engine.length(a) == 20 and engine.length(b) == 27
        for wrong in (Job(99, tokens[:1]), Job(a, np.array([320], np.int32)), Job(a, tokens[:200])):
            with pytest.raises(ValueError):
                engine.step([wrong])
        assert engine.length(a) == 20
        outcomes.append((first, second, nll))
    for native, torch_ in zip(*outcomes, strict=True):
        np.testing.assert_allclose(native, torch_, atol=FULL_PRECISION)
    assert (outcomes[0][2][:3] == 0).all() and (outcomes[0][2][3:] > 0).all()


def test_running_natively_never_imports_torch(make_folder, tmp_path):
    pack(make_folder("b158"), tmp_path / "packed")
    code = (
        "import sys; from tritkit.cli import main\n"
        f"folder = {str(tmp_path / 'packed')!r}\n"
        "assert main(['generate', folder, '--prompt', 'the cat', '--max-tokens', '5', '--seed', '1']) == 0\n"
        "assert main(['inspect', folder]) == 0\n"
        "assert main(['eval', folder, '--limit', '100', '--no-record']) == 0\n"
        "assert main(['compare', folder]) == 0\n"
        "assert main(['--help']) == 0\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["llama", "b158", "b1"])
def test_same_seed_same_text(make_folder, kind):
    from tritkit import generate

    model = load(make_folder(kind))
    texts = [generate("the cat", model, max_tokens=30, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_text_goes_on_past_the_context(make_folder):
    """A text longer than the context: the model re-reads its last half; the sequence is let go of at the end."""
    from tritkit.engine.sampling import Sampling
    from tritkit.engine.text import stream_ids

    model = load(make_folder("b158"))
    ids = list(stream_ids(model, [0, 5, 6], 200, Sampling(seed=3)))
    assert len(ids) == 200 or model.tokenizer.eos_id is not None
    with pytest.raises(ValueError, match="context is 128"):
        list(stream_ids(model, [5] * 128, 1, Sampling()))
