"""ggml's block types against the gguf package, and bitnet.cpp's I2_S against its source, read byte by byte."""

import warnings

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
from gguf.quants import dequantize, quantize  # noqa: E402

from tritkit.layouts import GGML, LAYOUTS, GgmlQuantizer, Packed, TwoLevels, Unpacked  # noqa: E402

SHAPE = (5, 768)
QUANTIZERS = [name for name, layout in GGML.items() if isinstance(layout, GgmlQuantizer)]
K_QUANTS = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]


def type_of(name: str):
    return {t.name.lower(): t for t in gguf.GGMLQuantizationType}[name]


def random_bytes(name: str, seed: int = 0, shape=SHAPE, finite: bool = False) -> np.ndarray:
    """Any bytes that are blocks; finite: of scales between -4 and 4 or so."""
    layout = GGML[name]
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (shape[0], layout.row_bytes(shape[1])), np.uint8).reshape(-1, layout.block_bytes)
    if name == "tq2_0":
        fields = blocks[:, :64]
        fields ^= fields & fields >> 1 & 0x55  # 3 is no code
    if finite:
        for at in layout.floats:
            blocks[:, at : at + 2] = random.uniform(-4, 4, (len(blocks), 1)).astype("<f2").view(np.uint8)
        if name == "mxfp4":
            blocks[:, 0] = random.integers(110, 130, len(blocks))
    return blocks.reshape(shape[0], -1)


def theirs(name: str, byte: np.ndarray) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they multiply NaN and infinity too
        return dequantize(byte.copy(), type_of(name))


def test_the_types_are_those_of_the_issue():
    assert sorted(GGML) == sorted(["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", *K_QUANTS, "mxfp4", "tq1_0", "tq2_0"])
    for name, layout in GGML.items():
        assert (layout.block, layout.block_bytes) == gguf.GGML_QUANT_SIZES[type_of(name)]
        assert layout.name == name


@pytest.mark.parametrize("name", GGML)
def test_values_are_ggufs_bit_for_bit(name):
    for seed in range(4):
        byte = random_bytes(name, seed)
        expected, found = theirs(name, byte), GGML[name].dequantize(Packed({"weight": byte}), SHAPE)
        assert found.dtype == np.float32
        odd = np.isnan(expected)
        assert np.array_equal(odd, np.isnan(found))
        assert np.array_equal(expected.view(np.uint32)[~odd], found.view(np.uint32)[~odd])


@pytest.mark.parametrize("name", GGML)
def test_rows_that_are_taken_some_at_a_time(name, monkeypatch):
    monkeypatch.setattr("tritkit.layouts.base.CHUNK", 2 * SHAPE[1])
    byte = random_bytes(name, finite=True)
    assert np.array_equal(theirs(name, byte), GGML[name].dequantize(Packed({"weight": byte}), SHAPE))
    if name in QUANTIZERS:
        w = weights()[: SHAPE[0]]
        assert np.array_equal(quantize(w, type_of(name)), GGML[name].quantize(w).arrays["weight"])


@pytest.mark.parametrize("name", GGML)
def test_bytes_come_back(name):
    layout = GGML[name]
    for seed in range(4):
        byte = random_bytes(name, seed, finite=True)
        blocks = byte.reshape(-1, layout.block_bytes)
        for at in layout.floats:  # scales of every odd kind: both zeros, subnormal, the ends of the range, infinite
            odd = np.array([0, -0.0, 6e-8, -6e-8, 65504, -65504, np.inf, -np.inf], "<f2")
            blocks[: len(odd), at : at + 2] = np.roll(odd, seed + at)[:, None].view(np.uint8)
        m = layout.unpack(Packed({"weight": byte}), SHAPE)
        assert m.codes.dtype == np.int16 and m.codes.shape == SHAPE
        assert m.codes.min() >= layout.lo and m.codes.max() <= layout.hi
        assert m.scale.dtype == np.float32 and m.scale.shape == (SHAPE[0], SHAPE[1] // layout.group)
        back = layout.pack(m)
        # Of tq1_0's 256 bytes ggml writes 243, and no minus zero of mxfp4; the others mean the same as one of these
        if name in ("tq1_0", "mxfp4"):
            again = layout.unpack(back, SHAPE)
            assert np.array_equal(again.codes, m.codes) and np.array_equal(again.scale, m.scale)
            byte, back = back.arrays["weight"], layout.pack(again)
        assert np.array_equal(back.arrays["weight"], byte)


@pytest.mark.parametrize("name", GGML)
def test_bytes_of_zeros_are_weights_of_zero(name):
    layout = GGML[name]
    zero = np.zeros((2, layout.row_bytes(512)), np.uint8)
    m = layout.unpack(Packed({"weight": zero}), (2, 512))
    assert name == "mxfp4" or not m.scale.any()  # its scales are powers of two
    assert np.array_equal(layout.pack(m).arrays["weight"], zero)
    assert not layout.dequantize(Packed({"weight": zero}), (2, 512)).any()


@pytest.mark.parametrize("name", [name for name in GGML if name != "mxfp4"])
def test_scales_that_are_not_finite_are_counted(name):
    layout = GGML[name]
    byte = random_bytes(name, finite=True)
    assert layout.nonfinite(Packed({"weight": byte})) == 0
    blocks = byte.reshape(-1, layout.block_bytes)
    for i, at in enumerate(layout.floats):
        for k, odd in enumerate((np.nan, np.inf, -np.inf)):
            blocks[3 * i + k, at : at + 2] = np.array([odd], "<f2").view(np.uint8)
    assert layout.nonfinite(Packed({"weight": byte})) == 3 * len(layout.floats)
    blocks[0, list(layout.floats)] = 0
    values = layout.dequantize(Packed({"weight": byte}), SHAPE).reshape(-1, layout.block)
    assert np.count_nonzero(~np.isfinite(values).all(axis=1)) >= 2  # and they reach the weights


def weights(seed: int = 0) -> np.ndarray:
    """Usual weights, rows of other sizes, blocks of zeros, of one value, of one outlier, and ties."""
    random = np.random.default_rng(seed)
    w = random.standard_normal((48, 768)).astype(np.float32)
    w[1] *= 1e-3
    w[2] *= 1e-7
    w[3] *= 3e3
    w[4, :256] = 0
    w[5, :64] = -0.37
    w[6, ::32] = 40
    w[7] = random.integers(-127, 128, 768)
    w[8] = random.integers(-15, 16, 768) / 2
    w[9] = random.integers(-1, 2, 768) * np.float32(0.0371)
    w[10] = np.abs(w[10])
    return w


@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantized_bytes_are_ggufs(name):
    for seed in range(3):
        w = weights(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = quantize(w, type_of(name))
        assert np.array_equal(GGML[name].quantize(w).arrays["weight"], expected)


def test_what_gguf_quantizes_we_do():
    assert QUANTIZERS == ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4", "tq1_0", "tq2_0"]


@pytest.mark.parametrize("name", QUANTIZERS)
def test_weights_that_do_not_fit_are_refused(name):
    layout = GGML[name]
    for odd in (np.nan, np.inf):
        w = weights()
        w[3, 5] = odd
        with pytest.raises(ValueError, match="finite weights, but 1 of these"):
            layout.quantize(w)
    if name != "mxfp4":
        with pytest.raises(ValueError, match="at most 65504"):
            layout.quantize(weights() * np.float32(1e9))
    with pytest.raises(ValueError, match="columns, but a row has 20"):
        layout.quantize(np.ones((4, 20), np.float32))


@pytest.mark.parametrize("name", GGML)
def test_odd_shapes_are_refused(name):
    layout = GGML[name]
    packed = Packed({"weight": random_bytes(name)})
    with pytest.raises(ValueError, match=f"blocks of {layout.block} columns, but a row has 784"):
        layout.unpack(packed, (5, 784))
    for shape in ((4, 768), (5, 512)):
        with pytest.raises(ValueError, match="bytes"):
            layout.dequantize(packed, shape)
    with pytest.raises(ValueError, match="dtype int8"):
        layout.unpack(Packed({"weight": packed.arrays["weight"].view(np.int8)}), SHAPE)
    with pytest.raises(ValueError, match="no array weight"):
        layout.unpack(Packed({}), SHAPE)


def unpacked(name: str) -> Unpacked:
    return GGML[name].unpack(Packed({"weight": random_bytes(name, finite=True)}), SHAPE)


@pytest.mark.parametrize("name", GGML)
def test_codes_and_scales_that_do_not_fit_are_refused(name):
    layout, m = GGML[name], unpacked(name)
    codes = m.codes.copy()
    codes[2, 7] = layout.hi + 1
    with pytest.raises(ValueError, match=f"codes from {layout.lo} to {layout.hi}, but"):
        layout.pack(Unpacked(codes, m.scale, m.offset, m.levels))
    if name in K_QUANTS:
        with pytest.raises(ValueError, match="two levels"):
            layout.pack(Unpacked(m.codes, m.scale, m.offset))
        with pytest.raises(ValueError, match="not those of its two levels"):
            layout.pack(Unpacked(m.codes, m.scale * 2, m.offset, m.levels))
        assert m.levels is not None
        scales = m.levels.scales.copy()
        scales[1, 1] = layout.scale_range[1] + 1
        with pytest.raises(ValueError, match="integer scales from"):
            layout.pack(
                Unpacked(m.codes, m.scale, m.offset, TwoLevels(m.levels.d, scales, m.levels.dmin, m.levels.mins))
            )
        with pytest.raises(ValueError, match="shapes"):
            odd = TwoLevels(m.levels.d[:, :1], m.levels.scales, m.levels.dmin, m.levels.mins)
            layout.pack(Unpacked(m.codes, m.scale, m.offset, odd))
        return
    with pytest.raises(ValueError, match="powers of two" if name == "mxfp4" else "float16"):
        layout.pack(Unpacked(m.codes, np.full((1, 1), 0.1, np.float32), m.offset))
    with pytest.raises(ValueError, match="do not share out"):
        layout.pack(Unpacked(m.codes, np.ones((5, SHAPE[1] // layout.group * 2), np.float32), m.offset))
    with pytest.raises(ValueError, match="do not share out"):
        layout.pack(Unpacked(m.codes, np.ones((5, 0), np.float32), m.offset))
    if m.offset is None:
        with pytest.raises(ValueError, match="no offsets"):
            layout.pack(Unpacked(m.codes, m.scale, m.scale))


@pytest.mark.parametrize("name", [name for name in GGML if name not in K_QUANTS])
def test_a_shared_scale_is_written_to_each_block(name):
    layout = GGML[name]
    codes = unpacked(name).codes
    for shape in ((1, 1), (5, 1), (1, 3), (5, 3)):
        scale = np.float32(2) ** np.random.default_rng(0).integers(-3, 4, shape).astype(np.float32)
        back = layout.unpack(layout.pack(Unpacked(codes, scale)), SHAPE)
        assert np.array_equal(back.codes, codes)
        groups = SHAPE[1] // layout.group
        assert np.array_equal(back.scale, np.broadcast_to(np.repeat(scale, groups // shape[1], 1), (5, groups)))


def test_tq2_0_has_three_codes():
    byte = random_bytes("tq2_0")
    byte[1, 4] |= 0b1100
    with pytest.raises(ValueError, match="fourth code"):
        GGML["tq2_0"].dequantize(Packed({"weight": byte}), SHAPE)


def test_every_byte_of_mxfp4():
    layout = GGML["mxfp4"]
    byte = np.empty((256, 17), np.uint8)
    byte[:, 0] = np.arange(256)
    byte[:, 1:] = np.arange(16) * 0x11
    found = layout.dequantize(Packed({"weight": byte}), (256, 32))
    assert np.array_equal(found.view(np.uint32), theirs("mxfp4", byte).view(np.uint32))
    assert layout.nonfinite(Packed({"weight": byte})) == 1  # 255, NaN by the definition of E8M0
    scales = layout.first_scales(Packed({"weight": byte}))
    assert np.array_equal(scales[:-1], 2.0 ** (np.arange(255) - 128)) and np.isnan(scales[-1])
    back = layout.pack(layout.unpack(Packed({"weight": byte}), (256, 32))).arrays["weight"]
    byte[:, 9] = 0  # minus zero
    assert np.array_equal(back, byte)


def test_codes_that_no_e2m1_number_has_are_refused():
    codes = np.full((1, 32), 5, np.int16)
    with pytest.raises(ValueError, match="with a sign, but the matrix has others"):
        GGML["mxfp4"].pack(Unpacked(codes, np.ones((1, 1), np.float32)))


def test_mxfp4_of_weights_at_the_ends_of_float32():
    """gguf's exponent wraps round below 2^-125, to NaN; ours stays finite. Above that the bytes are the same."""
    layout, random = GGML["mxfp4"], np.random.default_rng(0)
    w = random.uniform(-1, 1, (256, 32)).astype(np.float32)
    w[:, 0] = 1
    w = np.ldexp(w, np.arange(-128, 128)[:, None])
    packed = layout.quantize(w)
    with np.errstate(over="ignore"):
        assert np.array_equal(packed.arrays["weight"][3:], quantize(w[3:], type_of("mxfp4")))
    assert layout.nonfinite(packed) == 0
    for most in (1e-45, np.finfo(np.float32).max):
        x = np.full((1, 32), most, np.float32)
        assert np.isfinite(layout.dequantize(layout.quantize(x), (1, 32))).all()


# bitnet.cpp, src/ggml-bitnet-mad.cpp, quantize_i2_s: element j of block i goes to byte i * lanes + j % lanes, shifted
# left by 6 - 2 * (j / lanes); blocks of 128 and 32 lanes on x86, of 64 and 16 lanes on ARM; the scale behind them.
@pytest.mark.parametrize(("name", "lanes"), [("i2_s_x86", 32), ("i2_s_arm", 16)])
def test_i2s_bytes_are_those_of_bitnet_cpp(name, lanes):
    random = np.random.default_rng(0)
    layout = LAYOUTS[name]
    codes = random.integers(-1, 2, (6, 256)).astype(np.int16)
    flat = codes.ravel()
    expected = np.zeros(flat.size // 4 + 32, np.uint8)
    for i in range(flat.size // (4 * lanes)):
        for j in range(4 * lanes):
            expected[i * lanes + j % lanes] |= (int(flat[i * 4 * lanes + j]) + 1) << (6 - 2 * (j // lanes))
    expected[flat.size // 4 :][:4] = np.array([1.22], "<f4").view(np.uint8)
    packed = layout.pack(Unpacked(codes, np.full((1, 1), 1.22, np.float32)))
    assert np.array_equal(layout.to_stored(packed), expected)
    assert layout.stored_bytes((6, 256)) == expected.size
    expected[-28:] = 0xA5  # the quantiser in C++ leaves what was there
    back = layout.unpack(layout.from_stored(expected, (6, 256)), (6, 256))
    assert np.array_equal(back.codes, codes) and back.scale == np.float32(1.22)
    with pytest.raises(
        ValueError, match=f"{expected.size} bytes for a 6 x 256 matrix, but there are {expected.size - 1}"
    ):
        layout.from_stored(expected[:-1], (6, 256))
