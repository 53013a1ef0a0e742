"""Quantising a model folder: what comes out, layer by layer, and resumed."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from float_folder import SHORT, a_folder, a_text, distance, recipe

from tritkit import results
from tritkit.checkpoint import open_folder
from tritkit.cli import main
from tritkit.engine.torch import model_of
from tritkit.formats import format_of
from tritkit.methods.blocks import BlockJob, outputs, quantize_block
from tritkit.methods.calibration import read_calibration
from tritkit.methods.partial import Partial
from tritkit.methods.quantizer import quantize_folder
from tritkit.methods.recipe import GptqOptions, Plan, Recipe, Rule
from tritkit.methods.stream import DecoderStream
from tritkit.models.shapes import linear_names


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return a_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return a_folder(tmp_path_factory.mktemp("float") / "model")


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
        paper = Recipe(gptq=GptqOptions(sink=1.0))  # which first tokens there are, a pass for each stage does not see
        job = BlockJob(layer, linears, plans, paper, stream.call, [stream.embed(data.fit)], walk=walked)
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


def test_bits_are_those_of_the_file(folder, tmp_path):
    metrics = quantize_folder(folder, tmp_path / "q", "binary")
    records = results.read(tmp_path / "q")[0]["per_linear"]
    assert metrics["bits_per_weight"] == pytest.approx(2, abs=0.05)
    assert all(r["bits"] == pytest.approx(2, abs=0.1) for r in records.values())


def test_a_folder_says_how_to_make_it_again(folder, tmp_path, text):
    file = tmp_path / "m.gguf"
    quantize_folder(folder, tmp_path / "q", "q4_0", text, **SHORT, imatrix=file)
    settings = results.read(tmp_path / "q")[0]["settings"]
    assert settings["imatrix"] == str(file) and settings["calibration"] == [text] and settings["length"] == 32
    command = (tmp_path / "q" / "tritkit.toml").read_text().splitlines()[1].removeprefix("# tritkit quantize ")
    words = [{"OUT": str(tmp_path / "again"), "THIS_FILE": str(tmp_path / "q" / "tritkit.toml")}.get(w, w)
             for w in shlex.split(command)]  # fmt: skip
    assert main(["quantize", *words]) == 0
    files = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("q", "again")]
    assert files[0] == files[1]


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


@pytest.mark.parametrize("family", ["llama", "bitnet"])
def test_a_transform_leaves_codes_that_are_kept(tmp_path, text, family):
    """Scales are folded neither into columns nor into rows of matrices whose codes stay as they are."""
    a_folder(tmp_path / "floats", family, num_key_value_heads=1)
    quantize_folder(tmp_path / "floats", tmp_path / "model", "int8_g8")
    keep = [Rule(match=f"*.{name}", format="keep") for name in ("up_proj", "v_proj")]
    keep += [Rule(match="*.q_proj", format="keep", inputs="int8_row")]
    distances = []
    for transform in (None, "smoothquant"):
        settings = recipe(format="int8_g8", **({"transform": transform} if transform else {})).over(keep)
        quantize_folder(tmp_path / "model", tmp_path / str(transform), settings, [text], **SHORT)
        distances.append(distance(tmp_path / "model", tmp_path / str(transform)))
    assert distances[1] < 5 * distances[0] + 1e-6


def test_errors_of_outputs_count_rounded_inputs(folder, tmp_path, text):
    """8 bits of inputs with one range for all say more of the error than 8 bits of weights."""
    records = {}
    for name, more in (("weights", {}), ("both", {"inputs": "int4_row"})):
        quantize_folder(folder, tmp_path / name, recipe(format="int8_row", **more), [text], **SHORT)
        records[name] = results.read(tmp_path / name)[0]["per_linear"]["model.layers.0.self_attn.q_proj"]
    model, both = open_folder(folder), open_folder(tmp_path / "both")
    tokens = read_calibration(model.tokenizer(), [text], **SHORT).fit
    layer = model_of(model).model.layers[0]
    with torch.no_grad():
        x = layer.input_layernorm(model_of(model).model.embed_tokens(tokens)).flatten(0, 1)
        wanted = x @ layer.self_attn.q_proj.weight.T
        found = model_of(both).model.layers[0].self_attn.q_proj(x)
    error = float((found - wanted).square().sum() / wanted.square().sum())
    assert records["both"]["output_error"] == pytest.approx(error, rel=1e-3)
    assert records["both"]["output_error"] > 10 * records["weights"]["output_error"] > 0


def test_static_ranges_are_stored(folder, tmp_path, text):
    for name, kind in (("s", "int8_tensor"), ("a", "int8_tensor_asym")):
        settings = recipe(format="int8_row", inputs=kind, inputs_range="percentile")
        quantize_folder(folder, tmp_path / name, settings, [text], **SHORT)
        opened = open_folder(tmp_path / name)
        assert set(opened.inputs.values()) == {kind} and len(opened.inputs) == 21
        grids = [opened.input_grid(n) for n in opened.inputs]
        assert all(g is not None and g[0] > 0 and (g[1] is not None) == (name == "a") for g in grids)
        assert distance(folder, tmp_path / name) < 0.05


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
    model, data = open_folder(folder), None
    first = Partial.begin(tmp_path / "q", model, recipe(format="int4_g32"), data)
    first.keep("0", {}, {})
    assert Partial.begin(tmp_path / "q", model, recipe(format="int4_g32"), data).layers_done(3) == 1
    other = recipe(format="int3_g32")
    with pytest.raises(ValueError, match=r".q.partial holds a finished layer of another recipe, .* --overwrite drops"):
        Partial.begin(tmp_path / "q", model, other, data)
    assert Partial.begin(tmp_path / "q", model, recipe(format="int4_g32"), data).layers_done(3) == 1
    assert Partial.begin(tmp_path / "q", model, other, data, overwrite=True).layers_done(3) == 0
    assert Partial.begin(tmp_path / "q", model, recipe(format="int2_g32"), data).layers_done(3) == 0  # nothing to lose


def test_seconds_are_of_all_runs(folder, tmp_path):
    model, job = open_folder(folder), recipe(format="int4_g32")
    first = Partial.begin(tmp_path / "q", model, job, None, began=time.perf_counter() - 100)
    first.keep("0", {}, {})
    again = Partial.begin(tmp_path / "q", model, job, None, began=time.perf_counter() - 20)
    assert 120 <= again.seconds() < 125


def test_another_config_does_not_go_on_with_it(tmp_path):
    model = open_folder(a_folder(tmp_path / "model"))
    Partial.begin(tmp_path / "q", model, recipe(format="int4_g32"), None).keep("0", {}, {})
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace("}", " }"))
    with pytest.raises(ValueError, match="of another recipe, text, model or version"):
        Partial.begin(tmp_path / "q", model, recipe(format="int4_g32"), None)


def test_a_budget_is_measured_once(folder, tmp_path, text, monkeypatch):
    from tritkit.methods import allocate, layerwise

    settings, calls = recipe(**{"budget.bits": 3.5}), []
    measure, layer = allocate.measure, layerwise.Layerwise._layer
    monkeypatch.setattr(allocate, "measure", lambda *args: calls.append(args) or measure(*args))

    def stops(self, number, *rest):
        if number == 1:
            raise KeyboardInterrupt
        return layer(self, number, *rest)

    monkeypatch.setattr(layerwise.Layerwise, "_layer", stops)
    with pytest.raises(KeyboardInterrupt):
        quantize_folder(folder, tmp_path / "q", settings, [text], **SHORT)
    monkeypatch.setattr(layerwise.Layerwise, "_layer", layer)
    quantize_folder(folder, tmp_path / "q", settings, [text], **SHORT)
    assert len(calls) == 1
    quantize_folder(folder, tmp_path / "whole", settings, [text], **SHORT)
    files = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("q", "whole")]
    assert len(calls) == 2 and files[0] == files[1]


@pytest.mark.slow
@pytest.mark.parametrize("correct", [None, "qwt"])
def test_memory_is_one_layer_and_the_activations(tmp_path, text, correct):
    """Twice the layers, the same memory: a model of 24 layers would need 150 MB more than one of 12 in float32."""
    peaks, settings = [], {"format": "int4_g32", "method": "gptq"} | ({"correct": correct} if correct else {})
    for layers in (12, 24):
        sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4, "num_hidden_layers": layers}
        source = a_folder(tmp_path / f"model{layers}", vocab_size=4096, **sizes)
        code = (
            "import resource, sys; from tritkit.methods.quantizer import quantize_folder as q;"
            "from tritkit.methods.recipe import read_recipe as r;"
            f"q({str(source)!r}, {str(tmp_path / f'q{layers}')!r}, r(None, {settings!r}),"
            f"[{text!r}], sequences=4, length=32);"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "100000"}
        peaks.append(int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env).stdout))
    # mapped pages of the source and of the parts count as resident too: 75 MB of weights more, read once
    assert peaks[1] - peaks[0] < 110_000
