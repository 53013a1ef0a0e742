"""A recipe says which linear gets which format, chosen by which method. A TOML file, or one of the names below.

    format = "int4_g64"            # of every linear of the blocks
    method = "gptq"                # rtn, gptq, search
    correct = "qwt"                # a closed-form compensation of each block
    [[rule]]                       # later rules win
    match = "*.down_proj"
    format = "int8_row"

Names that need no file: any format (``int4_g64``: round to nearest) and llama.cpp's mixes (``q4_k_m``).
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..config import dump, fill, read_toml
from ..formats import Format, format_of
from ..formats.integer import Integer
from ..inputs import OUTLIERS, THRESHOLD, input_format
from .recipe_check import KEEP, check, mix_names, require_format


@dataclass(frozen=True)
class GptqOptions:
    """Frantar et al. 2022. damping: share of the mean diagonal that is added to the Hessian; columns: of a lazy batch;
    act_order: columns of large inputs first, which fixes the grids of groups beforehand (static groups). In models with
    a few massive channels, which are most, the order decides whether GPTQ gains anything (docs/log.md). sink: in
    decoders (model folders; modules have none), how many tokens the first one of a sequence counts for: all others
    attend to it, so an error in its keys and values reaches each of them, while it is one row of thousands in the
    Hessian (1: as in the paper)."""

    damping: float = 0.01
    sink: float = 64.0
    act_order: bool = True
    static_groups: bool = False
    columns: int = 128


@dataclass(frozen=True)
class AwqOptions:
    """Lin et al. 2023. steps: exponents between 0 and 1 that are tried."""

    steps: int = 20


@dataclass(frozen=True)
class SmoothQuantOptions:
    """Xiao et al. 2022. alpha: how much of the difficulty goes from the inputs to the weights."""

    alpha: float = 0.5


@dataclass(frozen=True)
class QwtOptions:
    """Fu et al. 2024. ridge: relative to the mean variance of the inputs; check: keep a term only where the divergence
    of the whole model falls on held-out tokens, which it has to explain (R^2) in any case; held_out: share of the
    calibration sequences kept for that; finetune: epochs over the others that train the terms afterwards."""

    ridge: float = 1e-2
    check: bool = True
    held_out: float = 0.125
    finetune: int = 0
    rate: float = 1e-5


@dataclass(frozen=True)
class BudgetOptions:
    """Bits a weight for the whole, measured in bytes of the blocks' matrices; options: formats to choose among."""

    bits: float | None = None
    options: tuple[str, ...] = ("int2_g64", "int3_g64", "int4_g64", "int5_g64", "int6_g64", "int8_g64")


@dataclass(frozen=True)
class Recipe:
    """What a recipe file may say; see the options of each method for its table. Everything is a default for rules."""

    name: str = ""
    format: str | None = None
    method: str | None = None  # none: search for the formats of ggml, else rtn
    range: str | None = None  # how a grid is chosen: one of ranges.RANGES; none: the format's own way
    inputs: str | None = None  # format of the activations; none: they stay floats
    inputs_range: str | None = None  # static ranges chosen on calibration data; none: dynamic
    transform: str | None = None
    correct: str | None = None
    mix: str | None = None  # one of llama.cpp's mixes in place of a format
    embedding: str | None = None  # format of the embedding; none: as it is
    head: str | None = None
    importance: bool = True  # ggml's fit weighs columns by their inputs where there is calibration data
    outlier_threshold: float = THRESHOLD  # LLM.int8()
    exact: bool = False  # the base lies on this very grid, so that a comparison says nothing
    gptq: GptqOptions = field(default_factory=GptqOptions)
    awq: AwqOptions = field(default_factory=AwqOptions)
    smoothquant: SmoothQuantOptions = field(default_factory=SmoothQuantOptions)
    qwt: QwtOptions = field(default_factory=QwtOptions)
    budget: BudgetOptions = field(default_factory=BudgetOptions)


@dataclass(frozen=True)
class Rule:
    """Overrides what the recipe says for the linears whose names match (shell patterns; ``*`` also matches dots)."""

    match: str
    format: str | None = None
    method: str | None = None
    range: str | None = None
    inputs: str | None = None
    inputs_range: str | None = None


@dataclass(frozen=True)
class Plan:
    """What becomes of one matrix. format None: it stays as it is."""

    format: Format | None = None
    method: str = "rtn"
    range: str | None = None
    inputs: str | None = None
    inputs_range: str | None = None

    @property
    def outliers(self) -> bool:
        """Whether columns with large inputs are multiplied in floating point (LLM.int8())."""
        return self.inputs is not None and self.inputs.endswith(OUTLIERS)

    @property
    def input_format(self) -> Format | None:
        return None if self.inputs is None else format_of(self.inputs.removesuffix(OUTLIERS))


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe, its rules, and the text that makes it again."""

    recipe: Recipe
    rules: tuple[Rule, ...] = ()

    def text(self) -> str:
        """As TOML."""
        rules = "".join(f"\n[[rule]]\n{dump(rule)}" for rule in self.rules)
        return dump(self.recipe) + rules

    def digest(self) -> str:
        return hashlib.sha256(self.text().encode()).hexdigest()[:16]

    def over(self, rules: Sequence[Rule]) -> LoadedRecipe:
        """With these rules in front of its own, which win."""
        return replace(self, rules=(*rules, *self.rules))


def read_recipe(source: str | Path | None, overrides: dict[str, str] | None = None) -> LoadedRecipe:
    """A recipe file, the name of a mix or of a format, or none: what the overrides {"gptq.damping": "0.02"} alone say.

    ValueError, with the nearest name, for what is unknown.
    """
    tree: dict[str, Any] = {}
    if source is not None:
        path = Path(source)
        if path.suffix == ".toml" or path.is_file():
            tree = read_toml(path)
            tree.setdefault("name", path.stem)
        elif str(source).lower() in mix_names():
            tree = {"name": str(source).lower(), "mix": str(source).lower()}
        else:
            require_format(str(source), f"there is no recipe {source}")
            tree = {"name": str(source), "format": str(source)}
    raw = tree.pop("rule", [])
    if not isinstance(raw, list) or not all(isinstance(r, dict) for r in raw):
        raise ValueError("rules are written as tables: [[rule]] and below it match = ...")
    recipe = fill(Recipe, tree, overrides)
    rules = []
    for number, table in enumerate(raw, 1):
        if "match" not in table:
            raise ValueError(f"rule {number} of the recipe has no match")
        try:
            rules.append(fill(Rule, table))
        except ValueError as error:
            raise ValueError(f"rule {number} of the recipe: {error}") from None
    loaded = LoadedRecipe(recipe, tuple(rules))
    check(loaded)
    return loaded


def as_recipe(recipe: LoadedRecipe | Recipe | str | Path) -> LoadedRecipe:
    """A recipe however it is given; ValueError where it makes no sense."""
    if isinstance(recipe, Recipe):
        recipe = LoadedRecipe(recipe)
    if isinstance(recipe, LoadedRecipe):
        check(recipe)
        return recipe
    return read_recipe(recipe)


Settings = dict[str, str | None]  # what a rule may set, by name


def plans_of(loaded: LoadedRecipe, names: Sequence[str]) -> dict[str, Plan]:
    """The plan of each linear; ValueError for a rule that matches none of the names."""
    return {name: plan_of(values) for name, values in settings_of(loaded, names).items()}


def settings_of(
    loaded: LoadedRecipe, names: Sequence[str], formats: Mapping[str, str] | None = None
) -> dict[str, Settings]:
    """What the recipe and its rules, later ones over earlier ones, say of each linear; ValueError as in ``plans_of``.

    formats: by linear, in place of the recipe's one. "keep" is for the inputs too, unless it comes with a format of
    theirs.
    """
    recipe = loaded.recipe
    base = {f.name: getattr(recipe, f.name) for f in fields(Rule) if f.name != "match"}
    merged = {name: _over(base, {"format": formats[name]}) if formats else dict(base) for name in names}
    for rule in loaded.rules:
        matching = [name for name in names if matches(name, rule.match)]
        if not matching:
            near = difflib.get_close_matches(rule.match.strip("*."), {n.rsplit(".", 1)[-1] for n in names}, n=1)
            hint = f"did you mean '*.{near[0]}'?" if near else f"the first is {names[0] if names else 'none'}"
            raise ValueError(f"the rule {rule.match!r} matches none of the {len(names)} linears; {hint}")
        given = {k: v for k, v in asdict(rule).items() if k != "match" and v is not None}
        for name in matching:
            merged[name] = _over(merged[name], given)
    return merged


def _over(values: Mapping[str, str | None], given: Mapping[str, str | None]) -> Settings:
    floats: Settings = {"inputs": None, "inputs_range": None} if given.get("format") == KEEP else {}
    return {**values, **floats, **given}


def plan_of(values: Mapping[str, str | None]) -> Plan:
    """A plan from some of the settings of a rule, with its defaults; ValueError for those that do not go together."""
    inputs, chosen = values.get("inputs"), values.get("range")
    if values["format"] in (None, KEEP):
        return Plan(None, inputs=inputs, inputs_range=_inputs_range(values))
    format = format_of(str(values["format"]))
    method = values.get("method") or ("search" if is_ggml(format) else "rtn")
    if method == "search" and not is_ggml(format):
        raise ValueError(f"the method search is for the formats of ggml, not for {format.name}; rtn and gptq are")
    if chosen is not None and not isinstance(format, Integer):
        raise ValueError(f"range is {chosen!r}, but {format.name} has a grid of its own; ranges are for integers")
    if chosen == "entropy" and format.has_offset:
        raise ValueError(f"range is 'entropy', which is for symmetric formats, but {format.name} is asymmetric")
    one_scale = isinstance(format, Integer) and format.group == "row" and not format.has_offset
    if inputs is not None and inputs.endswith(OUTLIERS) and not one_scale:
        raise ValueError(
            f"inputs in {inputs} need symmetric weights with one scale a row, such as int8_row, not {format.name}"
        )
    return Plan(format, method, chosen, inputs, _inputs_range(values))


def _inputs_range(values: Mapping[str, str | None]) -> str | None:
    """One range for all tokens has to be known beforehand: it is static, where the recipe does not say how with the
    least squared error, which in decoders is the best by far (docs/quantisation.md)."""
    inputs, chosen = values.get("inputs"), values.get("inputs_range")
    if inputs is None:
        if chosen is not None and values["format"] is not None:
            raise ValueError(f"inputs_range is {chosen!r}, but inputs names no format")
        return None
    format = input_format(inputs)
    if chosen is not None and not format.is_static:
        raise ValueError(
            f"static ranges are one for all tokens, but inputs in {inputs} have one for each; "
            f"name {inputs.split('_')[0]}_tensor, or leave out inputs_range"
        )
    if chosen == "entropy" and format.is_asymmetric:
        raise ValueError(f"inputs_range is 'entropy', which is for symmetric formats, but {inputs} is asymmetric")
    return chosen or ("mse" if format.is_static else None)


def is_ggml(format: Format) -> bool:
    """Whether its bytes are ggml's."""
    from ..layouts import GGML

    return format.layout in GGML


def matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
