"""Laws over LAYOUTS: bytes come back as the codes and scales that went in, at the width that was promised."""

import subprocess
import sys

import numpy as np
import pytest

from tritkit.layouts import GGML, LAYOUTS, Packed, Unpacked

CAN_HOLD = {
    "hf_bitlinear": [(-1, 0, 1)],
    "hf_autobitlinear": [(-1, 0, 1)],
    "binary_rows": [(-1, 1)],
    "i2_s_x86": [(-1, 0, 1)],
    "i2_s_arm": [(-1, 0, 1)],
    "dense": [
        *(tuple(range(-(1 << b - 1), 1 << b - 1)) for b in range(2, 9)),
        *(tuple(range(1 << b)) for b in range(1, 9)),
        (-1, 0, 1),
        (-1, 1),
        (0,),
        (-128,),
        (255,),
        (-3,),
    ],
}
CASES = [(name, codes) for name, all_codes in CAN_HOLD.items() for codes in all_codes]
BITS = {"hf_bitlinear": 2, "hf_autobitlinear": 2, "binary_rows": 1, "i2_s_x86": 2, "i2_s_arm": 2}
BLOCKS = {"i2_s_x86": 128, "i2_s_arm": 64}  # columns that lie together


def columns(name: str, cols: int) -> int:
    """So many columns, or blocks of that layout."""
    return cols * BLOCKS.get(name, 8) // 8


def matrix(codes, shape=(12, 40), scale=0.0371, seed=0) -> Unpacked:
    random = np.random.default_rng(seed)
    return Unpacked(random.choice(np.array(codes, np.int16), shape), np.array([[scale]], np.float32))


def same(a: Unpacked, b: Unpacked) -> bool:
    return (
        np.array_equal(a.codes, b.codes)
        and b.codes.dtype == np.int16
        and np.array_equal(a.scale, b.scale)
        and (a.offset is None) == (b.offset is None)
        and (a.offset is None or np.array_equal(a.offset, b.offset))
    )


def test_every_layout_is_tested():
    # those of ggml in test_ggml_layouts.py, tables in test_codebook.py
    assert set(CAN_HOLD) | set(GGML) | {"nf4", "nf4_dq", "fp4"} == set(LAYOUTS)


@pytest.mark.parametrize(("name", "codes"), CASES)
def test_pack_and_unpack_is_the_identity(name, codes):
    for shape in ((12, 40), (4, 8), (64, 128), *(((5, 7), (1, 1)) if name == "dense" else ())):
        shape = (shape[0], columns(name, shape[1]))
        layout, m = LAYOUTS[name], matrix(codes, shape)
        back = layout.unpack(layout.pack(m), shape)
        if name == "hf_bitlinear":  # stores 1 / scale
            np.testing.assert_allclose(back.scale, m.scale, rtol=2**-22)
            m = Unpacked(m.codes, back.scale)
        assert same(m, back)


@pytest.mark.parametrize(("name", "codes"), CASES)
def test_bits_per_weight_are_as_declared(name, codes):
    m = matrix(codes, (64, 256))
    packed = LAYOUTS[name].pack(m)
    low, high = min(codes), max(codes)
    natural = max((-low - 1).bit_length(), max(high, 0).bit_length()) + 1 if low < 0 else max(high.bit_length(), 1)
    assert 8 * packed.arrays["weight"].nbytes / m.codes.size == BITS.get(name, natural)
    assert packed.nbytes - packed.arrays["weight"].nbytes <= 8  # one scale, and dense's two words


@pytest.mark.parametrize("name", CAN_HOLD)
def test_pack_leaves_its_argument_alone(name):
    m = matrix(CAN_HOLD[name][0], (12, columns(name, 40)))
    before = m.codes.copy()
    LAYOUTS[name].pack(m)
    assert np.array_equal(m.codes, before)


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["hf_bitlinear", "hf_autobitlinear"])
def test_hf_bytes_equal_transformers(name, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    theirs = pytest.importorskip("transformers.integrations.bitnet")
    import torch

    m = matrix((-1, 0, 1), (32, 24))
    packed = LAYOUTS[name].pack(m).arrays["weight"]
    assert np.array_equal(packed, theirs.pack_weights(torch.from_numpy(m.codes).float().clone()).numpy())
    back = theirs.unpack_weights(torch.from_numpy(packed), dtype=torch.float32)
    assert np.array_equal(back.numpy(), m.codes)


def test_the_two_hf_layouts_have_opposite_scales():
    m = matrix((-1, 0, 1), scale=0.25)
    assert LAYOUTS["hf_bitlinear"].pack(m).arrays["weight_scale"].tolist() == [4.0]
    assert LAYOUTS["hf_autobitlinear"].pack(m).arrays["weight_scale"].tolist() == [0.25]


def test_binary_rows_bit_order():
    codes = np.array([[1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1, -1, -1, -1, -1]], np.int16)
    assert LAYOUTS["binary_rows"].pack(Unpacked(codes, np.ones((1, 1), np.float32))).arrays["weight"].tolist() == [
        [0x81, 0x02]
    ]


REFUSED = [
    ("hf_autobitlinear", (-1, 0, 1, 2), (8, 8), "codes from -1 to 2"),
    ("hf_bitlinear", (-2, 0), (8, 8), "codes from -2 to 0"),
    ("hf_autobitlinear", (-1, 0, 1), (6, 8), "multiple of 4, not 6"),
    ("binary_rows", (-1, 0, 1), (8, 8), "codes from -1 to 1"),
    ("binary_rows", (-1, 1), (8, 12), "a row has 12"),
    ("i2_s_x86", (-1, 0, 1), (8, 192), "blocks of 128 columns, but a row has 192"),
    ("i2_s_arm", (-1, 0, 1), (8, 32), "blocks of 64 columns, but a row has 32"),
    ("i2_s_arm", (0, 2), (8, 64), "codes from 0 to 2"),
    ("dense", (-129, 0), (8, 8), "codes from -129 to 0"),
    ("dense", (0, 256), (8, 8), "codes from 0 to 256"),
    ("dense", (-1, 128), (8, 8), "codes from -1 to 128"),
]


@pytest.mark.parametrize(("name", "codes", "shape", "message"), REFUSED)
def test_what_cannot_be_held_is_refused(name, codes, shape, message):
    with pytest.raises(ValueError, match=message):
        LAYOUTS[name].pack(matrix(codes, shape))


@pytest.mark.parametrize("name", BITS)
def test_layouts_of_one_scale_refuse_more(name):
    codes = matrix((-1, 1), (12, columns(name, 40))).codes
    with pytest.raises(ValueError, match="one scale per matrix"):
        LAYOUTS[name].pack(Unpacked(codes, np.ones((12, 1), np.float32)))
    with pytest.raises(ValueError, match="offset"):
        LAYOUTS[name].pack(Unpacked(codes, np.ones((1, 1), np.float32), np.ones((1, 1), np.float32)))


@pytest.mark.parametrize("value", [0.3, 1e-9, 1e9, 0.0])
def test_dense_keeps_scales_that_float16_does_not_hold(value):
    m = Unpacked(matrix((0, 1, 2, 3)).codes, np.full((12, 2), value, np.float32))
    packed = LAYOUTS["dense"].pack(Unpacked(m.codes, m.scale, -3 * m.scale))
    assert packed.arrays["weight_scale"].dtype == (np.float32 if value else np.float16)
    found = LAYOUTS["dense"].unpack(packed, m.codes.shape)
    assert np.array_equal(found.scale, m.scale) and np.array_equal(found.offset, -3 * m.scale)


def test_dense_refuses_offsets_that_it_would_change():
    codes, scale = matrix((0, 1, 2, 3)).codes, np.full((12, 2), 0.3, np.float32)
    scale = scale.astype(np.float16).astype(np.float32)
    LAYOUTS["dense"].pack(Unpacked(codes, scale, -scale * 255))
    for zero in (0.5, 256, -1):
        with pytest.raises(ValueError, match="zero point"):
            LAYOUTS["dense"].pack(Unpacked(codes, scale, -scale * zero))


@pytest.mark.parametrize("name", CAN_HOLD)
def test_bytes_of_another_shape_are_refused(name):
    layout = LAYOUTS[name]
    packed = layout.pack(matrix(CAN_HOLD[name][0], (8, columns(name, 16))))
    for rows, cols in ((8, 24), (12, 16), (16, 8), (9, 16)):
        with pytest.raises(ValueError, match="bytes"):
            layout.unpack(packed, (rows, columns(name, cols)))


@pytest.mark.parametrize("name", CAN_HOLD)
def test_odd_files_are_refused(name):
    layout, shape = LAYOUTS[name], (8, columns(name, 16))
    good = layout.pack(matrix(CAN_HOLD[name][0], shape))
    without = {k: v for k, v in good.arrays.items() if k != "weight_scale"}
    for arrays in (without, {**good.arrays, "weight_scale": np.ones(3, np.float32)}):
        if name == "dense" and "weight_scale" in arrays:
            arrays["weight_scale"] = np.ones((3, 1), np.float32)
        with pytest.raises(ValueError, match="weight_scale"):
            layout.unpack(Packed(arrays), shape)
    with pytest.raises(ValueError, match="made of bytes, but weight has dtype int8"):
        layout.unpack(Packed({**good.arrays, "weight": good.arrays["weight"].view(np.int8)}), shape)


@pytest.mark.parametrize("name", ["hf_bitlinear", "hf_autobitlinear", "i2_s_x86", "i2_s_arm"])
def test_the_fourth_field_value_is_no_code(name):
    shape = (8, columns(name, 16))
    packed = LAYOUTS[name].pack(matrix((-1, 0, 1), shape))
    packed.arrays["weight"][1, 3] |= 0b1100
    with pytest.raises(ValueError, match="code"):
        LAYOUTS[name].unpack(packed, shape)


@pytest.mark.parametrize("name", BITS)
def test_scales_that_are_no_number_are_refused(name):
    shape = (8, columns(name, 16))
    packed = LAYOUTS[name].pack(matrix(CAN_HOLD[name][0], shape))
    for odd in (np.nan, np.inf, -np.inf):
        packed.arrays["weight_scale"] = np.array([odd], np.float32)
        with pytest.raises(ValueError, match="finite weight_scale"):
            LAYOUTS[name].unpack(packed, shape)
    packed.arrays["weight_scale"] = np.zeros(1, np.float32)
    if name == "hf_bitlinear":
        with pytest.raises(ValueError, match="divides by weight_scale, but it is 0"):
            LAYOUTS[name].unpack(packed, shape)
    else:
        assert LAYOUTS[name].unpack(packed, shape).scale == 0


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("cols", [5, 32, 43])
def test_dense_codes_lie_bit_after_bit(bits, cols, monkeypatch):
    """The bits of a row, lowest first, spelt out as one long integer."""
    monkeypatch.setattr("tritkit.layouts.base.CHUNK", 2 * cols)
    chance = np.random.default_rng(bits)
    codes = chance.integers(0, 1 << bits, (5, cols)).astype(np.int16)
    codes[0, 0] = (1 << bits) - 1
    scale = chance.uniform(0.1, 1, (5, 1)).astype(np.float32)
    packed = LAYOUTS["dense"].pack(Unpacked(codes, scale))
    for row, byte in zip(codes, packed.arrays["weight"], strict=True):
        spelt = sum(int(code) << bits * i for i, code in enumerate(row))
        assert byte.tobytes() == spelt.to_bytes(-(-cols * bits // 8), "little")
    assert np.array_equal(LAYOUTS["dense"].unpack(packed, codes.shape).codes, codes)
    assert np.array_equal(LAYOUTS["dense"].dequantize(packed, codes.shape), codes * scale)


@pytest.mark.parametrize("header", [[0, 0], [9, -1], [-1, 0], [4]])
def test_dense_refuses_odd_widths(header):
    packed = LAYOUTS["dense"].pack(matrix(range(-8, 8), (8, 16)))
    packed.arrays["weight_code"] = np.array(header, np.int16)
    with pytest.raises(ValueError, match="weight_code"):
        LAYOUTS["dense"].unpack(packed, (8, 16))


WEIGHT_FORMATS = ["ternary", "binary"]
WEIGHT_FORMATS += [f"int{b}_{g}{a}" for b in (2, 3, 4, 7, 8) for g in ("tensor", "row", "g32") for a in ("", "_asym")]


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_a_formats_layout_holds_what_it_makes(name):
    import torch

    from tritkit.formats import format_of
    from tritkit.pack import unpacked

    format = format_of(name)
    w = 0.05 * torch.randn((32, 64), generator=torch.Generator().manual_seed(0))
    w[3] = 0
    q = format.quantize(w)
    layout, m = LAYOUTS[format.layout], unpacked(q)
    back = layout.unpack(layout.pack(m), (32, 64))
    assert same(m, back)
    groups = back.codes.reshape(q.codes.shape).astype(np.float32)
    values = groups * back.scale[..., None] + (0 if back.offset is None else back.offset[..., None])
    assert np.array_equal(values.reshape(32, 64), q.dequantize().numpy())


def test_importing_layouts_imports_no_torch():
    code = "import sys, tritkit.layouts; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
