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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..config import dump, fill, read_toml
from ..formats import FORMATS, Format, format_of
from ..inputs import OUTLIERS, THRESHOLD
from ..jsonfile import shown

KEEP = "keep"  # in place of a format: the matrix stays as it is
METHOD_NAMES = ("rtn", "gptq", "search")
RANGE_NAMES = ("absmax", "minmax", "percentile", "mse", "entropy")
TRANSFORMS = ("awq", "smoothquant")
CORRECTIONS = ("qwt",)


@dataclass(frozen=True)
class GptqOptions:
    """Frantar et al. 2022. damping: share of the mean diagonal that is added to the Hessian; columns: of a lazy batch;
    act_order: columns of large inputs first, which fixes the grids of groups beforehand (static groups). In models with
    a few massive channels, which are most, the order decides whether GPTQ gains anything (docs/log.md)."""

    damping: float = 0.01
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
    """Fu et al. 2024. ridge: relative to the mean square of the inputs; check: keep a term only where the divergence of
    the whole model falls on held-out tokens; held_out: share of the calibration sequences kept for that; finetune:
    epochs over the calibration sequences that train the terms afterwards."""

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
    range: str | None = None  # how a grid is chosen: one of RANGE_NAMES; none: the format's own way
    inputs: str | None = None  # format of the activations; none: they stay floats
    inputs_range: str | None = None  # static ranges chosen on calibration data; none: dynamic
    transform: str | None = None
    correct: str | None = None
    mix: str | None = None  # one of llama.cpp's mixes in place of a format
    embedding: str | None = None  # format of the embedding; none: as it is
    head: str | None = None
    importance: bool = True  # search weighs columns by their inputs where there is calibration data
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

    def with_rules(self, rules: Sequence[Rule]) -> LoadedRecipe:
        return replace(self, rules=(*self.rules, *rules))


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
            _require_format(str(source), f"there is no recipe {source}")
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


def mix_names() -> tuple[str, ...]:
    """Names of llama.cpp's mixes."""
    from .mixes import MIXES

    return tuple(MIXES)


def check(loaded: LoadedRecipe) -> None:
    """ValueError for a name that nobody knows, or settings that contradict each other."""
    recipe = loaded.recipe
    if recipe.mix is not None:
        _require(recipe.mix, mix_names(), "mix")
        if recipe.format is not None or recipe.budget.bits is not None:
            raise ValueError(f"the recipe has both the mix {recipe.mix} and another choice of formats; leave one out")
    if recipe.mix is None and recipe.format is None and recipe.budget.bits is None and not loaded.rules:
        raise ValueError("the recipe names no format: set format, mix, budget.bits, or rules")
    _require(recipe.transform, TRANSFORMS, "transform")
    _require(recipe.correct, CORRECTIONS, "correct")
    for name in (recipe.embedding, recipe.head, *recipe.budget.options):
        if name is not None and name != KEEP:
            _require_format(name)
    owners: tuple[Recipe | Rule, ...] = (recipe, *loaded.rules)
    for owner in owners:
        _require(owner.method, METHOD_NAMES, "method")
        _require(owner.range, RANGE_NAMES, "range")
        _require(owner.inputs_range, RANGE_NAMES, "inputs_range")
        if owner.format is not None and owner.format != KEEP:
            _require_format(owner.format)
        if owner.inputs is not None:
            _require_format(owner.inputs.removesuffix(OUTLIERS))
    if recipe.budget.bits is not None and not 1 <= recipe.budget.bits <= 16:
        raise ValueError(f"budget.bits is {recipe.budget.bits:g}, expected 1 to 16 bits a weight")
    if recipe.gptq.damping < 0:
        raise ValueError(f"gptq.damping is {recipe.gptq.damping:g}, expected 0 or more")
    if recipe.gptq.columns < 1:
        raise ValueError(f"gptq.columns is {recipe.gptq.columns}, expected at least 1")
    if not 0 < recipe.qwt.held_out < 1:
        raise ValueError(f"qwt.held_out is {recipe.qwt.held_out:g}, expected a share between 0 and 1")


def _require(value: str | None, known: Sequence[str], what: str) -> None:
    if value is None or value in known:
        return
    close = difflib.get_close_matches(value, known, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
    raise ValueError(f"there is no {what} {shown(value)}; {hint}")


def _require_format(name: str, beginning: str = "") -> None:
    try:
        format_of(name)
    except ValueError:
        known = [*FORMATS, *(f"int{bits}_g64" for bits in range(2, 9)), "int4_row", "int8_row", "int4_g64_asym"]
        candidates = [*known, *(mix_names() if beginning else ())]
        close = difflib.get_close_matches(name.lower(), candidates, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
        raise ValueError(f"{beginning or f'there is no format {shown(name)}'}; {hint}") from None


def plans_of(loaded: LoadedRecipe, names: Sequence[str]) -> dict[str, Plan]:
    """The plan of each linear; ValueError for a rule that matches none of the names."""
    recipe = loaded.recipe
    base = {f.name: getattr(recipe, f.name) for f in fields(Rule) if f.name != "match"}
    merged = {name: dict(base) for name in names}
    for rule in loaded.rules:
        matching = [name for name in names if matches(name, rule.match)]
        if not matching:
            near = difflib.get_close_matches(rule.match.strip("*."), {n.rsplit(".", 1)[-1] for n in names}, n=1)
            hint = f"did you mean '*.{near[0]}'?" if near else f"the first is {names[0] if names else 'none'}"
            raise ValueError(f"the rule {rule.match!r} matches none of the {len(names)} linears; {hint}")
        given = {k: v for k, v in asdict(rule).items() if k != "match" and v is not None}
        for name in matching:
            merged[name] |= given
    return {name: plan_of(values) for name, values in merged.items()}


def plan_of(values: dict[str, str | None]) -> Plan:
    """A plan from the settings of a rule, with its defaults."""
    if values["format"] in (None, KEEP):
        return Plan(None, inputs=values["inputs"], inputs_range=_inputs_range(values))
    format = format_of(str(values["format"]))
    method = values["method"] or ("search" if is_ggml(format) else "rtn")
    if method == "search" and not is_ggml(format):
        raise ValueError(f"the method search is for the formats of ggml, not for {format.name}; rtn and gptq are")
    if values["inputs_range"] is not None and values["inputs"] is None:
        raise ValueError(f"inputs_range is {values['inputs_range']!r}, but inputs names no format")
    return Plan(format, method, values["range"], values["inputs"], _inputs_range(values))


def _inputs_range(values: dict[str, str | None]) -> str | None:
    """One range for all tokens has to be known beforehand: it is static, by absmax where the recipe does not say."""
    inputs = values["inputs"]
    one = inputs is not None and format_of(inputs.removesuffix(OUTLIERS)).group == "tensor"
    return values["inputs_range"] or ("absmax" if one else None)


def is_ggml(format: Format) -> bool:
    """Whether its bytes are ggml's."""
    from ..layouts import GGML

    return format.layout in GGML


def matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
