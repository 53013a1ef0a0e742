"""What results.json says of a linear, against numpy on inputs that are computed apart."""

import numpy as np
import pytest
import torch
from float_folder import SHORT, a_folder, a_text, recipe

from tritkit import results
from tritkit.checkpoint import open_folder
from tritkit.engine.torch import model_of
from tritkit.folderwriter import write_folder
from tritkit.formats import format_of
from tritkit.methods import gptq
from tritkit.methods.calibration import read_calibration
from tritkit.methods.quantizer import quantize_folder
from tritkit.methods.ranges import RangeObserver
from tritkit.methods.recipe import Plan, Recipe
from tritkit.methods.stats import InputStats
from tritkit.tensorfile import StoredTensor

FIRST = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def massive(tmp_path_factory):
    """A model whose first linears read one massive channel and a large one, and a text."""
    folder = tmp_path_factory.mktemp("massive")
    opened = open_folder(a_folder(folder / "model"))
    tensors = {n: StoredTensor(t.dtype, np.array(t.array)) for n, t in opened.tensors.items()}
    tensors["model.layers.0.input_layernorm.weight"].array[[5, 11]] = 40, 3
    write_folder(folder / "massive", opened.config, tensors, opened.tokenizer(), {})
    return folder / "massive", a_text(folder)


def first_inputs(folder, text):
    """What the first linear reads of the calibration text, float32 [sequences, tokens, in]."""
    model = open_folder(folder)
    tokens, net = read_calibration(model.tokenizer(), [text], **SHORT).fit, model_of(model).model
    with torch.no_grad():
        return net.layers[0].input_layernorm(net.embed_tokens(tokens))


def test_the_record_is_that_of_the_inputs(massive, tmp_path):
    source, text = massive
    quantize_folder(source, tmp_path / "q", "int4_g32", [text], **SHORT)
    record = results.read(tmp_path / "q")[0]["per_linear"][FIRST]
    x = first_inputs(source, text).flatten(0, 1).numpy()
    w, q = open_folder(source).floats(FIRST), open_folder(tmp_path / "q").floats(FIRST)
    assert 0 < record["outliers"] < 0.1 and record["outliers"] == pytest.approx((np.abs(x) >= 6).mean())
    largest = np.abs(x).max(0)
    assert record["top_channels"][0][0] == 5 and len(record["top_channels"]) == 32
    for place, (channel, value) in enumerate(record["top_channels"]):
        assert value == pytest.approx(largest[channel], rel=1e-3)
        assert value == pytest.approx(np.sort(largest)[::-1][place], rel=1e-3)
    for kind, values in (("before", w), ("after", q), ("error", q - w), ("inputs", x)):
        found = record["histograms"][kind]
        assert (found["low"], found["high"]) == pytest.approx((values.min(), values.max()), rel=1e-3)
        counts = np.histogram(values, 64, (values.min(), values.max()))[0]
        # values on an edge may fall into either bin
        assert np.abs(np.cumsum(found["counts"]) - np.cumsum(counts)).max() <= 0.01 * values.size
    for method, ends in record["ranges"].items():
        observer = RangeObserver(format_of("int8_tensor"), [method])
        observer.update(torch.from_numpy(x))
        assert tuple(ends) == pytest.approx(observer.ranges()[method], rel=2e-3)
    error = np.square(x @ (q - w).T).sum() / np.square(x @ w.T).sum()
    assert record["output_error"] == pytest.approx(error, rel=1e-3)


def test_the_first_tokens_count_in_a_layer(massive, tmp_path):
    """Codes of the first linear are GPTQ's on second moments in which the first token of every sequence counts 64
    times: not the last one, nor the first of the first sequence alone."""
    source, text = massive
    quantize_folder(source, tmp_path / "q", recipe(format="int3_row", method="gptq"), [text], **SHORT)
    x, w = first_inputs(source, text), torch.from_numpy(open_folder(source).floats(FIRST))

    def solved(first):
        stats = InputStats(64)
        stats.update(x, first)
        return gptq.solve(w, Plan(format_of("int3_row"), "gptq"), stats, Recipe()).dequantize().numpy()

    found = open_folder(tmp_path / "q").floats(FIRST)
    assert (solved(x[:, 0]) != found).mean() < 0.01
    assert all((solved(first) != found).mean() > 0.02 for first in (x[:, -1], x[:1, 0]))
