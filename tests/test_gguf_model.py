"""A model to GGUF and back: nothing is lost that the type can hold, and what it cannot hold is refused."""

import json

import gguf
import numpy as np
import pytest

from tritkit.checkpoint import open_folder
from tritkit.difference import DIFFERENT, EQUAL, MISSING, REQUANTISED, ROUNDED, differences
from tritkit.engine.torch import model_of
from tritkit.gguf import GGUFFile
from tritkit.gguf_check import K_QUANTS, largest_error
from tritkit.gguf_config import FILE_TYPES, llama3_factors, llama3_scaling
from tritkit.gguf_export import export_gguf
from tritkit.gguf_model import (
    ggml_name,
    halves_to_pairs,
    hf_name,
    open_gguf,
    pairs_to_halves,
    shared_scale,
)
from tritkit.gguf_plan import WRITTEN, plan
from tritkit.gguf_writer import NewTensor, write_gguf
from tritkit.importer import import_model
from tritkit.inspection import inspect
from tritkit.layouts import GGML
from tritkit.layouts.search import SEARCHES, quantize
from tritkit.methods.importance import Importance
from tritkit.methods.mixes import MIXES
from tritkit.models.rope import Rope, rope_from_hf
from tritkit.models.shapes import linear_names, matrix_names, matrix_shape
from tritkit.pack import pack

WIDE = {"hidden_size": 256, "intermediate_size": 512}  # whole blocks of every type
LLAMA3 = ((8.0, 8192, 1.0, 4.0), (32.0, 8192, 1.0, 4.0), (4.0, 4096, 1.0, 8.0))
ROUNDING = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4")


def statuses(a, b):
    return {d.name: d.status for d in differences(open_any(a), open_any(b))}


def open_any(path):
    return open_gguf(path, "x86") if str(path).endswith(".gguf") else open_folder(path)


def logits(folder):
    import torch

    with torch.inference_mode():
        return model_of(folder)(torch.arange(40)[None] * 7 % 300).numpy()


FAMILIES = {
    "llama": ("llama", {}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "llama, wide heads": ("llama", {"head_dim": 24}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {"rope_theta": 1e6}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": False}),
    "bitnet": ("bitnet", {}),
    "bitnet, silu": ("bitnet", {"gate": "silu"}),
}


@pytest.mark.parametrize(("family", "changes"), FAMILIES.values(), ids=FAMILIES)
def test_every_family_comes_back(make_model, tmp_path, family, changes):
    folder = make_model(family, **changes)
    report = export_gguf(open_folder(folder), tmp_path / "x.gguf")
    assert set(report["types"]) == {"f32"}
    back = open_gguf(tmp_path / "x.gguf")
    assert set(statuses(folder, tmp_path / "x.gguf").values()) == {EQUAL}
    wanted, found = open_folder(folder).config.to_hf(), back.config.to_hf()
    lost = {"initializer_range"} | ({"model_type", "architectures", "sliding_window"} if family == "mistral" else set())
    assert {k: found.get(k) for k in wanted if k not in lost} == {k: v for k, v in wanted.items() if k not in lost}
    np.testing.assert_allclose(logits(back), logits(open_folder(folder)), atol=1e-5)
    assert back.tokenizer().encode("The cat — naïve? 12") == open_folder(folder).tokenizer().encode(
        "The cat — naïve? 12"
    )


ROPES = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn, factors": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 0.75,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_rotary_scaling_comes_back(make_model, tmp_path, rope):
    folder = make_model("llama")
    hf = json.loads((folder / "config.json").read_text())
    rope = {**rope, "rope_theta": hf["rope_theta"]}
    (folder / "config.json").write_text(json.dumps({**hf, "rope_parameters": rope, "rope_scaling": rope}))
    opened = open_folder(folder)
    export_gguf(opened, tmp_path / "x.gguf")
    np.testing.assert_allclose(
        open_gguf(tmp_path / "x.gguf").config.rope_frequencies()[0], opened.config.rope_frequencies()[0], rtol=1e-6
    )
    np.testing.assert_allclose(logits(open_gguf(tmp_path / "x.gguf")), logits(opened), atol=1e-4)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", *ROUNDING])
def test_every_type_has_the_bytes_that_ggmls_own_library_makes(make_folder, tmp_path, kind):
    folder = open_folder(make_folder("llama", **WIDE))
    export_gguf(folder, tmp_path / "x.gguf", kind, pure=kind in SEARCHES)
    file = GGUFFile(tmp_path / "x.gguf")
    number = gguf.GGMLQuantizationType[kind.upper()]
    for name in matrix_names(folder.config):
        values = folder.floats(name)
        heads = {"q_proj": 4, "k_proj": 2}.get(name.rpartition(".")[2])
        if heads:
            values = values[halves_to_pairs(len(values), heads)]
        wanted = gguf.quants.quantize(values, number)
        assert file[ggml_name(f"{name}.weight")].data.tobytes() == wanted.tobytes(), name
    found = statuses(folder.path, tmp_path / "x.gguf")
    matrices = {found[f"{name}.weight"] for name in matrix_names(folder.config)}
    assert matrices == {{"f32": EQUAL, "f16": ROUNDED, "bf16": ROUNDED}.get(kind, REQUANTISED)}


@pytest.mark.parametrize("kind", [*ROUNDING, *K_QUANTS])
def test_importing_keeps_the_bits_and_both_engines_run_them(make_folder, tmp_path, kind):
    from tritkit.engine import Job
    from tritkit.engine.load import decoder_weights
    from tritkit.engine.native import NativeEngine

    export_gguf(open_folder(make_folder("llama", **WIDE)), tmp_path / "x.gguf", kind, pure=kind in SEARCHES)
    metrics = import_model(tmp_path / "x.gguf", tmp_path / "back")
    assert metrics["layout"] == kind
    assert metrics["bits_per_weight"] == 8 * GGML[kind].block_bytes / GGML[kind].block
    assert set(statuses(tmp_path / "x.gguf", tmp_path / "back").values()) == {EQUAL}
    export_gguf(open_folder(tmp_path / "back"), tmp_path / "again.gguf")
    first, second = GGUFFile(tmp_path / "x.gguf"), GGUFFile(tmp_path / "again.gguf")
    assert {n: first[n].data.tobytes() for n in first} == {n: second[n].data.tobytes() for n in second}
    tokens = np.arange(40, dtype=np.int32) * 7 % 300
    wanted = logits(open_folder(tmp_path / "back"))[0]
    if kind == "mxfp4":  # the native engine has no kernel for it; torch runs the values that it stands for
        export_gguf(open_folder(tmp_path / "back"), tmp_path / "values.gguf", "f32")
        np.testing.assert_allclose(logits(open_gguf(tmp_path / "values.gguf"))[0], wanted, atol=1e-5)
        return
    for source in (open_folder(tmp_path / "back"), open_gguf(tmp_path / "x.gguf")):
        with NativeEngine(decoder_weights(source), kv_bits=32) as engine:
            (found,) = engine.step([Job(engine.new(), tokens, "all")])
        # activations are rounded to 8 bits there, and floats here
        assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.999


@pytest.mark.parametrize("form", ["latent", "packed"])
@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0", "i2_s"])
def test_ternary_codes_survive(make_folder, tmp_path, kind, form):
    from tritkit.engine import Job
    from tritkit.engine.load import decoder_weights
    from tritkit.engine.native import NativeEngine

    latent = make_folder("b158", **WIDE)
    pack(latent, tmp_path / "packed", "float32")
    packed = open_folder(tmp_path / "packed")
    source = packed if form == "packed" else open_folder(latent)
    report = export_gguf(source, tmp_path / "x.gguf", kind)
    assert report["architecture"] == "bitnet-b1.58"
    assert any("Mainline llama.cpp cannot run" in note for note in report["notes"])
    back = open_gguf(tmp_path / "x.gguf", "x86")
    assert (back.config.weights, back.config.activations) == ("ternary", "a8")
    for name in linear_names(packed.config):
        ours, theirs = back.codes(name), packed.codes(name)
        assert (ours.codes == theirs.codes).all()
        used = ours.scale[ours.scale != 0]
        assert np.abs(used - theirs.scale.item()).max() <= theirs.scale.item() * (0 if kind == "i2_s" else 2**-11)
    found = statuses(tmp_path / "packed", tmp_path / "x.gguf")
    assert not {DIFFERENT, MISSING} & {found[f"{n}.weight"] for n in linear_names(packed.config)}
    with NativeEngine(decoder_weights(back), kv_bits=32, head="float") as engine:
        (ours,) = engine.step([Job(engine.new(), np.arange(40, dtype=np.int32) * 7 % 300, "all")])
    wanted = logits(back)[0]
    assert np.abs(ours - wanted).max() < 0.05 * np.abs(wanted).max()  # embeddings and head of 8 bits, rounded inputs


def test_a_ternary_model_in_floats_is_known_by_its_values(make_folder, tmp_path):
    """One that was exported as plain floats may go back to codes; one that is not ternary may not."""
    pack(make_folder("b158", **WIDE), tmp_path / "packed", "float32")
    export_gguf(open_folder(tmp_path / "packed"), tmp_path / "floats.gguf", "f16")
    floats = open_gguf(tmp_path / "floats.gguf")
    assert floats.config.weights is None
    export_gguf(floats, tmp_path / "codes.gguf", "tq2_0")
    for name in linear_names(floats.config):
        ours, theirs = open_gguf(tmp_path / "codes.gguf").codes(name), open_folder(tmp_path / "packed").codes(name)
        assert (ours.codes == theirs.codes).all()
    with pytest.raises(ValueError, match=r"q_proj: these weights are not ternary: .* away; `tritkit quantize"):
        export_gguf(open_folder(make_folder("llama", **WIDE)), tmp_path / "no.gguf", "tq2_0")
    assert not (tmp_path / "no.gguf").exists()


def test_rows_that_are_no_whole_blocks_fall_back_and_say_so(make_folder, tmp_path):
    folder = open_folder(make_folder("llama", intermediate_size=172))
    report = export_gguf(folder, tmp_path / "x.gguf", "q8_0")
    assert report["types"] == {"q8_0": 13, "f16": 2}
    assert report["notes"] == ["2 matrices are F16: 172 columns are no multiple of 32."]
    pack(make_folder("b158"), tmp_path / "packed")
    with pytest.raises(ValueError, match=r"TQ2_0 has blocks of 256 columns, but a row of .* has 64: .* --type q8_0"):
        export_gguf(open_folder(tmp_path / "packed"), tmp_path / "y.gguf")


REFUSED = {
    "mix": ("llama", "Q4_K_L", None, "no type 'q4_k_l' to export; known are f32, .*q4_k_s, q4_k_m"),
    "embedding of a mix": (
        "llama",
        "q8_0",
        "q4_k_m",
        "no type 'q4_k_m' for an embedding; known are .* q6_k",
    ),
    "unknown": ("llama", "q9_9", None, "no type 'q9_9' to export; known are f32"),
    "embedding": ("llama", "q8_0", "tq2_0", "no type 'tq2_0' for an embedding"),
    "i2_s": ("llama", "i2_s", None, "these weights are not ternary"),
}


@pytest.mark.parametrize(("form", "kind", "embedding", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_written_is_refused(make_folder, tmp_path, form, kind, embedding, message):
    with pytest.raises(ValueError, match=message):
        export_gguf(open_folder(make_folder(form, **WIDE)), tmp_path / "x.gguf", kind, embedding)
    assert not list(tmp_path.glob("*gguf*"))


def test_nothing_is_replaced_without_being_asked(make_folder, tmp_path):
    folder = open_folder(make_folder("llama"))
    (tmp_path / "x.gguf").write_text("mine")
    with pytest.raises(ValueError, match="exists; give another name, or --overwrite"):
        export_gguf(folder, tmp_path / "x.gguf")
    export_gguf(folder, tmp_path / "x.gguf", overwrite=True)
    with pytest.raises(ValueError, match="there is no folder"):
        export_gguf(folder, tmp_path / "none" / "x.gguf")


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_k_m", "q2_k"])
def test_what_does_not_read_back_is_removed(make_folder, tmp_path, monkeypatch, kind):
    """A quantiser that is wrong in one byte of a row: the file never gets its name, and what was there stays."""
    folder = open_folder(make_folder("llama", **WIDE))
    (tmp_path / "x.gguf").write_text("mine")

    def wrong(kind, w, importance):
        rows = quantize(kind, w, importance)
        rows[:, 17] ^= 64
        return rows

    monkeypatch.setattr("tritkit.gguf_export.quantize", wrong)
    with pytest.raises(OSError, match=r"weight does not read back as it was written: .* the file was removed"):
        export_gguf(folder, tmp_path / "x.gguf", kind, overwrite=True)
    assert (tmp_path / "x.gguf").read_text() == "mine"
    assert list(tmp_path.glob("*gguf*")) == [tmp_path / "x.gguf"]


@pytest.mark.parametrize("kind", ["f16", "bf16", *ROUNDING])
def test_the_bound_of_verification_is_near(kind):
    """Rounding stays within it, and comes close to it: a bound that nothing can break would verify nothing."""
    values = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
    number = gguf.GGMLQuantizationType[kind.upper()]
    back = gguf.quants.dequantize(gguf.quants.quantize(values, number), number)
    share = np.abs(back - values) / largest_error(kind, values)
    assert (0.99 if kind == "mxfp4" else 0.6) < share.max() <= 1


def test_the_bound_of_mxfp4_holds_where_the_largest_weight_is_cut_off():
    values = np.zeros((8, 32), np.float32)
    values[:, 0] = [4, 5, 6, 7, 7.99, np.nextafter(np.float32(8), 0), 8, 1e-40]
    values[:, 1] = values[:, 0] * np.float32(0.62)
    back = GGML["mxfp4"].dequantize(GGML["mxfp4"].quantize(values), values.shape)
    error, allowed = np.abs(back - values), largest_error("mxfp4", values)
    assert (error <= allowed).all()
    assert allowed[:6, 0].tolist() == pytest.approx([1, 1, 1, 1, 1.99, 2])
    assert error[3:5, 0].tolist() == allowed[3:5, 0].tolist()


@pytest.mark.parametrize(("linears", "embedding"), [("mxfp4", "f16"), ("q8_0", "mxfp4")])
def test_the_native_engine_refuses_mxfp4_by_name(make_folder, tmp_path, linears, embedding):
    import tritkit

    export_gguf(open_folder(make_folder("llama", **WIDE)), tmp_path / "x.gguf", linears, embedding)
    name = "model.layers.0.self_attn.q_proj" if linears == "mxfp4" else "model.embed_tokens"
    with pytest.raises(ValueError, match=f"^{name} is mxfp4, which only the torch engine runs$"):
        tritkit.load(tmp_path / "x.gguf")
    assert tritkit.load(tmp_path / "x.gguf", engine="torch").engine.vocab_size > 0
    assert any("with --engine torch" in verb for verb in inspect(tmp_path / "x.gguf")["can"])


def changed(path, out, metadata=None, drop=(), add=None):
    """The same file with other keys or tensors."""
    file = GGUFFile(path)
    keys = {k: v for k, v in {**file.metadata, **(metadata or {})}.items() if v is not None}
    tensors = {n: NewTensor(file[n].type, file[n].shape, lambda n=n: file[n].data) for n in file if n not in drop}
    write_gguf(out, keys, {**tensors, **(add or {})})
    return out


ODD = {
    "architecture": ({"general.architecture": "gemma3"}, "architecture 'gemma3'; tritkit runs llama, qwen2"),
    "no architecture": ({"general.architecture": None}, "has the architecture None"),
    "experts": ({"llama.expert_count": 8}, "llama.expert_count = 8, which tritkit does not run"),
    "soft cap": ({"llama.attn_logit_softcapping": 30.0}, "attn_logit_softcapping = 30"),
    "yarn in part": ({"llama.rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor = 0.5"),
    "what nobody knows": ({"llama.attention.novelty": "yes"}, "llama.attention.novelty = yes, which tritkit does not"),
    "heads of other sizes": ({"llama.attention.value_length": 8}, "attention.value_length = 8, but its heads have 16"),
    "partial rotation": ({"llama.rope.dimension_count": 8}, "rope.dimension_count = 8"),
    "scaling": ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "scaling 'longrope'"),
    "no size": ({"llama.embedding_length": None}, "llama.embedding_length = None, expected a number"),
    "text for a number": ({"llama.block_count": "two"}, "block_count = 'two', expected a number"),
    "no heads": ({"llama.attention.head_count": 0}, "num_attention_heads must be at least 1"),
    "a layer too many": ({"llama.block_count": 3}, "no tensor model.layers.2"),
    "other width": ({"llama.feed_forward_length": 64}, "has the shape"),
    "NaN": ({"llama.rope.freq_base": float("nan")}, "freq_base = nan, expected a number"),
    "another in each layer": (
        {"llama.attention.head_count": np.array([4, 8], np.int32)},
        "another llama.attention.head_count in each layer",
    ),
}


@pytest.mark.parametrize(("metadata", "message"), ODD.values(), ids=ODD)
def test_metadata_that_is_not_understood_is_refused(make_folder, tmp_path, metadata, message):
    export_gguf(open_folder(make_folder("llama")), tmp_path / "x.gguf")
    path = changed(tmp_path / "x.gguf", tmp_path / "odd.gguf", metadata)
    with pytest.raises(ValueError, match=message) as caught:
        open_gguf(path)
    assert "\n" not in str(caught.value)


def test_tensors_that_are_not_understood_are_refused(make_folder, tmp_path):
    export_gguf(open_folder(make_folder("llama", **WIDE)), tmp_path / "x.gguf")
    zeros = NewTensor("f32", (64,), lambda: np.zeros(64, np.float32))
    path = changed(tmp_path / "x.gguf", tmp_path / "a.gguf", add={"blk.0.attn_sinks.weight": zeros})
    with pytest.raises(ValueError, match=r"has the tensor 'blk\.0\.attn_sinks\.weight', which tritkit does not know"):
        open_gguf(path)
    path = changed(tmp_path / "x.gguf", tmp_path / "b.gguf", drop=("blk.1.ffn_up.weight",))
    with pytest.raises(ValueError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        open_gguf(path)
    iq = NewTensor("iq4_nl", (512, 256), lambda: np.zeros((512, 8 * 18), np.uint8))
    path = changed(tmp_path / "x.gguf", tmp_path / "c.gguf", add={"blk.1.ffn_up.weight": iq})
    with pytest.raises(ValueError, match=r"'blk.1.ffn_up.weight' has the type IQ4_NL, .* it runs F32, F16, BF16, Q4_0"):
        open_gguf(path)


def test_scales_that_are_not_finite_are_found_on_import(make_folder, tmp_path):
    export_gguf(open_folder(make_folder("llama", **WIDE)), tmp_path / "x.gguf", "q8_0")
    file = GGUFFile(tmp_path / "x.gguf")
    data = file["blk.0.ffn_up.weight"].data.copy()
    data[34 * 3 : 34 * 3 + 2] = (0, 0x7E)  # a NaN
    bad = NewTensor("q8_0", (512, 256), lambda: data)
    path = changed(tmp_path / "x.gguf", tmp_path / "nan.gguf", add={"blk.0.ffn_up.weight": bad})
    with pytest.raises(ValueError, match=r"up_proj\.weight has 1 blocks with a scale that is not finite"):
        import_model(path, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_names_go_both_ways():
    for name in ("token_embd.weight", "output.weight", "blk.12.attn_q_norm.weight", "blk.3.attn_k.bias"):
        assert ggml_name(hf_name(name)) == name
    assert hf_name("blk.x.attn_q.weight") is None
    assert hf_name("blk.0.unknown.weight") is None
    with pytest.raises(ValueError, match="GGUF has no name"):
        ggml_name("model.layers.0.self_attn.rotary_emb.inv_freq")


def test_row_orders_undo_each_other():
    assert (pairs_to_halves(48, 4)[halves_to_pairs(48, 4)] == np.arange(48)).all()
    # llama.cpp's converter: reshape(heads, 2, half, ...).swapaxes(1, 2)
    rows = np.arange(48)
    wanted = rows.reshape(4, 2, 6).swapaxes(1, 2).reshape(-1)
    assert (rows[halves_to_pairs(48, 4)] == wanted).all()


@pytest.mark.parametrize("rope", [Rope("llama3", *r) for r in LLAMA3])
def test_llama3s_parameters_come_from_what_they_make(tmp_path, rope):
    factors = llama3_factors(rope, 500000.0, 128)
    wavelength = 2 * np.pi * 500000.0 ** (np.arange(64) / 64)  # llama.cpp's converter
    smooth = (rope.original_max_position_embeddings / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    smooth = np.clip(smooth, 0, 1)
    np.testing.assert_allclose(factors, 1 / ((1 - smooth) / rope.factor + smooth), rtol=1e-6)
    assert rope_from_hf({"rope_parameters": llama3_scaling(factors, 500000.0, 128, tmp_path)}, 1) == (rope, 500000.0)
    with pytest.raises(ValueError, match="not what llama3's rotary scaling makes"):
        llama3_scaling(np.linspace(1, 3, 64), 500000.0, 128, tmp_path)


def test_a_shared_scale_is_seen_only_where_there_is_one():
    def blocks(scales, codes=1):
        packed = np.full((len(scales), 66), 0x55, np.uint8)
        packed[:, :64] = 0x55 if codes == 0 else 0xAA
        packed[:, 64:] = np.array(scales, np.float16)[:, None].view(np.uint8)
        return packed

    assert shared_scale("tq2_0", blocks([0.5, 0.5])) == 0.5
    assert shared_scale("tq2_0", blocks([0.5, 0.25])) is None
    assert shared_scale("tq2_0", np.concatenate([blocks([0.5]), blocks([0.0], codes=0)])) == 0.5
    assert shared_scale("tq2_0", np.concatenate([blocks([0.5]), blocks([0.0])])) is None  # codes that a zero makes zero
    assert shared_scale("tq2_0", blocks([0.0], codes=0)) == 0.0


def test_the_plan_names_every_matrix(make_folder):
    folder = open_folder(make_folder("llama", tie_word_embeddings=False))
    plans = plan(folder, "q8_0", "f16")
    assert list(plans) == matrix_names(folder.config)
    assert {p.type for n, p in plans.items() if n in ("lm_head", "model.embed_tokens")} == {"f16"}
    assert all(matrix_shape(folder.config, n) for n in plans)
    assert set(WRITTEN) == {"f32", "f16", "bf16", "i2_s"} | set(MIXES) | set(GGML)


def test_importance_of_another_model_or_for_nothing_is_refused(make_folder, tmp_path):
    folder, name = open_folder(make_folder("llama", **WIDE)), "model.layers.0.mlp.down_proj"
    for names, columns, kind, message in (
        ([name], 512, "q8_0", "weighs the search for q4_0, .* but no matrix becomes one of these"),
        ([name], 512, "f16", "weighs the search for"),
        ([name], 500, "q4_k_m", "has 500 columns for model.layers.0.mlp.down_proj, which has 512"),
        (["model.layers.7.mlp.down_proj"], 512, "q4_k_m", "has no importance for any matrix of this model"),
    ):
        found = Importance()
        for each in names:
            found.add(each, np.ones(columns), 1)
        found.save(tmp_path / "imatrix.dat")
        with pytest.raises(ValueError, match=message):
            export_gguf(folder, tmp_path / "x.gguf", kind, imatrix=tmp_path / "imatrix.dat")
    assert not list(tmp_path.glob("*.gguf"))


@pytest.mark.parametrize("kind", ["q4_k_m", "q2_k", "q4_0", "q5_1"])
def test_importance_changes_the_bytes_of_the_linears_it_knows(make_folder, tmp_path, kind):
    folder, found = open_folder(make_folder("llama", **WIDE)), Importance()
    known = "model.layers.1.mlp.up_proj"
    found.add(known, np.random.default_rng(0).random(256), 1)
    found.save(tmp_path / "imatrix.gguf")
    export_gguf(folder, tmp_path / "plain.gguf", kind)
    export_gguf(folder, tmp_path / "weighed.gguf", kind, imatrix=tmp_path / "imatrix.gguf")
    files = [GGUFFile(tmp_path / f"{name}.gguf") for name in ("plain", "weighed")]
    assert [n for n in files[0] if not np.array_equal(*(f[n].data for f in files))] == [ggml_name(f"{known}.weight")]


@pytest.mark.parametrize("mix", MIXES)
def test_a_file_says_its_mix_also_when_it_is_written_again(make_folder, tmp_path, mix):
    """llama.cpp's numbers of files; what is copied from a folder has the types of the mix, and is called by it."""
    folder = open_folder(make_folder("llama", **WIDE, num_hidden_layers=9))
    export_gguf(folder, tmp_path / "x.gguf", mix)
    export_gguf(open_gguf(tmp_path / "x.gguf"), tmp_path / "again.gguf")
    for name in ("x", "again"):
        assert GGUFFile(tmp_path / f"{name}.gguf").metadata["general.file_type"] == FILE_TYPES[mix]


def test_pure_is_for_types(make_folder):
    folder = open_folder(make_folder("llama"))
    for kind, message in (
        ("q4_k_m", "not for q4_k_m; q4_k is the type"),
        ("f16", "not for f16"),
        (None, "not for what is there"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(folder, kind, None, pure=True)
