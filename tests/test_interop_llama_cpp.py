"""llama.cpp, the one inside llama-cpp-python, beside the native engine: same weights, same numbers; and the bench."""

import dataclasses
import json

import numpy as np
import pytest

from tritkit.checkpoint import open_folder
from tritkit.cli import main
from tritkit.engine import Job
from tritkit.engine.load import decoder_weights
from tritkit.engine.native import NativeEngine
from tritkit.gguf_writer import NewTensor
from tritkit.models.shapes import linear_names, norm_sizes
from tritkit.speed.bench import KEYS
from tritkit.speed.measure import Work
from tritkit.speed.peer import LlamaCpp, write_without_vocabulary
from tritkit.speed.shapes import LOGIT_SPREAD, SHAPES, random_folder

pytest.importorskip("llama_cpp")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

# llama.cpp rounds activations to int8 in blocks of 256 with a scale each, tritkit a whole row with one, as the models
# were trained: the logits differ by that rounding. Both as shares of their standard deviation.
MEAN_DIFFERENCE, LARGEST_DIFFERENCE = 0.05, 0.3
TOKENS = 64


def same_weights(folder) -> dict[str, NewTensor]:
    import gguf

    def tensor(kind: str, values: np.ndarray) -> NewTensor:
        data = gguf.quantize(values, gguf.GGMLQuantizationType[kind.upper()])
        return NewTensor(kind, values.shape, lambda: data)

    found = {}
    for name in linear_names(folder.config):
        linear = folder.codes(name)
        found[name] = tensor("tq2_0", linear.codes.astype(np.float32) * linear.scale)
    for name in ("model.embed_tokens", *norm_sizes(folder.config)):
        found[name] = tensor("f32", folder.tensors[f"{name}.weight"].float32())
    return found


def test_the_same_weights_give_the_same_logits(tmp_path):
    """With the gate that llama.cpp's bitnet has, SiLU: the models of the first paper have it, 2B-4T has ReLU squared,
    which this llama.cpp does not run. Everything else of the two is the same model."""
    config = SHAPES["bitnet-tiny"]
    with random_folder("bitnet-tiny", config) as path:
        folder = open_folder(path)
        write_without_vocabulary(tmp_path / "model.gguf", config, same_weights(folder))
        weights = decoder_weights(folder)
        shape = dataclasses.replace(weights.shape, activation="silu")
        native = NativeEngine(dataclasses.replace(weights, shape=shape), threads=2)
    peer = LlamaCpp(tmp_path / "model.gguf", Work(TOKENS, 1), 2, {})
    ids = np.random.default_rng(0).integers(0, config.vocab_size, TOKENS).astype(np.int32)
    peer.prepare("prefill")
    peer.decode_tokens([(0, position, True) for position in range(TOKENS)], ids)
    theirs = np.stack([peer.logits(i) for i in range(TOKENS)])
    ours = native.step([Job(native.new(), ids, "all")])[0]
    ours, theirs = ours / LOGIT_SPREAD, theirs / LOGIT_SPREAD
    difference = np.abs(ours - theirs)
    assert difference.mean() < MEAN_DIFFERENCE and difference.max() < LARGEST_DIFFERENCE
    best = np.sort(ours, axis=1)
    clear = best[:, -1] - best[:, -2] > 2 * difference.max(axis=1)
    assert clear.sum() > TOKENS / 4
    assert (ours.argmax(1) == theirs.argmax(1))[clear].all()


@pytest.mark.parametrize("shape", ["bitnet-tiny", "llama-tiny"])
def test_bench_with_a_peer(capsys, shape):
    sizes = ["--prompt", "600", "--tokens", "4", "--repeat", "2", "--threads", "2", "--context", "520", "--batch", "2"]
    assert main(["bench", "--shape", shape, *sizes, "--peer", "llama.cpp"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert tuple(found)[: len(KEYS)] == KEYS
    theirs = found["others"][-1]
    assert theirs["engine"] == "llama.cpp" and theirs["head"] == {"bitnet-tiny": "q6_k", "llama-tiny": "f16"}[shape]
    for row in (found, *found["others"]):
        assert row["decode_tok_s"] > 0 and row["prefill_tok_s"] > 0 and row["decode_samples"] >= 1
        assert row["threads"] == 2 and row["peak_rss_mib"] > 20
    assert found["ratios"]["decode"] == pytest.approx(found["decode_tok_s"] / theirs["decode_tok_s"])
    assert "times as fast as llama.cpp" in out
