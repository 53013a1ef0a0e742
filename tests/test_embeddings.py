"""Quantised embeddings: the equations of sentence-transformers, and search against its own and against brute force."""

import numpy as np
import pytest

from tritkit import embeddings as module
from tritkit.embeddings import (
    PRECISIONS,
    dequantize_embeddings,
    embedding_ranges,
    quantize_embeddings,
    search_embeddings,
)

CODED = ("int8", "uint8", "binary", "ubinary")


@pytest.fixture
def vectors():
    """600 of 72 dimensions and length one in 12 bunches; each dimension has a middle and a width of its own."""
    chance = np.random.default_rng(0)
    bunches = chance.standard_normal((12, 72))[chance.integers(0, 12, 600)]
    found = (bunches + chance.standard_normal((600, 72))) * chance.uniform(0.1, 3, 72) + chance.uniform(-0.2, 0.2, 72)
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def brute_force(first, second, top_k, multiplier):
    """Rows by the first scores, the best of these by those of the float query; of equal ones the lower number wins."""
    if multiplier == 0:
        return np.argsort(-first, kind="stable")[:top_k]
    kept = np.sort(np.argsort(-first, kind="stable")[: top_k * multiplier])
    return kept[np.argsort(-second[kept], kind="stable")[:top_k]]


def test_equations_by_hand():
    x = np.array([[0.0, -255.0, 0.5], [255.0, 255.0, 0.5], [7.9, 0.0, 0.5]], np.float32)
    # steps of 1 from 0, of 2 from -255, and none in the third dimension, which counts as steps of 1
    assert quantize_embeddings(x, "uint8").tolist() == [[0, 0, 0], [255, 255, 0], [7, 127, 0]]
    assert quantize_embeddings(x, "int8").tolist() == [[-128, -128, -128], [127, 127, -128], [-121, -1, -128]]
    wide = np.zeros((1, 10), np.float32)
    wide[0, [0, 3, 9]], wide[0, 1] = 1.0, -1.0  # zero is no one; 10 bits take two bytes, filled up with zeros
    assert quantize_embeddings(wide, "ubinary").tolist() == [[0b10010000, 0b01000000]]
    assert quantize_embeddings(wide, "binary").tolist() == [[0b10010000 - 128, 0b01000000 - 128]]


def test_ranges_clip_and_decode_to_the_lower_end(vectors):
    ranges = embedding_ranges(vectors[:50])
    step = (ranges[1] - ranges[0]) / 255
    for precision in ("int8", "uint8"):
        codes = quantize_embeddings(vectors, precision, ranges)
        assert (codes == quantize_embeddings(vectors, precision, calibration=vectors[:50])).all()
        error = np.clip(vectors, *ranges) - dequantize_embeddings(codes, precision, ranges)
        assert (error > -0.001 * step).all() and (error < 1.001 * step).all()
    bits = dequantize_embeddings(quantize_embeddings(vectors, "binary"), "binary", dimensions=72)
    assert (bits == (vectors > 0)).all()


@pytest.mark.parametrize("precision", CODED)
@pytest.mark.parametrize("multiplier", [0, 1, 3])
def test_search_equals_brute_force(vectors, precision, multiplier, monkeypatch):
    monkeypatch.setattr(module, "FLOAT_BLOCK", 64)
    monkeypatch.setattr(module, "BIT_BLOCK", 100)
    queries, corpus = vectors[:20], vectors[20:]
    ranges = embedding_ranges(vectors) if "int8" in precision else None
    codes = quantize_embeddings(corpus, precision, ranges)
    rows, scores = search_embeddings(queries, codes, precision, 7, multiplier, ranges)
    asked = quantize_embeddings(queries, precision, ranges)
    for query, own, found, score in zip(queries, asked, rows, scores, strict=True):
        if "binary" in precision:
            first = -((query > 0) != (corpus > 0)).sum(-1).astype(float)
            second = (corpus > 0).astype(np.float32) @ query
        else:
            first = codes.astype(np.int64) @ own.astype(np.int64)
            second = dequantize_embeddings(codes, precision, ranges) @ query
        wanted = brute_force(first, second, 7, multiplier)
        assert found.tolist() == wanted.tolist()
        np.testing.assert_allclose(score, (first if multiplier == 0 else second)[wanted], rtol=1e-4, atol=1e-5)


def test_float_search_and_candidates_that_are_all(vectors):
    queries, corpus = vectors[:5], vectors[5:]
    rows, _ = search_embeddings(queries, corpus, "float32", 10)
    assert (rows == np.argsort(-(queries @ corpus.T), axis=-1, kind="stable")[:, :10]).all()
    ranges = embedding_ranges(corpus)
    codes = quantize_embeddings(corpus, "int8", ranges)
    rows, _ = search_embeddings(queries, codes, "int8", 10, 1000, ranges)
    exact = queries @ dequantize_embeddings(codes, "int8", ranges).T
    assert (rows == np.argsort(-exact, axis=-1, kind="stable")[:, :10]).all()


def test_small_cases(vectors):
    codes = quantize_embeddings(vectors[:3], "ubinary")
    rows, scores = search_embeddings(vectors[:1], codes, "ubinary", 10)
    assert rows.shape == scores.shape == (1, 3) and rows[0, 0] == 0
    assert search_embeddings(vectors[:0], codes, "ubinary", 10)[0].shape == (0, 3)
    assert search_embeddings(vectors[:2], codes[:0], "ubinary", 10)[0].shape == (2, 0)
    assert quantize_embeddings(vectors[0], "ubinary").shape == (9,)
    # equal ones come in the order of their numbers, also across blocks
    same = np.repeat(codes[:1], 40000, axis=0)
    assert search_embeddings(vectors[1:2], same, "ubinary", 5, 0)[0].tolist() == [[0, 1, 2, 3, 4]]


def test_bits_are_counted_without_numpy_2(vectors, monkeypatch):
    codes = quantize_embeddings(vectors, "binary")
    wanted = search_embeddings(vectors[:9], codes, "binary", 8, 2)
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    found = search_embeddings(vectors[:9], codes, "binary", 8, 2)
    assert (found[0] == wanted[0]).all() and (found[1] == wanted[1]).all()


def test_wrong_input_is_one_sentence(vectors):
    codes = quantize_embeddings(vectors, "int8")
    ranges = embedding_ranges(vectors)
    broken = vectors.copy()
    broken[3, 5] = np.nan
    for wrong, message in [
        (lambda: quantize_embeddings(vectors, "int4"), "unknown precision 'int4'; known are float32, int8"),
        (lambda: quantize_embeddings(codes, "int8"), "embeddings are floats, found int8"),
        (lambda: quantize_embeddings(broken, "binary"), "embeddings are finite"),
        (
            lambda: quantize_embeddings(vectors[:1], "int8"),
            r"two embeddings or more, found an array of shape \[1, 72\]",
        ),
        (lambda: quantize_embeddings(vectors, "int8", ranges[:, :9]), r"shape \[2, 72\], found \[2, 9\]"),
        (lambda: quantize_embeddings(vectors, "int8", ranges[::-1]), "the second of each dimension is the larger"),
        (lambda: search_embeddings(vectors, codes, "int8"), "the ranges that it was quantised with, found none"),
        (lambda: search_embeddings(vectors, codes, "ubinary"), r"ubinary codes of shape \[n, 9\] and type uint8"),
        (lambda: search_embeddings(vectors[0], codes, "int8"), r"one a row, found an array of shape \[72\]"),
        (lambda: search_embeddings(vectors, codes, "int8", 0, ranges=ranges), "top_k is 1 or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            wrong()


@pytest.mark.interop
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("width", [72, 67])
def test_codes_equal_sentence_transformers(vectors, kind, width):
    theirs = pytest.importorskip("sentence_transformers.util.quantization")
    values, calibration = vectors[:, :width].astype(kind), vectors[:200, :width].astype(kind)
    ranges = np.vstack((calibration.min(0), calibration.max(0)))
    for precision in PRECISIONS:
        for low_high, taken_from in ((None, None), (ranges, None), (None, calibration)):
            ours = quantize_embeddings(values, precision, low_high, taken_from)
            wanted = theirs.quantize_embeddings(values, precision, low_high, taken_from)
            assert ours.dtype == wanted.dtype and ours.shape == wanted.shape
            assert (ours == wanted).all(), (precision, low_high is None, taken_from is None)


THEIRS = [("uint8", "faiss"), ("ubinary", "faiss"), ("int8", "usearch"), ("binary", "usearch")]


@pytest.mark.interop
@pytest.mark.parametrize(("precision", "library"), THEIRS)
def test_search_equals_sentence_transformers(vectors, precision, library):
    """Their first step is faiss or usearch, which takes any of those that are equal at the border of the candidates; so
    bits are compared where the last candidate is nearer than the first one that is left out."""
    theirs = pytest.importorskip("sentence_transformers.util.quantization")
    pytest.importorskip(library)
    search = getattr(theirs, f"semantic_search_{library}")
    queries, corpus = vectors[:40], vectors[40:]
    ranges = embedding_ranges(vectors)
    codes = quantize_embeddings(corpus, precision, ranges)
    distances = np.sort(((queries[:, None] > 0) != (corpus > 0)).sum(-1), axis=-1)
    for multiplier in (2, 55):
        clear = np.ones(len(queries), bool)
        if "binary" in precision:
            clear = distances[:, 10 * multiplier - 1] < distances[:, 10 * multiplier]
        rows, scores = search_embeddings(queries, codes, precision, 10, multiplier, ranges)
        hits, _ = search(
            queries, codes, corpus_precision=precision, top_k=10, rescore_multiplier=multiplier, ranges=ranges
        )
        wanted = np.array([[hit["corpus_id"] for hit in found] for found in hits])
        wanted_scores = np.array([[hit["score"] for hit in found] for found in hits])
        assert clear.sum() >= 5
        assert (rows[clear] == wanted[clear]).all()
        np.testing.assert_allclose(scores[clear], wanted_scores[clear], rtol=1e-4, atol=1e-5)
