"""One block of a model, quantised: collect what its linears read, solve each, and go on with the quantised block.

Linears that read the same input are one stage; stages are done in the order of computation, each on the outputs of
those that are quantised already (GPTQ's "true sequential"). Works on any module: Linear, and Conv2d as the matrix
[out, in * height * width] that it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..formats import QTensor
from ..formats.integer import Integer
from ..stored import InputQuantizer
from . import METHODS, NEED_INPUTS
from .batches import without_padding
from .ranges import RangeObserver
from .recipe import Plan, Recipe
from .record import record_of
from .stats import InputStats

Call = Callable[[nn.Module, int, Tensor], Tensor]  # (block, number of the chunk, its input) -> output
# The same in stages: yields the modules of a stage and what they read, goes on when they are quantised.
Walk = Generator[tuple[tuple[nn.Module, ...], Tensor], None, Tensor]


@dataclass
class Quantised:
    """What became of a linear: codes and grid, and the quantiser of its inputs where it has one."""

    weight: QTensor | None
    inputs: InputQuantizer | None
    record: dict[str, Any]


@dataclass
class BlockJob:
    """linears: those of the block by their full names; plans: what becomes of each; inputs: chunks of what the block
    reads, none where there is no calibration data; importance: of the columns of linears, from a file; walk: the
    block's pass in stages, which spares it being computed anew for each; before: takes what the float block returns,
    where ``collects_at_once``; layout_of: where codes will be kept (none: in the layout of their format); real: which
    tokens of a chunk are no padding, bool [b, t] (none: all), of the held-out chunks behind those of ``inputs`` too."""

    block: nn.Module
    linears: dict[str, nn.Module]
    plans: Mapping[str, Plan]
    recipe: Recipe
    call: Call
    inputs: Sequence[Tensor]
    advance: Callable[[], None] = lambda: None
    importance: dict[str, Tensor] = field(default_factory=dict)
    walk: Callable[[nn.Module, int, Tensor], Walk] | None = None
    before: list[Tensor] | None = None
    layout_of: Callable[[Plan], str] | None = None
    real: Sequence[Tensor | None] = ()
    done: dict[str, Quantised] = field(default_factory=dict)


class _Seen(Exception):
    """Ends a forward pass once the input of interest went by."""


def is_matrix(module: nn.Module) -> bool:
    """Whether a module is one that can be quantised: a Linear, or a Conv2d whose groups are one."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def parameter_of(module: nn.Module) -> Tensor:
    """Its weights as they are."""
    assert isinstance(module.weight, Tensor)
    return module.weight


def matrix_of(module: nn.Module) -> Tensor:
    """Its weights, float32 [out, in]."""
    return parameter_of(module).detach().float().flatten(1)


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """What a row of the matrix is multiplied with, float32 [n, in]."""
    if not isinstance(module, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode)
    columns = F.unfold(x, module.kernel_size, module.dilation, 0, module.stride)  # type: ignore[arg-type]
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


def _geometry(module: nn.Module) -> tuple:
    """What else its rows depend on: convolutions of one picture may unfold it differently."""
    if not isinstance(module, nn.Conv2d):
        return ()
    return module.kernel_size, module.stride, module.padding, module.padding_mode, module.dilation


def _wanted(job: BlockJob) -> dict[str, nn.Module]:
    return {name: module for name, module in job.linears.items() if job.plans[name].format or job.plans[name].inputs}


def collects_at_once(job: BlockJob) -> bool:
    """Whether one pass through the float block tells all that quantising it needs."""
    wanted = _wanted(job)
    return bool(wanted) and not any(job.plans[name].method in NEED_INPUTS for name in wanted)


@torch.no_grad()
def quantize_block(job: BlockJob) -> list[Tensor] | None:
    """Quantise the linears of the block in place; ``job.done`` tells what became of each. Returns the outputs of the
    quantised block where they were computed on the way."""
    wanted = _wanted(job)
    if not wanted:
        return None
    if not job.inputs:
        for name in wanted:
            _solve(job, name, None)
        return None
    needed = not collects_at_once(job)
    if needed and job.walk is not None:
        return _walked(job, wanted)
    stages = stages_of(job, wanted)
    if needed:
        for stage in stages:
            stats = collect(job, [stage])
            for name in stage:
                _solve(job, name, stats[name])
        return None
    stats = collect(job, stages, job.before, paired=False)
    for stage in stages:
        for name in stage:
            _solve(job, name, stats[name])
    return None


def _walked(job: BlockJob, wanted: Mapping[str, nn.Module]) -> list[Tensor]:
    """All chunks go through the block together, stage by stage; each linear is computed once."""
    assert job.walk is not None
    walks = [job.walk(job.block, i, x) for i, x in enumerate(job.inputs)]
    results: list[Tensor] = []
    while not results:
        stats: InputStats | None = None
        modules: tuple[nn.Module, ...] = ()
        for walk in walks:
            try:
                modules, x = next(walk)
            except StopIteration as end:
                results.append(end.value)
                continue
            if stats is None:
                names = [name for name, module in wanted.items() if any(module is m for m in modules)]
                stats = new_stats(job, names, x.shape[-1])
            stats.update(x, x[:, 0] if x.dim() == 3 else None)
        for name, module in wanted.items():
            if any(module is m for m in modules):
                _solve(job, name, stats)
    return results


def outputs(job: BlockJob) -> list[Tensor]:
    """What the block makes of its inputs as it is now."""
    with torch.no_grad():
        return [job.call(job.block, i, x) for i, x in enumerate(job.inputs)]


def stages_of(job: BlockJob, wanted: Mapping[str, nn.Module]) -> list[list[str]]:
    """Names by the input that they share, in the order of computation; linears that are not called come last, alone."""
    seen: list[tuple[str, tuple]] = []
    alive = []  # keeps the inputs, so that no address is used twice

    def hook_of(name: str):
        def hook(module: nn.Module, args: tuple) -> None:
            alive.append(args[0])
            seen.append((name, (args[0].data_ptr(), tuple(args[0].shape), *_geometry(module))))

        return hook

    handles = [module.register_forward_pre_hook(hook_of(name)) for name, module in wanted.items()]
    try:
        job.call(job.block, 0, job.inputs[0])
    finally:
        for handle in handles:
            handle.remove()
    stages: list[list[str]] = []
    keys: list[tuple] = []
    for name, key in seen:
        if any(name in stage for stage in stages):
            continue  # called twice: the first input decides
        if key in keys:
            stages[keys.index(key)].append(name)
        else:
            keys.append(key)
            stages.append([name])
    called = {name for stage in stages for name in stage}
    return stages + [[name] for name in wanted if name not in called]


def new_stats(job: BlockJob, names: Sequence[str], features: int, paired: bool = True) -> InputStats:
    """Empty statistics for the inputs of these linears, with an observer for each static range that they want."""
    stats = InputStats(features, paired)
    for plan in (job.plans[name] for name in names):
        format = plan.input_format
        if plan.inputs_range is not None and isinstance(format, Integer):
            stats.observers[format.name, plan.inputs_range] = RangeObserver(format, (plan.inputs_range,))
    return stats


def collect(
    job: BlockJob,
    stages: Sequence[Sequence[str]],
    results: list[Tensor] | None = None,
    paired: bool = True,
    sinks: bool = False,
) -> dict[str, InputStats]:
    """Statistics of the inputs of these stages over all chunks; linears of a stage share theirs. results: takes what
    the block returns, where somebody wants it; paired: with products of two inputs, as ``InputStats`` has them; sinks:
    with the first rows of sequences, as a decoder's walk has them."""
    found: dict[str, InputStats] = {}
    handles = []

    real: Tensor | None = None  # of the chunk that runs

    def hook_of(stats: InputStats, last: bool):
        def hook(module: nn.Module, args: tuple) -> None:
            x = args[0] if isinstance(module, nn.Conv2d) else without_padding(args[0], real)
            stats.update(input_rows(module, x), args[0][:, 0] if sinks else None)
            if last:
                raise _Seen

        return hook

    for number, stage in enumerate(stages):
        module = job.linears[stage[0]]
        stats = new_stats(job, stage, matrix_of(module).shape[1], paired)
        found |= dict.fromkeys(stage, stats)
        alone = len(stages) == 1 and number == 0 and results is None
        handles.append(module.register_forward_pre_hook(hook_of(stats, alone)))
    try:
        for i, x in enumerate(job.inputs):
            real = job.real[i] if job.real else None
            try:
                y = job.call(job.block, i, x)
            except _Seen:
                continue
            if results is not None:
                results.append(y)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _solve(job: BlockJob, name: str, stats: InputStats | None) -> None:
    module, plan = job.linears[name], job.plans[name]
    began = time.perf_counter()
    before = matrix_of(module)
    if name in job.importance:  # of this linear alone, whatever it shares with others
        stats = (stats or InputStats(before.shape[1], paired=False)).weighed(job.importance[name])
    if not torch.isfinite(before).all():
        raise ValueError(f"{name}.weight has values that are not finite: the model is damaged")
    try:
        weight = None if plan.format is None else METHODS[plan.method](before, plan, stats, job.recipe)
        inputs = input_quantizer(plan, stats, job.recipe)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    after = before if weight is None else weight.dequantize()
    if not torch.isfinite(after).all():
        raise ValueError(f"{name}: {plan.format.name if plan.format else ''} cannot hold its weights: the scales are "
                         "not finite")  # fmt: skip
    seconds = time.perf_counter() - began
    layout = None if job.layout_of is None or plan.format is None else job.layout_of(plan)
    try:
        record = record_of(before, after, weight, plan, stats, seconds, inputs, layout)
    except ValueError as error:  # that layout cannot hold it
        raise ValueError(f"{name}: {error}") from None
    job.done[name] = Quantised(weight, inputs, record)
    parameter = parameter_of(module)
    parameter.data = after.reshape(parameter.shape).to(parameter.dtype)
    if inputs is not None:
        install(module, inputs)
    job.advance()


def install(module: nn.Module, inputs: InputQuantizer) -> None:
    """From now on the module's input is rounded first."""
    module.register_forward_pre_hook(lambda _, args: (inputs(args[0]), *args[1:]))


def input_quantizer(plan: Plan, stats: InputStats | None, recipe: Recipe) -> InputQuantizer | None:
    """The quantiser of a linear's inputs: dynamic, or with the range that the calibration data has."""
    format = plan.input_format
    if format is None:
        return None
    outliers = recipe.outlier_threshold if plan.outliers else None
    if plan.inputs_range is None:
        return InputQuantizer(format, outliers=outliers)
    if stats is None or not stats.tokens:
        raise ValueError("static ranges of inputs need calibration data; give batches of inputs")
    if format.group != "tensor" or not isinstance(format, Integer):
        raise ValueError(
            f"static ranges are one for all tokens, but inputs in {format.name} have one for each; "
            f"name {format.name.split('_')[0]}_tensor"
        )
    grid = stats.observers[format.name, plan.inputs_range].grid(plan.inputs_range)
    zero = None if grid.offset is None else torch.round(-grid.offset / grid.scale).reshape(())
    return InputQuantizer(format, scale=grid.scale.reshape(()), zero=zero)
