"""A recipe on a model: what becomes of each of its matrices, what that needs, and whether it can be."""

from __future__ import annotations

from collections.abc import Mapping

from ..checkpoint import ModelFolder
from ..gguf_plan import WEIGHED
from ..inputs import OUTLIERS, has_row_scales
from ..layouts import LAYOUTS
from ..models.shapes import EMBEDDING, HEAD, linear_names, matrix_names, matrix_shape
from . import NEED_INPUTS
from .histogram import BINS
from .layerwise import layout_of
from .recipe import KEEP, LoadedRecipe, Plan, Settings, is_ggml, plan_of, settings_of

FLOATS = ("f32", "f16", "bf16")  # what a mix falls back to where no block fits a row


def all_plans(model: ModelFolder, loaded: LoadedRecipe, has_importance: bool) -> dict[str, Plan]:
    """The plan of each linear, and of the embedding and the head where they change. Under a budget linears that no
    rule names a format for have none yet. has_importance: whether it is known how large the inputs of the linears are.
    """
    recipe, types = loaded.recipe, {}
    if recipe.mix is not None:
        from .mixes import mix_types

        found = mix_types(model.config, recipe.mix, has_importance and recipe.importance)
        types = {name: KEEP if kind in FLOATS else kind for name, kind in found.items()}
    settings = settings_of(loaded, linear_names(model.config), types)
    plans = {name: _linear(model, loaded, name, values) for name, values in settings.items()}
    for name, format in ((EMBEDDING, recipe.embedding), (HEAD, recipe.head)):
        if name == HEAD and format not in (None, KEEP) and name not in matrix_names(model.config):
            raise ValueError(f"the recipe has a format for the head, but {model.path} has none of its own: it is "
                             "the embedding")  # fmt: skip
        format = format or types.get(name, KEEP)
        if format != KEEP:  # by no method that asks for inputs: those of the tables are token numbers, or not seen
            plans[name] = plan_of({"format": format})
    return plans


def _linear(model: ModelFolder, loaded: LoadedRecipe, name: str, values: Settings) -> Plan:
    recipe = loaded.recipe
    if values["format"] is None and recipe.budget.bits is not None:
        for option in recipe.budget.options:  # ValueError before anything is measured
            plan_of({**values, "format": option})
    elif values["format"] is None:  # rules alone say what changes
        alone = [k for k, v in values.items() if v is not None and v != getattr(recipe, k)]
        if alone:
            raise ValueError(f"a rule gives {name} {alone[0]} {values[alone[0]]!r}, but nothing gives it a format")
        return Plan()
    elif values["format"] == KEEP and values["inputs"] is not None and name not in model.layouts:
        raise ValueError(f"inputs are {values['inputs']}, but the weights of {name} stay floats; give them a format")
    elif values["format"] == KEEP and (values["inputs"] or "").endswith(OUTLIERS) and not has_row_scales(model, name):
        raise ValueError(f"inputs in {values['inputs']} need symmetric weights with one scale a row, but {name} stays "
                         f"{model.layouts[name]}")  # fmt: skip
    return plan_of(values)


def needs_inputs(plan: Plan, loaded: LoadedRecipe) -> bool:
    return (plan.method in NEED_INPUTS and plan.format is not None) or bool(
        plan.inputs_range or loaded.recipe.correct or loaded.recipe.transform or loaded.recipe.budget.bits is not None
    )


def what_needs(plan: Plan, loaded: LoadedRecipe) -> str:
    recipe = loaded.recipe
    if plan.method in NEED_INPUTS and plan.format is not None:
        return f"the method {plan.method}"
    if recipe.correct or recipe.transform:
        return str(recipe.correct or recipe.transform)
    return "a static range of inputs" if plan.inputs_range else "a budget of bits"


def require_fit(model: ModelFolder, plans: Mapping[str, Plan]) -> None:
    """ValueError, before any work, for a format whose groups do not divide a row, or that no layout holds."""
    for name, plan in plans.items():
        require_shape(name, plan, *matrix_shape(model.config, name))
        if plan.format is not None and layout_of(plan) not in LAYOUTS:
            raise ValueError(f"{name}: no layout holds weights in {plan.format.name}")


def require_shape(name: str, plan: Plan, rows: int, columns: int) -> None:
    """ValueError where the formats of a plan do not fit a matrix [rows, columns]."""
    for format in (plan.format, plan.input_format):
        if format is not None and format.block and columns % format.block:
            advice = f"choose a group size that divides {columns}"
            if is_ggml(format):  # its blocks have one size
                advice = "choose a format of smaller groups, or a mix as q4_k_m, which has other types for such rows"
            raise ValueError(
                f"{format.name} has groups of {format.block} columns, but a row of {name} has {columns}; {advice}"
            )
    if plan.format is None:
        return
    together = plan.format.block or (columns if plan.format.group == "row" else rows * columns)
    if plan.range == "entropy" and together < BINS:
        raise ValueError(
            f"entropy looks at a histogram of {BINS} bins, but in {plan.format.name} {together} weights of {name} "
            "share a scale; mse is for such groups"
        )


def is_weighed(plan: Plan) -> bool:
    """Whether its method looks at how large the inputs of the columns are (ggml's search)."""
    return plan.format is not None and plan.method == "search" and plan.format.name in WEIGHED


def weighs_inputs(loaded: LoadedRecipe, plans: Mapping[str, Plan]) -> bool:
    """Whether that is so of any linear; the inputs of the embedding and the head are not looked at."""
    linears = [plan for name, plan in plans.items() if name not in (EMBEDDING, HEAD)]
    return loaded.recipe.importance and any(map(is_weighed, linears))


def require_weighed(loaded: LoadedRecipe, plans: Mapping[str, Plan], imatrix: object) -> None:
    """ValueError where an importance matrix would change nothing."""
    recipe = loaded.recipe
    if not recipe.importance:
        raise ValueError(f"the recipe has importance = false, but {imatrix} is an importance matrix; leave one out")
    weighed = weighs_inputs(loaded, plans)
    if recipe.budget.bits is not None and recipe.method in (None, "search"):
        weighed = weighed or bool(set(recipe.budget.options) & set(WEIGHED))
    if not weighed:
        raise ValueError(f"{imatrix} weighs the search for {', '.join(WEIGHED)}, but no linear is quantised by it")


def require_plain(model: ModelFolder) -> None:
    """ValueError where the model is quantised in a way that another quantisation would lose."""
    if model.config.weights is not None:
        raise ValueError(
            f"{model.path} is a {model.config.weights} model already; `tritkit pack` rounds its weights as they were "
            "trained"
        )
    if model.adapters or model.inputs:
        what = "compensates" if model.adapters else "rounds the inputs of"
        count = f"{len(model.adapters)} layers" if model.adapters else f"{len(model.inputs)} linears"
        raise ValueError(
            f"{model.path} {what} {count}, which belongs to the weights as they are; quantise the model that it was "
            "made from"
        )


def warnings_of(model: ModelFolder, plans: Mapping[str, Plan]) -> list[str]:
    """What a user should know before the work begins, a sentence each."""
    names = {plan.format.name for plan in plans.values() if plan.format is not None}
    found = []
    again = [model.layouts[n] for n, plan in plans.items() if plan.format is not None and n in model.layouts]
    if again:
        found.append(
            f"{len(again)} matrices of {model.path} are quantised already ({', '.join(sorted(set(again)))}); their "
            "rounded values are quantised once more"
        )
    for name in sorted(names & {"ternary", "binary", "tq1_0", "tq2_0"}):
        found.append(
            f"{name} weights that are rounded after training lose nearly all that a model has learnt, whatever the "
            "method; models of such weights have to be trained with them: see tritkit train"
        )
    return found
