"""Products with scales for groups of columns: every width, group size and form of scale, against float64."""

import numpy as np
import pytest
import torch
from decoder_reference import random_decoder
from grouped_reference import check_product, dequantize, quantize_activations

from tritkit import _native
from tritkit.engine import Job
from tritkit.engine.native import NativeEngine
from tritkit.engine.weights import Groups
from tritkit.formats import format_of

ISAS = _native.available_isas()
# fmt: off
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])
FP4 = np.array([0, 1, 128, 192, 64, 96, 32, 48, 0, -1, -128, -192, -64, -96, -32, -48], np.int16)  # times 192
# fmt: on


def linear(runner, codes, groups, **more):
    return _native.GroupedLinear(runner, codes, groups.bits, groups.size, **groups.arrays(), **more)


def random_codes(rng, bits: int, shape: tuple[int, int]) -> np.ndarray:
    return rng.integers(0, 1 << bits, shape, dtype=np.uint8)


FORMS = [
    "half",
    "float",
    "zeros",
    "half offsets",
    "float offsets",
    "two levels",
    "mins",
    "nibbles",
    "mins of one level",
]


def random_groups(rng, bits: int, size: int, shape: tuple[int, int], form: str) -> Groups:
    rows, cols = shape
    groups, spans = (rows, -(-cols // size)), (rows, -(-cols // 256))

    def floats(shape, dtype=np.float16):
        return (rng.standard_normal(shape) * 0.1).astype(dtype)

    def small(top, dtype=np.uint8):
        return rng.integers(0, top, groups).astype(dtype)

    if form == "half":
        return Groups(bits, size, floats(groups))
    if form == "float":
        return Groups(bits, size, floats(groups, np.float32))
    if form == "zeros":
        return Groups(bits, size, floats(groups), zeros=small(1 << bits))
    if form == "half offsets":
        return Groups(bits, size, floats(groups), offsets=floats(groups))
    if form == "float offsets":
        return Groups(bits, size, floats(groups, np.float32), offsets=floats(groups, np.float32))
    if form == "mins of one level":
        return Groups(bits, size, floats(groups), mins=small(256), dmin=floats(spans))
    scales = rng.integers(-128, 128, groups).astype(np.int8)
    if form == "two levels":
        return Groups(bits, size, scales, d=floats(spans))
    if form == "mins":
        return Groups(bits, size, scales, d=floats(spans), mins=small(256), dmin=floats(spans))
    return Groups(bits, size, small(16, np.int8), d=floats(spans), mins=small(16), dmin=floats(spans))


@pytest.mark.parametrize("size", [16, 32, 48, 64, 128, 1000])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_products_of_every_form(bits, size):
    rng = np.random.default_rng(bits * 1000 + size)
    for i, form in enumerate(FORMS):
        if (i >= FORMS.index("two levels")) and 256 % size:
            continue
        shape = (int(rng.integers(1, 70)), int(rng.integers(1, 620)))
        codes, groups = random_codes(rng, bits, shape), random_groups(rng, bits, size, shape, form)
        x = rng.standard_normal((int(rng.integers(1, 12)), shape[1])).astype(np.float32)
        expected = None
        for isa in ISAS:
            runner = _native.Runner(1, isa)
            found = _native.apply(runner, linear(runner, codes, groups), x)
            if expected is None:
                check_product(found, x, codes, groups)
                expected = found
            np.testing.assert_array_equal(found, expected, err_msg=f"{isa}, {form}")  # bit for bit


@pytest.mark.parametrize("isa", ISAS)
def test_a_product_does_not_know_the_tokens_beside_it_or_how_rows_are_shared(isa):
    rng = np.random.default_rng(5)
    codes, groups = random_codes(rng, 4, (325, 192)), random_groups(rng, 4, 32, (325, 192), "mins")
    x = rng.standard_normal((40, 192)).astype(np.float32)
    alone = _native.Runner(1, isa)
    expected = np.concatenate([_native.apply(alone, linear(alone, codes, groups), row[None]) for row in x])
    for threads in (1, 2):
        runner = _native.Runner(threads, isa)
        built = linear(runner, codes, groups)
        for tokens in range(1, 41):
            np.testing.assert_array_equal(_native.apply(runner, built, x[:tokens]), expected[:tokens])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_the_largest_codes_do_not_overflow(bits, isa):
    shape = (17, 32768)
    x = np.full((7, shape[1]), -3.0, np.float32)
    runner = _native.Runner(1, isa)
    codes = np.full(shape, (1 << bits) - 1, np.uint8)
    for size in (16, 32, 32768):
        count = -(-shape[1] // size)
        ones = np.ones((shape[0], count), np.float16)
        found = _native.apply(
            runner, linear(runner, codes, Groups(bits, size, ones, zeros=0 * ones.astype(np.uint8))), x
        )
        expected = -3.0 * shape[1] * ((1 << bits) - 1)
        np.testing.assert_allclose(found, expected, rtol=1e-4)  # 1000 sums of the same sign
        found = _native.apply(runner, linear(runner, 0 * codes, Groups(bits, size, ones)), x)
        np.testing.assert_allclose(found, 3.0 * shape[1] * 2 ** (bits - 1), rtol=1e-4)


@pytest.mark.parametrize("columns", [1, 7, 32, 33, 48, 2560])
@pytest.mark.parametrize("isa", ISAS)
def test_activations_are_quantized_as_defined(columns, isa):
    rng = np.random.default_rng(columns)
    x = (rng.standard_normal((9, columns)) * 10.0 ** rng.integers(-8, 8, (9, columns))).astype(np.float32)
    x[1] = 0
    x[2] = np.where(np.arange(columns) % 2, 254, -1)  # -0.5 if 254 becomes 127: to even
    codes, scales = _native.quantize(x, "a8_g32", isa)
    expected, expected_scales = quantize_activations(x)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(scales, expected_scales)


FORMATS = [
    "int4_g64",
    "int4_g128",
    "int3_g32_asym",
    "int8_row",
    "int2_g16",
    "int6_row_asym",
    "int5_g64_asym",
    "int7_g48",
]


def groups_of(name: str, w: np.ndarray) -> tuple[np.ndarray, Groups, np.ndarray]:
    """Codes and groups of a format of tritkit.formats, and its own float32 values."""
    format = format_of(name)
    q = format.quantize(torch.from_numpy(w))
    scales = q.grid.scale[..., 0].numpy()
    size = format.group if isinstance(format.group, int) else w.shape[1]
    if isinstance(format.group, int):
        assert (scales.astype(np.float16) == scales).all()
        scales = scales.astype(np.float16)
    bits = int(format.bits())
    codes = q.codes.numpy().reshape(w.shape) - format.lo
    zeros = None
    if q.grid.offset is not None:
        zeros = np.rint(-q.grid.offset[..., 0].numpy() / scales.astype(np.float32)).astype(np.uint8)
    return codes.astype(np.uint8), Groups(bits, size, scales, zeros=zeros), q.dequantize().numpy()


@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_tritkit_run(name):
    rng = np.random.default_rng(len(name))
    w = rng.standard_normal((50, 384)).astype(np.float32)
    x = rng.standard_normal((9, 384)).astype(np.float32)
    codes, groups, values = groups_of(name, w)
    np.testing.assert_allclose(dequantize(codes, groups), values, rtol=1e-5, atol=1e-6)  # float32 there
    for isa in ISAS:
        runner = _native.Runner(2, isa)
        check_product(_native.apply(runner, linear(runner, codes, groups), x), x, codes, groups)


@pytest.mark.parametrize("table", [np.round(32767 * NF4).astype(np.int16), FP4, np.arange(-8, 8, dtype=np.int16) * 17])
@pytest.mark.parametrize("size", [16, 32, 64])
def test_tables(table, size):
    rng = np.random.default_rng(size)
    shape = (70, 320)
    codes = random_codes(rng, 4, shape)
    groups = Groups(4, size, rng.uniform(0.01, 0.2, (70, 320 // size)).astype(np.float32), table=table)
    x = rng.standard_normal((11, 320)).astype(np.float32)
    scale = 1.0 / float(np.abs(table).max())
    results = []
    for isa in ISAS:
        runner = _native.Runner(1, isa)
        results.append(_native.apply(runner, linear(runner, codes, groups, scale=scale), x))
    check_product(results[0], x, codes, groups, scale)
    for isa, result in zip(ISAS, results, strict=True):
        np.testing.assert_array_equal(result, results[0], err_msg=isa)


def test_nf4_in_16_bits_is_nf4():
    found = np.round(32767 * NF4).astype(np.int16) / 32767
    assert np.abs(found - NF4).max() <= 0.5 / 32767 + 1e-12


def test_a_decoder_with_grouped_linears():
    """Every linear in int4_g16 or another format, with a bias: the same logits as with the float64 reference."""
    weights, reference = random_decoder("llama", "grouped")
    tokens = np.random.default_rng(1).integers(0, weights.shape.vocab_size, 30).astype(np.int32)
    expected = reference(tokens)
    results = []
    for isa in ISAS:
        with NativeEngine(weights, threads=2, isa=isa, kv_bits=32) as engine:
            assert "t16_4+t16_1_g16" in engine.layout
            (logits,) = engine.step([Job(engine.new(), tokens, "all")])
            assert logits is not None
            np.testing.assert_allclose(logits, expected, atol=2e-3, rtol=0)  # roundings to int8 may flip
            results.append(logits)


def test_what_does_not_fit_is_refused():
    runner = _native.Runner(1, "scalar")
    codes = np.zeros((4, 64), np.uint8)
    half = np.ones((4, 2), np.float16)
    one = np.ones((4, 1), np.float16)
    small = np.zeros((4, 2), np.uint8)

    def refused(message, codes=codes, bits=4, group=32, scales=half, **more):
        with pytest.raises(ValueError, match=message):
            _native.GroupedLinear(runner, codes, bits, group, scales, **more)

    refused("bits is 9, expected 2 to 8", bits=9)
    refused("a code that does not fit 4 bits", codes=codes + np.uint8(16))
    refused(
        "the group size is 24, expected a multiple of 16, or at least the 64 columns",
        group=24,
        scales=np.ones((4, 3), np.float16),
    )
    refused(r"scales has shape \[4, 2\], expected \[4, 4\]", group=16)
    refused("scales is float64, expected float32", scales=np.ones((4, 2)))
    refused("scales is float16, expected int8", d=one)
    refused("d is float32, expected float16", scales=half.astype(np.int8), d=one.astype(np.float32))
    refused("divisor of 256 where scales have two levels", group=48, scales=half.astype(np.int8), d=one)
    refused("only one of zeros, offsets and mins", zeros=small, offsets=half)
    refused("mins and dmin go together", mins=small)
    refused("zeros is int8, expected uint8", zeros=small.astype(np.int8))
    refused("a table has 16 numbers, for codes of 4 bits", bits=3, table=np.zeros(16, np.int16))
    refused(r"table has shape \[15\], expected \[16\]", table=np.zeros(15, np.int16))
    refused("codes is int8, expected uint8", codes=codes.astype(np.int8))
    refused(r"bias has shape \[3\], expected \[4\]", bias=np.zeros(3, np.float32))
