"""Recipes: what they mean, and one clear sentence for each that means nothing."""

import re
import sys
from pathlib import Path

import pytest

from tritkit.config import names
from tritkit.methods.recipe import KEEP, Plan, Recipe, plans_of, read_recipe

NAMES = [f"model.layers.{i}.{n}" for i in range(3) for n in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]


def write(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


def test_a_format_is_a_recipe():
    plans = plans_of(read_recipe("int4_g64"), NAMES)
    assert {(p.format.name, p.method) for p in plans.values()} == {("int4_g64", "rtn")}


def test_rules_override_in_their_order(tmp_path):
    loaded = read_recipe(write(tmp_path, """
        format = "int4_g64"
        method = "gptq"
        [[rule]]
        match = "*.down_proj"
        format = "int8_row"
        [[rule]]
        match = "model.layers.0.*"
        format = "keep"
        [[rule]]
        match = "layers.0.mlp.down_proj"
        format = "int2_g64"
        method = "rtn"
    """))  # fmt: skip
    plans = plans_of(loaded, NAMES)
    assert loaded.recipe.name == "mine"
    assert plans["model.layers.1.mlp.up_proj"].format.name == "int4_g64"
    assert plans["model.layers.1.mlp.down_proj"] == Plan(plans["model.layers.2.mlp.down_proj"].format, "gptq")
    assert plans["model.layers.0.self_attn.q_proj"].format is None
    assert (plans["model.layers.0.mlp.down_proj"].format.name, plans["model.layers.0.mlp.down_proj"].method) == (
        "int2_g64", "rtn",
    )  # fmt: skip


def test_its_text_makes_it_again(tmp_path):
    loaded = read_recipe(
        write(tmp_path, 'format="int4_g64"\n[gptq]\ndamping=0.05\n[[rule]]\nmatch="*.q_proj"\nformat="keep"')
    )
    again = read_recipe(write(tmp_path, loaded.text()))
    assert again == loaded and again.digest() == loaded.digest()


def test_the_command_line_overrides_the_file(tmp_path):
    path = write(tmp_path, 'format = "int4_g64"')
    loaded = read_recipe(path, {"method": "gptq", "gptq.damping": "0.1", "budget.options": "int2_g64,int4_g64"})
    assert (loaded.recipe.method, loaded.recipe.gptq.damping) == ("gptq", 0.1)
    assert loaded.recipe.budget.options == ("int2_g64", "int4_g64")


def test_one_range_for_all_tokens_is_static():
    for inputs in ("int8_tensor", "int8_tensor_asym"):
        plans = plans_of(read_recipe(None, {"format": "int8_row", "inputs": inputs}), NAMES)
        assert {p.inputs_range for p in plans.values()} == {"mse"}
    plans = plans_of(read_recipe(None, {"format": "int8_row", "inputs": "int8_row"}), NAMES)
    assert {p.inputs_range for p in plans.values()} == {None}


def test_llm_int8():
    plan = plans_of(read_recipe(None, {"format": "int8_row", "inputs": "int8_row+outliers"}), NAMES)[NAMES[0]]
    assert plan.outliers and plan.input_format.name == "int8_row"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('format = "int4_64g"', "there is no format 'int4_64g'; did you mean 'int4_g64'?"),
        ('format = "int4_g64"\nmethod = "gptk"', "there is no method 'gptk'; did you mean 'gptq'?"),
        ('format = "int4_g64"\ntransform = "smoothquand"', "did you mean 'smoothquant'?"),
        ('format = "int4_g64"\ncorrect = "qtw"', "did you mean 'qwt'?"),
        ('format = "int4_g64"\nrange = "percentil"', "there is no range 'percentil'; did you mean 'percentile'?"),
        ('formats = "int4_g64"', "there is no setting 'formats'; did you mean 'format'?"),
        ('format = "int4_g64"\n[gptq]\ndampin = 0.1', "did you mean 'gptq.damping'?"),
        ('format = "int4_g64"\n[gptq]\ndamping = -1.0', "gptq.damping is -1, expected 0 or more"),
        ('format = "int4_g64"\n[[rule]]\nformat = "keep"', "rule 1 of the recipe has no match"),
        ('format = "int4_g64"\n[[rule]]\nmatch = "*"\nmethode = "rtn"', "rule 1 of the recipe: there is no setting"),
        ('format = "int4_g64"\nmix = "q4_k_m"', "leave one out"),
        ('method = "gptq"', "the recipe names no format"),
        ("format = ", "is not a TOML file"),
        ("[budget]\nbits = 0.5", "budget.bits is 0.5, expected 1 to 16"),
        ('format = "int4_g64"\nrule = 3', r"\[\[rule\]\]"),
        ('format = "int4_g64"\nmix = "q4_k_m"\nrange = "mse"', "leave one out"),
        ('mix = "q4_k_m"\nrange = "mse"', "range is 'mse', but the types of the mix q4_k_m have grids of their own"),
        ('format = "int4_g64"\n[budget]\nbits = 4', "both the format int4_g64 and budget.bits (4)"),
        ("[budget]\nbits = 4\noptions = []", "budget.options is empty"),
        ('[budget]\nbits = 4\noptions = ["keep"]', "there is no format 'keep'"),
        ("[budget]\nbits = nan", "budget.bits is nan, expected 1 to 16"),
        ('format = "int4_g64"\n[qwt]\nridge = -0.1', "qwt.ridge is -0.1, expected 0 or more"),
        ('format = "int4_g64"\n[qwt]\nfinetune = -1', "qwt.finetune is -1, expected 0 or more epochs"),
        ('format = "int4_g64"\n[qwt]\nrate = 0.0', "qwt.rate is 0, expected a number above 0"),
        ('format = "int4_g64"\n[awq]\nsteps = 0', "awq.steps is 0, expected at least 1"),
        ('format = "int4_g64"\n[smoothquant]\nalpha = 1.5', "smoothquant.alpha is 1.5, expected 0 to 1"),
        ('format = "int4_g64"\noutlier_threshold = -6.0', "outlier_threshold is -6, expected a number above 0"),
        ('format = "int4_g64"\ninputs = "nf4"', "inputs cannot be 'nf4'; known are a8"),
        ('format = "int8_row"\ninputs = "int8_g64+outliers"', "outliers stay apart from codes with one scale a token"),
        ('format = "int8_row"\ninputs_range = "mse"', "inputs_range is 'mse', but inputs names no format"),
    ],
)
def test_mistakes_get_one_sentence(tmp_path, text, sentence):
    with pytest.raises(ValueError, match=sentence if "[" in sentence else re.escape(sentence)) as caught:
        read_recipe(write(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"format": "int4_g64", "method": "search"}, "the method search is for the formats of ggml, not for int4_g64"),
        ({"format": "nf4", "range": "mse"}, "range is 'mse', but nf4 has a grid of its own"),
        ({"format": "q4_k", "range": "mse"}, "range is 'mse', but q4_k has a grid of its own"),
        ({"format": "ternary", "range": "absmax"}, "range is 'absmax', but ternary has a grid of its own"),
        (
            {"format": "int4_row_asym", "range": "entropy"},
            "'entropy', which is for symmetric formats, but int4_row_asym",
        ),
        ({"inputs": "int8_row", "inputs_range": "mse"}, "inputs in int8_row have one for each; name int8_tensor"),
        ({"inputs": "int8_tensor_asym", "inputs_range": "entropy"}, "for symmetric formats, but int8_tensor_asym is"),
        ({"format": "int8_row_asym", "inputs": "int8_row+outliers"}, "need symmetric weights with one scale a row"),
        ({"format": "int4_g64", "inputs": "int8_row+outliers"}, "such as int8_row, not int4_g64"),
        ({"format": "q8_0", "inputs": "int8_row+outliers"}, "such as int8_row, not q8_0"),
    ],
)
def test_settings_that_do_not_go_together(settings, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        settings = {"format": "int8_row", **settings}
        plans_of(read_recipe(None, settings), NAMES)


def test_what_is_kept_keeps_its_inputs_too(tmp_path):
    loaded = read_recipe(write(tmp_path, """
        format = "int8_row"
        inputs = "int8_tensor"
        [[rule]]
        match = "*.down_proj"
        format = "keep"
    """))  # fmt: skip
    plans = plans_of(loaded, NAMES)
    assert plans["model.layers.1.mlp.down_proj"] == Plan(None)
    assert plans["model.layers.1.mlp.up_proj"].inputs == "int8_tensor"


def test_a_rule_that_matches_nothing(tmp_path):
    loaded = read_recipe(write(tmp_path, f'format = "int4_g64"\n[[rule]]\nmatch = "*.downproj"\nformat = "{KEEP}"'))
    with pytest.raises(
        ValueError, match=r"the rule '\*.downproj' matches none of the 9 linears; did you mean '\*.down_proj'"
    ):
        plans_of(loaded, NAMES)


@pytest.mark.parametrize(("name", "near"), [("q4_k_mm", "q4_k_m"), ("int44_row", "int4_row"), ("ternery", "ternary")])
def test_an_unknown_name_offers_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"there is no recipe {name}; did you mean '{near}'"):
        read_recipe(name)


def test_a_missing_file():
    with pytest.raises(ValueError, match=r"there is no settings file .*nowhere.toml"):
        read_recipe(Path("nowhere.toml"))


def test_the_recipes_that_ship_and_those_of_the_table_are_understood(tmp_path):
    root = Path(__file__).parent.parent
    sys.path.insert(0, str(root / "tools"))
    try:
        from table_recipes import TWIN, rows, twin_rows
    finally:
        sys.path.pop(0)
    assert set(TWIN) <= set(rows()), "a name that is none would be left out without a word"
    for name, text in (rows() | twin_rows()).items():
        (tmp_path / f"{name}.toml").write_text(text)
    files = [*sorted((root / "recipes").glob("*.toml")), *sorted(tmp_path.glob("*.toml"))]
    assert len(files) > 70
    for file in files:
        loaded = read_recipe(file)
        assert loaded.recipe.mix or plans_of(loaded, NAMES)


def test_the_documents_know_every_setting(tmp_path):
    text = (Path(__file__).parent.parent / "docs" / "quantisation.md").read_text(encoding="utf-8")
    text = text.partition("## Recipes")[2].partition("\n## ")[0]
    loaded = read_recipe(write(tmp_path, text.partition("```toml")[2].partition("```")[0]))
    formats = {p.format.name if p.format else None for p in plans_of(loaded, NAMES).values()}
    assert formats == {"int4_g64", "int6_g64", None}
    listed = set()
    for line in text.splitlines():
        if line.startswith("| `"):  # `gptq.damping` `.sink`
            first, *others = re.findall(r"`([\w.]+)`", line.split("|")[1])
            table = first.partition(".")[0]
            listed |= {first, *(table + name if name.startswith(".") else name for name in others)}
    assert listed == set(names(Recipe))
