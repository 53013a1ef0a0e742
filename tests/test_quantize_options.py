"""Options of `tritkit quantize`: every one does what it says, together with the others, and none is passed over."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from float_folder import LONG, SHORT, a_folder, a_text, distance, recipe

from tritkit import results
from tritkit.checkpoint import open_folder
from tritkit.engine.torch import model_of
from tritkit.folderwriter import write_folder
from tritkit.layouts import search
from tritkit.methods import quantizer
from tritkit.methods.calibration import read_calibration
from tritkit.methods.importance import read_importance
from tritkit.methods.planning import all_plans
from tritkit.methods.quantizer import quantize_folder
from tritkit.methods.recipe import Rule, read_recipe
from tritkit.methods.stream import DecoderStream
from tritkit.models.shapes import linear_names
from tritkit.tensorfile import StoredTensor


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return a_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return a_folder(tmp_path_factory.mktemp("float") / "model")


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


@pytest.mark.parametrize(("method", "more"), [("rtn", {}), ("gptq", {"transform": "smoothquant"})])
def test_qwt_is_fitted_on_the_compensated_prefix(folder, tmp_path, text, method, more):
    """Each layer of the written model without its term, beside the float layer, on what those before it hand on."""
    settings = {"format": "int2_g32", "method": method, "correct": "qwt", "qwt.check": "false", "qwt.ridge": "0.1"}
    quantize_folder(folder, tmp_path / "q", recipe(**settings, **more), [text], **LONG)
    model, written = open_folder(folder), model_of(open_folder(tmp_path / "q")).eval()
    reports = results.read(tmp_path / "q")[0]["per_linear"]
    data = read_calibration(model.tokenizer(), [text], LONG["sequences"], LONG["length"], 6)
    stream, kept = DecoderStream(model), 0
    with torch.no_grad():
        states = [written.model.embed_tokens(t) for t in (data.fit, data.held_out)]
        for number, layer in enumerate(written.model.layers):
            after = [stream.call(layer, 0, x) for x in states]
            report = reports[f"model.layers.{number}.adapter"]
            if report["kept"]:
                kept += 1
                plain = [y - layer.adapter(x) for x, y in zip(states, after, strict=True)]
                missing = [stream.call(stream.layer(number), 0, x) - y for x, y in zip(states, plain, strict=True)]
                x, y = (t[0].flatten(0, -2).double().numpy() for t in (states, missing))
                cx, cy = x - x.mean(0), y - y.mean(0)
                gram = cx.T @ cx
                w = np.linalg.solve(gram + 0.1 * np.trace(gram) / len(gram) * np.eye(len(gram)), cx.T @ cy).T
                b = y.mean(0) - w @ x.mean(0)
                assert np.abs(layer.adapter.weight.double().numpy() - w).max() < 3e-3 * np.abs(w).max()
                assert np.abs(layer.adapter.bias.double().numpy() - b).max() < 1e-2 * np.abs(b).max()
                for name, (x, y) in zip(("r2", "r2_held_out"), zip(states, missing, strict=True), strict=True):
                    x, y = x.flatten(0, -2).double().numpy(), y.flatten(0, -2).double().numpy()
                    r2 = 1 - np.square(y - x @ w.T - b).sum() / np.square(y - y.mean(0)).sum()
                    assert report[name] == pytest.approx(r2, abs=5e-3)
            states = after
    assert kept


def test_qwt_terms_stay_only_where_the_divergence_falls(folder, tmp_path, text):
    settings = {"format": "int2_g32", "correct": "qwt", "qwt.ridge": "0.1"}
    quantize_folder(folder, tmp_path / "q", recipe(**settings), [text], **LONG)
    (run,) = results.read(tmp_path / "q")
    reports = {n: r for n, r in run["per_linear"].items() if n.endswith(".adapter")}
    judged = [r for r in reports.values() if "divergence_before" in r]
    assert judged and all(r["kept"] == (r["divergence_after"] < r["divergence_before"]) for r in judged)
    # the last layer's is the divergence of the model as it was written
    model, quantised = open_folder(folder), open_folder(tmp_path / "q")
    tokens = read_calibration(model.tokenizer(), [text], LONG["sequences"], LONG["length"], 6).held_out
    with torch.no_grad():
        p, q = (model_of(m)(tokens).double().log_softmax(-1) for m in (model, quantised))
    last = reports["model.layers.2.adapter"]
    found = last["divergence_after" if last["kept"] else "divergence_before"]
    assert found == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-2)


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
    metrics = results.read(tmp_path / "q")[0]["metrics"]
    assert metrics["finetune_epochs"] == 2 and metrics["finetune_kept"] is True
    assert 0 < metrics["finetune_nll_after"] < metrics["finetune_nll_before"]


def test_a_budget_is_kept_and_used(folder, tmp_path, text):
    settings = {"budget.bits": 3.5, "budget.options": "int2_g32,int3_g32,int4_g32,int6_g32"}
    metrics = quantize_folder(folder, tmp_path / "q", recipe(**settings), [text], **SHORT)
    assert 3.3 < metrics["bits_per_weight"] <= 3.5
    assert metrics["weights"].count("+") >= 1
    uniform = quantize_folder(folder, tmp_path / "u", recipe(format="int3_g32"), [text], **SHORT)
    assert uniform["bits_per_weight"] == pytest.approx(3.5, abs=0.02)
    assert distance(folder, tmp_path / "q") < 1.1 * distance(folder, tmp_path / "u")


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_budget_goes_where_it_helps(tmp_path, text, method):
    """Four linears of a layer are five times as large, so that what is lost in them is lost in all behind them: the
    same bits spread evenly are worse by far."""
    model = open_folder(a_folder(tmp_path / "even"))
    tensors = {n: StoredTensor(t.dtype, np.array(t.array)) for n, t in model.tensors.items()}
    for name in ("mlp.down_proj", "mlp.up_proj", "self_attn.o_proj", "self_attn.v_proj"):
        tensors[f"model.layers.0.{name}.weight"].array[:] *= 3
    write_folder(tmp_path / "model", model.config, tensors, model.tokenizer(), {})
    settings = {"budget.bits": 3.5, "budget.options": "int2_g32,int3_g32,int4_g32,int6_g32", "method": method}
    metrics = quantize_folder(tmp_path / "model", tmp_path / "q", recipe(**settings), [text], sequences=16, length=32)
    even = recipe(format="int3_g32", method=method)
    quantize_folder(tmp_path / "model", tmp_path / "u", even, [text], sequences=16, length=32)
    assert metrics["bits_per_weight"] <= 3.5
    assert distance(tmp_path / "model", tmp_path / "q") < 0.8 * distance(tmp_path / "model", tmp_path / "u")


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
        quantize_folder(folder, tmp_path / "b", "q4_0", (), imatrix=tmp_path / "none.dat")
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere to write m.dat into"):
        quantize_folder(folder, tmp_path / "b", "q4_0", [text], imatrix=tmp_path / "nowhere" / "m.dat")


def test_a_stopped_run_does_not_measure_importance_again(folder, tmp_path, text, monkeypatch):
    """Nor does it take what it has measured itself for a file of the user's."""
    calls, layer, measure = [], quantizer.Layerwise._layer, quantizer.collect_importance

    def stops(self, number, *rest):
        if number == 1:
            raise KeyboardInterrupt
        return layer(self, number, *rest)

    monkeypatch.setattr(quantizer, "collect_importance", lambda *args: calls.append(args) or measure(*args))
    monkeypatch.setattr(quantizer.Layerwise, "_layer", stops)
    file, arguments = tmp_path / "m.dat", (folder, tmp_path / "q", "q4_0", [text])
    with pytest.raises(KeyboardInterrupt):
        quantize_folder(*arguments, **SHORT, imatrix=file)
    assert not file.exists()
    monkeypatch.setattr(quantizer.Layerwise, "_layer", layer)

    def is_full(*_):
        raise OSError("the disk is full")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="full"):
        patched.setattr(quantizer, "_write", is_full)
        quantize_folder(*arguments, **SHORT, imatrix=file)
    quantize_folder(*arguments, **SHORT, imatrix=file)
    assert len(calls) == 1 and file.exists()
    quantize_folder(folder, tmp_path / "whole", "q4_0", [text], **SHORT, imatrix=file)
    files = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("q", "whole")]
    assert len(calls) == 1 and files[0] == files[1]


def test_importance_from_a_file_goes_through_a_transform(tmp_path, text):
    """What the file says of the columns is said of inputs before they were made smaller: the weights are those of the
    importance that is measured behind the transform."""
    source = a_folder(tmp_path / "model", hidden_size=128, num_hidden_layers=1)
    settings = recipe(format="q4_0", transform="smoothquant")
    quantize_folder(source, tmp_path / "measured", settings, [text], **SHORT)
    quantize_folder(source, tmp_path / "filed", settings, [text], **SHORT, imatrix=tmp_path / "m.gguf")
    quantize_folder(source, tmp_path / "plain", replace_importance(settings), [text], **SHORT)
    name = "model.layers.0.self_attn.q_proj"
    measured, filed, plain = (open_folder(tmp_path / n).floats(name) for n in ("measured", "filed", "plain"))
    assert (filed != measured).mean() < 0.01 < (plain != measured).mean()


def replace_importance(loaded):
    return replace(loaded, recipe=replace(loaded.recipe, importance=False))


def test_the_search_says_what_weighs_it(folder, tmp_path, text, capfd):
    quantize_folder(folder, tmp_path / "a", "q4_0", [text], **SHORT)
    assert "weighed by the inputs on the calibration text" in capfd.readouterr().err
    quantize_folder(folder, tmp_path / "b", recipe(format="q4_0", importance="false"), [text], **SHORT)
    quantize_folder(folder, tmp_path / "c", "q4_0")
    quantize_folder(folder, tmp_path / "d", recipe(format="int4_g32", embedding="q4_0"), [text], **SHORT)
    assert "weighed" not in capfd.readouterr().err


def test_singular_second_moments_are_said(tmp_path, text, capfd):
    """Fewer tokens than columns: undamped, their second moments have no inverse."""
    source = a_folder(tmp_path / "model")
    settings = recipe(format="int4_g32", method="gptq", **{"gptq.damping": "0"})
    quantize_folder(source, tmp_path / "q", settings, [text], sequences=1, length=16)
    err = capfd.readouterr().err
    assert (
        "warning: the second moments of inputs of 21 linears (model.layers.0.self_attn.q_proj ...) were singular" in err
    )


def test_the_bundled_books_are_the_calibration_where_none_is_named(folder, tmp_path, capfd):
    quantize_folder(folder, tmp_path / "q", recipe(format="int3_row", method="gptq"), None, **SHORT)
    assert "bundled books" in capfd.readouterr().err
    assert results.read(tmp_path / "q")[0]["metrics"]["calibration_sequences"] == 4


def test_a_mix_takes_inputs_embedding_and_head(tmp_path):
    source = a_folder(tmp_path / "model", tie_word_embeddings=False)
    settings = recipe(mix="q4_0", inputs="int8_row", embedding="int8_row", head="int4_g32")
    quantize_folder(source, tmp_path / "q", settings)
    opened = open_folder(tmp_path / "q")
    assert len(opened.inputs) == 21 and set(opened.inputs.values()) == {"int8_row"}
    bits = {name: 8 * opened.packed(name).nbytes / (4096 * 64) for name in ("model.embed_tokens", "lm_head")}
    assert opened.layouts["model.embed_tokens"] == "dense" and bits["model.embed_tokens"] == pytest.approx(8, abs=0.6)
    assert bits["lm_head"] == pytest.approx(4.5, abs=0.01)


def test_rules_over_a_mix(folder):
    """Also those that keep, or name a method alone."""
    rules = (Rule("*.v_proj", "keep"), Rule("*.q_proj", method="rtn"), Rule("layers.1.mlp.*", inputs="int8_row"))
    loaded = replace(recipe(mix="q4_0", inputs="int4_row"), rules=rules)
    plans = all_plans(open_folder(folder), loaded, False)
    layer = {n.rpartition(".")[2]: p for n, p in plans.items() if ".layers.1." in n}
    assert layer["v_proj"].format is None and layer["v_proj"].inputs is None
    assert (layer["q_proj"].format.name, layer["q_proj"].method, layer["q_proj"].inputs) == ("q4_0", "rtn", "int4_row")
    assert (layer["k_proj"].format.name, layer["k_proj"].method) == ("q4_0", "search")
    assert (layer["up_proj"].format.name, layer["up_proj"].inputs) == ("q4_0", "int8_row")


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_of_a_mix_need_no_inputs(tmp_path, text, tied):
    source = a_folder(tmp_path / "model", tie_word_embeddings=tied)
    quantize_folder(source, tmp_path / "q", recipe(mix="q4_k_m", method="gptq"), [text], **SHORT)
    (run,) = results.read(tmp_path / "q")
    methods = {name: r["method"] for name, r in run["per_linear"].items()}
    assert methods.pop("model.embed_tokens") == "search" and methods.pop("lm_head", "search") == "search"
    assert set(methods.values()) == {"gptq"} and len(methods) == 21


def test_a_mix_knows_of_importance_when_the_books_are_taken(tmp_path):
    """q4_0 gives the first eighth of the down projections q4_1 where their importance is known."""
    source = a_folder(tmp_path / "model", num_hidden_layers=8)
    quantize_folder(source, tmp_path / "q", recipe(mix="q4_0", correct="qwt"), None, **SHORT)
    layouts = open_folder(tmp_path / "q").layouts
    assert [layouts[f"model.layers.{i}.mlp.down_proj"] for i in range(8)] == ["q4_1"] + 7 * ["q4_0"]


def test_rules_win_over_a_budget_and_count_in_it(folder, tmp_path, text):
    budget = {"budget.bits": 6, "budget.options": "int2_g32,int3_g32,int4_g32,int6_g32,int8_g32"}
    rules = (Rule("*.v_proj", "keep"), Rule("*.q_proj", "int7_g32"), Rule("*.k_proj", method="gptq"))
    metrics = quantize_folder(folder, tmp_path / "q", replace(recipe(**budget), rules=rules), [text], **SHORT)
    assert 5.7 < metrics["bits_per_weight"] <= 6
    (run,) = results.read(tmp_path / "q")
    opened = open_folder(tmp_path / "q")
    for i in range(3):
        at = f"model.layers.{i}.self_attn"
        assert f"{at}.v_proj" not in opened.layouts
        assert run["per_linear"][f"{at}.q_proj"]["format"] == "int7_g32"
        assert run["per_linear"][f"{at}.k_proj"]["method"] == "gptq"
    assert read_recipe(tmp_path / "q" / "tritkit.toml").rules[-3:] == rules


def test_a_budget_counts_the_terms_of_qwt_and_stored_ranges(folder, tmp_path, text):
    options = {"budget.options": "int2_g32,int3_g32,int4_g32,int6_g32", "correct": "qwt", "qwt.check": "false"}
    options |= {"qwt.ridge": "0.1", "inputs": "int8_tensor_asym"}
    metrics = quantize_folder(folder, tmp_path / "q", recipe(**options, **{"budget.bits": 5}), [text], **LONG)
    assert metrics["adapters"] == 3 and 4.8 < metrics["bits_per_weight"] <= 5
    for bits, sentence in (
        (1.5, "of the 20,736 bytes of the budget, compensation and grids of inputs take 25,512, which leaves nothing"),
        (3, "take 25,512: the budget of 15,960 bytes is less than"),
    ):
        with pytest.raises(ValueError, match=sentence):
            quantize_folder(folder, tmp_path / "none", recipe(**options, **{"budget.bits": bits}), [text], **SHORT)


def test_a_model_that_is_quantised_already_comes_with_a_warning(folder, tmp_path, capfd):
    quantize_folder(folder, tmp_path / "q", "int8_row")
    assert "already" not in capfd.readouterr().err
    quantize_folder(tmp_path / "q", tmp_path / "again", "int4_g32")
    said = " ".join(capfd.readouterr().err.split())
    assert "21 matrices of" in said and "are quantised already (dense)" in said


def test_metrics_say_exact_only_where_it_is(folder, tmp_path):
    assert "exact" not in quantize_folder(folder, tmp_path / "a", recipe(format="int4_g32"))
    assert quantize_folder(folder, tmp_path / "b", recipe(format="int4_g32", exact="true"))["exact"] is True
