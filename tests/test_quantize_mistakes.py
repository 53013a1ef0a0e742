"""What `tritkit quantize` refuses: one sentence, before the work where that can be known, and nothing is left."""

import numpy as np
import pytest
import torch
from float_folder import SHORT, a_folder, a_text, recipe, with_value

from tritkit.checkpoint import open_folder
from tritkit.methods import quantizer
from tritkit.methods.quantizer import quantize_folder
from tritkit.methods.recipe import LoadedRecipe, Recipe, Rule
from tritkit.sources import bundled_folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return a_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return a_folder(tmp_path_factory.mktemp("float") / "model")


def test_rounding_to_ternary_comes_with_a_warning(folder, tmp_path, capfd):
    quantize_folder(folder, tmp_path / "q", "ternary")
    assert "lose nearly all that a model has learnt" in " ".join(capfd.readouterr().err.split())
    quantize_folder(folder, tmp_path / "q4", "int4_g32")
    assert "warning" not in capfd.readouterr().err


def test_mistakes_get_one_sentence_and_nothing_is_written(folder, tmp_path, text):
    short = tmp_path / "short.txt"
    short.write_text("Only this.")
    odd = with_value(folder, tmp_path / "odd", "model.layers.1.mlp.up_proj.weight", np.nan)
    cases = [
        (folder, recipe(format="int4_g48"), [], {}, "int4_g48 has groups of 48 columns, but a row of model.layers.0"),
        (folder, recipe(format="q4_k"), [], {}, "q4_k has groups of 256 columns, but .*, or a mix as q4_k_m, which"),
        (folder, recipe(format="int4_g32", method="gptq"), [], {}, "the method gptq needs calibration data"),
        (folder, recipe(format="int4_g32", correct="qwt"), [], {}, "qwt needs calibration data"),
        (folder, recipe(format="int8_row", inputs="int8_tensor"), [], {}, "a static range of inputs needs calibration"),
        (folder, recipe(**{"budget.bits": 3}), [], {}, "a budget of bits needs calibration data"),
        (folder, recipe(format="int4_g32", method="gptq"), [str(short)], SHORT, "fewer than 1 sequence of 32"),
        (folder, recipe(format="int4_g32", head="int8_row"), [], {}, "has none of its own"),
        (odd, recipe(format="int4_g32"), [], {}, "model.layers.1.mlp.up_proj.weight has 1 values that are not finite"),
        (bundled_folder(), recipe(format="int4_g32"), [], {}, "is a ternary model already"),
        (tmp_path / "none", recipe(format="int4_g32"), [], {}, "there is no model folder"),
    ]  # fmt: skip
    for source, settings, calibration, options, sentence in cases:
        with pytest.raises(ValueError, match=sentence) as caught:
            quantize_folder(source, tmp_path / "out", settings, calibration, **options)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_what_is_not_finite_is_named_whatever_it_is(tmp_path):
    source = a_folder(tmp_path / "model", "qwen2")
    for number, (name, value) in enumerate(
        (
            ("model.embed_tokens.weight", np.nan),
            ("model.norm.weight", np.inf),
            ("model.layers.1.input_layernorm.weight", -np.inf),
            ("model.layers.2.self_attn.q_proj.bias", np.nan),
        )
    ):
        odd = with_value(source, tmp_path / str(number), name, value)
        with pytest.raises(ValueError, match=f": {name} has 1 values that are not finite: the file is damaged"):
            quantize_folder(odd, tmp_path / "out", "int4_g32")
        assert not list(tmp_path.glob(".*"))


def test_what_fails_on_the_way_leaves_nothing(folder, tmp_path):
    """A weight whose block has a scale beyond float16."""
    large = with_value(folder, tmp_path / "large", "model.layers.2.mlp.up_proj.weight", 1e8)
    with pytest.raises(ValueError, match=r"model.layers.2.mlp.up_proj: q4_0 holds scales as float16, at most 65504"):
        quantize_folder(large, tmp_path / "out", "q4_0")
    assert [p.name for p in tmp_path.iterdir()] == ["large"]


def test_what_an_earlier_run_finished_stays(folder, tmp_path, monkeypatch):
    for error in (KeyboardInterrupt, ValueError):

        def stop(self, error=error):
            raise error

        monkeypatch.setattr(quantizer.Layerwise, "run", stop)
        with pytest.raises(error):
            quantize_folder(folder, tmp_path / "out", "int4_g32")
        assert (tmp_path / ".out.partial").is_dir()


def test_adapters_and_rounded_inputs_are_not_quantised_again(folder, tmp_path, text):
    settings = {"correct": "qwt", "qwt.check": "false", "qwt.ridge": "0.1", "format": "int2_g32"}
    quantize_folder(folder, tmp_path / "terms", recipe(**settings), [text], sequences=48, length=64)
    quantize_folder(folder, tmp_path / "inputs", recipe(format="int8_row", inputs="int8_row"))
    for name, sentence in (("terms", r"compensates \d layers"), ("inputs", "rounds the inputs of 21 linears")):
        with pytest.raises(ValueError, match=f"{name} {sentence}, which belongs to the weights as they are"):
            quantize_folder(tmp_path / name, tmp_path / "out", "int4_g32")


def test_an_importance_matrix_that_changes_nothing_is_refused(folder, tmp_path, text):
    file = tmp_path / "m.gguf"
    cases = (
        (recipe(format="int4_g32"), "but no linear is quantised by it"),
        (recipe(format="q4_0", method="gptq"), "but no linear is quantised by it"),
        (recipe(format="q8_0"), "but no linear is quantised by it"),
        (recipe(**{"budget.bits": 4}), "but no linear is quantised by it"),
        (recipe(format="q4_0", importance="false"), "the recipe has importance = false, but .*m.gguf"),
    )
    for settings, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            quantize_folder(folder, tmp_path / "out", settings, [text], **SHORT, imatrix=file)
        assert not file.exists() and not (tmp_path / "out").exists()


def test_one_importance_is_not_another_of_the_same_sum():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
    assert quantizer._digest({"l": a}) == quantizer._digest({"l": a.clone()}) != quantizer._digest({"l": b})


def test_kept_weights_have_no_rounded_inputs(folder, tmp_path):
    with pytest.raises(ValueError, match=r"inputs are int8_row, but the weights of model.layers.0.self_attn.q_proj"):
        quantize_folder(folder, tmp_path / "out", recipe(format="keep", inputs="int8_row"))
    with pytest.raises(ValueError, match=r"in int4_g32 32 weights of model.layers.0.self_attn.q_proj share a scale"):
        quantize_folder(folder, tmp_path / "out", recipe(format="int4_g32", range="entropy"))
    rules = (Rule(match="*.down_proj", format="int8_row"), Rule(match="*.q_proj", inputs="int8_row"))
    with pytest.raises(ValueError, match=r"a rule gives .*q_proj inputs 'int8_row', but nothing gives it a format"):
        quantize_folder(folder, tmp_path / "out", LoadedRecipe(Recipe(), rules))
    assert not list(tmp_path.iterdir()) and open_folder(folder)


@pytest.mark.parametrize("format", ["int8_g32", "q8_0"])
def test_outliers_need_one_scale_a_row_of_kept_codes(folder, tmp_path, format):
    quantize_folder(folder, tmp_path / "q", format)
    with pytest.raises(ValueError, match=r"need symmetric weights with one scale a row, but .*q_proj stays"):
        quantize_folder(tmp_path / "q", tmp_path / "out", recipe(format="keep", inputs="int8_row+outliers"))
    assert not (tmp_path / "out").exists()
