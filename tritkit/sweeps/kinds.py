"""What a sweep has to know of a recipe: its method, the calibration text it uses, which others take about as long."""

from __future__ import annotations

from ..checkpoint import ModelFolder
from ..methods.planning import all_plans, needs_inputs, weighs_inputs
from ..methods.recipe import LoadedRecipe
from .settings import Settings


def calibration_of(model: ModelFolder, settings: Settings, loaded: LoadedRecipe) -> tuple[str, ...] | None:
    """The text for one recipe: none, (), where it has no use for one; None: the bundled books."""
    try:
        plans = all_plans(model, loaded, bool(settings.calibration))
    except ValueError:  # a recipe that does not fit this model: its row will say so
        return ()
    if any(needs_inputs(plan, loaded) for plan in plans.values()):
        return settings.calibration or None
    return settings.calibration if weighs_inputs(loaded, plans) else ()


def kind_of(loaded: LoadedRecipe | None) -> str:
    """Recipes of one kind take about equally long: "gptq+qwt", "awq+rtn", "search", "none" for the model itself."""
    if loaded is None:
        return "none"
    recipe = loaded.recipe
    parts = [recipe.transform, method_of(loaded), recipe.correct, "budget" if recipe.budget.bits is not None else None]
    return "+".join(part for part in parts if part)


def method_of(loaded: LoadedRecipe) -> str:
    """The method of most linears."""
    from ..formats import format_of
    from ..methods.recipe import KEEP, is_ggml

    recipe = loaded.recipe
    if recipe.method is not None:
        return recipe.method
    named = recipe.format not in (None, KEEP)
    return "search" if recipe.mix is not None or (named and is_ggml(format_of(str(recipe.format)))) else "rtn"
