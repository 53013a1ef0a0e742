"""How long a sweep will take: from a short measured probe before it starts, corrected by every row that is done."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..checkpoint import ModelFolder, linear_names, linear_shape
from ..engine.load import Model
from ..evals.divergence import compared, logits_of
from ..evals.perplexity import ScoredText
from ..methods.quantizer import all_plans, needs_inputs, require_fit
from ..methods.recipe import LoadedRecipe

SPEED_SECONDS = 20.0  # of the suite speed: processes that start, a second or two of every sample
PROBE_TOKENS, PROBE_ROWS = 256, 512
SEARCH = 4.0  # times as long as rounding to nearest, roughly


@dataclass(frozen=True)
class Probe:
    """Seconds: of a scored token; of a weight and calibration token; of rounding a weight."""

    token: float
    forward: float
    rounding: float

    @classmethod
    def measure(cls, model: Model, texts: dict[str, ScoredText]) -> Probe:
        """A window, a matrix product and a matrix that is rounded, once each after one that does not count."""
        return cls(_token(model, texts), *_matrices(model.folder))


def _token(model: Model, texts: dict[str, ScoredText]) -> float:
    if not texts:
        return 0.0
    window = next(iter(texts.values())).windows[0]
    window = type(window)(window.tokens[:PROBE_TOKENS], window.targets[:PROBE_TOKENS])
    if not (window.targets >= 0).any():  # the second half of a chunk is scored
        window = type(window)(window.tokens, np.append(window.tokens[1:], np.int32(-1)))
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        for logits in logits_of(model.engine, window):
            compared(logits[:8], logits[:8], np.zeros(len(logits[:8]), np.int64))
        seconds = time.perf_counter() - began
    return seconds / len(window.tokens)


def _matrices(folder: ModelFolder) -> tuple[float, float]:
    import torch

    from ..formats import format_of

    rows, columns = max((linear_shape(folder.config, name) for name in linear_names(folder.config)), key=np.prod)
    w = torch.randn(min(rows, PROBE_ROWS), columns)
    x = torch.randn(PROBE_TOKENS, columns)
    format, found = format_of("int4_row"), []
    for work in (lambda: x @ w.T, lambda: format.quantize(w)):
        work()
        began = time.perf_counter()
        work()
        found.append((time.perf_counter() - began) / w.numel())
    return found[0] / PROBE_TOKENS, found[1]


@dataclass
class Estimate:
    """Seconds of the rows to come: quantising is predicted for each recipe, measuring takes the same for all."""

    folder: ModelFolder
    probe: Probe
    evaluation: float  # seconds to measure one model
    calibration_tokens: int
    done: dict[str, list[float]] = field(default_factory=dict)  # kind: [seconds of quantising predicted, measured]
    evaluations: list[float] = field(default_factory=list)  # measured

    def quantising(self, loaded: LoadedRecipe | None) -> float:
        """By the probe alone. None: the model as it is."""
        if loaded is None:
            return 0.0
        shapes = [linear_shape(self.folder.config, name) for name in linear_names(self.folder.config)]
        weights = sum(rows * columns for rows, columns in shapes)
        kind, passes = kind_of(loaded), 0.0
        try:
            plans = all_plans(self.folder, loaded, bool(self.calibration_tokens))
            require_fit(self.folder, plans)
            passes = 2.0 * any(needs_inputs(plan, loaded) for plan in plans.values())
        except ValueError:  # it will fail, which takes no time
            return 0.0
        if loaded.recipe.correct:
            passes += 2
        if loaded.recipe.budget.bits is not None:
            passes += len(loaded.recipe.budget.options)
        seconds = weights * self.probe.rounding * (SEARCH if "search" in kind else 1.0)
        seconds += passes * weights * self.calibration_tokens * self.probe.forward
        if "gptq" in kind:  # a product a column, and a Cholesky factor: half their operations are multiplications
            seconds += sum(rows * c * c + c**3 for rows, c in shapes) / 2 * self.probe.forward
        return seconds

    def learn(self, loaded: LoadedRecipe | None, quantising: float, evaluation: float) -> None:
        """What a row took."""
        self.evaluations.append(evaluation)
        if loaded is not None:
            sums = self.done.setdefault(kind_of(loaded), [0.0, 0.0])
            sums[0] += self.quantising(loaded)
            sums[1] += quantising

    def learn_row(self, loaded: LoadedRecipe | None, row: dict[str, Any]) -> None:
        """The same from a row of the file; one that failed teaches nothing."""
        if row["error"] is None:
            quantising = min(row["metrics"].get("quantize_seconds", 0.0), row["seconds"])
            self.learn(loaded, quantising, row["seconds"] - quantising)

    def left(self, rows: Sequence[LoadedRecipe | None]) -> float:
        """Seconds for all of these: predicted, times what rows of the same kind really took of it, or all rows."""
        every = [sum(column) for column in zip(*self.done.values(), strict=True)] or [1.0, 1.0]
        each = sum(self.evaluations) / len(self.evaluations) if self.evaluations else self.evaluation
        total = each * len(rows)
        for row in rows:
            before, after = self.done.get(kind_of(row), every)
            total += self.quantising(row) * (after / before if before else 1.0)
        return total


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


def said(seconds: float) -> str:
    """A duration as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
