"""Laws of the translator: over all pairs of layouts codes survive, and scales as far as the target holds them.

And the two questions that a file leaves open: which order its I2_S is in, and whether its floats are ternary.
"""

import itertools
import warnings

import numpy as np
import pytest

from tritkit.checkpoint import open_folder
from tritkit.engine.load import bundled_folder
from tritkit.layouts import GGML, LAYOUTS, Packed, Unpacked, detect_i2s, layer_evidence
from tritkit.layouts.i2s import NORMS
from tritkit.layouts.translate import TERNARY, one_scale, pack_ternary, ternary_codes, ternary_misfit, translate

SHAPE = (8, 768)
PAIRS = [(a, b) for a, b in itertools.product(TERNARY, TERNARY)]
FLOAT16 = ("tq1_0", "tq2_0")


def ternary(seed: int = 0, scale: float = 0.0371, shape=SHAPE) -> Unpacked:
    """Ternary codes with a block of zeros."""
    codes = np.random.default_rng(seed).integers(-1, 2, shape).astype(np.int16)
    codes[1, 256:512] = 0
    return Unpacked(codes, np.full((1, 1), scale, np.float32))


def matrix(*layouts: str, **how) -> Unpacked:
    """A matrix that all these layouts hold: ternary, or binary where one of them wants that."""
    m = ternary(**how)
    return Unpacked(np.where(m.codes > 0, 1, -1).astype(np.int16), m.scale) if "binary_rows" in layouts else m


def values(m: Unpacked) -> np.ndarray:
    scale = np.broadcast_to(m.scale, (len(m.codes), m.scale.shape[1]))
    return m.codes * np.repeat(scale, m.codes.shape[1] // scale.shape[1], axis=1)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_codes_survive_and_scales_as_the_target_holds_them(source, target):
    for scale in (0.0371, 1.22, 3e-4, 812.5):
        m = matrix(source, target, scale=scale)
        first = pack_ternary(m, source)
        there = translate(first.packed, source, target, SHAPE)
        before, after = LAYOUTS[source].unpack(first.packed, SHAPE), LAYOUTS[target].unpack(there.packed, SHAPE)
        assert np.array_equal(before.codes, m.codes) and np.array_equal(after.codes, m.codes)
        s, t = one_scale(before).scale.item(), one_scale(after).scale.item()
        assert there.scale_error == pytest.approx(abs(t - s) / s, rel=1e-3, abs=1e-9)
        assert there.scale_error <= (2**-11 if target in FLOAT16 else 2**-23 if target == "hf_bitlinear" else 0)
        back = translate(there.packed, target, source, SHAPE)
        again = LAYOUTS[source].unpack(back.packed, SHAPE)
        assert np.array_equal(again.codes, m.codes)
        assert one_scale(again).scale.item() == pytest.approx(s, rel=2**-11 if target in FLOAT16 else 2**-22)
        if target not in FLOAT16 and "hf_bitlinear" not in (source, target):
            for name, array in first.packed.arrays.items():
                assert np.array_equal(array, back.packed.arrays[name])


def test_float16_changes_some_scales():
    assert 1e-5 < translate(pack_ternary(ternary(), "dense").packed, "dense", "tq2_0", SHAPE).scale_error < 2**-11
    assert pack_ternary(ternary(scale=0.375), "tq1_0").scale_error == 0


@pytest.mark.parametrize("target", FLOAT16)
def test_what_is_ternary_becomes_the_bytes_of_gguf(target):
    gguf = pytest.importorskip("gguf")
    m = ternary(scale=0.0371)
    type_ = getattr(gguf.GGMLQuantizationType, target.upper())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = gguf.quants.quantize(values(m).astype(np.float32), type_)
    found = translate(pack_ternary(m, "hf_autobitlinear").packed, "hf_autobitlinear", target, SHAPE).packed
    assert np.array_equal(found.arrays["weight"], expected)
    assert not GGML[target].unpack(found, SHAPE).scale[1, 1]  # a block of zeros has the scale 0


def blocks_of(scale: np.ndarray, target: str = "tq2_0") -> Packed:
    return LAYOUTS[target].pack(Unpacked(ternary().codes, scale.astype(np.float32)))


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_many_scales_survive_or_are_refused(source, target):
    if source not in FLOAT16:
        return
    packed = blocks_of(np.arange(1, 25).reshape(8, 3) / 16, source)
    if target == "binary_rows":
        with pytest.raises(ValueError, match=r"the codes -1 and 1, but 3.* of the weights are 0"):
            translate(packed, source, target, SHAPE)
    elif target in (*FLOAT16, "dense"):
        there = translate(packed, source, target, SHAPE)
        assert there.scale_error == 0
        back = translate(there.packed, target, source, SHAPE).packed
        assert np.array_equal(back.arrays["weight"], packed.arrays["weight"])
    else:
        with pytest.raises(ValueError, match=rf"{target} holds one scale .* has 23, from 0.0625 to 1.5"):
            translate(packed, source, target, SHAPE)  # that of the block of zeros is none of them


@pytest.mark.parametrize("target", TERNARY)
def test_blocks_of_scale_zero_belong_to_any_scale(target):
    scale = np.full((8, 3), 0.375)
    scale[1, 1] = scale[2, 2] = 0  # one block of codes 0, and one of other codes, whose weights are 0 all the same
    packed = blocks_of(scale)
    if target == "binary_rows":
        return
    m = LAYOUTS["tq2_0"].unpack(packed, SHAPE)
    found = LAYOUTS[target].unpack(translate(packed, "tq2_0", target, SHAPE).packed, SHAPE)
    assert np.allclose(values(found), values(m), rtol=2**-22, atol=0)
    assert not values(found)[2, 512:].any()


@pytest.mark.parametrize("target", [t for t in TERNARY if t != "binary_rows"])
def test_a_matrix_of_zeros_has_any_scale(target):
    zeros = Unpacked(np.zeros(SHAPE, np.int16), np.zeros((1, 1), np.float32))
    found = LAYOUTS[target].unpack(pack_ternary(zeros, target).packed, SHAPE)
    assert not values(found).any() and np.isfinite(found.scale).all()


@pytest.mark.parametrize("target", FLOAT16)
def test_scales_beyond_float16_are_refused(target):
    for scale, becomes in ((1e5, "inf"), (-7e4, "-inf"), (1e-9, "0"), (8.7e-8, "5.96")):
        with pytest.raises(ValueError, match=f"cannot hold the scale {scale:.6g}: it would become {becomes}"):
            pack_ternary(ternary(scale=scale), target)
    for scale in (65504, 1e-5, -0.5):
        assert pack_ternary(ternary(scale=scale), target).scale_error < 0.01


def test_what_is_not_ternary_is_refused():
    w = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    with pytest.raises(ValueError, match="codes from -8 to 7"):
        translate(GGML["q4_0"].quantize(w), "q4_0", "tq2_0", SHAPE)
    with pytest.raises(ValueError, match="and offsets"):
        translate(GGML["q4_1"].quantize(np.abs(np.sign(w)) * 0.5), "q4_1", "tq2_0", SHAPE)
    with pytest.raises(ValueError, match="no layout of ternary weights"):
        translate(pack_ternary(ternary(), "dense").packed, "dense", "q4_0", SHAPE)
    bad = blocks_of(np.full((8, 3), np.nan))
    with pytest.raises(ValueError, match="not finite"):
        translate(bad, "tq2_0", "tq1_0", SHAPE)


@pytest.mark.parametrize(
    ("target", "shape", "message"),
    [
        ("tq1_0", (8, 640), "blocks of 256 columns"),
        ("tq2_0", (8, 64), "blocks of 256 columns"),
        ("i2_s_x86", (8, 64), "blocks of 128 columns"),
        ("hf_bitlinear", (6, 256), "multiple of 4, not 6"),
    ],
)
def test_shapes_that_a_target_cannot_hold_are_refused(target, shape, message):
    m = Unpacked(np.ones(shape, np.int16), np.ones((1, 1), np.float32))
    with pytest.raises(ValueError, match=message):
        pack_ternary(m, target)


@pytest.mark.parametrize("rounded", ["float32", "float16", "bfloat16"])
def test_floats_on_the_grid_are_codes(rounded):
    import torch

    for seed, scale in enumerate((0.0371, 1.22, 3e-4, 812.5)):
        m = ternary(seed, scale)
        w = torch.from_numpy(values(m)).to(getattr(torch, rounded)).float().numpy()
        found = ternary_codes(w)
        assert np.array_equal(found.codes, m.codes)
        assert np.array_equal(values(found), w)
        assert ternary_misfit(w) == (found.scale.item(), 0)
    sparse = np.zeros(SHAPE, np.float32)
    sparse[2, 3] = -0.25
    assert ternary_codes(sparse).codes.sum() == -1 and ternary_misfit(sparse) == (0.25, 0)
    assert not ternary_codes(np.zeros(SHAPE, np.float32)).codes.any()


def test_floats_off_the_grid_are_refused_with_the_size_of_the_misfit():
    random = np.random.default_rng(0)
    w = random.standard_normal(SHAPE).astype(np.float32)
    with pytest.raises(ValueError, match=r"is 4\d\.\d\d% away; `tritkit quantize MODEL OUT ternary`"):
        ternary_codes(w)
    grid = values(ternary(scale=0.5)).astype(np.float32)
    for noise in (1e-1, 1e-3, 1e-5):
        scale, error = ternary_misfit(grid + noise * w)
        assert scale == pytest.approx(0.5, rel=2 * noise)
        # |noise| / |w|, less what the best scale takes of it
        assert error == pytest.approx(noise * np.linalg.norm(w) / np.linalg.norm(grid), rel=0.06)
    one_off = grid.copy()
    one_off[0, 0] = 0.6
    with pytest.raises(ValueError, match="not ternary"):
        ternary_codes(one_off)
    one_off[0, 0] = np.nan
    with pytest.raises(ValueError, match="1 of these weights are not finite"):
        ternary_codes(one_off)


needs_bundled = pytest.mark.skipif(not bundled_folder().is_dir(), reason="the bundled model is not in this checkout")


def bundled_evidence(byte_of) -> list[list[tuple[np.ndarray, list[np.ndarray]]]]:
    """The evidence of each layer of the bundled ternary model, its codes written by ``byte_of``."""
    folder = open_folder(bundled_folder())
    found = []
    for i in range(folder.config.num_hidden_layers):
        layer = f"model.layers.{i}."
        linears = {name: byte_of(folder.codes(layer + name).codes) for name in NORMS}
        norms = {name: folder.tensors[f"{layer}{name}.weight"].float32() for name in set(NORMS.values())}
        found.append(layer_evidence(linears, norms))
    return found


def i2s_bytes(order: str):
    return lambda codes: LAYOUTS[order].pack(Unpacked(codes, np.ones((1, 1), np.float32))).arrays["weight"]


@needs_bundled
@pytest.mark.parametrize("order", ["i2_s_x86", "i2_s_arm"])
def test_the_order_of_a_trained_model_is_told(order):
    layers = bundled_evidence(i2s_bytes(order))
    assert detect_i2s(list(itertools.chain(*layers))) == order
    for evidence in layers:
        assert detect_i2s(evidence) == order  # each layer says so
        for one in evidence:  # and no matrix says the other
            assert detect_i2s([one]) in (order, None)
    gate, up, down = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    folder = open_folder(bundled_folder())
    alone = {name: i2s_bytes(order)(folder.codes(f"model.layers.1.{name}").codes) for name in (gate, up, down)}
    assert detect_i2s(layer_evidence(alone, {})) == order  # without any norm


@needs_bundled
def test_an_order_that_is_neither_is_not_taken_for_one():
    def four_rows(codes):  # what bitnet.cpp writes on x86 without ACT_PARALLEL: a byte is one column of four rows
        t = (codes + 1).astype(np.uint8).reshape(-1, 4, codes.shape[1])
        return (t[:, 0] << 6 | t[:, 1] << 4 | t[:, 2] << 2 | t[:, 3]).reshape(len(codes), -1)

    assert detect_i2s(list(itertools.chain(*bundled_evidence(four_rows)))) is None


def test_what_cannot_be_told_is_not_guessed():
    random = np.random.default_rng(0)
    for layers in (1, 8):
        evidence = []
        for _ in range(layers):
            linears = {n: i2s_bytes("i2_s_x86")(random.integers(-1, 2, (256, 256)).astype(np.int16)) for n in NORMS}
            evidence += layer_evidence(linears, {norm: random.standard_normal(256) for norm in NORMS.values()})
        assert sum(len(references) for _, references in evidence) == 19 * layers
        assert detect_i2s(evidence) is None
    byte = evidence[0][0]
    for reference in (np.ones(256), np.full(256, np.nan), np.ones(255), np.zeros(0)):
        assert detect_i2s([(byte, [reference])]) is None
    assert detect_i2s([]) is None
