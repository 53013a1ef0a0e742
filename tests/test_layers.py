"""The linears against the fake-quantised autograd graph, the integer product against int64, RMSNorm against torch."""

import pytest
import torch
import torch.nn.functional as F

from tritkit.formats import fake_quantize, format_of
from tritkit.kernels import BACKENDS, integer_product
from tritkit.layers import BitLinear, Codes, Linear, PackedLinear, RMSNorm, linear_for

PAIRS = [("ternary", "a8"), ("binary", "a8_q128"), ("ternary", "a4"), ("int4_tensor", "a8")]
FLOAT = dict(rtol=1e-5, atol=1e-5)  # float32: the scale is multiplied in at another place
BFLOAT16 = 2.0**-6  # relative to the largest value: two roundings to 8 bits and a sum in another order


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(weights, activations, inputs=96, outputs=40, bias=False):
    made = BitLinear(inputs, outputs, format_of(weights), format_of(activations), bias)
    with torch.no_grad():
        made.weight.copy_(random(outputs, inputs, seed=1, scale=0.03) + 0.002)
    return made


def codes(low, high, *shape, seed=0):
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


@pytest.mark.parametrize("backend", [*BACKENDS, None])
@pytest.mark.parametrize("bounds", [(-1, 1), (-128, 127)])
def test_integer_product_is_exact(backend, bounds):
    for m, k, n in ((1, 1, 1), (3, 7, 5), (1, 256, 33), (17, 1000, 24), (33, 1040, 9), (2, 16384, 4)):
        x, w = codes(-128, 127, m, k), codes(*bounds, n, k, seed=1)
        y = integer_product(x, w, backend)
        assert y.dtype == torch.int32 and torch.equal(y.long(), x.long() @ w.long().t())


@pytest.mark.parametrize("backend", [*BACKENDS, None])
def test_integer_product_of_the_most_extreme_codes(backend):
    """K = 16384: the sums pass 2^24, where float32 would round, and come near 2^28."""
    x = torch.full((2, 16384), -128, dtype=torch.int8)
    x[1, 0] = 127
    for value in (-128, 127, -1, 1):
        w = torch.full((8, 16384), value, dtype=torch.int8)
        assert torch.equal(integer_product(x, w, backend).long(), x.long() @ w.long().t())


def graph(layer, x, w):
    """What BitLinear computes, written as the papers' code has it."""
    return F.linear(
        fake_quantize(x, layer.activations, layer.strength), fake_quantize(w, layer.weights, layer.strength)
    )


@pytest.mark.parametrize(("weights", "activations"), PAIRS)
def test_forward_and_gradients_equal_the_fake_quantised_graph(weights, activations):
    layer = linear(weights, activations)
    assert layer.is_integer
    x, gradient = random(2, 11, 96).requires_grad_(), random(2, 11, 40, seed=3)
    y = layer(x)
    y.backward(gradient)
    x2, w2 = x.detach().requires_grad_(), layer.weight.detach().requires_grad_()
    expected = graph(layer, x2, w2)
    expected.backward(gradient)
    torch.testing.assert_close(y, expected, **FLOAT)
    torch.testing.assert_close(x.grad, x2.grad, **FLOAT)
    torch.testing.assert_close(layer.weight.grad, w2.grad, **FLOAT)


@pytest.mark.parametrize(("weights", "activations"), PAIRS[:2])
def test_the_same_under_bfloat16_autocast(weights, activations):
    layer = linear(weights, activations)
    x, gradient = random(2, 11, 96).requires_grad_(), random(2, 11, 40, seed=3)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.backward(gradient.bfloat16())
    x2, w2 = x.detach().requires_grad_(), layer.weight.detach().requires_grad_()
    expected = graph(layer, x2, w2)
    expected.backward(gradient)
    assert x.grad.dtype == layer.weight.grad.dtype == torch.float32
    for found, wanted in ((y, expected), (x.grad, x2.grad), (layer.weight.grad, w2.grad)):
        assert (found.float() - wanted).abs().max() < BFLOAT16 * wanted.abs().max()


@pytest.mark.parametrize(("weights", "activations"), PAIRS[:2])
def test_prepared_activations_may_be_shared(weights, activations):
    """q, k and v read codes that were rounded once: same values, and the gradients of all three meet in x."""
    layers = [linear(weights, activations, outputs=n) for n in (8, 24, 40)]
    x, apart = random(2, 5, 96).requires_grad_(), random(2, 5, 96).requires_grad_()
    prepared = layers[0].prepare(x)
    assert isinstance(prepared, Codes) and prepared.values.dtype == torch.int8
    for layer in layers:
        together, alone = layer(prepared), layer(apart)
        assert torch.equal(together, alone)
        (together.square().sum() + alone.square().sum()).backward()
    assert torch.equal(x.grad, apart.grad)


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.999])
def test_strength_below_one(strength):
    layer = linear("ternary", "a8")
    layer.strength = strength
    assert not layer.is_integer
    x = random(3, 96).requires_grad_()
    y = layer(x)
    xq, wq = fake_quantize(x, layer.activations), fake_quantize(layer.weight, layer.weights)
    expected = F.linear(x + strength * (xq - x), layer.weight + strength * (wq - layer.weight))
    torch.testing.assert_close(y, expected, **FLOAT)
    y.sum().backward()
    assert x.grad is not None and layer.weight.grad is not None


@pytest.mark.parametrize(
    ("weights", "activations"),
    [("int4_row", "a8"), ("int4_g32", "a8"), ("int4_tensor_asym", "a8"), ("ternary", "int4_row_asym"),
     ("ternary", "int7_row_asym"), ("int8_tensor", "a8"), ("ternary", "int8_g32")],
)  # fmt: skip
def test_what_has_no_integer_product_runs_in_floats(weights, activations):
    layer, x = linear(weights, activations), random(3, 96) + 0.5
    torch.testing.assert_close(layer(x), graph(layer, x, layer.weight), **FLOAT)


@pytest.mark.parametrize(("weights", "activations"), PAIRS)
@pytest.mark.parametrize("bias", [False, True])
def test_packed_linear_equals_bitlinear_exactly(weights, activations, bias):
    layer = linear(weights, activations, bias=bias)
    q = layer.weights.quantize(layer.weight)
    packed = PackedLinear(
        q.codes.reshape(q.shape).to(torch.int8), q.grid.scale.reshape(()), layer.activations, layer.bias
    )
    x = random(2, 7, 96)
    assert torch.equal(packed(x), layer(x))
    assert torch.equal(packed(packed.prepare(x)), layer(x))


@pytest.mark.parametrize("value", [0.0, 1e-12, 1e12])
def test_extreme_inputs_stay_finite(value):
    for weights, activations in PAIRS:
        layer, x = linear(weights, activations), torch.full((2, 96), value, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.isfinite().all() and x.grad.isfinite().all() and layer.weight.grad.isfinite().all()


def test_rms_norm_is_torchs():
    norm = RMSNorm(96, 1e-5)
    with torch.no_grad():
        norm.weight.copy_(random(96, seed=4))
    for scale in (1e-4, 1.0, 1e4):
        x = random(3, 5, 96, scale=scale)
        torch.testing.assert_close(norm(x), F.rms_norm(x, (96,), norm.weight, 1e-5), rtol=1e-5, atol=1e-6)
    assert norm(x.bfloat16()).dtype == torch.float32
    assert (norm(torch.zeros(2, 96)) == 0).all()


def test_linear_for():
    assert type(linear_for(None, None)(8, 4)) is Linear
    made = linear_for("binary", "a8_q128")(8, 4)
    assert (made.weights.name, made.activations.name, made.weight.shape) == ("binary", "a8_q128", (4, 8))
    with pytest.raises(ValueError, match="need an activation format"):
        linear_for("ternary", None)
    with pytest.raises(ValueError, match="unknown format 'a9'"):
        linear_for("ternary", "a9")
