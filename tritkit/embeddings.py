"""Embeddings in one byte or one bit a dimension, and exact search among them.

The codes are those of sentence-transformers (util/quantization.py). int8 and uint8 divide the range of each dimension
into 255 steps; binary keeps the sign. Search looks at the codes of the whole corpus first, keeps more candidates than
were asked for and ranks these again by the float query (Yamada et al., arXiv 2106.00882; "Binary and Scalar Embedding
Quantization", Hugging Face 2024).

Shapes: n embeddings of d dimensions; q queries.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

from .jsonfile import shown

PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")
FLOAT_BLOCK, BIT_BLOCK = 2048, 16384  # rows of a corpus that are looked at together; what they become fits into a cache
_BITS_OF_A_BYTE = np.array([byte.bit_count() for byte in range(256)], np.uint8)  # for numpy 1, which cannot count


def quantize_embeddings(
    embeddings: ArrayLike,
    precision: str,
    ranges: ArrayLike | None = None,
    calibration: ArrayLike | None = None,
) -> np.ndarray:
    """The codes of float embeddings [n, d] or [d] in a precision of PRECISIONS.

    int8, uint8: [n, d]; code = floor((x - low) / step) in 0..255 with step = (high - low) / 255, int8 minus 128.
    ``ranges`` [2, d] holds low and high of each dimension; without it they are those of ``calibration`` [m, d], and
    without that too, of the embeddings themselves. ubinary: uint8 [n, ceil(d / 8)], bit x > 0, the first dimension in
    the highest bit; binary: the same minus 128 as int8. float32: [n, d].
    """
    values = _floats(embeddings, "embeddings")
    if _is_checked(precision) == "float32":
        return values.astype(np.float32)
    if precision in ("binary", "ubinary"):
        bits = np.packbits(values > 0, axis=-1)
        return bits if precision == "ubinary" else (bits ^ 0x80).view(np.int8)
    if ranges is None:
        ranges = embedding_ranges(values if calibration is None else calibration)
    low, step = _low_and_step(ranges, values.shape[-1])
    codes = np.clip(np.floor((values - low) / step), 0, 255)
    return codes.astype(np.uint8) if precision == "uint8" else (codes - 128).astype(np.int8)


def embedding_ranges(embeddings: ArrayLike) -> np.ndarray:
    """Least and largest value of each dimension, [2, d], to be kept beside int8 codes: later ones need the same."""
    values = _floats(embeddings, "embeddings that ranges are taken from")
    if values.ndim != 2 or len(values) < 2:
        raise ValueError(f"ranges need two embeddings or more, found an array of shape {list(values.shape)}")
    return np.vstack((values.min(0), values.max(0)))


def dequantize_embeddings(
    codes: np.ndarray, precision: str, ranges: ArrayLike | None = None, dimensions: int | None = None
) -> np.ndarray:
    """float32 [n, d] that codes stand for: the lower end of their step, for bits 0 and 1.

    ``ranges``: those of int8 and uint8. ``dimensions``: d of bits, where it is no multiple of 8.
    """
    if _is_checked(precision) == "float32":
        return np.asarray(codes, np.float32)
    if precision in ("binary", "ubinary"):
        return np.unpackbits(_bytes_of(codes, precision), axis=-1, count=dimensions).astype(np.float32)
    low, step = _low_and_step(ranges, codes.shape[-1])
    return (codes.astype(np.float32) + np.float32(128 if precision == "int8" else 0)) * step + low


def search_embeddings(
    queries: ArrayLike,
    corpus: np.ndarray,
    precision: str,
    top_k: int = 10,
    rescore_multiplier: int = 4,
    ranges: ArrayLike | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The embeddings of a corpus that are nearest to float queries [q, d] by dot product.

    corpus: what ``quantize_embeddings`` made of it in that precision, also a memory-mapped one, with its ``ranges``
    where that is int8 or uint8. First the queries' own codes are compared with all of the corpus, by dot product or by
    Hamming distance, which finds top_k * rescore_multiplier candidates; then the float query ranks these. 0: no second
    step. If that many are the whole corpus or more, or the precision is float32, there is only the second step.

    Returns row numbers, int64 [q, k], best first, the lower number first where two are equal, and scores, float32
    [q, k]: dot products, or minus the Hamming distance; k = top_k, or n if that is less.
    """
    wanted = _floats(queries, "queries").astype(np.float32)
    if wanted.ndim != 2:
        raise ValueError(f"queries are a matrix, one a row, found an array of shape {list(wanted.shape)}")
    if top_k < 1 or rescore_multiplier < 0:
        raise ValueError(f"top_k is 1 or more and rescore_multiplier 0 or more, found {top_k} and {rescore_multiplier}")
    dimensions = wanted.shape[1]
    _check_corpus(corpus, _is_checked(precision), dimensions)
    if precision in ("int8", "uint8") and ranges is None:
        raise ValueError(f"a corpus in {precision} is searched with the ranges that it was quantised with, found none")
    k = min(top_k, len(corpus))
    if not len(wanted):
        return np.empty((0, k), np.int64), np.empty((0, k), np.float32)
    candidates = k if rescore_multiplier == 0 else top_k * rescore_multiplier
    if precision == "float32" or (rescore_multiplier and candidates >= len(corpus)):
        return _nearest(_float_scores(wanted, corpus, precision, ranges), len(wanted), k)
    codes = quantize_embeddings(wanted, precision, ranges)
    if precision in ("binary", "ubinary"):
        first = _hamming_scores(_bytes_of(codes, precision), corpus, precision)
    else:
        first = _code_scores(codes, corpus)
    rows, scores = _nearest(first, len(wanted), candidates)
    if rescore_multiplier == 0:
        return rows, scores
    rows.sort(-1)  # so that of two with equal scores the lower number wins again
    for i, query in enumerate(wanted):
        kept = dequantize_embeddings(corpus[rows[i]], precision, ranges, dimensions)
        scores[i] = kept @ query
    order = np.argsort(-scores, axis=-1, kind="stable")[:, :k]
    return np.take_along_axis(rows, order, -1), np.take_along_axis(scores, order, -1)


Scores = Iterator[tuple[int, np.ndarray]]  # (number of the query, scores of the next rows of the corpus), see _nearest


def _float_scores(queries: np.ndarray, corpus: np.ndarray, precision: str, ranges: ArrayLike | None) -> Scores:
    for start in range(0, len(corpus), FLOAT_BLOCK):
        block = dequantize_embeddings(corpus[start : start + FLOAT_BLOCK], precision, ranges, queries.shape[1])
        yield from enumerate(queries @ block.T)


def _code_scores(queries: np.ndarray, corpus: np.ndarray) -> Scores:
    """Dot products of codes. In float32, since numpy has no fast product of integers: exact up to 2**24, hence for up
    to 257 dimensions of 255 * 255 and 1024 of 128 * 128; beyond that rounded as any dot product in float32 is."""
    wide = queries.astype(np.float32)
    for start in range(0, len(corpus), FLOAT_BLOCK):
        yield from enumerate(wide @ corpus[start : start + FLOAT_BLOCK].astype(np.float32).T)


def _hamming_scores(queries: np.ndarray, corpus: np.ndarray, precision: str) -> Scores:
    """Minus the number of bits that differ, int32. A block is turned so that words of 64 bits lie in rows."""
    width = -(-queries.shape[1] // 8) * 8
    wide = _words(queries, width)
    for start in range(0, len(corpus), BIT_BLOCK):
        block = _words(_bytes_of(corpus[start : start + BIT_BLOCK], precision), width).T.copy()
        for number, query in enumerate(wide):
            yield number, -_ones(block ^ query[:, None]).sum(0, dtype=np.int32)


def _words(codes: np.ndarray, width: int) -> np.ndarray:
    """Bytes [n, b] as words of 64 bits, uint64 [n, width / 8], filled up with zeros."""
    if codes.shape[1] != width:
        codes = np.pad(codes, ((0, 0), (0, width - codes.shape[1])))
    return np.ascontiguousarray(codes).view(np.uint64)


def _ones(words: np.ndarray) -> np.ndarray:
    """How many bits of each word are set, uint8."""
    if hasattr(np, "bitwise_count"):
        return np.bitwise_count(words)
    return _BITS_OF_A_BYTE[words.view(np.uint8)].reshape(*words.shape, 8).sum(-1, dtype=np.uint8)


def _nearest(scores: Scores, queries: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers and scores of the k best of each query, out of blocks that come in the order of the corpus.

    A block meets a query once. After the first few blocks hardly a row is better than the k-th so far, so that one
    comparison is all that most rows cost.
    """
    rows: list[np.ndarray] = [np.empty(0, np.int64)] * queries
    best: list[np.ndarray] = [np.empty(0, np.float32)] * queries
    seen = [0] * queries
    for number, found in scores:
        have = best[number]
        # have is sorted; a row that equals its last comes later, so it loses
        new = np.flatnonzero(found > have[-1]) if len(have) == k else _largest(found, k)
        if len(new):
            merged = np.concatenate((have, found[new].astype(np.float32)))
            order = np.argsort(-merged, kind="stable")[:k]
            rows[number] = np.concatenate((rows[number], new + seen[number]))[order]
            best[number] = merged[order]
        seen[number] += len(found)
    return np.stack(rows), np.stack(best)


def _largest(values: np.ndarray, k: int) -> np.ndarray:
    """Where the k largest are, ascending; of equal ones the first."""
    if k >= len(values):
        return np.arange(len(values))
    kth = np.partition(values, len(values) - k)[len(values) - k]
    above = np.flatnonzero(values > kth)
    equal = np.flatnonzero(values == kth)[: k - len(above)]
    return np.sort(np.concatenate((above, equal)))


def _bytes_of(codes: np.ndarray, precision: str) -> np.ndarray:
    """The bits themselves, uint8: binary codes are those minus 128."""
    return codes.view(np.uint8) ^ 0x80 if precision == "binary" else codes


def _low_and_step(ranges: ArrayLike | None, dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    found = np.asarray(ranges, np.float32)
    if found.shape != (2, dimensions):
        raise ValueError(f"ranges are an array of shape [2, {dimensions}], found {list(found.shape)}")
    step = (found[1] - found[0]) / 255
    if not (np.isfinite(step).all() and (step >= 0).all()):
        raise ValueError("ranges are finite and the second of each dimension is the larger, found some that are not")
    return found[0], np.where(step == 0, np.float32(1), step)


def _floats(values: ArrayLike, what: str) -> np.ndarray:
    found = np.asarray(values)
    if found.dtype.kind != "f":
        raise ValueError(f"{what} are floats, found {found.dtype}; codes cannot be quantised again")
    if not np.isfinite(found).all():
        raise ValueError(f"{what} are finite, found NaN or infinity")
    return found


def _is_checked(precision: str) -> str:
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {shown(precision)}; known are {', '.join(PRECISIONS)}")
    return precision


def _check_corpus(corpus: np.ndarray, precision: str, dimensions: int) -> None:
    kinds = {"float32": np.float32, "int8": np.int8, "uint8": np.uint8, "binary": np.int8, "ubinary": np.uint8}
    width = -(-dimensions // 8) if precision in ("binary", "ubinary") else dimensions
    if corpus.ndim != 2 or corpus.shape[1] != width or corpus.dtype != kinds[precision]:
        raise ValueError(
            f"queries of {dimensions} dimensions search {precision} codes of shape [n, {width}] and type "
            f"{np.dtype(kinds[precision])}, found {list(corpus.shape)} of {corpus.dtype}"
        )
