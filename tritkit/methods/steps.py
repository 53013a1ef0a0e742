"""One block after the other: transform, quantise, compensate, and hand the quantised block's outputs to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import compensation_conv, qwt
from .batches import without_padding
from .blocks import BlockJob, collects_at_once, outputs, quantize_block
from .compensation_conv import ConvCompensation
from .qwt import Compensation


@dataclass
class Step:
    """outputs, held: what the block hands on, of the calibration and of the held-out inputs; term: its compensation,
    where there is one that is kept; report: what is to be said of it."""

    outputs: list[Tensor]
    held: list[Tensor]
    term: Compensation | ConvCompensation | None = None
    report: dict[str, Any] | None = None


Judge = Callable[[list[Tensor]], float]  # held-out outputs of this block -> divergence of the whole model


@torch.no_grad()
def run_block(
    job: BlockJob, held: list[Tensor], judge: Judge | None = None, transform: Callable[[], None] | None = None
) -> Step:
    """Quantise the block of the job in place. held: inputs that nothing is fitted on; judge: says whether a term is
    worth keeping (none: its R^2 on the held-out inputs does); transform: changes the float weights first."""
    corrects = job.recipe.correct == "qwt"
    if corrects and not job.inputs:
        raise ValueError("qwt needs calibration data; give batches of inputs")
    first = len(job.inputs)  # held-out chunks are numbered behind those of the calibration

    def held_outputs() -> list[Tensor]:
        return [job.call(job.block, first + i, x) for i, x in enumerate(held)]

    wanted: list[Tensor] = []
    wanted_held = held_outputs() if corrects else []
    if corrects and (transform is not None or not collects_at_once(job)):
        wanted = outputs(job)
    elif corrects:
        job.before = wanted  # filled on the way
    if transform is not None:
        transform()
    found = quantize_block(job)
    if not job.inputs:
        return Step([], [])
    step = Step(found or outputs(job), held_outputs())
    if not corrects:
        return step
    real = job.real or [None] * (first + len(held))
    missing = _missing(job.inputs, wanted, step.outputs, real[:first])
    missing_held = _missing(held, wanted_held, step.held, real[first:])
    options = job.recipe.qwt
    term: Any
    pictures = job.inputs[0].dim() == 4 and any(isinstance(m, nn.Conv2d) for m in job.block.modules())
    rows, made = tuple(job.inputs[0].shape[:-1]), tuple(step.outputs[0].shape[:-1])
    if not pictures and rows != made:  # it merges tokens, so that none of its outputs has an input of its own
        step.report = {"kept": False, "note": f"no term: the block makes {made} rows of {rows}"}
        return step
    if pictures:
        term, explained = compensation_conv.solve(missing, options.ridge), compensation_conv.explained
    else:
        term, explained = qwt.solve(missing, options.ridge), qwt.explained
    fitted = explained(missing, term)
    judged = explained(missing_held, term) if held else None
    kept, more = (fitted if judged is None else judged) > 0, {}
    compensated = [y + term(x) for x, y in zip(held, step.held, strict=True)]
    if kept and options.check and judge is not None and held:
        before, after = judge(step.held), judge(compensated)
        kept, more = after < before, {"divergence_before": round(before, 8), "divergence_after": round(after, 8)}
    step.report = qwt.report(term, fitted, judged, kept, **more)
    if kept:
        step.term = term
        step.held = compensated
        step.outputs = [y + term(x) for x, y in zip(job.inputs, step.outputs, strict=True)]
    return step


def _missing(
    inputs: Sequence[Tensor], wanted: Sequence[Tensor], found: Sequence[Tensor], real: Sequence[Tensor | None]
) -> list[qwt.Pair]:
    """What the block reads of real tokens, and what its outputs for them lack."""
    each = zip(inputs, wanted, found, real, strict=True)
    return [(without_padding(x, some), without_padding(w - y, some)) for x, w, y, some in each]
