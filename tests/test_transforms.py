"""AWQ and SmoothQuant against their equations, and folding against the float layer itself."""

import numpy as np
import pytest
import torch
from float_folder import SHORT, a_folder, a_text, recipe

from tritkit.checkpoint import open_folder
from tritkit.formats import format_of
from tritkit.methods import layerwise
from tritkit.methods.quantizer import quantize_folder
from tritkit.methods.recipe import Plan
from tritkit.methods.stats import InputStats
from tritkit.methods.stream import DecoderStream
from tritkit.methods.transforms import Fold, apply, awq, folds, smoothquant


def massive_inputs(seed=0):
    """512 tokens of 64 inputs, some of which are far larger than the others, and two matrices that read them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(512, 64, generator=generator) * (1 + 20 * (torch.rand(64, generator=generator) > 0.9))
    weights = {name: torch.randn(rows, 64, generator=generator) for name, rows in (("a", 48), ("b", 32))}
    return x, weights


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.8])
def test_smoothquant_is_equation_4(alpha):
    x, weights = massive_inputs()
    stats = InputStats(64, paired=False)
    stats.update(x)
    both = np.abs(np.concatenate([w.numpy() for w in weights.values()])).max(0)
    wanted = np.abs(x.numpy()).max(0) ** alpha / both ** (1 - alpha)
    np.testing.assert_allclose(smoothquant(weights, stats, alpha).numpy(), wanted, rtol=1e-5)


@pytest.mark.parametrize("format", ["int3_g32", "int4_row"])
def test_awq_takes_the_exponent_with_the_least_error(format):
    """Section 3.2: s = mean|X|^a, the error that of the products themselves."""
    x, weights = massive_inputs()
    stats = InputStats(64)
    stats.update(x)
    plans = dict.fromkeys(weights, Plan(format_of(format)))
    size, errors, scales = x.abs().mean(0), [], []
    for step in range(20):
        scale = size ** (step / 20)
        scale = scale / (scale.max() * scale.min()).sqrt()
        rounded = {n: format_of(format).quantize(w * scale).dequantize() / scale for n, w in weights.items()}
        errors.append(sum(float(((rounded[n] - w) @ x.t()).square().sum()) for n, w in weights.items()))
        scales.append(scale)
    best = int(np.argmin(errors))
    assert best > 0 and errors[best] < 0.8 * errors[0]  # there is something to gain here
    torch.testing.assert_close(awq(weights, stats, plans, 20), scales[best])


def test_awq_leaves_alone_what_it_cannot_help():
    """Inputs of one size: scaling by their mean changes nothing, so no exponent is better than 0."""
    x = torch.where(torch.rand(512, 64, generator=torch.Generator().manual_seed(3)) > 0.5, 1.0, -1.0)
    stats = InputStats(64)
    stats.update(x)
    _, weights = massive_inputs()
    assert awq(weights, stats, dict.fromkeys(weights, Plan(format_of("int4_g32"))), 20) is None
    assert awq(weights, stats, dict.fromkeys(weights, Plan()), 20) is None


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("family", ["llama", "bitnet", "qwen2", "qwen3"])
def test_a_fold_leaves_the_float_layer_as_it_is(tmp_path, family, heads):
    """Every fold of a layer, by scales over a factor of 50, biases included: outputs change by rounding alone."""
    model = open_folder(a_folder(tmp_path / "model", family, num_key_value_heads=heads))
    stream, tokens = DecoderStream(model), torch.arange(96).reshape(2, 48)
    every = folds(model.config)
    assert any(f.source.endswith("v_proj") for f in every) == (heads == 2 and family != "bitnet")
    with torch.no_grad():
        x = stream.embed(tokens)
        for fold in every:
            layer = stream.layer(1)
            before = stream.call(layer, 0, x)
            first = layer.get_submodule(fold.readers[0]).weight
            weight, generator = first.clone(), torch.Generator().manual_seed(1)
            scale = 50 ** torch.rand(first.shape[1], generator=generator) / 7
            apply(layer, fold, scale)
            assert not torch.allclose(first, weight, rtol=0.1)
            error = (stream.call(layer, 0, x) - before).norm() / before.norm()
            assert error < 1e-5, fold


@pytest.mark.parametrize("transform", ["awq", "smoothquant"])
def test_a_fold_that_changes_the_model_is_refused(tmp_path, transform, monkeypatch):
    """The norm feeds v too, which this fold forgets."""
    source, text = a_folder(tmp_path / "model", num_key_value_heads=2), a_text(tmp_path)
    wrong = [Fold("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj"))]
    monkeypatch.setattr(layerwise, "folds", lambda config: wrong)
    with pytest.raises(ValueError, match=r"model.layers.0: the transformed weights change the output by"):
        quantize_folder(source, tmp_path / "q", recipe(format="int3_g32", transform=transform), [text], **SHORT)
    assert not (tmp_path / "q").exists() and not list(tmp_path.glob(".*"))
