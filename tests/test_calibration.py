"""Calibration sequences against the stream of tokens that they are cut from, put together here by hand."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from tritkit.methods.calibration import SPREAD, read_calibration

WORDS = 5000


def tokenizer(begin, end):
    """A word is its number: no two places of the text are alike."""
    return SimpleNamespace(bos_id=begin, eos_id=end, encode=lambda text, special: [int(w) for w in text.split()])


def written(folder, documents, words):
    """Files of documents that count on, and their tokens."""
    found, number = [], 0
    for i in range(documents):
        found.append([number + k for k in range(words + i)])
        number += words + i
    path = folder / "text.txt"
    path.write_text("\n<|endoftext|>\n".join(" ".join(map(str, d)) for d in found) + "\n")
    return str(path), found


@pytest.mark.parametrize(("begin", "end"), [(None, None), (90001, 90002), (None, 90002)])
@pytest.mark.parametrize(("documents", "words"), [(3, 40), (7, 23), (60, 31)])
@pytest.mark.parametrize(("sequences", "held_out"), [(1, 0), (4, 0), (1, 1), (6, 2), (16, 4)])
def test_sequences_are_pieces_of_the_stream(tmp_path, begin, end, documents, words, sequences, held_out):
    length = 16
    path, found = written(tmp_path, documents, words)
    marks = [[m] if m is not None else [] for m in (begin, end)]
    stream = [token for d in found for token in (*marks[0], *d, *marks[1])]
    data = read_calibration(tokenizer(begin, end), [path], sequences, length, held_out)
    count = min(sequences + held_out, len(stream) // length)
    assert len(data.fit) + len(data.held_out) == count and data.fit.shape[1] == length
    assert len(data.held_out) == min(held_out, count - 1)
    # rows begin with a word, which is unique, within two tokens
    places = {}
    for name, rows in (("fit", data.fit), ("held out", data.held_out)):
        for row in rows.tolist():
            start = next(stream.index(t) - i for i, t in enumerate(row) if t < 90000)
            assert stream[start : start + length] == row
            places[start] = name
    starts = sorted(places)
    assert len(starts) == count and all(b - a >= length for a, b in pairwise(starts))  # none overlaps another
    if held_out > 0 and count > 2 * held_out:
        assert places[starts[0]] == places[starts[-1]] == "fit"  # held-out ones are inside the text
    if (
        len(stream) <= SPREAD * (sequences + held_out) * length and count > 1
    ):  # all of it is read: drawn from end to end
        assert starts[0] == 0 and starts[-1] == len(stream) - length


def test_not_more_than_the_model_reads(tmp_path):
    path, _ = written(tmp_path, 9, 50)
    assert read_calibration(tokenizer(None, None), [path], 4, 64, longest=32).fit.shape == (4, 32)
    with pytest.raises(ValueError, match="fewer than 2 sequences of 300"):
        read_calibration(tokenizer(None, None), [path], 4, 300, 1)
    one = read_calibration(tokenizer(None, None), [path], 4, 200, 0)
    assert one.fit.shape == (2, 200) and one.digest() != read_calibration(tokenizer(None, 7), [path], 4, 200).digest()
    assert np.array_equal(one.fit[0].numpy(), np.arange(200))
