"""Quantising a model folder: what comes out, layer by layer, resumed, and refused."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from tritkit import results
from tritkit.checkpoint import linear_names, open_folder, write_folder
from tritkit.engine.torch import model_of
from tritkit.formats import format_of
from tritkit.layouts import search
from tritkit.methods.blocks import BlockJob, outputs, quantize_block
from tritkit.methods.calibration import read_calibration
from tritkit.methods.importance import read_importance
from tritkit.methods.quantizer import quantize_folder
from tritkit.methods.recipe import Plan, Recipe, read_recipe
from tritkit.methods.stream import DecoderStream
from tritkit.models.config import ModelConfig
from tritkit.models.transformer import build
from tritkit.sources import bundled_folder
from tritkit.tensorfile import StoredTensor

SIZES = {
    "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
SHORT = {"sequences": 4, "length": 32}
LONG = {"sequences": 48, "length": 64}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    rng = np.random.default_rng(0)
    words = ["the", "king", "went", "over", "a", "hill", "and", "saw", "his", "daughter", "there", "at", "night"]
    path.write_text("\n".join(" ".join(rng.choice(words, 12)) + "." for _ in range(400)))
    return str(path)


def a_folder(path, family="llama", **settings):
    tokenizer = open_folder(bundled_folder()).tokenizer()
    config = ModelConfig(family=family, **{**SIZES, "num_key_value_heads": 1, **settings})
    model = build(config, seed=1)
    with torch.no_grad():  # a random model says the same of everything; this one has something to lose
        for name, p in model.named_parameters():
            if p.dim() == 2 and "embed" not in name:
                p.mul_(4)
            if name.endswith("norm.weight"):
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    tensors = {name: StoredTensor("F32", p.detach().numpy()) for name, p in model.named_parameters()}
    write_folder(path, config, tensors, tokenizer, {})
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return a_folder(tmp_path_factory.mktemp("float") / "model")


def recipe(**settings):
    return read_recipe(None, {k: str(v) for k, v in settings.items()})


def logits(path, tokens):
    with torch.no_grad():
        return model_of(open_folder(path)).eval()(tokens)


TOKENS = torch.randint(0, 4096, (2, 48), generator=torch.Generator().manual_seed(3))


def distance(a, b):
    p, q = (logits(x, TOKENS).double().log_softmax(-1) for x in (a, b))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_rounding_is_the_formats_own(folder, tmp_path):
    metrics = quantize_folder(folder, tmp_path / "q", "int4_g32")
    before, after = open_folder(folder), open_folder(tmp_path / "q")
    format = format_of("int4_g32")
    for name in linear_names(before.config):
        wanted = format.quantize(torch.from_numpy(before.floats(name))).dequantize().numpy()
        assert np.array_equal(after.floats(name), wanted)
    assert metrics["types"].startswith("21 int4_g32") and abs(metrics["bits_per_weight"] - 4.5) < 0.01
    assert 0 < distance(folder, tmp_path / "q") < 1


def test_the_record_of_a_linear(folder, tmp_path, text):
    quantize_folder(folder, tmp_path / "q", recipe(format="int4_g32", method="gptq"), [text], **SHORT)
    (run,) = results.read(tmp_path / "q")
    record = run["per_linear"]["model.layers.1.mlp.down_proj"]
    before, after = open_folder(folder), open_folder(tmp_path / "q")
    w, q = (m.floats("model.layers.1.mlp.down_proj").astype(np.float64) for m in (before, after))
    assert abs(record["mse"] / np.square(w - q).mean() - 1) < 1e-3
    assert abs(record["snr_db"] - 10 * np.log10(np.square(w).mean() / np.square(w - q).mean())) < 0.01
    assert record["bits"] == pytest.approx(4.5, abs=0.01) and record["format"] == "int4_g32"
    assert 0 < record["output_error"] < 0.1 and record["calibration_tokens"] == 4 * 32
    assert {k: len(h["counts"]) for k, h in record["histograms"].items()} == dict.fromkeys(
        ("before", "after", "error", "inputs"), 64
    )
    assert sum(record["histograms"]["before"]["counts"]) == w.size
    assert len(record["top_channels"]) == 32 and set(record["ranges"]) == {"absmax", "percentile", "mse", "entropy"}
    assert all(len(json.dumps(r)) < 20_000 for r in run["per_linear"].values())


@pytest.mark.parametrize("family", ["llama", "bitnet", "qwen3"])
def test_a_layer_in_stages_is_the_layer(tmp_path, family, text):
    """Also with every linear quantised behind what is quantised: the same codes as with a pass for each stage."""
    source = a_folder(tmp_path / "model", family, num_key_value_heads=2)
    model = open_folder(source)
    stream, x = DecoderStream(model), torch.randn(2, 32, 64)
    layer = stream.layer(1)
    walk = stream.walk(layer, 0, x)
    seen = []
    with torch.no_grad():
        try:
            while True:
                seen += next(walk)[0]
        except StopIteration as end:
            assert torch.equal(end.value, stream.call(layer, 0, x))
    assert [id(m) for m in seen] == [id(m) for n, m in layer.named_modules() if n.endswith("_proj")]
    data = read_calibration(model.tokenizer(), [text], 4, 32)
    found = []
    for walked in (stream.walk, None):
        layer = stream.layer(0)
        linears = {n: m for n, m in layer.named_modules() if n.endswith("_proj")}
        plans = dict.fromkeys(linears, Plan(format_of("int4_g32"), "gptq"))
        job = BlockJob(layer, linears, plans, Recipe(), stream.call, [stream.embed(data.fit)], walk=walked)
        ys = quantize_block(job)
        found.append((ys or outputs(job), {n: q.weight.codes for n, q in job.done.items()}))
    assert torch.equal(found[0][0][0], found[1][0][0])
    assert all(torch.equal(codes, found[1][1][n]) for n, codes in found[0][1].items()) and len(found[0][1]) == 7


def test_gptq_is_nearer_than_rounding(folder, tmp_path, text):
    for method in ("rtn", "gptq"):
        quantize_folder(folder, tmp_path / method, recipe(format="int3_row", method=method), [text], **SHORT)
    errors = []
    for method in ("rtn", "gptq"):
        (run,) = results.read(tmp_path / method)
        errors.append(np.mean([r["output_error"] for r in run["per_linear"].values()]))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("transform", ["awq", "smoothquant"])
@pytest.mark.parametrize("family", ["llama", "bitnet", "qwen2"])
def test_a_transform_alone_changes_nothing(tmp_path, text, transform, family):
    """Weights in 8 bits of groups of 8 are near enough to floats to show that the folding is right."""
    source = a_folder(tmp_path / "model", family, num_key_value_heads=2)
    quantize_folder(source, tmp_path / "plain", recipe(format="int8_g8"), [text], **SHORT)
    quantize_folder(source, tmp_path / "q", recipe(format="int8_g8", transform=transform), [text], **SHORT)
    assert distance(source, tmp_path / "q") < 5 * distance(source, tmp_path / "plain") + 1e-6
    before, after = open_folder(source), open_folder(tmp_path / "q")
    norm = "model.layers.0.input_layernorm.weight"
    assert not np.allclose(before.tensors[norm].float32(), after.tensors[norm].float32(), rtol=0.01)


def test_static_ranges_are_stored(folder, tmp_path, text):
    for name, kind in (("s", "int8_tensor"), ("a", "int8_tensor_asym")):
        settings = recipe(format="int8_row", inputs=kind, inputs_range="percentile")
        quantize_folder(folder, tmp_path / name, settings, [text], **SHORT)
        opened = open_folder(tmp_path / name)
        assert set(opened.inputs.values()) == {kind} and len(opened.inputs) == 21
        grids = [opened.input_grid(n) for n in opened.inputs]
        assert all(g is not None and g[0] > 0 and (g[1] is not None) == (name == "a") for g in grids)
        assert distance(folder, tmp_path / name) < 0.05


def test_qwt_is_stored_and_counted(folder, tmp_path, text):
    settings = {"format": "int2_g32", "qwt.check": "false", "qwt.ridge": "0.1"}
    quantize_folder(folder, tmp_path / "plain", recipe(**settings), [text], **LONG)
    metrics = quantize_folder(folder, tmp_path / "q", recipe(correct="qwt", **settings), [text], **LONG)
    opened = open_folder(tmp_path / "q")
    assert metrics["adapters"] == len(opened.adapters) > 0
    (run,) = results.read(tmp_path / "q")
    reports = {n: r for n, r in run["per_linear"].items() if n.endswith(".adapter")}
    assert len(reports) == 3 and all({"r2", "r2_held_out", "kept"} <= set(r) for r in reports.values())
    plain = open_folder(tmp_path / "plain").bits_per_weight()
    added = 8 * len(opened.adapters) * (2 * 64 * 64 + 4 * 64)
    weights = sum(opened.floats(n).size for n in linear_names(opened.config))
    assert opened.bits_per_weight() == pytest.approx(plain + added / weights)


def test_qwt_terms_stay_only_where_the_divergence_falls(folder, tmp_path, text):
    quantize_folder(folder, tmp_path / "q", recipe(format="int2_g32", correct="qwt"), [text], **SHORT)
    (run,) = results.read(tmp_path / "q")
    for name, report in run["per_linear"].items():
        if name.endswith(".adapter") and "divergence_before" in report:
            assert report["kept"] == (report["divergence_after"] < report["divergence_before"])


def test_qwt_terms_can_be_trained_on(folder, tmp_path, text):
    settings = {"format": "int2_g32", "correct": "qwt", "qwt.check": "false", "qwt.ridge": "0.1"}
    quantize_folder(folder, tmp_path / "plain", recipe(**settings), [text], **LONG)
    quantize_folder(folder, tmp_path / "q", recipe(**settings, **{"qwt.finetune": 2, "qwt.rate": 1e-3}), [text], **LONG)
    plain, tuned = open_folder(tmp_path / "plain"), open_folder(tmp_path / "q")
    assert plain.adapters == tuned.adapters and plain.adapters
    terms = [[m.tensors[f"model.layers.{i}.adapter.weight"].array for i in m.adapters] for m in (plain, tuned)]
    assert any(not np.array_equal(a, b) for a, b in zip(*terms, strict=True))
    assert all(t.dtype == np.float16 for t in terms[1])
    tokens = read_calibration(plain.tokenizer(), [text], 48, 64, 6).fit
    with torch.no_grad():
        losses = [float(model_of(m).loss(tokens[:, :-1], tokens[:, 1:])) for m in (plain, tuned)]
    assert losses[1] < losses[0]


def test_a_budget_is_kept_and_used(folder, tmp_path, text):
    settings = {"budget.bits": 3.5, "budget.options": "int2_g32,int3_g32,int4_g32,int6_g32"}
    metrics = quantize_folder(folder, tmp_path / "q", recipe(**settings), [text], **SHORT)
    assert 3.3 < metrics["bits_per_weight"] <= 3.5
    assert metrics["weights"].count("+") >= 1
    uniform = quantize_folder(folder, tmp_path / "u", recipe(format="int3_g32"), [text], **SHORT)
    assert uniform["bits_per_weight"] == pytest.approx(3.5, abs=0.02)
    assert distance(folder, tmp_path / "q") < 1.1 * distance(folder, tmp_path / "u")


def test_embedding_and_rules(folder, tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('format = "int4_g32"\nembedding = "int8_row"\n[[rule]]\nmatch = "*.v_proj"\nformat = "keep"')
    metrics = quantize_folder(folder, tmp_path / "q", path)
    opened = open_folder(tmp_path / "q")
    assert opened.layouts["model.embed_tokens"] == "dense" and "model.layers.0.self_attn.v_proj" not in opened.layouts
    assert metrics["types"] == "18 int4_g32, 3 floats, 1 int8_row"


def test_an_importance_matrix_is_measured_written_and_read(tmp_path, text):
    """The search weighed by the file gives the bytes that ggml's quantiser gives for the same importance."""
    source = a_folder(tmp_path / "model", hidden_size=128)
    file = tmp_path / "m.imatrix.gguf"
    quantize_folder(source, tmp_path / "a", "q4_0", [text], **SHORT, imatrix=file)
    quantize_folder(source, tmp_path / "b", "q4_0", (), imatrix=file)
    quantize_folder(source, tmp_path / "plain", "q4_0")
    model, found = open_folder(source), read_importance(file)
    a, b, plain = (open_folder(tmp_path / n) for n in ("a", "b", "plain"))
    differs = 0
    for name in linear_names(model.config):
        wanted = search.quantize("q4_0", model.floats(name), found.of(name))
        assert np.array_equal(a.packed(name).arrays["weight"], wanted)
        assert np.array_equal(b.packed(name).arrays["weight"], wanted)
        differs += not np.array_equal(plain.packed(name).arrays["weight"], wanted)
    assert differs == 21
    tokens = read_calibration(model.tokenizer(), [text], 4, 32).fit
    with torch.no_grad():
        layer = model_of(model).model.layers[0]
        x = layer.input_layernorm(model_of(model).model.embed_tokens(tokens))
    wanted = x.flatten(0, 1).double().square().mean(0).numpy()
    assert np.allclose(found.of("model.layers.0.self_attn.q_proj"), wanted, rtol=1e-5)


def test_an_importance_matrix_of_another_model_is_refused(folder, tmp_path, text):
    other = a_folder(tmp_path / "other", hidden_size=128)
    quantize_folder(other, tmp_path / "a", "q4_0", [text], **SHORT, imatrix=tmp_path / "m.dat")
    with pytest.raises(ValueError, match=r"m.dat has 128 values for model.layers.0.self_attn.q_proj, which has 64"):
        quantize_folder(folder, tmp_path / "b", "q4_0", imatrix=tmp_path / "m.dat")
    with pytest.raises(ValueError, match=r"there is no importance matrix .*none.dat; to measure one, give text"):
        quantize_folder(folder, tmp_path / "b", "q4_0", imatrix=tmp_path / "none.dat")


def test_rounding_to_ternary_comes_with_a_warning(folder, tmp_path, capfd):
    quantize_folder(folder, tmp_path / "q", "ternary")
    assert "lose nearly all that a model has learnt" in " ".join(capfd.readouterr().err.split())
    quantize_folder(folder, tmp_path / "q4", "int4_g32")
    assert "warning" not in capfd.readouterr().err


def test_the_bundled_books_are_the_calibration_where_none_is_named(folder, tmp_path, capfd):
    quantize_folder(folder, tmp_path / "q", recipe(format="int3_row", method="gptq"), None, **SHORT)
    assert "bundled books" in capfd.readouterr().err
    assert results.read(tmp_path / "q")[0]["settings"]["calibration_sequences"] == 4


KILLED = """
import sys, time
from tritkit.methods import layerwise
from tritkit.methods.calibration import read_calibration
from tritkit.methods.quantizer import quantize_folder
from tritkit.methods.recipe import read_recipe
inner, seen = layerwise.Layerwise._layer, []
def layer(self, number, *rest):
    seen.append(number)
    if sys.argv[4] != "all" and number == int(sys.argv[4]):
        print("here", flush=True)
        time.sleep(60)
    return inner(self, number, *rest)
layerwise.Layerwise._layer = layer
settings = {"format": "int3_g32", "method": "gptq", "correct": "qwt"}
quantize_folder(sys.argv[1], sys.argv[2], read_recipe(None, settings), [sys.argv[3]], sequences=4, length=32)
print(seen)
"""


def test_a_killed_run_goes_on_at_its_layer(folder, tmp_path, text):
    def run(out, stop):
        arguments = [sys.executable, "-c", KILLED, str(folder), str(tmp_path / out), text, stop]
        return subprocess.Popen(
            arguments, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )

    whole = run("whole", "all").communicate()[0]
    assert whole.strip() == "[0, 1, 2]"
    process = run("again", "2")
    assert process.stdout.readline().strip() == "here"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "again").exists() and (tmp_path / ".again.partial").is_dir()
    assert run("again", "all").communicate()[0].strip() == "[2]"
    assert not (tmp_path / ".again.partial").exists()
    names = ("model.safetensors", "config.json")
    assert all((tmp_path / "whole" / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in names)
    records = [results.read(tmp_path / out)[0]["per_linear"] for out in ("whole", "again")]
    assert records[0].keys() == records[1].keys()


def test_another_recipe_does_not_go_on_with_it(folder, tmp_path, text):
    from tritkit.methods.partial import Partial
    from tritkit.sources import open_model

    model, data = open_model(folder), None
    first = Partial.begin(tmp_path / "q", model, recipe(format="int4_g32"), data)
    first.keep("0", {}, {})
    assert Partial.begin(tmp_path / "q", model, recipe(format="int4_g32"), data).layers_done(3) == 1
    assert Partial.begin(tmp_path / "q", model, recipe(format="int3_g32"), data).layers_done(3) == 0


def test_mistakes_get_one_sentence_and_nothing_is_written(folder, tmp_path, text):
    short = tmp_path / "short.txt"
    short.write_text("Only this.")
    odd = a_folder(tmp_path / "odd")
    opened = open_folder(odd)
    tensors = {n: StoredTensor(t.dtype, np.array(t.array)) for n, t in opened.tensors.items()}
    tensors["model.layers.1.mlp.up_proj.weight"].array[3, 4] = np.nan
    write_folder(odd, opened.config, tensors, opened.tokenizer(), {})
    cases = [
        (folder, recipe(format="int4_g48"), [], {}, "int4_g48 has groups of 48 columns, but a row of model.layers.0"),
        (folder, recipe(format="int4_g32", method="gptq"), [], {}, "the method gptq needs calibration data"),
        (folder, recipe(format="int4_g32", correct="qwt"), [], {}, "qwt needs calibration data"),
        (folder, recipe(format="int8_row", inputs="int8_tensor"), [], {}, "a static range of inputs needs calibration"),
        (folder, recipe(**{"budget.bits": 3}), [], {}, "a budget of bits needs calibration data"),
        (folder, recipe(format="int4_g32", method="gptq"), [str(short)], SHORT, "fewer than 1 sequence of 32"),
        (folder, recipe(format="int4_g32", head="int8_row"), [], {}, "has none of its own"),
        (odd, recipe(format="int4_g32"), [], {}, "model.layers.1.mlp.up_proj.weight has values that are not finite"),
        (bundled_folder(), recipe(format="int4_g32"), [], {}, "is a ternary model already"),
        (tmp_path / "none", recipe(format="int4_g32"), [], {}, "there is no model folder"),
    ]  # fmt: skip
    for source, settings, calibration, options, sentence in cases:
        with pytest.raises(ValueError, match=sentence) as caught:
            quantize_folder(source, tmp_path / "out", settings, calibration, **options)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_memory_is_one_layer_and_the_activations(tmp_path, text):
    """Twice the layers, the same memory: a model of 24 layers would need 150 MB more than one of 12 in float32."""
    peaks = []
    for layers in (12, 24):
        sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4, "num_hidden_layers": layers}
        source = a_folder(tmp_path / f"model{layers}", vocab_size=4096, **sizes)
        code = (
            "import resource, sys; from tritkit.methods.quantizer import quantize_folder as q;"
            "from tritkit.methods.recipe import read_recipe as r;"
            f"q({str(source)!r}, {str(tmp_path / f'q{layers}')!r}, r(None, {{'format': 'int4_g32', 'method': 'gptq'}}),"
            f"[{text!r}], sequences=4, length=32);"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "100000"}
        peaks.append(int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env).stdout))
    # mapped pages of the source and of the parts count as resident too: 75 MB of weights more, read once
    assert peaks[1] - peaks[0] < 110_000
