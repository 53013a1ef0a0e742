"""The kernels of every instruction set: exact integer products, activation codes as they are defined."""

import os
import subprocess
import sys

import numpy as np
import pytest
from decoder_reference import from_bf16, pack_binary, pack_ternary, to_bf16

from tritkit import _native

ISAS = _native.available_isas()
LAYOUTS = ["hf_autobitlinear", "hf_bitlinear", "binary_rows"]
FLOAT_ROUNDING = 2.0**-24  # of one float32 operation, relative to its result
TOKENS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 33]


@pytest.fixture(params=ISAS)
def isa(request):
    return request.param


def codes_of(layout: str, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.choice(np.array([-1, 1] if layout == "binary_rows" else [-1, 0, 1], np.int8), shape)


def pack(layout: str, codes: np.ndarray) -> np.ndarray:
    return (pack_binary if layout == "binary_rows" else pack_ternary)(codes)


def check_product(layout: str, codes: np.ndarray, x: np.ndarray, isa: str) -> None:
    found = _native.integer_product(layout, pack(layout, codes), *codes.shape, x, isa)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, x.astype(np.int64) @ codes.T.astype(np.int64))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 32), (17, 33), (64, 256), (100, 259), (144, 40), (640, 96)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_integer_products_are_exact(layout, shape, tokens, isa):
    x = np.random.default_rng(tokens).integers(-128, 128, (tokens, shape[1]), dtype=np.int8)
    check_product(layout, codes_of(layout, shape), x, isa)


EXTREMES = [("hf_autobitlinear", w) for w in (-1, 0, 1)] + [("binary_rows", w) for w in (-1, 1)]


@pytest.mark.parametrize("value", [-128, 127])
@pytest.mark.parametrize("layout, weight", EXTREMES)
def test_no_sum_overflows(layout, weight, value, isa):
    codes = np.full((80, 16384), weight, np.int8)
    for tokens in (1, 2, 4, 9):
        check_product(layout, codes, np.full((tokens, 16384), value, np.int8), isa)


def test_a_code_out_of_range_is_refused():
    data = np.zeros((4, 8), np.uint8)
    data[2, 3] = 0b00_11_00_00
    with pytest.raises(ValueError, match="not -1, 0 or"):
        _native.integer_product("hf_bitlinear", data, 16, 8, np.zeros((1, 8), np.int8))


@pytest.mark.parametrize("levels, activations", [(127, "a8"), (128, "a8_q128")])
@pytest.mark.parametrize("columns", [1, 7, 16, 100, 2560])
def test_activations_are_quantized_as_defined(columns, levels, activations, isa):
    rng = np.random.default_rng(columns)
    x = rng.standard_normal((9, columns)).astype(np.float32) * np.float32(10.0) ** rng.integers(-8, 8, (9, 1))
    x = x.astype(np.float32)
    x[1] = 0
    x[2] = np.arange(columns) - columns // 2  # halves after scaling, whole numbers before
    x[3] = np.where(np.arange(columns) % 2, 254, -1).astype(np.float32)  # -0.5 if 254 becomes 127: to even
    x[4] = -3.7
    inverse = np.float32(levels) / np.maximum(np.abs(x).max(1, keepdims=True), np.float32(1e-5))
    expected = np.clip(np.rint(x * inverse), -128, 127).astype(np.int8)
    codes, scales = _native.quantize(x, activations, isa)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(scales, np.float32(1) / inverse[:, 0])


def test_odd_floats_give_the_same_codes_everywhere():
    x = np.array([[np.nan, 1, -2, 3], [np.inf, 1, -2, np.nan], [1e-45, -1e-45, 0, -0.0], [3e38, -3e38, 1e30, 0]])
    x = np.tile(x.astype(np.float32), (1, 11))
    expected = _native.quantize(x, "a8", "scalar")
    for isa in ISAS:
        for a, b in zip(_native.quantize(x, "a8", isa), expected, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 33])
@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (75, 200)])
@pytest.mark.parametrize("layout", ["f32", "f16", "bf16"])
def test_float_products(layout, shape, tokens, isa):
    rng = np.random.default_rng(0)
    w = rng.standard_normal(shape).astype(np.float32)
    w.flat[:1] = 2.0**-20  # a subnormal float16
    data = {"f32": w, "f16": w.astype(np.float16).view(np.uint16), "bf16": to_bf16(w)}[layout]
    w = {"f32": lambda: w, "f16": lambda: data.view(np.float16), "bf16": lambda: from_bf16(data)}[layout]()
    x = rng.standard_normal((tokens, shape[1])).astype(np.float32)
    bias = rng.standard_normal(shape[0]).astype(np.float32)
    runner = _native.Runner(2, isa)
    linear = _native.Linear(runner, layout, data, *shape, 0.5, None, bias)
    found = _native.apply(runner, linear, x)
    expected = x.astype(np.float64) @ w.T.astype(np.float64) * 0.5 + bias
    bound = (np.abs(x) @ np.abs(w).T + np.abs(bias)) * FLOAT_ROUNDING * (shape[1] + 2)  # of any order of the sum
    assert (np.abs(found - expected) <= bound).all()
    one_by_one = np.concatenate([_native.apply(runner, linear, row[None]) for row in x])
    np.testing.assert_array_equal(found, one_by_one)


@pytest.mark.parametrize("layout, activations", [("hf_bitlinear", "a8"), ("binary_rows", "a8_q128")])
def test_scales_are_multiplied_in_the_stated_order(layout, activations, isa):
    codes = codes_of(layout, (40, 72))
    x = np.random.default_rng(3).standard_normal((5, 72)).astype(np.float32)
    runner = _native.Runner(1, isa)
    linear = _native.Linear(runner, layout, pack(layout, codes), 40, 72, 0.0371, activations, None)
    x_codes, x_scales = _native.quantize(x, activations, isa)
    sums = (x_codes.astype(np.int32) @ codes.T.astype(np.int32)).astype(np.float32)
    expected = sums * (np.float32(0.0371) * x_scales[:, None])
    np.testing.assert_array_equal(_native.apply(runner, linear, x), expected)


def test_wrong_arrays_are_refused():
    runner = _native.Runner(1, "scalar")
    ok = np.zeros((4, 8), np.uint8)
    wrong = [
        (("hf_bitlinear", ok, 20, 8, 1.0, "a8", None), "data has 32 bytes, expected 40"),
        (("hf_bitlinear", ok.T, 16, 8, 1.0, "a8", None), "C-contiguous"),
        (("hf_bitlinear", ok, 16, 8, 1.0, None, None), "activations is None for layout hf_bitlinear, expected a8"),
        (("hf_bitlinear", ok, 16, 8, 1.0, "a8_g32", None), "activations is 'a8_g32' for layout hf_bitlinear"),
        (("hf_bitlinear", ok, 16, 8, 1.0, "a9", None), "'a9'"),
        (("hf_bitlinear", ok, 16, 8, 1.0, "a8", np.zeros(16)), "bias is float64, expected float32"),
        (("tq9", ok, 16, 8, 1.0, "a8", None), "layout is 'tq9', expected one of hf_autobitlinear, hf_bitlinear"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            _native.Linear(runner, *arguments)
    with pytest.raises(ValueError, match=r"x has shape \[2, 7\], expected \[2, 8\]"):
        _native.integer_product("hf_bitlinear", ok, 16, 8, np.zeros((2, 7), np.int8))
    with pytest.raises(ValueError, match="x is int16, expected int8"):
        _native.integer_product("hf_bitlinear", ok, 16, 8, np.zeros((2, 8), np.int16))


@pytest.mark.parametrize("value", [*ISAS, "sse17"])
def test_environment_chooses_the_instruction_set(value):
    code = """
from tritkit import _native
try:
    print(_native.default_isa())
except ValueError as error:
    print(error)
"""
    environment = {**os.environ, "TRITKIT_ISA": value}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    refusal = f"TRITKIT_ISA is 'sse17', expected one that this CPU can run: {', '.join(ISAS)}"
    assert run.stdout.strip() == (value if value in ISAS else refusal)
