"""ggml's quantisers: the bytes of llama.cpp's own library, of the gguf package, and laws that need neither."""

import numpy as np
import pytest

from tritkit.layouts import GGML, Packed
from tritkit.layouts.search import SEARCHES, quantize

LEGACY = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "tq1_0", "tq2_0"]
WIDTHS = (256, 512, 576, 1536, 2560)  # 576, the hidden size of SmolLM2-135M, is no multiple of 256
CASES = [(name, columns) for name in SEARCHES for columns in WIDTHS if columns % GGML[name].block == 0]


def matrices(columns: int, rows: int = 12) -> dict[str, np.ndarray]:
    """What a quantiser may meet: weights as they are, and groups that are degenerate in some way."""
    random = np.random.default_rng(columns)
    gauss = random.standard_normal((rows, columns)).astype(np.float32)
    outlier = np.zeros((rows, columns), np.float32)
    outlier[:, 5] = np.linspace(-3, 4, rows)
    one_large = gauss * np.float32(1e-3)
    one_large[:, 7] = 50
    found = {
        "gauss": gauss,
        "heavy": random.standard_t(2, (rows, columns)),
        "weights": gauss * 0.02,
        "bf16": (gauss.view(np.uint32) & 0xFFFF0000).view(np.float32),
        "constant": np.full((rows, columns), 0.37) * np.linspace(-2, 2, rows)[:, None],
        "zero": np.zeros((rows, columns)),
        "minus zero": np.where(random.random((rows, columns)) < 0.9, -0.0, gauss),
        "one outlier in zeros": outlier,
        "one outlier": one_large,
        "tiny": gauss * 1e-6,
        "below the smallest scale": gauss * 1e-15,
        "subnormal": gauss * 1e-39,
        "positive": np.abs(gauss) + 1,
        "negative": -np.abs(gauss) - 1,
        "few values": random.integers(-3, 4, (rows, columns)),
        "sparse": np.where(random.random((rows, columns)) < 0.05, gauss, 0),
    }
    return {name: np.ascontiguousarray(w, np.float32) for name, w in found.items()}


def importances(columns: int) -> dict[str, np.ndarray | None]:
    random = np.random.default_rng(columns + 1)
    wide = np.exp(3 * random.standard_normal(columns))
    found = {
        "random": random.random(columns) ** 2,
        "wide": wide,
        "half zero": np.where(random.random(columns) < 0.5, 0, wide),
        "nearly all zero": np.where(random.random(columns) < 0.97, 0, wide),  # least squares of one point
        "zero": np.zeros(columns),
        "one": np.ones(columns),
    }
    return {"none": None} | {name: f.astype(np.float32) for name, f in found.items()}


@pytest.mark.interop
@pytest.mark.parametrize(("name", "columns"), CASES)
def test_every_byte_is_llama_cpps(name, columns):
    peer = pytest.importorskip("ggml_peer")
    for kind, w in matrices(columns).items():
        for weighing, importance in importances(columns).items():
            ours, theirs = quantize(name, w, importance), peer.quantize_chunk(name, w, importance)
            assert np.array_equal(ours, theirs), f"{name} of {kind} {columns} with importance {weighing}"


@pytest.mark.interop
@pytest.mark.slow
@pytest.mark.parametrize("name", SEARCHES)
def test_every_byte_of_many_blocks_is_llama_cpps(name):
    """Ties that one block in ten thousand has: eighty thousand blocks of 256 without importance, as many with it."""
    peer = pytest.importorskip("ggml_peer")
    random = np.random.default_rng(7)
    for part in range(4):
        w = random.standard_normal((4000, 2560)).astype(np.float32) * np.float32(0.03)
        if part % 2:
            w = (w.view(np.uint32) & 0xFFFF0000).view(np.float32)
        importance = np.exp(2 * random.standard_normal(2560)).astype(np.float32) if part > 1 else None
        ours = quantize(name, w, importance)
        different = (ours != peer.quantize_chunk(name, w, importance)).any(axis=1)
        assert not different.any(), f"{different.sum()} rows of {len(w)} differ, with importance: {part > 1}"


@pytest.mark.parametrize(("name", "columns"), [case for case in CASES if case[0] in LEGACY])
def test_formulas_are_those_of_the_gguf_package(name, columns):
    gguf = pytest.importorskip("gguf")
    kind = {t.name.lower(): t for t in gguf.GGMLQuantizationType}[name]
    for what in ("gauss", "heavy", "weights", "bf16", "constant", "zero", "one outlier", "positive", "few values"):
        w = matrices(columns)[what]
        theirs = gguf.quants.quantize(w, kind).reshape(len(w), -1)
        assert np.array_equal(quantize(name, w), theirs), what


@pytest.mark.parametrize("name", SEARCHES)
def test_bytes_do_not_depend_on_threads_or_neighbours(name):
    w = matrices(512, 33)["heavy"]
    importance = importances(512)["wide"]
    whole = quantize(name, w, importance, threads=1)
    assert np.array_equal(whole, quantize(name, w, importance, threads=3))
    assert np.array_equal(whole[10:12], quantize(name, w[10:12], importance))
    assert np.array_equal(whole[:, : GGML[name].row_bytes(256)], quantize(name, w[:, :256], importance[:256])) == (
        name not in ("q4_0", "q4_1", "q5_0", "q5_1")  # these weigh by the variance of the whole row
    )


def error(name: str, w: np.ndarray, importance: np.ndarray, rows: np.ndarray) -> float:
    back = GGML[name].dequantize(Packed({"weight": rows}), w.shape)
    return float(((back - w) ** 2 * importance).sum() / (w**2 * importance).sum())


@pytest.mark.parametrize("name", [n for n in SEARCHES if n not in ("q8_0", "tq1_0", "tq2_0")])
def test_importance_lowers_the_error_where_it_matters(name):
    w = matrices(512, 32)["weights"]
    importance = importances(512)["wide"]
    searched = error(name, w, importance, quantize(name, w, importance))
    assert searched < error(name, w, importance, quantize(name, w))


def test_more_bits_are_nearer():
    w = matrices(512, 16)["weights"]
    ones = np.ones(512, np.float32)
    errors = [error(name, w, ones, quantize(name, w)) for name in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0")]
    # Each bit divides the squared error by four, roughly.
    for more, less in zip(errors[1:], errors, strict=False):
        assert more < less / 2
    assert errors[2] < error("q4_0", w, ones, quantize("q4_0", w))


def refusal(*args) -> str:
    with pytest.raises(ValueError) as caught:
        quantize(*args)
    return str(caught.value)


def test_what_cannot_be_quantised_is_refused():
    w = matrices(256, 2)["gauss"]
    assert "known are q4_0, q4_1" in refusal("q4_k_m", w)
    assert "q4_k has blocks of 256 columns, but a row has 128" in refusal("q4_k", w[:, :128])
    assert "but this array has the shape (256,)" in refusal("q4_k", w[0])
    odd = w.copy()
    odd[1, 3], odd[0, 0] = np.nan, np.inf
    assert refusal("q6_k", odd) == "q6_k holds finite weights, but 2 of these are not"
    assert "too large" in refusal("q8_0", w * np.float32(1e20))
    assert "float16, at most 65504" in refusal("q4_0", w * np.float32(1e7))
    assert "wants the shape (256,), one number a column, not (255,)" in refusal("q4_k", w, np.ones(255))
    assert "not negative, but some of these are not" in refusal("q4_k", w, -np.ones(256))
    assert "not negative, but some of these are not" in refusal("q4_k", w, np.full(256, np.nan))
    assert quantize("q4_k", w[:0]).shape == (0, 144)
