"""What int8 and binary embeddings cost in retrieval and give in size and speed, with all-MiniLM-L6-v2 on Wikipedia.

OMP_NUM_THREADS=1 python benchmarks/embeddings.py --text WIKI.txt[.xz] [--passages 6000] [--queries 1000]
    [--peer sentence-transformers]

The task is an inverse cloze (Lee et al., arXiv 1906.00300): a query is a sentence out of a paragraph, and the paragraph
without that sentence is the one passage to be found among all. The text: articles between lines <|endoftext|>,
paragraphs between empty lines. The int8 ranges are those of the corpus. Retention is the NDCG@10 as a share of
float32's, its standard error that of the paired differences. Speeds are medians
taken in turns, of processor time: with OMP_NUM_THREADS=1 that of an idle machine. --peer says instead how many codes
and how many queries' results are those of sentence-transformers, which finds candidates by faiss or usearch.
"""

import argparse
import lzma
import re
import time
from pathlib import Path

import numpy as np
import torch
import zoo_models
from rich.console import Console
from rich.table import Table

from tritkit.embeddings import embedding_ranges, quantize_embeddings, search_embeddings
from tritkit.progress import progress

TOP_K = 10
ROWS = [("float32", 0), *((p, m) for p in ("int8", "ubinary") for m in (0, 1, 2, 4, 10))]
MOST_TOKENS = 128  # of a passage: about as many as the mean paragraph has


def cloze_task(text: Path, passages: int, queries: int, seed: int) -> tuple[list[str], list[str], np.ndarray]:
    """(passages, queries, number of the passage that each query came out of)."""
    opened = lzma.open if text.suffix == ".xz" else open
    with opened(text, "rt", encoding="utf-8") as file:
        articles = file.read(passages * 4000).split("<|endoftext|>")
    paragraphs = [p.strip() for article in articles for p in article.split("\n\n")[1:] if len(p.strip()) >= 300]
    if len(paragraphs) < passages:
        raise SystemExit(f"{text} begins with {len(paragraphs)} paragraphs of 300 characters, too few for {passages}")
    chance = np.random.default_rng(seed)
    kept = [paragraphs[i] for i in chance.permutation(len(paragraphs))[:passages]]
    asked, answers = [], []
    for row in range(passages):
        sentences = re.split(r"(?<=[a-z)\"][.!?]) (?=[A-Z])", kept[row])
        long = [i for i, sentence in enumerate(sentences) if 40 <= len(sentence) <= 300]
        if len(asked) < queries and len(sentences) >= 3 and long:
            asked.append(sentences.pop(int(chance.choice(long))))
            answers.append(row)
            kept[row] = " ".join(sentences)
    return kept, asked, np.array(answers)


def vectors(texts: list[str], models: Path, what: str) -> np.ndarray:
    """float32 [n, 384], the texts sorted by length while they are encoded so that little is padding."""
    encoder, tokenize = zoo_models.minilm(models)
    found = np.empty((len(texts), 384), np.float32)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    with progress(what, len(texts), "texts") as advance, torch.inference_mode():
        for start in range(0, len(order), 32):
            rows = order[start : start + 32]
            found[rows] = encoder(*tokenize([texts[i] for i in rows], MOST_TOKENS)).numpy()
            advance(len(rows))
    return found


def gains(rows: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """NDCG@10 of each query with one passage to find: 1 / log2(1 + rank), 0 beyond the tenth place."""
    hit = rows == answers[:, None]
    return np.where(hit.any(1), 1 / np.log2(2 + hit.argmax(1)), 0.0)


def seconds_a_query(corpora: dict[str, np.ndarray], ranges: np.ndarray, queries: np.ndarray) -> dict:
    """Medians for every row of ROWS, in turns; also of so many queries at once, divided by their number."""
    samples: dict = {(row, many): [] for row in ROWS for many in (1, len(queries))}
    for turn in range(7):
        for (precision, multiplier), many in samples:
            start = time.process_time()
            search_embeddings(queries[:many], corpora[precision], precision, TOP_K, multiplier, ranges)
            if turn:  # the first one warms up
                samples[(precision, multiplier), many].append((time.process_time() - start) / many)
    return {key: float(np.median(found)) for key, found in samples.items()}


PEERS = {"uint8": "faiss", "ubinary": "faiss", "int8": "usearch", "binary": "usearch"}  # what can search them


def print_peer(queries: np.ndarray, corpus: np.ndarray, ranges: np.ndarray) -> None:
    """How much of what we make and find is what sentence-transformers does."""
    from sentence_transformers.util import quantization

    table = Table(title=f"sentence-transformers on the same {len(corpus)} vectors, {len(queries)} queries")
    for column in ("precision", "by", "codes the same", "queries that find the same", "largest difference of scores"):
        table.add_column(column, justify="right")
    for precision, library in PEERS.items():
        codes = quantize_embeddings(corpus, precision, ranges)
        same = codes == quantization.quantize_embeddings(corpus, precision, ranges)
        rows, scores = search_embeddings(queries, codes, precision, TOP_K, 4, ranges)
        search = getattr(quantization, f"semantic_search_{library}")
        hits, _ = search(
            queries, codes, corpus_precision=precision, top_k=TOP_K, rescore_multiplier=4, ranges=ranges, exact=True
        )
        theirs = np.array([[hit["corpus_id"] for hit in found] for found in hits])
        alike = (np.sort(rows, 1) == np.sort(theirs, 1)).all(1)  # those of equal scores in any order
        apart = np.abs(scores - np.array([[hit["score"] for hit in found] for found in hits]))[alike]
        table.add_row(precision, library, f"{same.mean():.4%}", f"{alike.sum()} of {len(alike)}", f"{apart.max():.1e}")
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--models", type=Path, default=Path("runs/zoo"))
    parser.add_argument("--passages", type=int, default=6000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--speed", type=int, default=200_000, help="embeddings of the corpus that speed is taken on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer", choices=("sentence-transformers",), help="compare with it instead")
    options = parser.parse_args()

    kept = options.models / f"wiki-{options.text.name}-{options.passages}-{options.queries}-{options.seed}.npz"
    if not kept.exists():
        passages, asked, answers = cloze_task(options.text, options.passages, options.queries, options.seed)
        np.savez(
            kept,
            corpus=vectors(passages, options.models, "passages"),
            queries=vectors(asked, options.models, "queries"),
            answers=answers,
        )
    data = np.load(kept)
    corpus, queries, answers = data["corpus"], data["queries"], data["answers"]
    ranges = embedding_ranges(corpus)
    if options.peer is not None:
        print_peer(queries, corpus, ranges)
        return
    codes = {precision: quantize_embeddings(corpus, precision, ranges) for precision, _ in ROWS}
    quality = {}
    for precision, multiplier in ROWS:
        found, _ = search_embeddings(queries, codes[precision], precision, TOP_K, multiplier, ranges)
        quality[precision, multiplier] = gains(found, answers)

    # Speed depends on sizes alone: the same vectors again and again, each time with some noise.
    chance = np.random.default_rng(options.seed)
    many = corpus[chance.integers(0, len(corpus), options.speed)]
    many += 0.02 * chance.standard_normal(many.shape, dtype=np.float32)
    large = {precision: quantize_embeddings(many, precision, ranges) for precision, _ in ROWS}
    seconds = seconds_a_query(large, ranges, queries[:100])

    exact, n = quality[ROWS[0]], len(queries)
    title = f"all-MiniLM-L6-v2, {n} queries, {len(corpus)} passages; speed among {options.speed} of 384 dimensions"
    table = Table(title=title)
    for column in ("precision", "rescored", "bytes", "NDCG@10", "±", "retention", "±", "ms a query", "faster",
                   "ms in 100", "faster"):  # fmt: skip
        table.add_column(column, justify="right")
    for row in ROWS:
        one, batch = seconds[row, 1], seconds[row, 100]
        precision, multiplier = row
        share = quality[row].mean() / exact.mean()
        table.add_row(
            precision,
            f"x{multiplier}" if multiplier else "no",
            str(codes[precision][0].nbytes),
            f"{quality[row].mean():.4f}",
            f"{quality[row].std() / n**0.5:.4f}",
            f"{share:.2%}",
            f"{(quality[row] - share * exact).std() / n**0.5 / exact.mean():.2%}",  # of a ratio of paired means
            f"{1e3 * one:.2f}",
            f"{seconds[ROWS[0], 1] / one:.1f}x",
            f"{1e3 * batch:.2f}",
            f"{seconds[ROWS[0], 100] / batch:.1f}x",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
