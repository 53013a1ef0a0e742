"""NF4 and FP4: their numbers, nearest codes, double quantisation and bytes; bitsandbytes and FACTS as the truth."""

import numpy as np
import pytest
import torch

from tritkit.formats import format_of
from tritkit.formats.codebook import Codebook
from tritkit.layouts import LAYOUTS, Packed, Unpacked
from tritkit.layouts.codebook import DYNAMIC, E2M1, NF4, SecondLevel
from tritkit.methods.rtn import packed

NAMES = ["nf4", "nf4_g32", "nf4_dq", "nf4_g128_dq", "fp4", "fp4_g16"]
LAST_BIT = 2.0**-23  # sums in another order


def weights(seed: int = 0, shape=(64, 512)) -> torch.Tensor:
    """Rows of very different size, one of zeros."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    w *= torch.logspace(-3, 1, shape[0])[:, None]
    w[3] = 0
    return w


def test_nf4_is_made_of_quantiles_of_the_normal_distribution():
    """QLoRA appendix E, by its construction: 8 negative quantiles and 9 positive ones share the zero, then / max."""
    offset = 0.9677083
    normal = torch.distributions.Normal(0, 1)
    positive = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1].double())
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1].double())
    built = torch.cat([negative, torch.zeros(1), positive]).sort().values
    np.testing.assert_allclose(np.array(NF4), (built / built.max()).numpy(), atol=2e-6)


def test_e2m1_is_sign_exponent_mantissa():
    for code, value in enumerate(E2M1):
        exponent, mantissa = code >> 1 & 3, code & 1
        size = (1 + mantissa / 2) * 2 ** (exponent - 1) if exponent else mantissa / 2
        assert abs(value) == size and np.signbit(value) == (code >= 8)


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_the_nearest_numbers(name):
    """All 16 of them tried for each weight, with the scale that is stored."""
    format, w = format_of(name), weights()
    q = format.quantize(w)
    table = torch.tensor(format.table)
    rows = format.split(w)
    distances = (rows[..., None] - table * q.grid.scale[..., None]).abs()
    ours = (format.decode(q.codes.float(), q.grid) - rows).abs()
    assert ((ours - distances.amin(-1)) <= 1e-6 * q.grid.scale.abs()).all()
    assert q.codes.min() >= 0 and q.codes.max() == 15
    assert (q.dequantize()[3] == 0).all()
    largest = rows.abs().amax(-1, keepdim=True)
    if not format.double:  # the largest weight is kept to the last bit
        there = rows.abs() == largest
        assert torch.allclose(format.decode(q.codes.float(), q.grid)[there], rows[there], rtol=2 * LAST_BIT)


def test_fp4_never_writes_minus_zero():
    assert (format_of("fp4").quantize(weights() * 1e-3).codes != 8).all()


@pytest.mark.parametrize("name", NAMES)
def test_bytes_come_back(name):
    format, w = format_of(name), weights()
    q = format.quantize(w)
    layout, stored = LAYOUTS[format.layout], packed(q)
    back = layout.unpack(stored, w.shape)
    assert np.array_equal(back.codes, q.codes.reshape(w.shape).numpy()) and back.codes.dtype == np.int16
    assert np.array_equal(back.scale, q.grid.scale[..., 0].numpy()) and back.offset is None
    assert np.array_equal(layout.dequantize(stored, w.shape), q.dequantize().numpy())
    assert layout.table.dtype == np.float32 and np.array_equal(layout.table, np.float32(format.table))
    again = layout.pack(back)
    assert all(np.array_equal(again.arrays[n], a) for n, a in stored.arrays.items())
    for some in (slice(5, 9), np.array([3, 60])):
        part = layout.rows(stored, w.shape, some)
        assert np.array_equal(layout.dequantize(part, (len(part.arrays["weight"]), 512)), q.dequantize().numpy()[some])


@pytest.mark.parametrize(
    ("name", "bits"),
    [("nf4", 4.5), ("nf4_g32", 5), ("fp4", 4.5), ("nf4_dq", 4 + 8 / 64 + 32 / 64 / 256), ("fp4_g16", 6)],
)
def test_bits_per_weight(name, bits):
    """QLoRA: the constants of nf4 cost 0.5 bits a weight, and 0.127 when they are quantised themselves."""
    w = weights(shape=(64, 1024))
    mean = 32 / w.numel() if "dq" in name else 0
    assert 8 * packed(format_of(name).quantize(w)).nbytes / w.numel() == pytest.approx(bits + mean, abs=1e-9)


def test_the_first_code_lies_in_the_high_nibble():
    codes = np.arange(16, dtype=np.int16)[None]
    byte = LAYOUTS["nf4"].pack(Unpacked(codes, np.ones((1, 1), np.float32))).arrays["weight"]
    assert byte.tolist() == [[0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]]


def test_the_second_level():
    scale = np.random.default_rng(0).lognormal(size=(40, 9)).astype(np.float32)
    second = SecondLevel.of(scale)
    assert second.codes.shape == (40, 9) and second.absmax.shape == (2,)
    assert len(np.unique(DYNAMIC)) == 256 and DYNAMIC[0] > -1 and DYNAMIC[-1] == 1
    rest = (scale - second.mean).reshape(-1)
    for block, absmax in enumerate(second.absmax):
        part = rest[256 * block : 256 * block + 256]
        assert absmax == np.abs(part).max()
        nearest = np.abs(part[:, None] / absmax - DYNAMIC).argmin(1)
        assert np.array_equal(nearest, second.codes.reshape(-1)[256 * block : 256 * block + 256])
    widest = np.diff(DYNAMIC).max() / 2
    absmax = np.repeat(second.absmax, 256)[:360].reshape(40, 9)
    assert (np.abs(second.scale() - scale) <= widest * absmax * 1.001).all() and widest < 0.0071


@pytest.mark.parametrize("name", ["nf4", "nf4_dq", "fp4"])
def test_gptq_takes_a_column_at_a_time(name):
    """With the grid given, the code of a weight depends on that weight alone."""
    format, w = format_of(name), weights(shape=(8, 128))
    q = format.quantize(w)
    for column in (0, 63, 64, 127):
        group = column // 64
        grid = type(q.grid)(q.grid.scale[:, group : group + 1], q.grid.inverse[:, group : group + 1])
        code = format.encode(w[:, column, None, None], grid)
        assert torch.equal(code.flatten(), q.codes.reshape(w.shape)[:, column].float())


def test_names():
    assert format_of("nf4_g32").group == 32 and format_of("nf4_g32").block == 32
    assert format_of("nf4_dq").block == 0 and format_of("nf4_dq").layout == "nf4_dq"  # one fit for the whole matrix
    assert isinstance(format_of("nf4_g128_dq"), Codebook)
    for name in ("nf5", "nf4_g0", "fp4_dq", "nf4_row", "nf4_dq_g32"):
        with pytest.raises(ValueError, match=f"unknown format '{name}'"):
            format_of(name)


def test_what_cannot_be_held_is_refused():
    nf4, codes, scale = LAYOUTS["nf4"], np.zeros((2, 8), np.int16), np.ones((2, 2), np.float32)
    for matrix, message in [
        (Unpacked(codes + 16 * np.eye(2, 8, dtype=np.int16), scale), "codes from 0 to 16"),
        (Unpacked(codes[:, :7], np.ones((2, 7), np.float32)), "a row has 7"),
        (Unpacked(codes, np.ones((2, 3), np.float32)), "do not share out"),
        (Unpacked(codes, np.ones((1, 1), np.float32)), "do not share out"),
        (Unpacked(codes, scale, scale), "no offsets"),
    ]:
        with pytest.raises(ValueError, match=message):
            nf4.pack(matrix)
    with pytest.raises(ValueError, match="codes of a second level"):
        LAYOUTS["nf4_dq"].pack(Unpacked(codes, scale))
    stored = packed(format_of("nf4_dq").quantize(weights())).arrays
    for broken, message in [
        ({"weight": stored["weight"][1:]}, "wants weight"),
        ({"weight_scale": stored["weight_scale"][:, :-1]}, "do not share out"),
        ({"weight_scale_absmax": stored["weight_scale_absmax"][1:]}, "wants weight_scale_absmax"),
        ({"weight_scale_mean": None}, "no array weight_scale_mean"),
    ]:
        arrays = {k: v for k, v in (stored | broken).items() if v is not None}
        with pytest.raises(ValueError, match=message):
            LAYOUTS["nf4_dq"].unpack(Packed(arrays), (64, 512))


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
def test_nf4_is_that_of_bitsandbytes():
    theirs = pytest.importorskip("bitsandbytes.functional", exc_type=ImportError)
    w = weights(1)
    w[3, ::2] = 0.5  # they write a scale of 0 for zeros, and we write 1
    byte, state = theirs.quantize_4bit(w, quant_type="nf4", blocksize=64)
    ours = packed(format_of("nf4").quantize(w)).arrays
    assert np.array_equal(ours["weight"].reshape(-1), byte.numpy().reshape(-1))
    assert np.array_equal(ours["weight_scale"].reshape(-1), state.absmax.numpy())
    values = LAYOUTS["nf4"].dequantize(Packed(ours), tuple(w.shape))
    assert np.array_equal(values, theirs.dequantize_4bit(byte, state).numpy())


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
def test_double_quantisation_is_that_of_bitsandbytes():
    """Scales alike; our codes are the nearest with the scales as stored, theirs with the scales before rounding."""
    theirs = pytest.importorskip("bitsandbytes.functional", exc_type=ImportError)
    w = weights(2)
    byte, state = theirs.quantize_4bit(w, quant_type="nf4", blocksize=64, compress_statistics=True)
    q = format_of("nf4_dq").quantize(w)
    ours = packed(q).arrays
    np.testing.assert_allclose(theirs.create_dynamic_map().numpy(), DYNAMIC, rtol=2 * LAST_BIT)
    assert np.array_equal(ours["weight_scale"].reshape(-1), state.absmax.numpy())
    np.testing.assert_allclose(ours["weight_scale_absmax"], state.state2.absmax.numpy(), rtol=4 * LAST_BIT)
    np.testing.assert_allclose(ours["weight_scale_mean"], state.offset.numpy(), rtol=4 * LAST_BIT)
    their_error = (theirs.dequantize_4bit(byte, state) - w).square().mean()
    assert 0.9 * their_error < (q.dequantize() - w).square().mean() <= their_error
