"""Matrices in their own bits against what the formats and the gguf package say they are; rounded activations against
the formulas, written once more in numpy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mixed import packed

from tritkit import stored
from tritkit.formats import format_of
from tritkit.layers import Adapter
from tritkit.layouts import GGML, Packed
from tritkit.stored import InputQuantizer, StoredEmbedding, StoredLinear, StoredMatrix

DENSE = ["int2_g32", "int3_row", "int4_g64_asym", "int5_tensor", "int8_row", "int8_row_asym", "int6_g32_asym",
         "nf4", "nf4_dq", "fp4_g32"]  # fmt: skip


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantized(name: str, rows=40, cols=256):
    """(layout, arrays, values) of a random matrix in that format; the values are the format's own, or gguf's."""
    w = random(rows, cols, seed=1, scale=0.05) + 0.01
    layout, arrays = packed(name, w.numpy())
    if name in GGML:
        return layout, arrays, torch.from_numpy(theirs(name, arrays["weight"]))
    return layout, arrays, format_of(name).quantize(w).dequantize()


def theirs(name: str, byte: np.ndarray) -> np.ndarray:
    gguf = pytest.importorskip("gguf")
    kind = next(t for t in gguf.GGMLQuantizationType if t.name.lower() == name)
    return gguf.quants.dequantize(byte.copy(), kind)


@pytest.fixture(params=[None, 1000], ids=["whole", "strips"])
def strip(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(stored, "STRIP", request.param)


@pytest.mark.parametrize("name", [*DENSE, *GGML, "ternary", "binary"])
def test_products_and_rows_are_those_of_the_values(name, strip):
    layout, arrays, values = quantized(name)
    x, bias = random(2, 3, 256), random(40, seed=5)
    linear = StoredLinear(layout, arrays, (40, 256), bias)
    expected = F.linear(x, values, bias)
    torch.testing.assert_close(
        linear(x), expected, rtol=0, atol=1e-6 * float(x.abs().amax() * values.abs().sum(1).max())
    )
    tokens = torch.tensor([[3, 39, 3], [0, 17, 3]])
    assert torch.equal(StoredEmbedding(layout, arrays, (40, 256))(tokens), values[tokens])


@pytest.mark.parametrize("name", [*DENSE, *GGML])
def test_the_bytes_stay_what_they_are(name):
    layout, arrays, _ = quantized(name)
    matrix = StoredMatrix(layout, arrays, (40, 256))
    assert sum(b.numel() * b.element_size() for b in matrix.buffers()) == Packed(dict(arrays)).nbytes
    assert not list(matrix.parameters())
    for key, value in matrix.state_dict().items():
        assert value.numpy().dtype == arrays[key].dtype and np.array_equal(value.numpy(), arrays[key])


@pytest.mark.parametrize("name", ["a8", "a8_q128", "a4", "a8_g32", "int8_row", "int4_row", "int8_g32", "int8_row_asym",
                                  "int8_tensor", "int5_row_asym", "int8_tensor_asym"])  # fmt: skip
def test_dynamic_inputs_are_the_formats(name):
    x = random(2, 5, 64) + 0.3
    assert torch.equal(InputQuantizer(name)(x), format_of(name).quantize(x).dequantize())


def test_each_token_has_its_own_scale():
    x = random(2, 5, 64)
    quantizer = InputQuantizer("int8_row")
    x[1, 3] *= 1000
    apart = torch.stack([quantizer(row) for row in x.reshape(10, 64)]).reshape(x.shape)
    assert torch.equal(quantizer(x), apart)


@pytest.mark.parametrize(
    ("name", "scale", "zero"),
    [("int8_tensor", 0.02, None), ("int8_tensor_asym", 0.02, 103.0), ("int4_tensor", 0.3, None)],
)
def test_static_inputs_are_clipped_to_the_stored_range(name, scale, zero):
    format, x = format_of(name), random(2, 5, 64, scale=3.0)
    quantizer = InputQuantizer(name, scale, zero)
    assert quantizer.is_static and not InputQuantizer(name).is_static
    ratio = x.double().numpy() / scale + (zero or 0)
    code = np.clip(np.rint(ratio), format.lo, format.hi)
    assert set(code.flat) >= {format.lo, format.hi}
    found = quantizer(x).double().numpy() / scale + (zero or 0)
    tie = np.abs(ratio - np.floor(ratio) - 0.5) < 1e-4  # float32 may round these the other way
    assert np.abs(found - code)[~tie].max() < 1e-4 and tie.mean() < 0.01


def test_outliers_are_llm_int8s():
    """FACTS 10.1, equations of section 3.2 in float64: columns above 6 in floats, all others per token and per row."""
    layout, arrays, values = quantized("int8_row")
    x = random(2, 7, 256)
    x[0, 3, [5, 77]] = torch.tensor([6.5, -80.0])
    x[:, :, 200] = x[:, :, 200].clamp(-5, 5)
    linear = StoredLinear(layout, arrays, (40, 256), inputs=InputQuantizer("int8_row", outliers=6.0))
    rows, w = x.double().numpy().reshape(14, 256), values.double().numpy()
    big = (np.abs(rows) >= 6).any(0)
    assert list(np.flatnonzero(big)) == [5, 77]
    rest = np.where(big, 0, rows)
    scale = np.abs(rest).max(1, keepdims=True) / 127
    rounded = np.where(big, rows, np.rint(rest / scale) * scale)
    np.testing.assert_allclose(linear(x).reshape(14, 40), rounded @ w.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(linear.inputs(x).reshape(14, 256), rounded, rtol=1e-5, atol=1e-6)
    plain = StoredLinear(layout, arrays, (40, 256), inputs=InputQuantizer("int8_row"))
    exact = (rows @ w.T).reshape(2, 7, 40)
    assert np.abs(linear(x).numpy() - exact).max() < 0.2 * np.abs(plain(x).numpy() - exact).max()


def test_outliers_let_gradients_through():
    layout, arrays, values = quantized("int8_row")
    linear = StoredLinear(layout, arrays, (40, 256), inputs=InputQuantizer("int8_row", outliers=6.0))
    x = random(7, 256)
    x[0, 5] = 9.0
    y = linear(x.requires_grad_(True))
    y.sum().backward()
    torch.testing.assert_close(x.grad, values.sum(0).expand(7, 256), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y.detach(), linear(x.detach()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs", [None, "int8_row", "int8_row outliers"])
def test_linears_return_the_dtype_they_read(dtype, inputs):
    """They compute in float32: the only loss is the rounding of the result."""
    layout, arrays, _ = quantized("int8_row")
    name, _, outliers = (inputs or "").partition(" ")
    quantizer = InputQuantizer(name, outliers=6.0 if outliers else None) if name else None
    x = random(2, 7, 256).to(dtype)
    x[0, 3, 5] = -80
    linear = StoredLinear(layout, arrays, (40, 256), random(40, seed=5).to(dtype), quantizer)
    assert torch.equal(linear(x), linear(x.float()).to(dtype)) and linear(x).dtype == dtype
    if quantizer is not None:
        assert torch.equal(quantizer(x), quantizer(x.float()).to(dtype)) and quantizer(x).dtype == dtype


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InputQuantizer("int8_row", 0.1), "a scale for each row, so none can be stored"),
        (lambda: InputQuantizer("int8_tensor", float("nan")), "one finite number, not nan"),
        (lambda: InputQuantizer("int8_tensor", 0.0), "must be above 0"),
        (lambda: InputQuantizer("int8_tensor", 0.1, 3.0), "symmetric, but they were given a zero point"),
        (lambda: InputQuantizer("int8_tensor_asym", None, 3.0), "no scale to go with it"),
        (lambda: InputQuantizer("int8_row", outliers=0), "must be above 0, not 0"),
        (lambda: InputQuantizer("int9_row"), "unknown format 'int9_row'"),
        (lambda: with_outliers("int4_g64_asym", "int8_row"), "outliers need weights with one scale a row"),
        (lambda: with_outliers("q8_0", "int8_row"), "outliers need weights with one scale a row"),
        (lambda: with_outliers("int8_row", "int8_row_asym"), "not from int8_row_asym"),
    ],
)
def test_odd_inputs_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def with_outliers(weights, inputs):
    layout, arrays, _ = quantized(weights)
    return StoredLinear(layout, arrays, (40, 256), inputs=InputQuantizer(inputs, outliers=6.0))


def test_an_adapter_begins_as_nothing_and_is_a_float_linear():
    adapter, x = Adapter(48), random(2, 3, 48)
    assert adapter.weight.dtype == torch.float16 and (adapter(x) == 0).all()
    with torch.no_grad():
        adapter.weight.copy_(random(48, 48, seed=2))
        adapter.bias.copy_(random(48, seed=3))
    assert torch.equal(adapter(x), F.linear(x, adapter.weight.float(), adapter.bias))
