"""Folders of quantised models through both engines: every layout in its own bits, rounded inputs, adapters. The torch
engine is the truth for the native one; gguf, the formats and the papers' formulas are torch's (test_stored.py)."""

import dataclasses

import numpy as np
import pytest
import torch
from mixed import DTYPES, FORMATS, WIDE, mixed, packed
from test_engines import MEAN_KL, MEDIAN_LOGIT, TOP_1, log_softmax, teacher_forced

from tritkit import _native
from tritkit.checkpoint import open_folder
from tritkit.engine import Job
from tritkit.engine.codes import grouped
from tritkit.engine.load import decoder_weights, load
from tritkit.engine.native import NativeEngine
from tritkit.engine.torch import input_quantizer, model_of
from tritkit.folderwriter import write_folder
from tritkit.formats import format_of
from tritkit.layouts import LAYOUTS
from tritkit.methods.rtn import unpacked
from tritkit.models.shapes import linear_names
from tritkit.stored import InputQuantizer, StoredLinear, StoredMatrix
from tritkit.tensorfile import StoredTensor

INPUTS = ["int8_row", "int8_tensor", "int8_tensor_asym", "int8_g32", "int4_row", "int8_row_asym", "a8_g32", "a8",
          "int6_tensor", "int5_tensor_asym", "a8_q128", "int8_g64"]  # fmt: skip
# One rounding in some ten thousand falls the other way, since sums of floats have an order, and every later position of
# that sequence sees it: in short sequences most positions see none.
CONTEXT = 4
A8_G32 = ["a8_g32"]  # what the native engine makes of inputs without a format


@pytest.fixture
def source(make_folder):
    return make_folder("llama", initializer_range=0.02, tie_word_embeddings=False, **WIDE)


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(0, 320, 1024).astype(np.int32)


def torch_logits(folder, tokens, context=CONTEXT):
    """The torch model's; a head of codes reads what the native engine gives it, in a8_g32."""
    model = model_of(open_folder(folder)).eval()
    head = model.model.embed_tokens if model.lm_head is None else model.lm_head
    rounded = InputQuantizer("a8_g32") if isinstance(head, StoredMatrix) else torch.nn.Identity()
    with torch.inference_mode():
        batch = torch.from_numpy(tokens.reshape(-1, context)).long()
        return model.logits(rounded(model.hidden(batch))).flatten(0, 1).numpy()


def native_logits(folder, tokens, context=CONTEXT, **settings):
    with NativeEngine(decoder_weights(open_folder(folder)), 1, kv_bits=32, **settings) as engine:
        return teacher_forced(engine, tokens, context)


@pytest.mark.parametrize("formats", [FORMATS[:9], FORMATS[9:]], ids=["first", "second"])
def test_every_layout_runs_in_both_engines(source, tmp_path, tokens, formats):
    folder = mixed(source, tmp_path / "mixed", formats, A8_G32)
    native = native_logits(folder, tokens)
    check_near(native, torch_logits(folder, tokens))
    plain = mixed(source, tmp_path / "plain", formats)
    assert np.array_equal(native_logits(plain, tokens), native)  # the same by another path
    for isa in _native.available_isas():
        few = native_logits(folder, tokens[:40], isa=isa)
        assert np.abs(few - native[:40]).max() < 1e-4, isa


@pytest.mark.parametrize(
    "inputs",
    [INPUTS[:4], INPUTS[4:8], INPUTS[8:], ["int4_tensor", "int4_tensor_asym"]],
    ids=["8 bits", "tokens", "more", "4 bits"],
)
def test_inputs_are_rounded_alike(source, tmp_path, tokens, inputs):
    """q, k and v read the same x and have different grids here."""
    folder = mixed(source, tmp_path / "mixed", FORMATS, inputs)
    native, exact = native_logits(folder, tokens), torch_logits(folder, tokens)
    check_near(native, exact)
    others = native_logits(mixed(source, tmp_path / "float", FORMATS), tokens)
    assert np.median(np.abs(others - exact)) > 1e-4  # the inputs do matter


def test_asymmetric_inputs_of_matrices_with_a_scale(source, tmp_path, tokens):
    """What the numbers of FP4 are multiplied by holds for the sums of the rows too."""
    folder = mixed(source, tmp_path / "mixed", ["fp4_g32"], ["int8_tensor_asym", "int8_row_asym"])
    check_near(native_logits(folder, tokens), torch_logits(folder, tokens))


def test_long_sequences_tell_the_same(source, tmp_path, tokens):
    folder = mixed(source, tmp_path / "mixed", FORMATS, INPUTS, (0,))
    exact, native = (of(folder, tokens, 128) for of in (torch_logits, native_logits))
    p, q = log_softmax(exact), log_softmax(native)
    assert (np.exp(p) * (p - q)).sum(-1).mean() <= MEAN_KL
    assert (native.argmax(-1) == exact.argmax(-1)).mean() >= 0.99


def check_near(native, exact):
    """What DESIGN asks for. The likeliest token of this untrained model is often likeliest by a hair, so that one is
    looked at where no rounding fell the other way: which is nearly everywhere, and there all must be equal."""
    p, q = log_softmax(exact), log_softmax(native)
    assert np.median(np.abs(native - exact)) <= MEDIAN_LOGIT
    assert (np.exp(p) * (p - q)).sum(-1).mean() <= MEAN_KL
    same = np.abs(native - exact).max(-1) < 1e-4
    assert same.mean() > 0.9
    assert (native.argmax(-1) == exact.argmax(-1))[same].mean() >= TOP_1


def test_adapters_are_added(source, tmp_path, tokens):
    folder = mixed(source, tmp_path / "mixed", FORMATS, A8_G32, adapters=(1,))
    native, exact = native_logits(folder, tokens), torch_logits(folder, tokens)
    check_near(native, exact)
    without = native_logits(mixed(source, tmp_path / "without", FORMATS), tokens)
    assert np.median(np.abs(without - exact)) > 1e-2
    engine, bare = (load(f, threads=1).engine for f in (folder, tmp_path / "without"))
    for each in (engine, bare):
        each.step([Job(each.new(), tokens[:1])])
    assert engine.bytes_per_token - bare.bytes_per_token == 256 * 256 * 2


@pytest.mark.parametrize("kind", ["int8_row", "int4_g32_asym", "q8_0", "q6_k", "int6_tensor", "fp4"])
@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_of_codes(make_folder, tmp_path, tokens, kind, tied):
    source = make_folder("llama", initializer_range=0.02, tie_word_embeddings=tied, **WIDE)
    folder = mixed(source, tmp_path / "mixed", ["int4_g64"], A8_G32, embedding=kind, head=None if tied else kind)
    check_near(native_logits(folder, tokens), torch_logits(folder, tokens))


@pytest.mark.parametrize("kind", ["nf4", "nf4_g32_dq"])
def test_nf4_is_near(source, tmp_path, tokens, kind):
    """Its numbers are integers of 16 bits in the native engine, off by 4e-6 of the largest. That is enough for some
    roundings of every token to fall the other way, so the products are compared, and the divergence."""
    chance = np.random.default_rng(0)
    w, x = chance.standard_normal((48, 256)).astype(np.float32), chance.standard_normal((5, 256)).astype(np.float32)
    layout, arrays = packed(kind, w)
    data, groups, scale = grouped(layout, arrays, w.shape)
    built = _native.GroupedLinear(_native.Runner(1), data, groups.bits, groups.size, **groups.arrays(), scale=scale,
                                  cols=256, field_bits=4)  # fmt: skip
    linear = StoredLinear(layout, arrays, w.shape, inputs=InputQuantizer("a8_g32"))
    found, exact = _native.apply(_native.Runner(1), built, x), linear(torch.from_numpy(x)).numpy()
    assert np.abs(found - exact).max() < 2e-5 * np.abs(exact).std() * 5
    folder = mixed(source, tmp_path / "m", [kind], A8_G32, embedding=kind, head=kind)
    p, q = (log_softmax(of(folder, tokens)) for of in (torch_logits, native_logits))
    assert (np.exp(p) * (p - q)).sum(-1).mean() <= MEAN_KL


def test_the_torch_model_keeps_the_bits_of_the_file(source, tmp_path):
    folder = open_folder(mixed(source, tmp_path / "m", FORMATS, INPUTS, (0, 1), embedding="q8_0", head="int4_g64"))
    model = model_of(folder)
    held = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    stored = sum(t.array.nbytes for t in folder.tensors.values())
    assert held < 1.02 * stored
    full = sum(p.numel() * 4 for p in model_of(open_folder(source)).parameters())
    assert held < 0.35 * full


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_generate_and_eval(source, tmp_path, tokens, engine):
    from tritkit.engine.text import generate
    from tritkit.evals.perplexity import evaluate

    folder = mixed(source, tmp_path / "m", FORMATS, ["int8_row", "int8_tensor"], (0,), embedding="q8_0")
    model = load(folder, engine, threads=1)
    assert generate("the cat", model, max_tokens=8, temperature=0) == generate(
        "the cat", model, max_tokens=8, temperature=0
    )
    found = evaluate(model, protocol="gptq", context=64, limit=256)
    assert found["eval_engine"] == engine and 100 < found["gptq_perplexity"] < 1000  # of 320 tokens, untrained


# --- The grids by themselves.


@pytest.mark.parametrize("kind", [kind for kind in INPUTS if kind not in A8_G32])
def test_codes_are_torchs(source, tmp_path, kind):
    """Codes, scales and zero points of rows that are large, small, one-sided, constant and zero."""
    folder = open_folder(mixed(source, tmp_path / "m", ["int4_g32"], [kind]))
    name = linear_names(folder.config)[0]
    chance = np.random.default_rng(3)
    x = chance.standard_normal((60, 256)).astype(np.float32) * 10.0 ** chance.integers(-6, 6, (60, 1)).astype(
        np.float32
    )
    x[1], x[2], x[3], x[4] = 0, 3.5, np.abs(x[3]), -np.abs(x[4])
    x[5] = np.where(np.arange(256) % 2, 254, -1)  # -0.5 if 254 becomes 127: to even
    grid = decoder_weights(folder).layers[0].q.inputs
    built = _native.InputGrid(grid.lo, grid.hi, grid.group, grid.asymmetric, grid.scale, grid.zero, grid.peak)
    codes, scales, shifts = _native.quantize_on_grid(x, built)
    quantizer = input_quantizer(folder, name)
    expected, theirs = quantizer.encode(torch.from_numpy(x))
    center = 128 if grid.hi > 127 else 0
    np.testing.assert_array_equal(codes.astype(np.int16) + center, expected.reshape(60, 256).numpy())
    spread = theirs.scale.numpy().reshape(-1, theirs.scale.shape[1])
    np.testing.assert_array_equal(scales, np.broadcast_to(np.repeat(spread, 8 // spread.shape[1], 1), (60, 8)))
    values = codes * np.repeat(scales, 32, 1) + shifts[:, None]
    np.testing.assert_allclose(values, quantizer(torch.from_numpy(x)), rtol=2e-5, atol=1e-6 * np.abs(x).max(1).max())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_products_with_the_lowest_code_are_exact_on_every_isa(bits):
    """-128, which a8_g32 never has, times every code, against int64."""
    chance = np.random.default_rng(bits)
    rows, cols = 37, 320
    codes = chance.integers(0, 1 << bits, (rows, cols)).astype(np.uint8)
    codes[::2] = (1 << bits) - 1
    codes[3] = 0
    x = chance.choice(np.array([-128, -128, 127, 3], np.float32), (9, cols))
    x[0] = -128
    ones = np.ones((rows, 10), np.float16)
    wide = (codes.astype(np.int64) - (1 << (bits - 1))) @ x.astype(np.int64).T
    for isa in _native.available_isas():
        runner = _native.Runner(1, isa)
        built = _native.GroupedLinear(runner, codes, bits, 32, ones)
        built.round_inputs(_native.InputGrid(-128, 127, scale=1.0), None)
        assert np.array_equal(_native.apply(runner, built, x), wide.T.astype(np.float32)), isa
        for tokens in (1, 2, 5):
            assert np.array_equal(_native.apply(runner, built, x[:tokens]), wide.T[:tokens].astype(np.float32)), isa


def test_tables_with_the_lowest_code_are_exact_on_every_isa():
    chance = np.random.default_rng(0)
    codes = chance.integers(0, 16, (37, 320)).astype(np.uint8)
    x = chance.choice(np.array([-128, 127], np.float32), (5, 320))
    ones = np.ones((37, 10), np.float16)
    for table in (np.linspace(-128, 127, 16), np.linspace(-3000, 3000, 16)):
        table = table.astype(np.int16)
        wide = table.astype(np.int64)[codes] @ x.astype(np.int64).T
        for isa in _native.available_isas():
            runner = _native.Runner(1, isa)
            built = _native.GroupedLinear(runner, codes, 4, 32, ones, table=table)
            built.round_inputs(_native.InputGrid(-128, 127, scale=1.0), None)
            np.testing.assert_allclose(_native.apply(runner, built, x), wide.T, rtol=1e-6, atol=0, err_msg=isa)


def test_packed_fields_are_the_codes():
    chance = np.random.default_rng(1)
    for bits in range(2, 9):
        codes = chance.integers(0, 1 << bits, (21, 83)).astype(np.uint8)
        spread = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., :bits]
        fields = np.packbits(spread.reshape(21, -1), axis=1, bitorder="little")
        scales = chance.uniform(0.5, 1, (21, 1)).astype(np.float32)
        runner, x = _native.Runner(1), chance.standard_normal((3, 83)).astype(np.float32)
        apart = _native.GroupedLinear(runner, codes, bits, 83, scales)
        together = _native.GroupedLinear(runner, fields, bits, 83, scales, cols=83, field_bits=bits)
        np.testing.assert_array_equal(_native.apply(runner, together, x), _native.apply(runner, apart, x))
        table = _native.RowTable.grouped(fields, bits, 83, scales, cols=83, field_bits=bits)
        expected = (codes.astype(np.float32) - (1 << (bits - 1))) * scales
        np.testing.assert_array_equal(np.stack([table.row(r) for r in range(21)]), expected)


@pytest.mark.parametrize(
    ("formats", "inputs", "message"),
    [
        (["int8_row"], ["int8_row+outliers"], r"q_proj keeps outliers of its inputs in floats \(LLM.int8\(\)\)"),
        (["int8_row"], ["a4"], "q_proj has inputs a4, which only the torch engine runs"),
        (["int8_row"], ["int8_g16"], "q_proj has inputs int8_g16, which only the torch engine runs"),
        (["int8_row"], ["int8_g32_asym"], "q_proj has inputs int8_g32_asym, which only the torch engine runs"),
        (["int4_g8"], [], "q_proj: it has groups of 8 columns; the native engine runs multiples of 16"),
        (["mxfp4"], [], "q_proj is mxfp4, which only the torch engine runs"),
    ],
)
def test_what_the_native_engine_does_not_run_torch_does(source, tmp_path, tokens, formats, inputs, message):
    folder = mixed(source, tmp_path / "m", formats, inputs)
    with pytest.raises(ValueError, match=message):
        load(folder)
    engine = load(folder, "torch").engine
    assert np.isfinite(engine.step([Job(engine.new(), tokens[:20], "all")])[0]).all()


@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize(
    ("suffix", "array", "message"),
    [
        ("weight_code", np.array([9, -8], np.int16), "q_proj: dense holds 1 to 8 bits a code"),
        ("weight_code", np.array([4], np.int16), r"q_proj: dense wants weight_code of \(2,\)"),
        ("weight_scale", np.ones((256, 7), np.float16), "q_proj: dense has weight_scale of"),
        ("weight", np.zeros((255, 128), np.uint8), "q_proj: dense wants"),
        (
            "weight_scale",
            np.where(np.arange(256)[:, None] == 200, np.nan, np.ones((256, 8))).astype(np.float16),
            "q_proj.* not finite",
        ),
    ],
)
def test_odd_codes_are_refused(source, tmp_path, engine, suffix, array, message):
    folder = open_folder(mixed(source, tmp_path / "m", ["int4_g32"]))
    name = linear_names(folder.config)[0]
    odd = {**folder.tensors, f"{name}.{suffix}": StoredTensor(DTYPES[array.dtype.name], array)}
    opened = dataclasses.replace(folder, tensors=odd)
    with pytest.raises(ValueError, match=message):
        decoder_weights(opened) if engine == "native" else model_of(opened)


@pytest.mark.parametrize("layout", ["i2_s_x86", "i2_s_arm"])
def test_one_ternary_matrix_beside_floats_runs(source, tmp_path, tokens, layout):
    """As in a GGUF file of which only some linears are ternary: their inputs are rounded as those of other blocks."""
    folder = open_folder(source)
    name, tensors = linear_names(folder.config)[5], dict(folder.tensors)
    q = format_of("ternary").quantize(torch.from_numpy(folder.floats(name)))
    arrays = LAYOUTS[layout].pack(unpacked(q)).arrays
    del tensors[f"{name}.weight"]
    tensors |= {f"{name}.{k}": StoredTensor(DTYPES[a.dtype.name], a) for k, a in arrays.items()}
    write_folder(tmp_path / "m", folder.config, tensors, folder.tokenizer(), {name: layout}, inputs={name: "a8_g32"})
    check_near(native_logits(tmp_path / "m", tokens), torch_logits(tmp_path / "m", tokens))


def test_llm_int8_keeps_what_is_large(source, tmp_path, tokens):
    """With a threshold above all inputs it is int8_row; with one that some columns pass it is nearer to the floats."""
    float_inputs = mixed(source, tmp_path / "w8", ["int8_row"])
    coarse, same, apart = (
        mixed(source, tmp_path / name, ["int8_row"], [kind], threshold=threshold)
        for name, kind, threshold in (
            ("a", "int8_row", 6.0),
            ("b", "int8_row+outliers", 1e9),
            ("c", "int8_row+outliers", 1.5),
        )
    )
    assert open_folder(apart).outlier_threshold == 1.5
    exact, rounded, unmoved, nearer = (torch_logits(f, tokens[:128]) for f in (float_inputs, coarse, same, apart))
    assert np.median(np.abs(unmoved - rounded)) < 1e-6
    assert np.abs(nearer - exact).mean() < 0.8 * np.abs(rounded - exact).mean()


def test_formats_of_inputs_are_formats():
    for kind in INPUTS:
        assert format_of(kind).name == kind
