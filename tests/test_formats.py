"""Laws over FORMATS and a sample of the integer grammar; the papers' own formulas as oracles."""

import numpy as np
import pytest
import torch

from tritkit.formats import FORMATS, QTensor, fake_quantize, format_of
from tritkit.layouts import GGML, Packed
from tritkit.layouts.search import SEARCHES, quantize
from tritkit.methods import gptq
from tritkit.methods.recipe import Plan, Recipe
from tritkit.methods.rtn import unpacked
from tritkit.methods.stats import InputStats

GRAMMAR = [
    f"int{bits}_{group}{asym}"
    for bits in (2, 3, 4, 7, 8)
    for group in ("tensor", "row", "g32", "g64")
    for asym in ("", "_asym")
]
SYMMETRIC = [n for n in GRAMMAR if not n.endswith("_asym")]
ALL = [*FORMATS, *GRAMMAR]
EPSILON = 1e-5  # the clamp of the authors' code
HALF_ULP = 2.0**-11  # relative error of a scale rounded to float16


def gaussian(seed=0, shape=(24, 256), scale=0.05, mean=0.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean


def weights(seed: int) -> torch.Tensor:
    """Rows of very different size, one of zeros, one of a single sign, one with an outlier."""
    w = gaussian(seed) * torch.logspace(-3, 3, 24)[:, None]
    w[3] = 0
    w[5] = w[5].abs() + 0.1
    w[7] = -w[7].abs()
    w[9, 4] = 40
    return w


@pytest.mark.parametrize("name", ALL)
def test_codes_are_in_range_and_shape_is_kept(name):
    format, w = format_of(name), weights(0)
    q = format.quantize(w)
    assert q.codes.dtype == torch.int16 and q.codes.numel() == w.numel()
    assert q.codes.min() >= format.lo and q.codes.max() <= format.hi
    assert q.dequantize().shape == w.shape and q.dequantize().isfinite().all()
    assert 2 ** format.bits() <= format.hi - format.lo + 1 + 1e-3


@pytest.mark.parametrize("name", GRAMMAR)
def test_error_is_at_most_half_a_step(name):
    """Absmax and min-max grids span the values, so nothing is clipped by more than float16 scales cost at the ends."""
    format, w = format_of(name), weights(1)
    rows = format.split(w)
    grid = format.fit(rows)
    error = (format.decode(format.encode(rows, grid), grid) - rows).abs() / grid.scale
    span = max(format.hi, -format.lo)
    assert error.max() <= 0.5 + span * HALF_ULP * isinstance(format.group, int) + 1e-3


@pytest.mark.parametrize("name", ALL)
def test_encoding_what_was_decoded_gives_the_same_codes(name):
    """On the same grid that must hold for all. (binary encodes by the mean, which decoding moves.)"""
    format = format_of(name)
    q = format.quantize(weights(0))
    if name != "binary":
        again = format.encode(format.decode(q.codes.float(), q.grid), q.grid)
        means_something = q.grid.scale != 0  # beside an outlier, scales of a k-quant round to zero
        assert torch.equal(again * means_something, q.codes.float() * means_something)


@pytest.mark.parametrize("name", [*SYMMETRIC, "ternary", "a8", "binary"])
def test_quantising_the_quantised_changes_no_code(name):
    """Also with the grid fitted anew: the largest code of a symmetric grid is always used. (Not so for a4's and
    a8_q128's grids, which clip, and for min-max grids, whose zero point moves.)"""
    format = format_of(name)
    for seed in range(3):
        q = format.quantize(gaussian(seed))
        assert torch.equal(format.quantize(q.dequantize()).codes, q.codes)


@pytest.mark.parametrize("name", ALL)
def test_fake_quantize_is_quantize_and_dequantize(name):
    for dtype in (torch.float32, torch.bfloat16):
        format, w = format_of(name), gaussian().to(dtype).requires_grad_()
        y = fake_quantize(w, format)
        assert torch.equal(y, format.quantize(w).dequantize().to(dtype)) and y.dtype == dtype
        gradient = gaussian(5).to(dtype)
        y.backward(gradient)
        assert torch.equal(w.grad, gradient)


@pytest.mark.parametrize("name", ALL)
def test_strength_mixes_linearly(name):
    format, w = format_of(name), gaussian().requires_grad_()
    q = format.quantize(w).dequantize()
    assert torch.equal(fake_quantize(w, format, 0.0), w)
    for strength in (0.25, 0.5, 0.9):
        y = fake_quantize(w, format, strength)
        torch.testing.assert_close(y, (1 - strength) * w + strength * q, rtol=0, atol=1e-6)
        w.grad = None
        y.sum().backward()
        assert torch.equal(w.grad, torch.ones_like(w))


def their_weight_quant(w):  # verbatim, "The Era of 1-bit LLMs: Training Tips, Code and FAQ"
    scale = 1.0 / w.abs().mean().clamp_(min=1e-5)
    return (w * scale).round().clamp_(-1, 1) / scale


def their_activation_quant(x):  # verbatim, the same
    scale = 127.0 / x.abs().max(dim=-1, keepdim=True).values.clamp_(min=1e-5)
    return (x * scale).round().clamp_(-128, 127) / scale


@pytest.mark.parametrize("seed", range(5))
def test_ternary_codes_equal_the_authors(seed):
    w = gaussian(seed, mean=0.01 * seed)
    q = format_of("ternary").quantize(w)
    scale = 1.0 / w.abs().mean().clamp_(min=EPSILON)
    codes = (w * scale).round().clamp_(-1, 1)
    assert torch.equal(q.codes.reshape(w.shape).float(), codes)
    # Their values divide by 1/absmean, ours multiply by absmean, which is what a file stores: one rounding apart.
    torch.testing.assert_close(q.dequantize(), their_weight_quant(w), rtol=2**-23, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_a8_equals_the_authors(seed):
    x = weights(seed)
    q = format_of("a8").quantize(x)
    scale = 127.0 / x.abs().max(dim=-1, keepdim=True).values.clamp_(min=EPSILON)
    assert torch.equal(q.codes.reshape(x.shape).float(), (x * scale).round().clamp_(-128, 127))
    torch.testing.assert_close(q.dequantize(), their_activation_quant(x), rtol=2**-22, atol=0)


def test_binary_is_the_sign_of_the_centred_weight():
    """Eq. 1-2 of BitNet; what equals the mean, and zero where the mean is zero, goes to -1."""
    w = gaussian(mean=0.02)
    q = format_of("binary").quantize(w)
    assert torch.equal(q.codes.reshape(w.shape), torch.where(w - w.mean() > 0, 1, -1).to(torch.int16))
    assert q.grid.scale.item() == pytest.approx(w.abs().mean().item(), rel=1e-6)  # of the uncentred W
    even = torch.tensor([[1.0, -1.0, 0.0, 0.0, 2.0, -2.0]])
    assert format_of("binary").quantize(even).codes.flatten().tolist() == [1, -1, -1, -1, 1, -1]
    shifted = torch.tensor([[0.5, 1.0, 1.5]])
    assert format_of("binary").quantize(shifted).codes.flatten().tolist() == [-1, -1, 1]
    assert set(format_of("binary").quantize(torch.zeros(2, 4)).codes.flatten().tolist()) == {-1}


def test_a8_q128_is_the_first_papers():
    """Eq. 3 of BitNet with Q_b = 128: a positive peak is clipped to 127, a negative one reaches -128."""
    x = torch.tensor([[1.0, 0.5, -0.25, 0.0], [-2.0, 1.0, 0.3, 0.1]])
    q = format_of("a8_q128").quantize(x)
    absmax = x.abs().amax(-1, keepdim=True)
    assert torch.equal(q.codes.reshape(x.shape).float(), (128 * x / absmax).round().clamp(-128, 127))
    assert q.codes[0, 0, 0] == 127 and q.codes[1, 0, 0] == -128
    assert torch.allclose(q.grid.scale.reshape(-1, 1), absmax / 128)


def test_a4_is_absmean():
    """BitNet a4.8 eq. 6, and its clipping on Gaussian rows: at 2.11 sigma, 1.7 % of the values."""
    x = gaussian(shape=(64, 4096), scale=3.0)
    q = format_of("a4").quantize(x)
    expected = (7**0.5 / x.abs().mean(-1, keepdim=True) * x).round().clamp(-8, 7)
    different = (q.codes.reshape(x.shape).float() != expected).float().mean()
    assert different < 1e-4  # ties that the order of two roundings decides
    ratio = q.grid.scale.reshape(-1, 1) * 7**0.5 / x.abs().mean(-1, keepdim=True)
    assert torch.allclose(ratio, torch.ones_like(ratio))
    noise = (q.dequantize() - x).square().sum()
    assert 10 * torch.log10(x.square().sum() / noise) == pytest.approx(18.8, abs=0.2)


@pytest.mark.parametrize("name", [n for n in GRAMMAR if n.endswith("_asym")])
def test_asymmetric_grids_hold_zero_exactly(name):
    format = format_of(name)
    for mean in (-3.0, 0.0, 0.02, 5.0):
        w = gaussian(mean=mean)
        w[:, ::32] = 0
        assert (format.quantize(w).dequantize()[:, ::32] == 0).all()


@pytest.mark.parametrize("name", ["int8_g64", "int4_g32", "int4_g64_asym"])
def test_small_weights_keep_their_precision(name):
    """Scales below the smallest normal float16, 6e-5, are stored too: the error is what it is for large weights."""
    format, errors = format_of(name), []
    for spread in (1.0, 1e-3):
        w = spread * gaussian()
        errors.append(float((format.quantize(w).dequantize() - w).norm() / w.norm()))
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


@pytest.mark.parametrize("name", ALL)
def test_extreme_values_stay_finite(name):
    for value in (0.0, 1e-30) if name in SEARCHES else (0.0, 1e-30, 1e30):  # those refuse what float16 does not hold
        w = torch.full((4, 256), value)
        w[:, ::2] *= -1
        w = fake_quantize(w, format_of(name))
        assert w.isfinite().all()
        assert value or name == "binary" or (w == 0).all()


def test_names_parse_to_themselves():
    assert [format_of(name).name for name in ALL] == ALL


def test_row_is_the_default_group():
    assert format_of("int4").name == "int4_row" and format_of("int4_asym").name == "int4_row_asym"


@pytest.mark.parametrize(
    "name", ["int1", "int9", "int4_g0", "int4_gx", "ternery", "", "int4_row_sym", "INT4", "int4_", "int4g64"]
)
def test_bad_names_are_refused(name):
    with pytest.raises(ValueError, match=f"unknown format {name!r}"):
        format_of(name)


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"int4_g64 .* 64 .*100"):
        format_of("int4_g64").quantize(torch.ones(2, 100))


def test_share_of_zeros():
    """Of absmean rounding: |w| < mean|w| / 2. Gaussian: erf(1 / (2 sqrt(pi))) = 31.0 %; uniform: 25 %."""
    ternary = format_of("ternary")
    w = gaussian(shape=(1000, 1000))
    assert (ternary.quantize(w).codes == 0).float().mean() == pytest.approx(0.3101, abs=0.002)
    u = torch.rand((1000, 1000), generator=torch.Generator().manual_seed(0)) - 0.5
    assert (ternary.quantize(u).codes == 0).float().mean() == pytest.approx(0.25, abs=0.002)


@pytest.mark.parametrize("name", SEARCHES)
def test_formats_of_ggml_pack_to_the_bytes_of_the_search(name):
    """With their grids and codes, and also with the codes that encode finds on a grid of fit (those of k-quants)."""
    format, layout, w = format_of(name), GGML[name], weights(3)[:, :256]
    importance = torch.rand(256, generator=torch.Generator().manual_seed(1))
    for given in (None, importance):
        rows = quantize(name, w.numpy(), None if given is None else given.numpy())
        q = format.quantize(w, given)
        assert np.array_equal(layout.pack(unpacked(q)).arrays["weight"], rows)
        assert rows.nbytes * 8 / w.numel() == format.bits_per_weight
        assert np.array_equal(layout.dequantize(Packed({"weight": rows}), (24, 256)), q.dequantize().numpy())
        split = format.split(w)
        grid = format.fit(split, None if given is None else given.reshape(split.shape[1:]))
        again = QTensor(format, format.encode(split, grid).to(torch.int16), grid, (24, 256))
        assert torch.equal(grid.scale, q.grid.scale)
        if name.endswith("_k"):
            assert torch.equal(again.dequantize(), q.dequantize())
        layout.pack(unpacked(again))


def test_a_row_that_is_no_whole_blocks_is_refused():
    with pytest.raises(ValueError, match="q4_k has blocks of 256 weights of a row, but a row has 576 weights"):
        format_of("q4_k").quantize(torch.zeros(2, 576))


@pytest.mark.parametrize("name", SEARCHES)
def test_gptq_chooses_other_codes_on_grids_of_ggml_and_their_bytes_hold_them(name):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 512, generator=random) @ (torch.eye(512) + 0.3 * torch.randn(512, 512, generator=random))
    w, format, stats = gaussian(1, (16, 512)), format_of(name), InputStats(512)
    stats.update(x)
    q = gptq.solve(w, Plan(format, "gptq"), stats, Recipe(format=name, method="gptq"))
    rows = GGML[name].pack(unpacked(q))
    assert np.array_equal(GGML[name].dequantize(rows, (16, 512)), q.dequantize().numpy())
    searched = format.quantize(w, stats.second_moment).dequantize()
    assert stats.output_error(q.dequantize() - w) < stats.output_error(searched - w)
