"""The blocks of ggml, run as they are: rows, products, a whole decoder, heads. The truth is gguf.dequantize."""

import dataclasses

import gguf
import numpy as np
import pytest
from decoder_reference import pack_ternary, random_decoder
from grouped_reference import (
    GGML,
    HALVES,
    check_product,
    dequantize,
    from_ggml,
    ggml_floats,
    pack_i2_s,
    random_blocks,
)

from tritkit import _native
from tritkit.engine import Job
from tritkit.engine.native import LINEARS, NativeEngine, default_head
from tritkit.engine.weights import BLOCKS, TERNARY_BLOCKS, LinearWeights, check

ISAS = _native.available_isas()
SIZES = {"vocab_size": 97, "hidden_size": 256, "intermediate_size": 512, "num_layers": 2, "head_dim": 64}


def columns_of(name: str) -> list[int]:
    """Fewer than a span of the run-time layout, a span, several, and a part of one at the end."""
    unit = BLOCKS[name.lower()][0]
    return [unit, 3 * unit, 7 * unit, 1280]


@pytest.mark.parametrize("name", GGML)
def test_rows_are_those_of_ggml_bit_for_bit(name):
    rng = np.random.default_rng(len(name))
    for cols in columns_of(name):
        data = random_blocks(rng, name, 21, cols)
        table = _native.RowTable(name.lower(), data, 21, cols, 1.0)
        found = np.stack([table.row(r) for r in range(21)])
        np.testing.assert_array_equal(found.view(np.uint32), ggml_floats(name, data).view(np.uint32))
        half = _native.RowTable(name.lower(), data, 21, cols, 0.5)
        np.testing.assert_array_equal(half.row(20), found[20] * np.float32(0.5))


@pytest.mark.parametrize("name", GGML)
def test_products_are_those_of_the_values(name):
    rng = np.random.default_rng(len(name))
    for rows, cols in zip((1, 17, 37, 70), columns_of(name), strict=True):
        data = random_blocks(rng, name, rows, cols)
        codes, groups = from_ggml(name, data, BLOCKS[name.lower()][1])
        np.testing.assert_allclose(  # float32 there, whose rounding of scale * code a min may leave alone
            dequantize(codes, groups), ggml_floats(name, data), rtol=1e-6, atol=1e-6
        )
        for tokens in (1, 3, 8, 33):
            x = rng.standard_normal((tokens, cols)).astype(np.float32)
            results = []
            for isa in ISAS:
                runner = _native.Runner(2, isa)
                built = _native.Linear(runner, name.lower(), data, rows, cols, 1.0, "a8_g32", None)
                assert built.bytes == _native.runtime_bytes(runner, name.lower(), data, rows, cols, "a8_g32")
                results.append(_native.apply(runner, built, x))
                np.testing.assert_array_equal(results[-1], results[0], err_msg=isa)  # bit for bit
            check_product(results[0], x, codes, groups)
            if name not in ("TQ1_0", "TQ2_0"):  # there the zero point is none of the reference's
                runner = _native.Runner(1)
                same = _native.GroupedLinear(runner, codes, groups.bits, groups.size, **groups.arrays())
                np.testing.assert_array_equal(results[0], _native.apply(runner, same, x))


def test_a_scale_and_a_bias_come_on_top():
    rng = np.random.default_rng(0)
    data, bias = random_blocks(rng, "Q4_K", 20, 512), rng.standard_normal(20).astype(np.float32)
    x = rng.standard_normal((2, 512)).astype(np.float32)
    runner = _native.Runner(1)
    bare, full = (_native.Linear(runner, "q4_k", data, 20, 512, s, "a8_g32", b) for s, b in ((1.0, None), (0.3, bias)))
    expected = _native.apply(runner, bare, x) * np.float32(0.3) + bias
    np.testing.assert_array_equal(_native.apply(runner, full, x), expected)


# --- Blocks of ternary codes as a matrix with one scale.


def ternary_blocks(layout: str, codes: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """As ggml's own quantiser and bitnet.cpp write them."""
    if layout.startswith("i2_s"):
        return pack_i2_s(codes, 32 if layout == "i2_s_x86" else 16)
    return gguf.quantize(codes.astype(np.float32) * np.float32(scale), gguf.GGMLQuantizationType[layout.upper()])


def ternary_codes(rng, layout: str, rows: int) -> np.ndarray:
    unit = BLOCKS[layout][0]
    codes = rng.integers(-1, 2, (rows, unit * int(rng.integers(1, 12))))
    codes[rows // 2, :unit] = 0  # a block of zeros, whose scale is zero
    return codes.astype(np.int8)


@pytest.mark.parametrize("layout", TERNARY_BLOCKS)
def test_ternary_blocks_with_one_scale_run_as_one_matrix(layout):
    rng = np.random.default_rng(len(layout))
    for rows, tokens in ((1, 1), (17, 3), (64, 8), (130, 33)):
        codes = ternary_codes(rng, layout, rows)
        data = ternary_blocks(layout, codes)
        x = rng.integers(-128, 128, (tokens, codes.shape[1])).astype(np.int8)
        for isa in ISAS:
            found = _native.integer_product(layout, data, *codes.shape, x, isa)
            np.testing.assert_array_equal(found, x.astype(np.int32) @ codes.astype(np.int32).T)


@pytest.mark.parametrize("runtime", ["t16_2", "t16_3"])
@pytest.mark.parametrize("layout", TERNARY_BLOCKS)
def test_ternary_blocks_are_the_same_as_transformers_bytes(layout, runtime):
    rng = np.random.default_rng(1)
    codes = ternary_codes(rng, layout, 40)
    scale = float(np.float16(0.037))
    x = rng.standard_normal((3, codes.shape[1])).astype(np.float32)
    runner = _native.Runner(1, "", runtime)
    a, b = (
        _native.Linear(runner, name, data, *codes.shape, scale, "a8", None)
        for name, data in ((layout, ternary_blocks(layout, codes, scale)), ("hf_autobitlinear", pack_ternary(codes)))
    )
    assert a.layout == b.layout == runtime
    np.testing.assert_array_equal(_native.apply(runner, a, x), _native.apply(runner, b, x))


@pytest.mark.parametrize("layout", TERNARY_BLOCKS)
def test_what_is_not_ternary_or_has_other_scales_is_refused(layout):
    rng = np.random.default_rng(1)
    codes = ternary_codes(rng, layout, 24)
    data = ternary_blocks(layout, codes, 0.25)

    def build(data, scale):
        return _native.Linear(_native.Runner(1), layout, data, *codes.shape, scale, "a8", None)

    build(data, 0.25)
    if not layout.startswith("i2_s"):
        with pytest.raises(ValueError, match=f"^{layout} data holds .* a block with another scale than the matrix$"):
            build(data, 0.5)
        one = data.copy()
        one[-1, -2:] = np.float16([0.5]).view(np.uint8)
        with pytest.raises(ValueError, match="another scale than the matrix"):
            build(one, 0.25)
    if layout != "tq1_0":  # whose bytes hold nothing but trits
        with pytest.raises(ValueError, match=f"^{layout} data holds a code that is not -1, 0 or \\+1"):
            build(data | np.uint8(3), 0.25) if layout.startswith("i2_s") else build(
                np.concatenate([data[:, :1] | np.uint8(3), data[:, 1:]], 1), 0.25
            )


# --- A decoder.


def test_a_decoder_of_mixed_blocks():
    """Every layout somewhere among the linears, the embedding and the head: the logits of the float64 reference."""
    weights, reference = random_decoder("llama", "blocks", **SIZES)
    layouts = {getattr(layer, name).layout for layer in weights.layers for name in LINEARS}
    assert weights.head is not None and len(layouts) == len(GGML)
    tokens = np.random.default_rng(1).integers(0, weights.shape.vocab_size, 30).astype(np.int32)
    expected = reference(tokens)
    for isa in ISAS:
        with NativeEngine(weights, threads=2, isa=isa, kv_bits=32) as engine:
            assert engine.head == weights.head.layout
            (logits,) = engine.step([Job(engine.new(), tokens, "all")])
            assert logits is not None
            error = np.abs(logits - expected).max(axis=1) / expected.std()
            assert np.median(error) < 3e-6  # float32, and where no code of an activation falls on the other side
            assert error.max() < 0.03  # where one does, and what comes after it in its layer


@pytest.mark.parametrize("name", ["Q8_0", "Q6_K", "Q4_1"])
def test_a_tied_table_of_blocks_is_embedding_and_head(name):
    weights, _ = random_decoder("llama", "blocks", **SIZES)
    data = random_blocks(np.random.default_rng(2), name, 97, 256, 0.001)
    table = LinearWeights(name.lower(), data, 97, 256, 1.0, "a8_g32")
    weights = dataclasses.replace(weights, embedding=table, head=None)
    assert default_head(weights) == "float"
    floats = LinearWeights("f32", ggml_floats(name, data), 97, 256)
    exact = dataclasses.replace(weights, embedding=floats)
    tokens = np.arange(40, dtype=np.int32)

    def run(weights, head):
        with NativeEngine(weights, threads=1, head=head) as engine:
            return engine.head, engine.step([Job(engine.new(), tokens, "all")])[0]

    expected = run(exact, "float")[1]
    for head in (None, "int8", "int6", "int4"):
        kind, found = run(weights, head)
        assert kind == (head or name.lower())
        if head:
            np.testing.assert_array_equal(found, run(exact, head)[1])  # built from the very same rows
        else:
            # Activations of 8 bits a group of 32: half a step of their largest, 1 / 254, at random signs.
            assert 0 < np.abs(found - expected).mean() < 0.01 * expected.std()
    with pytest.raises(ValueError, match=f"only a head of floats can be screened, not one of {name.lower()}"):
        NativeEngine(weights, head="screen")


# --- Mistakes: one sentence with the name of the tensor.


def test_what_does_not_fit_is_refused():
    weights, _ = random_decoder("llama", "blocks", **SIZES)
    layer = weights.layers[0]

    def refused(message, run=check, **changes):
        linear = dataclasses.replace(layer.q, **changes)
        broken = [dataclasses.replace(layer, q=linear), *weights.layers[1:]]
        with pytest.raises(ValueError, match=message):
            run(dataclasses.replace(weights, layers=broken))

    name = layer.q.layout
    columns, size = BLOCKS[name]
    rows, cols = layer.q.rows, layer.q.cols
    refused(
        rf"^layers\[0\].q has data uint8 \[{rows}, {cols // columns * size - 1}\], expected", data=layer.q.data[:, 1:]
    )
    refused("has activations None, expected a8_g32$", activations=None)
    refused("has activations 'a8', expected a8_g32$", activations="a8")
    odd = dataclasses.replace(weights, shape=dataclasses.replace(weights.shape, hidden_size=200))
    table = dataclasses.replace(weights.embedding, layout="q4_k", cols=200)
    with pytest.raises(ValueError, match=r"^embedding has 200 columns, but q4_k has blocks of 256$"):
        check(dataclasses.replace(odd, embedding=table))
    table = LinearWeights("tq2_0", np.zeros((97, 66), np.uint8), 97, 256, 1.0, "a8")
    with pytest.raises(ValueError, match=r"^embedding has activations 'a8', expected a8_g32$"):
        check(dataclasses.replace(weights, embedding=table))
    with pytest.raises(ValueError, match=r"^q4_k has blocks of 256 columns, which does not divide 200$"):
        _native.RowTable("q4_k", np.zeros((1, 144), np.uint8), 1, 200, 1.0)
    with pytest.raises(ValueError, match=r"^data has 143 bytes, expected 144 for q4_k"):
        _native.RowTable("q4_k", np.zeros((1, 143), np.uint8), 1, 256, 1.0)


@pytest.mark.parametrize("name", GGML)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scales_that_are_no_numbers_are_refused_by_name(name, value):
    weights, _ = random_decoder("llama", "blocks", **SIZES)
    layer = weights.layers[1]
    for at in HALVES[name]:
        data = random_blocks(np.random.default_rng(0), name, layer.up.rows, layer.up.cols)
        begin = data.shape[1] - BLOCKS[name.lower()][1] + at  # in the last block
        data[-1, begin : begin + 2] = np.float16([value]).view(np.uint8)
        broken = dataclasses.replace(layer, up=dataclasses.replace(layer.up, layout=name.lower(), data=data))
        message = rf"^layers\[1\].up: {name.lower()} data holds a scale that is not a finite number$"
        with pytest.raises(ValueError, match=message):
            NativeEngine(dataclasses.replace(weights, layers=[weights.layers[0], broken]), threads=1)


def test_a_row_whose_scale_is_no_number_is_no_number():
    data = random_blocks(np.random.default_rng(0), "Q8_0", 2, 64)
    data[1, :2] = np.float16([np.nan]).view(np.uint8)
    table = _native.RowTable("q8_0", data, 2, 64, 1.0)
    assert (
        np.isnan(table.row(1)[:32]).all() and np.isfinite(table.row(1)[32:]).all() and np.isfinite(table.row(0)).all()
    )
    weights, _ = random_decoder("llama", "blocks", **SIZES)
    broken = LinearWeights("q8_0", np.tile(data[1:, :68], (97, 4)), 97, 256, 1.0, "a8_g32")
    with pytest.raises(ValueError, match="not finite"):  # a head of integers is made of all rows
        NativeEngine(dataclasses.replace(weights, head=broken), threads=1, head="int8")
