"""How long a sweep will take: from a short measured probe before it starts, corrected by every row that is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from ..checkpoint import ModelFolder
from ..engine.load import Model
from ..evals.divergence import compared, logits_of
from ..evals.perplexity import ScoredText
from ..methods.allocate import SEQUENCES, TOKENS
from ..methods.quantizer import all_plans, require_fit
from ..methods.recipe import LoadedRecipe
from ..models.shapes import linear_names, linear_shape
from .kinds import calibration_of, kind_of
from .settings import Settings

SPEED_SECONDS = 20.0  # of the suite speed: processes that start, a second or two of every sample
WINDOW_TOKENS = 256
PROBE_TOKENS, PROBE_WEIGHTS = 2048, 2**20
RECENT = 5  # rows of which the median counts: how busy the machine is changes
SEARCH = 4.0  # times as long as rounding to nearest, roughly


@dataclass(frozen=True)
class Probe:
    """Seconds: of a scored token; of a weight and calibration token; of rounding a weight."""

    token: float
    forward: float
    rounding: float

    @classmethod
    def measure(cls, model: Model, texts: dict[str, ScoredText]) -> Probe:
        """A window, a matrix product and a matrix that is rounded, each the median of several."""
        return cls(_token(model, texts), *_matrices(model.folder))


def _token(model: Model, texts: dict[str, ScoredText]) -> float:
    if not texts:
        return 0.0
    window = next(iter(texts.values())).windows[0]
    window = type(window)(window.tokens[:WINDOW_TOKENS], window.targets[:WINDOW_TOKENS])
    if not (window.targets >= 0).any():  # the second half of a chunk is scored
        window = type(window)(window.tokens, np.append(window.tokens[1:], np.int32(-1)))

    def read() -> None:
        for logits in logits_of(model.engine, window):
            compared(logits[:8], logits[:8], np.zeros(len(logits[:8]), np.int64))

    return _seconds(read, 3) / len(window.tokens)


def _matrices(folder: ModelFolder) -> tuple[float, float]:
    """Sizes as in the work itself: where other processes run, a small product waits longer than it computes."""
    import torch

    from ..formats import format_of
    from ..kernels.floats import linear

    rows, columns = max((linear_shape(folder.config, name) for name in linear_names(folder.config)), key=np.prod)
    w = torch.randn(max(min(rows, PROBE_WEIGHTS // columns), 1), columns)
    x = torch.randn(PROBE_TOKENS, columns)
    format = format_of("int4_row")
    product, rounding = (_seconds(work, 5) / w.numel() for work in (lambda: linear(x, w), lambda: format.quantize(w)))
    return product / PROBE_TOKENS, rounding


def _seconds(work: Callable[[], object], times: int) -> float:
    """The median, after once that does not count."""
    found = []
    for _ in range(times + 1):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return median(found[1:])


@dataclass
class Estimate:
    """Seconds of the rows to come: quantising is predicted for each recipe, measuring takes the same for all.

    Rows that are done correct both by medians of what they took. The prediction itself is one of the values, but not
    where rows of the very same kind of recipe say better: then it would keep what is wrong with it.
    """

    folder: ModelFolder
    settings: Settings
    probe: Probe
    evaluation: float  # seconds to measure one model
    # of rows that are done: (kind, whether it calibrates, seconds of quantising measured / predicted)
    rates: list[tuple[str, bool, float]] = field(default_factory=list)
    evaluations: list[float] = field(default_factory=list)  # measured

    def quantising(self, loaded: LoadedRecipe | None) -> float:
        """By the probe alone. None: the model as it is."""
        if loaded is None:
            return 0.0
        shapes = [linear_shape(self.folder.config, name) for name in linear_names(self.folder.config)]
        weights = sum(rows * columns for rows, columns in shapes)
        kind, passes = kind_of(loaded), 2.0 * self._calibrates(loaded)
        try:
            require_fit(self.folder, all_plans(self.folder, loaded, bool(self.settings.calibration)))
        except ValueError:  # it will fail, which takes no time
            return 0.0
        if loaded.recipe.correct:
            passes += 2
        tokens = self.settings.sequences * self.settings.length_of(self.folder)
        seconds = weights * self.probe.rounding * (SEARCH if "search" in kind else 1.0)
        seconds += passes * weights * tokens * self.probe.forward
        if loaded.recipe.budget.bits is not None:  # each option rounded and tried, forth and back on part of the text
            options, some = len(loaded.recipe.budget.options), min(tokens, SEQUENCES * TOKENS)
            seconds += weights * (options * self.probe.rounding + (options + 4) * some * self.probe.forward)
        if "gptq" in kind:  # a product a column, and a Cholesky factor: half their operations are multiplications
            seconds += sum(rows * c * c + c**3 for rows, c in shapes) / 2 * self.probe.forward
        return seconds

    def _calibrates(self, loaded: LoadedRecipe) -> bool:
        return calibration_of(self.folder, self.settings, loaded) != ()

    def learn(self, loaded: LoadedRecipe | None, quantising: float, evaluation: float) -> None:
        """What a row took."""
        self.evaluations.append(evaluation)
        predicted = self.quantising(loaded)
        if loaded is not None and predicted:
            self.rates.append((kind_of(loaded), self._calibrates(loaded), quantising / predicted))

    def learn_row(self, loaded: LoadedRecipe | None, row: dict[str, Any]) -> None:
        """The same from a row of the file; one that failed teaches nothing."""
        if row["error"] is None:
            quantising = min(row["metrics"].get("quantize_seconds", 0.0), row["seconds"])
            self.learn(loaded, quantising, row["seconds"] - quantising)

    def left(self, rows: Sequence[LoadedRecipe | None]) -> float:
        """Seconds for all of these."""
        each = median([self.evaluation, *self.evaluations[-RECENT:]])
        return sum(each + self._rate(row) * self.quantising(row) for row in rows)

    def _rate(self, loaded: LoadedRecipe | None) -> float:
        """Of what is predicted, by rows of its kind that calibrate as it does, or else by all that do: rounding and
        products are predicted apart, and what is wrong with one says nothing of the other."""
        if loaded is None:
            return 1.0
        kind, calibrates = kind_of(loaded), self._calibrates(loaded)
        same = [rate for *other, rate in self.rates if other == [kind, calibrates]]
        alike = [rate for _, other, rate in self.rates if other == calibrates]
        return median(same[-RECENT:] or [1.0, *alike[-RECENT:]])


def said(seconds: float) -> str:
    """A duration as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
