"""Text-compression baselines: what a trained model has to beat to have learnt more than word statistics.

    python -m tritkit.evals.ngram --tokenizer tokenizer.json --train train.txt.xz --held-out val.txt

Two of them: an interpolated modified Kneser-Ney n-gram model over the same tokens, and xz over the bytes.
Bits per byte = sum of nll over all tokens / ln 2 / UTF-8 bytes of the documents (separator lines do not count,
the end-of-document tokens are paid for), so models with different tokenizers can be compared.
"""

import argparse
import json
import lzma
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ..data import SEPARATOR, documents
from ..tokenizer import Tokenizer

XZ_WINDOW = 64 << 20  # bytes: the dictionary of xz preset 9


@dataclass(frozen=True)
class NgramTable:
    """All distinct n-grams of one order, sorted by key; an n-gram's row is its id.

    key = id of the first n - 1 tokens * vocab_size + last token, so any vocabulary fits 63 bits.
    `probability` (one per row) is already interpolated down to the uniform distribution;
    `backoff` (one per row of the order below) is the mass a context leaves to the order below.
    """

    keys: np.ndarray
    probability: np.ndarray
    backoff: np.ndarray


@dataclass(frozen=True)
class KneserNey:
    """Interpolated modified Kneser-Ney language model. Chen & Goodman 1998 (TR-10-98), section 3.

    p_n(w | h) = (c(hw) - D(c(hw))) / c(h.) + backoff(h) p_{n-1}(w | h'),   h' = h without its oldest token,
    backoff(h) = (D1 N_1(h.) + D2 N_2(h.) + D3+ N_3+(h.)) / c(h.),          p_0 = 1 / vocab_size.

    At the highest order c is the number of occurrences; below, the number of distinct tokens seen to the left
    (the start of the stream is one such neighbour). A context that was never seen has backoff 1.
    """

    vocab_size: int
    bos: int | None
    discounts: np.ndarray  # float64 [order, 3]: D1, D2, D3+ of orders 1, 2, ...
    tables: tuple[NgramTable, ...]  # of orders 1, 2, ...

    @classmethod
    def fit(cls, tokens: np.ndarray, vocab_size: int, order: int = 5, bos: int | None = None) -> "KneserNey":
        """Count one stream of tokens; n-grams run across end-of-document tokens like across any other.

        `bos` stands once before the stream, here and in `nll`, as context only. An order above the stream's
        length is cut to it.
        """
        if order < 1:
            raise ValueError(f"order is {order}, expected at least 1.")
        if len(tokens) == 0:
            raise ValueError("The training tokens are empty, expected at least one.")
        stream = _stream(tokens, vocab_size, bos)
        order = min(order, len(stream))

        # ids[j] is the row of the n-gram that starts at token j; the one 0-gram is everywhere.
        ids: np.ndarray = np.zeros(len(stream) + 1, np.int32)
        keys: list[np.ndarray] = []
        suffixes: list[np.ndarray] = []
        counts: list[np.ndarray] = []
        for n in range(1, order + 1):
            first, suffix_of_token = ids[0], ids[1:]
            key = np.multiply(ids[:-1], vocab_size, dtype=np.int64) + stream[n - 1 :]
            distinct, ids = np.unique(key, return_inverse=True)
            suffix = np.empty(len(distinct), np.int32)
            suffix[ids] = suffix_of_token
            if n > 1:  # the order below is not the highest: count its left neighbours instead
                counts[-1] = np.bincount(suffix, minlength=len(keys[-1]))
                counts[-1][first] += 1
            keys.append(distinct)
            suffixes.append(suffix)
            counts.append(np.bincount(ids))
            ids = ids.astype(np.int32)
        if bos is not None:
            counts[0][np.searchsorted(keys[0], bos)] -= 1  # nobody had to predict it

        lower = np.array([1 / vocab_size])
        discounts, tables = [], []
        for key, suffix, count in zip(keys, suffixes, counts, strict=True):
            discounts.append(modified_discounts(count))
            discount = np.append(0.0, discounts[-1])[np.minimum(count, 3)]
            prefix = key // vocab_size
            total = np.bincount(prefix, count, minlength=len(lower))
            freed = np.bincount(prefix, discount, minlength=len(lower))
            backoff = np.divide(freed, total, out=np.ones_like(total), where=total > 0)
            lower = (count - discount) / total[prefix] + backoff[prefix] * lower[suffix]
            tables.append(NgramTable(key, lower, backoff))
        return cls(vocab_size, bos, np.stack(discounts), tuple(tables))

    def nll(self, tokens: np.ndarray) -> np.ndarray:
        """-ln p(token | up to order - 1 tokens before it), float64 [t], in nats."""
        stream = _stream(tokens, self.vocab_size, self.bos)
        p = np.full(len(stream), 1 / self.vocab_size)
        context = np.zeros(len(stream), np.int64)  # row in the order below, -1 = never seen
        for table in self.tables:
            wanted = np.where(context < 0, -1, context * self.vocab_size + stream)
            row = np.minimum(np.searchsorted(table.keys, wanted), len(table.keys) - 1)
            seen = table.keys[row] == wanted
            left_to_lower = np.where(context < 0, 1.0, table.backoff[context])
            p = np.where(seen, table.probability[row], left_to_lower * p)
            context = np.append(-1, np.where(seen, row, -1)[:-1])[: len(stream)]
        return -np.log(p)[len(stream) - len(tokens) :]


def modified_discounts(counts: np.ndarray) -> np.ndarray:
    """D1, D2, D3+ of one order: D_k = k - (k + 1) Y n_{k+1} / n_k, Y = n_1 / (n_1 + 2 n_2).

    n_k n-grams have count k. Chen & Goodman 1998, section 3. Where one is undefined or outside [0, k]
    (tiny or unnatural data), all three are KenLM's fallback 0.5, 1, 1.5.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6).astype(np.float64)
    k = np.arange(1, 4)
    if (n[k] > 0).all():
        d = k - (k + 1) * n[1] / (n[1] + 2 * n[2]) * n[k + 1] / n[k]
        if ((d >= 0) & (d <= k)).all():
            return d
    return np.array([0.5, 1.0, 1.5])


def _stream(tokens: np.ndarray, vocab_size: int, bos: int | None) -> np.ndarray:
    """int32 [t], or [1 + t] with `bos`, every token checked."""
    stream = np.asarray(tokens if bos is None else np.append(bos, tokens))
    outside = stream[(stream < 0) | (stream >= vocab_size)]
    if len(outside):
        raise ValueError(f"Token {outside[0]} is outside the vocabulary, expected 0 to {vocab_size - 1}.")
    return stream.astype(np.int32)


def xz_bits_per_byte(train: bytes | None, text: bytes) -> float:
    """Size of `xz -9e` output per byte of text, in bits: of the text alone, or of what it adds to the training text.

    With `train`: (size(train + text) - size(train)) / len(text). xz looks back 64 MiB, so only the last
    64 MiB of the training text are used.
    """
    if not text:
        raise ValueError("The held-out text is empty, expected at least one byte.")
    before = (train or b"")[-XZ_WINDOW:]
    sizes = [len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) for data in (before, before + text)]
    return 8 * (sizes[1] - (sizes[0] if before else 0)) / len(text)


@dataclass(frozen=True)
class Baseline:
    """One row of the table; `seconds` is fitting and scoring, without reading and tokenising."""

    model: str
    tokens_seen: int
    perplexity: float | None  # per token; None for a compressor of bytes
    bits_per_byte: float
    seconds: float


def end_of_document(tokenizer: Tokenizer) -> int | None:
    """The end-of-text token that the tokenizer's folder names, else the one called <|endoftext|>."""
    return tokenizer.inner.token_to_id(SEPARATOR) if tokenizer.eos_id is None else tokenizer.eos_id


def encode_documents(tokenizer: Tokenizer, texts: Iterable[str], limit: int | None) -> tuple[np.ndarray, bytes]:
    """Tokens of each document by itself, each followed by its end token if there is one; and the bytes.

    Reading stops at the document that reaches `limit` tokens: of it the tokens are cut, the bytes are not.
    """
    end = end_of_document(tokenizer)
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
    pieces, utf8, seen = [np.empty(0, dtype)], [], 0
    for text in texts:
        ids = tokenizer.encode(text, special=False)
        pieces.append(np.array(ids if end is None else [*ids, end], dtype))
        utf8.append(text.encode())
        seen += len(pieces[-1])
        if limit is not None and seen >= limit:
            break
    return np.concatenate(pieces)[:limit], b"".join(utf8)


def measure(
    tokenizer: Tokenizer, train: Iterable[str], held_out: Iterable[str], order: int = 5, limit: int | None = None
) -> Iterator[Baseline]:
    """Every baseline in turn, the quick ones first: xz, Kneser-Ney, xz that has seen the training text."""
    tokens, text = encode_documents(tokenizer, held_out, None)

    start = time.perf_counter()
    yield Baseline("xz -9e", 0, None, xz_bits_per_byte(None, text), time.perf_counter() - start)

    train_tokens, train_text = encode_documents(tokenizer, train, limit)
    end = end_of_document(tokenizer)
    before = tokenizer.bos_id if end is None else end  # the first document begins where another ended
    start = time.perf_counter()
    nll = KneserNey.fit(train_tokens, len(tokenizer), order, before).nll(tokens)
    seconds = time.perf_counter() - start
    bits = nll.sum() / math.log(2) / len(text)
    yield Baseline(f"Kneser-Ney {order}-gram", len(train_tokens), math.exp(nll.mean()), bits, seconds)

    start = time.perf_counter()
    bits = xz_bits_per_byte(train_text, text)
    yield Baseline("xz -9e after train", len(train_tokens), None, bits, time.perf_counter() - start)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tritkit.evals.ngram", description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", required=True, metavar="TOKENIZER_JSON", help="or a model folder")
    parser.add_argument("--train", required=True, nargs="+", type=Path, help=".txt, or .txt.xz, .gz, .zst")
    parser.add_argument("--held-out", required=True, type=Path)
    parser.add_argument("--order", type=int, default=5)
    parser.add_argument("--limit-train-tokens", type=int, metavar="N")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of the table")
    args = parser.parse_args(argv)
    train, held_out = documents(args.train), documents([args.held_out])
    try:
        tokenizer = Tokenizer.load(args.tokenizer)
        with Console(stderr=True).status("Measuring; xz needs one or two seconds per megabyte ..."):
            rows = list(measure(tokenizer, train, held_out, args.order, args.limit_train_tokens))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if args.json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    table = Table("model")
    for column in ("tokens seen", "perplexity/token", "bits/byte", "seconds"):
        table.add_column(column, justify="right")
    for row in rows:
        perplexity = "" if row.perplexity is None else f"{row.perplexity:.3f}"
        table.add_row(row.model, f"{row.tokens_seen:,}", perplexity, f"{row.bits_per_byte:.4f}", f"{row.seconds:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
