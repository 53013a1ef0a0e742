"""What is wrong with a recipe by itself, before there is a model: names that nobody knows, numbers out of their range,
settings that contradict each other."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..formats import FORMATS, format_of
from ..inputs import input_format
from ..jsonfile import shown

if TYPE_CHECKING:
    from .recipe import LoadedRecipe, Recipe, Rule

KEEP = "keep"  # in place of a format: the matrix stays as it is
TRANSFORMS = ("awq", "smoothquant")
CORRECTIONS = ("qwt",)


def check(loaded: LoadedRecipe) -> None:
    """ValueError for a name that nobody knows, or settings that contradict each other."""
    from .ranges import RANGES
    from .table import METHODS

    recipe = loaded.recipe
    _check_choice(loaded)
    _require(recipe.transform, TRANSFORMS, "transform")
    _require(recipe.correct, CORRECTIONS, "correct")
    for name in (recipe.embedding, recipe.head):
        if name != KEEP and name is not None:
            require_format(name)
    for name in recipe.budget.options:
        require_format(name)
    owners: tuple[Recipe | Rule, ...] = (recipe, *loaded.rules)
    for owner in owners:
        _require(owner.method, tuple(METHODS), "method")
        _require(owner.range, tuple(RANGES), "range")
        _require(owner.inputs_range, tuple(RANGES), "inputs_range")
        if owner.format is not None and owner.format != KEEP:
            require_format(owner.format)
        if owner.inputs is not None:
            input_format(owner.inputs)
    ranged = next((o.inputs_range for o in owners if o.inputs_range is not None), None)
    if ranged is not None and all(o.inputs is None for o in owners):
        raise ValueError(f"inputs_range is {ranged!r}, but inputs names no format")
    _check_numbers(recipe)


def _check_choice(loaded: LoadedRecipe) -> None:
    """ValueError unless exactly one setting says which formats there are."""
    recipe = loaded.recipe
    if recipe.mix is not None:
        _require(recipe.mix, mix_names(), "mix")
        if recipe.format is not None or recipe.budget.bits is not None:
            raise ValueError(f"the recipe has both the mix {recipe.mix} and another choice of formats; leave one out")
        if recipe.range is not None:
            raise ValueError(
                f"range is {recipe.range!r}, but the types of the mix {recipe.mix} have grids of their own; ranges are "
                "for integers"
            )
    if recipe.budget.bits is not None and recipe.format is not None:
        raise ValueError(
            f"the recipe has both the format {recipe.format} and budget.bits ({recipe.budget.bits:g}), which chooses "
            "formats; leave one out"
        )
    if recipe.budget.bits is not None and not recipe.budget.options:
        raise ValueError("budget.options is empty; name the formats to choose among")
    if recipe.mix is None and recipe.format is None and recipe.budget.bits is None and not loaded.rules:
        raise ValueError("the recipe names no format: set format, mix, budget.bits, or rules")


def _check_numbers(recipe: Recipe) -> None:
    """ValueError for a number outside its range; NaN is outside of every one."""
    bits, gptq, qwt = recipe.budget.bits, recipe.gptq, recipe.qwt
    numbers: tuple[tuple[str, float, bool, str], ...] = (
        ("budget.bits", 1 if bits is None else bits, bits is None or 1 <= bits <= 16, "1 to 16 bits a weight"),
        ("outlier_threshold", recipe.outlier_threshold, recipe.outlier_threshold > 0, "a number above 0"),
        ("gptq.damping", gptq.damping, gptq.damping >= 0, "0 or more"),
        ("gptq.sink", gptq.sink, gptq.sink >= 1, "1 or more"),
        ("gptq.columns", gptq.columns, gptq.columns >= 1, "at least 1"),
        ("awq.steps", recipe.awq.steps, recipe.awq.steps >= 1, "at least 1"),
        ("smoothquant.alpha", recipe.smoothquant.alpha, 0 <= recipe.smoothquant.alpha <= 1, "0 to 1"),
        ("qwt.ridge", qwt.ridge, qwt.ridge >= 0, "0 or more"),
        ("qwt.held_out", qwt.held_out, 0 < qwt.held_out < 1, "a share between 0 and 1"),
        ("qwt.finetune", qwt.finetune, qwt.finetune >= 0, "0 or more epochs"),
        ("qwt.rate", qwt.rate, qwt.rate > 0, "a number above 0"),
    )
    for name, value, is_right, expected in numbers:
        if not is_right or not math.isfinite(value):
            raise ValueError(f"{name} is {value:g}, expected {expected}")


def mix_names() -> tuple[str, ...]:
    """Names of llama.cpp's mixes."""
    from .mixes import MIXES

    return tuple(MIXES)


def _require(value: str | None, known: Sequence[str], what: str) -> None:
    if value is None or value in known:
        return
    close = difflib.get_close_matches(value, known, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
    raise ValueError(f"there is no {what} {shown(value)}; {hint}")


def require_format(name: str, beginning: str = "") -> None:
    """ValueError, with the nearest name, where there is no such format. beginning: of the sentence."""
    try:
        format_of(name)
    except ValueError:
        known = [*FORMATS, *(f"int{bits}_g64" for bits in range(2, 9)), "int4_row", "int8_row", "int4_g64_asym"]
        candidates = [*known, *(mix_names() if beginning else ())]
        close = difflib.get_close_matches(name.lower(), candidates, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
        raise ValueError(f"{beginning or f'there is no format {shown(name)}'}; {hint}") from None
