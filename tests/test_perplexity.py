"""The three protocols against their definitions, computed here from plain logits in float64."""

import math

import numpy as np
import pytest

from tritkit.data import documents
from tritkit.engine import Job
from tritkit.engine.load import load
from tritkit.evals.perplexity import evaluate, gptq_windows, sliding

CLOSE = 1e-5  # float32 likelihoods summed in another order


@pytest.fixture
def model(make_folder):
    return load(make_folder("llama"))


def nll(model, tokens, position: int) -> float:
    """-log p of the token after ``position``, from the logits of the whole window."""
    sequence = model.engine.new()
    logits = model.engine.step([Job(sequence, np.asarray(tokens, np.int32), "all")])[0][position].astype(np.float64)
    model.engine.free(sequence)
    return float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[tokens[position + 1]])


def test_llama_cpp(model, text_file):
    """Second half of each chunk; BOS in place of its first token; 255 predictions of 512, here 15 of 32."""
    ids = model.tokenizer.encode("".join(documents([text_file])))
    n, found = 32, []
    for start in (0, n, 2 * n):
        chunk = [model.tokenizer.bos_id, *ids[start + 1 : start + n]]
        found += [nll(model, chunk, i) for i in range(n // 2, n - 1)]
    assert len(found) == 3 * 15
    metrics = evaluate(model, [str(text_file)], protocol="llama.cpp", context=n, limit=3 * 15)
    assert metrics["llama_cpp_perplexity"] == pytest.approx(math.exp(np.mean(found)), rel=CLOSE)
    assert metrics["llama_cpp_tokens"] == 45


def test_gptq(model, text_file):
    """Lines joined by blank lines, no BOS, whole windows; the mean of n-1 losses counts as n."""
    rows = [row + "\n" for row in "".join(documents([text_file])).split("\n")[:-1]]
    ids = model.tokenizer.encode("\n\n".join(r if r.strip() else "" for r in rows), special=False)
    n = 32
    windows = [ids[start : start + n] for start in (0, n)]
    losses = [np.mean([nll(model, w, i) for i in range(n - 1)]) for w in windows]
    expected = math.exp(sum(loss * n for loss in losses) / (2 * n))
    metrics = evaluate(model, [str(text_file)], protocol="gptq", context=n, limit=2 * (n - 1))
    assert metrics["gptq_perplexity"] == pytest.approx(expected, rel=CLOSE)


def test_gptq_rows_end_at_newlines_only(model, tmp_path):
    """The text between two "\\n" is one row, whatever else some would call a line end."""
    text = "the cat sat\x0con a mat\x85and saw\u2028the moon\x1cover the hill\n \nowls sang" * 3
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    windows, size = gptq_windows(model, [tmp_path / "one.txt"], 16, "text")
    rows = text.split("\n")
    joined = "\n\n".join([row + "\n" if row.strip() else "" for row in rows[:-1]] + rows[-1:])
    ids = model.tokenizer.encode(joined, special=False)
    assert size == len(joined.encode())
    assert np.concatenate([w.tokens for w in windows]).tolist() == ids[: len(ids) // 16 * 16]


def test_document_scores_every_token_once(model, tmp_path):
    text = "the cat sat on a mat and saw the moon over the hill. " * 8
    (tmp_path / "one.txt").write_text(text)
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode(text, special=False), model.tokenizer.eos_id]
    n = 32
    assert len(ids) > 3 * n
    found = [nll(model, ids, i) for i in range(n)]  # the first window
    for position in range(n, len(ids) - 1):
        first = n + (position - n) // (n // 2) * (n // 2)
        start = first - n // 2
        found.append(nll(model, ids[start : position + 2], position - start))
    metrics = evaluate(model, [str(tmp_path / "one.txt")], context=n)
    assert metrics["document_tokens"] == len(ids) - 1
    assert metrics["document_perplexity"] == pytest.approx(math.exp(np.mean(found)), rel=CLOSE)
    assert metrics["bits_per_byte"] == pytest.approx(sum(found) / math.log(2) / len(text.encode()), rel=CLOSE)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 48, 49, 100])
def test_sliding_covers_each_position_once(length):
    n, scored = 32, []
    for start, stop, first in sliding(length, n):
        assert stop - start <= n and (first - start >= n // 2 or first == 0)
        scored += range(first, stop)
    assert scored == list(range(length))


def test_engines_agree(make_folder, text_file):
    folder = make_folder("b158", initializer_range=0.02)
    a, b = (
        evaluate(load(folder, e), [str(text_file)], context=64, limit=1000)["document_perplexity"]
        for e in ("native", "torch")
    )
    assert a == pytest.approx(b, rel=1e-4)


def test_standard_error_and_refusals(model, text_file, tmp_path):
    metrics = evaluate(model, [str(text_file)], limit=500)
    assert 0 < metrics["document_perplexity_error"] < metrics["document_perplexity"]
    for context, protocol in ((0, "document"), (-5, "document"), (1, "gptq"), (2, "llama.cpp"), (129, "gptq")):
        with pytest.raises(ValueError, match=f"context is {context}, .*context is 128"):
            evaluate(model, [str(text_file)], protocol=protocol, context=context)
    with pytest.raises(ValueError, match="limit is -1"):
        evaluate(model, [str(text_file)], limit=-1)
    with pytest.raises(ValueError, match="unknown protocol"):
        evaluate(model, [str(text_file)], protocol="other")
    (tmp_path / "short.txt").write_text("the cat")
    with pytest.raises(ValueError, match="shorter than one window"):
        evaluate(model, [str(tmp_path / "short.txt")], protocol="gptq", context=64)
