"""Folders for transformers: what is written, what is refused, and that a stranger's process gets the same logits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tritkit.checkpoint import open_folder
from tritkit.engine.torch import model_of
from tritkit.folderwriter import write_folder
from tritkit.hf_export import export_hf
from tritkit.layouts import LAYOUTS
from tritkit.layouts.translate import translate
from tritkit.models.shapes import EMBEDDING, linear_names
from tritkit.pack import pack
from tritkit.sources import open_model
from tritkit.tensorfile import StoredTensor, TensorFile

CHILD = Path(__file__).with_name("transformers_child.py")
SAME_MODE = 1e-4  # float32, same operations: only the order of sums differs
TERNARY = ("hf-bitlinear", "hf-autobitlinear")
FLOATS = ("bf16", "float16", "float32")
# An activation within a float's rounding of a half may become one code here and the next one there. Of 180 positions in
# short texts (a longer one hands it on) that changes five, by a hundredth of the logits.
FLIPPED = 0.05
FLIP = 0.2
SENTENCE = "The cat sat on a naïve mat."


@pytest.fixture
def tokens():
    return torch.randint(0, 320, (60, 3), generator=torch.Generator().manual_seed(0))


def logits_of(mode: str, folders: list[Path], tokens, tmp_path) -> list[np.ndarray | str]:
    """Logits of each folder in a fresh process, or the error."""
    np.save(tmp_path / "tokens.npy", tokens.numpy())
    outs = [str(tmp_path / f"{mode}-{i}.npy") for i in range(len(folders))]
    pairs = [str(x) for pair in zip(folders, outs, strict=True) for x in pair]
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", str(CHILD), mode, str(tmp_path / "tokens.npy"), *pairs]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[np.ndarray | str] = []
    for folder, out in zip(folders, outs, strict=True):
        if os.path.exists(f"{out}.error"):
            found.append(Path(f"{out}.error").read_text())
        else:
            found.append(np.load(out))
            assert np.load(f"{out}.ids.npy").tolist() == open_folder(folder).tokenizer().encode(SENTENCE)
    return found


def ours(folder, tokens) -> np.ndarray:
    with torch.no_grad():
        return model_of(open_folder(folder)).eval()(tokens).numpy()


def relaid(source, out: Path, layout: str, embedding: str | None = None, weights: str | None = "ternary") -> Path:
    """A packed ternary folder in another of the ternary layouts; its embedding in blocks of ggml too."""
    folder = open_folder(source)
    tensors = {n: t for n, t in folder.tensors.items() if "_proj" not in n}
    layouts = dict.fromkeys(linear_names(folder.config), layout)
    for name in linear_names(folder.config):
        shape = folder.codes(name).codes.shape
        packed = translate(folder.packed(name), folder.layouts[name], layout, shape).packed
        for key, array in packed.arrays.items():
            tensors[f"{name}.{key}"] = StoredTensor("U8" if array.dtype == np.uint8 else "F32", array)
    if embedding is not None:
        blocks = LAYOUTS[embedding].quantize(folder.floats(EMBEDDING)).arrays["weight"]
        tensors[f"{EMBEDDING}.weight"] = StoredTensor("U8", blocks)
        layouts[EMBEDDING] = embedding
    write_folder(out, folder.config, tensors, folder.tokenizer(), layouts)
    return out


def assert_same(wanted: np.ndarray, found: np.ndarray, what: str) -> None:
    """The same logits; where activations are rounded, but for the few positions where one went the other way."""
    far = np.abs(found - wanted).max(-1)
    if not any(form in what for form in TERNARY):
        assert far.max() < SAME_MODE, f"{what}: {far.max()}"
    assert far.max() < FLIP and (far >= SAME_MODE).mean() <= FLIPPED, f"{what}: {far.max()} {(far >= SAME_MODE).sum()}"


SIZES = {"hidden_size": 256, "intermediate_size": 256, "vocab_size": 320}


@pytest.fixture
def ternary(make_folder, tmp_path):
    """ternary("bitnet", "tq2_0") is a packed ternary folder of that family and layout."""

    def make(family: str, layout: str = "hf_autobitlinear", embedding: str | None = None, sizes: dict = SIZES) -> Path:
        latent = make_folder("b158", **sizes, family=family)
        packed = tmp_path / f"packed-{family}"
        pack(latent, packed, dtype="float32", overwrite=True)
        if layout == "hf_autobitlinear" and embedding is None:
            return packed
        return relaid(packed, tmp_path / f"{family}-{layout}", layout, embedding)

    return make


@pytest.mark.parametrize("to", TERNARY)
@pytest.mark.parametrize("layout", ["hf_autobitlinear", "hf_bitlinear", "tq1_0", "tq2_0", "i2_s_x86", "i2_s_arm"])
def test_codes_survive(ternary, tmp_path, layout, to):
    source = open_folder(ternary("llama", layout))
    report = export_hf(source, tmp_path / "out", to)
    written = open_folder(tmp_path / "out")
    assert set(written.layouts.values()) == {to.replace("-", "_")} and report["types"][to.replace("-", "_")] == 14
    for name in linear_names(source.config):
        a, b = source.codes(name), written.codes(name)
        assert np.array_equal(a.codes, b.codes) and np.isclose(a.scale.max(), b.scale.max(), rtol=1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["quantization_config"]["quant_method"] == "bitnet"
    assert not list(tmp_path.glob(".*"))


def test_latent_weights_are_rounded_as_training_rounds_them(make_folder, tmp_path):
    latent = make_folder("b158")
    pack(latent, tmp_path / "packed", dtype="float32")
    export_hf(open_folder(latent), tmp_path / "out", "hf-autobitlinear")
    a, b = TensorFile(tmp_path / "packed" / "model.safetensors"), TensorFile(tmp_path / "out" / "model.safetensors")
    assert dict(a) and set(a) == set(b) and all(np.array_equal(a[n].array, b[n].array) for n in a)


def test_floats_on_the_grid_become_codes(ternary, tmp_path):
    packed = open_folder(ternary("llama"))
    export_hf(packed, tmp_path / "floats", "float32")
    report = export_hf(open_folder(tmp_path / "floats"), tmp_path / "out", "hf-bitlinear")
    assert any("8 bits" in note for note in report["notes"])  # these floats had no rounded activations
    written = open_folder(tmp_path / "out")
    for name in linear_names(packed.config):
        assert np.array_equal(packed.codes(name).codes, written.codes(name).codes)


@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("kind", ["llama", "b158", "b1", "int4_g32"])
def test_every_model_becomes_floats(make_folder, tmp_path, kind, to):
    changes = {"weights": "int4_g32", "activations": "a4"} if kind == "int4_g32" else {}
    source = open_folder(make_folder("b158" if changes else kind, **changes))
    report = export_hf(source, tmp_path / "out", to)
    written = open_folder(tmp_path / "out")
    assert written.config.weights is None and "quantization_config" not in written.hf
    assert {t.dtype for t in written.tensors.values()} == {{"bf16": "BF16", "float16": "F16", "float32": "F32"}[to]}
    assert bool(report["notes"]) == (kind != "llama")
    if to == "float32":
        linears = model_of(source).linears()
        for name, linear in linears.items():
            weights = getattr(linear, "weights", None)
            values = linear.weight if weights is None else weights.quantize(linear.weight).dequantize()
            assert np.array_equal(written.floats(name), values.detach().numpy())


def test_blocks_of_ggml_become_bfloat16(ternary, tmp_path):
    source = open_folder(ternary("bitnet", "tq2_0", embedding="q8_0"))
    report = export_hf(source, tmp_path / "out", "hf-bitlinear")
    written = open_folder(tmp_path / "out")
    assert written.tensors[f"{EMBEDDING}.weight"].dtype == "BF16" and any("Q8_0" in n for n in report["notes"])
    far = np.abs(written.floats(EMBEDDING) - source.floats(EMBEDDING))
    assert (far <= np.abs(source.floats(EMBEDDING)) * 2.0**-8).all()


def test_refusals(make_folder, tmp_path):
    def refused(folder, to) -> str:
        with pytest.raises(ValueError) as error:
            export_hf(open_folder(folder), tmp_path / "out", to)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
        return str(error.value)

    sentence = refused(make_folder("llama"), "hf-bitlinear")
    assert "% away" in sentence and "tritkit quantize" in sentence and "q_proj" in sentence
    assert "a8_q128" in refused(make_folder("b1"), "hf-autobitlinear") and "'gguf'" in refused(
        make_folder("b1"), "gguf"
    )
    sentence = refused(make_folder("b158", seed=3, intermediate_size=162), "hf-bitlinear")
    assert "162" in sentence and "multiple of 4" in sentence
    large = make_folder("llama", seed=1)
    with torch.no_grad():
        from safetensors.torch import load_file, save_file

        tensors = load_file(large / "model.safetensors")
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
        save_file(tensors, large / "model.safetensors", {"format": "pt"})
    assert "too large for float16" in refused(large, "float16")
    with pytest.raises(ValueError, match="itself"):
        export_hf(open_folder(large), large, "bf16", overwrite=True)


def test_overwriting_replaces_the_model_and_nothing_else(make_folder, tmp_path):
    source, out = open_folder(make_folder("llama")), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "model-00001-of-00002.safetensors").write_text("stale")
    for name in ("config.json", "quantize_config.json", "tritkit.toml", "results.json"):
        (out / name).write_text("{}")
    with pytest.raises(ValueError, match="already holds"):
        export_hf(source, out, "bf16")
    export_hf(source, out, "bf16", overwrite=True)
    assert (out / "notes.txt").read_text() == "mine" and not (out / "model-00001-of-00002.safetensors").exists()
    assert open_folder(out).config == source.config
    assert not any((out / name).exists() for name in ("quantize_config.json", "tritkit.toml", "results.json"))
    assert (out / "results.previous.json").exists()


def test_what_does_not_read_back_is_removed(make_folder, tmp_path, monkeypatch):
    """A writer that errs, for the codes, the floats and the config."""
    import tritkit.hf_export as module

    source = open_folder(make_folder("b158"))
    right = module.write_folder

    def wrong(name, change):
        def write(folder, config, tensors, *rest):
            return right(folder, config, {**tensors, name: change(tensors[name])}, *rest)

        return write

    def flipped(tensor):
        array = np.array(tensor.make())
        array.reshape(-1).view(np.uint8)[:] ^= 1
        return StoredTensor(tensor.dtype, array)

    for to, name in (
        ("hf-bitlinear", "model.layers.1.mlp.down_proj.weight"),
        ("hf-autobitlinear", "model.layers.1.mlp.down_proj.weight_scale"),
        ("float32", "model.layers.1.mlp.down_proj.weight"),
        ("bf16", "model.norm.weight"),
    ):
        monkeypatch.setattr(module, "write_folder", wrong(name, flipped))
        if name.endswith("scale"):
            monkeypatch.setattr(module, "write_folder", wrong(name, lambda t: StoredTensor("F32", t.make() * 1.001)))
        with pytest.raises((OSError, ValueError), match=r"down_proj|norm"):
            export_hf(source, tmp_path / "out", to)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.interop
def test_plain_transformers_gets_the_same_logits(make_folder, ternary, tokens, tmp_path):
    """In one fresh process without tritkit: every form of every family, and the tokens of a sentence."""
    pytest.importorskip("transformers")
    folders, wanted = [], []
    for family in ("llama", "bitnet"):
        packed = ternary(family, sizes={})
        for to in (*TERNARY, *FLOATS):
            out = tmp_path / f"{family}-{to}"
            export_hf(open_folder(packed), out, to)
            folders.append(out)
            wanted.append(ours(out, tokens))
        assert_same(ours(packed, tokens), wanted[-5], TERNARY[0])  # codes and scales are those of the source
    for kind in ("llama", "b1"):
        out = tmp_path / f"{kind}-as-floats"
        export_hf(open_folder(make_folder(kind, seed=5, tie_word_embeddings=False)), out, "float32")
        folders.append(out)
        wanted.append(ours(out, tokens))
    for folder, logits, theirs in zip(folders, wanted, logits_of("plain", folders, tokens, tmp_path), strict=True):
        assert not isinstance(theirs, str), f"{folder.name}: {theirs}"
        assert_same(logits, theirs, folder.name)


@pytest.mark.interop
def test_a_real_model_with_its_tokenizer(shared_data, tmp_path):
    """stories260K from llama2.c's own files: SentencePiece tokens and logits as transformers gets them."""
    pytest.importorskip("transformers")
    source = open_model(shared_data / "stories260K" / "stories260K.bin")
    export_hf(source, tmp_path / "out", "float32")
    tokens = torch.tensor([source.tokenizer().encode("Once upon a time, there was a little girl named Lily.")])
    (theirs,) = logits_of("plain", [tmp_path / "out"], tokens, tmp_path)
    assert not isinstance(theirs, str), theirs
    assert np.abs(theirs - ours(tmp_path / "out", tokens)).max() < SAME_MODE
