"""Quantise any torch module whose blocks follow each other: an encoder, a vision transformer, a ResNet, a decoder.

from tritkit import quantize
quantize(model, "int4_g64", batches)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..progress import progress, warn
from .batches import held_out, real_tokens, run, split, without_padding
from .blocks import BlockJob, Quantised, is_matrix, parameter_of
from .finetune import finetune
from .planning import require_shape
from .recipe import LoadedRecipe, Recipe, as_recipe, plans_of
from .steps import run_block
from .swap import Swap
from .undo import Snapshot, with_linears, without_shortcuts
from .watch import Arguments, Watch, blocks_of, require_linears, state_of, uncalled, with_state

ADAPTER = "adapter"  # of a block: the term that compensates it
NOTABLE = 0.05  # share of the weights
Distance = Callable[[Tensor, Tensor], Tensor]


def quantize(
    model: nn.Module | Path | str,
    recipe: LoadedRecipe | Recipe | str | Path,
    batches: Sequence[Any] | str | Path | None = None,
    *,
    out: Path | str | None = None,
    blocks: str | Sequence[str] | None = None,
    distance: Distance | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Quantise a module in place, or a model folder into the folder ``out``; returns what it became.

    model: a module in evaluation, or a folder, for which see ``quantize_folder`` (batches are the names of its
    calibration texts and options its options). recipe: one in Python, a file, or a name. batches: calibration inputs;
    a tensor, a tuple or a dict each, given to the model as one, as arguments or as keywords; padding does not count
    where a dict tells it by ``attention_mask`` or ``src_key_padding_mask`` [b, t]. blocks: the name of the
    ModuleList of the blocks, or the names of all blocks (none: the class of modules that holds most of the weights).
    distance: of two outputs of the model (wanted, found), padding and all, which decides over QwT's terms on the last
    batches (none: KL for outputs with ``logits``, else the relative squared error).

    The report has "per_linear" (records by name), "left" (names of linears that stay floats because the model reads
    their weights without calling them, as nn.MultiheadAttention does), "floats" (how many weights each tensor has that
    stays floats, embeddings aside: outside of the blocks, or no Linear and no Conv2d without groups, as experts in one
    tensor), "adapters" (QwT's terms by block), "bits_per_weight", "bytes", "seconds". Linears then run in their own
    bits and return the dtype they read; convolutions keep float weights on the grid. ValueError as for folders, and for
    blocks that do not follow each other; the module then is what it was, for which its float weights stay in memory
    until the end.
    """
    loaded = as_recipe(recipe)
    if not isinstance(model, nn.Module):
        from .quantizer import quantize_folder

        if out is None:
            raise ValueError("quantising a model folder needs a folder to write: out=")
        if blocks is not None or distance is not None:
            name = "blocks" if blocks is not None else "distance"
            raise ValueError(f"{name} is an option for modules, but {model} is a model folder")
        return quantize_folder(model, out, loaded, batches, **options)
    if options or out is not None:
        unknown = next(iter(options), "out")
        raise ValueError(f"{unknown} is an option for model folders, but this is a {type(model).__name__}")
    if isinstance(batches, str | Path | Tensor | Mapping):
        raise ValueError(f"batches is one {type(batches).__name__}; give a list of batches")
    before = Snapshot(model)
    try:
        with_linears(model)
        return _Modules(model, loaded, () if batches is None else batches, blocks, distance).run()
    except BaseException:
        before.restore()
        raise


class _Modules:
    """One run over the blocks of a module."""

    def __init__(
        self,
        model: nn.Module,
        loaded: LoadedRecipe,
        batches: Sequence[Any],
        blocks: str | Sequence[str] | None,
        distance: Distance | None,
    ):
        recipe = loaded.recipe
        for name in ("mix", "transform", "embedding", "head"):
            if getattr(recipe, name) is not None:
                raise ValueError(f"{name} is for model folders; a module takes formats, methods, inputs and correct")
        if recipe.budget.bits is not None:
            raise ValueError("budget.bits is for model folders; a module takes formats, methods, inputs and correct")
        if model.training:
            raise ValueError("the module is in training; call its eval() first")
        elsewhere = next((p.device for p in model.parameters() if p.device.type != "cpu"), None)
        if elsewhere is not None:
            raise ValueError(f"the module is on {elsewhere}, but quantising works on the CPU; move it there first")
        self.model, self.loaded, self.recipe = model, loaded, recipe
        self.blocks = blocks_of(model, blocks)
        require_linears(self.blocks)
        single = next((name for name, block in self.blocks.items() if is_matrix(block)), None)
        if single is not None:
            raise ValueError(
                f"{single} is a linear itself, but a block is a module that holds some; name those around it"
            )
        taken = next((name for name, block in self.blocks.items() if hasattr(block, ADAPTER)), None)
        if recipe.correct and taken is not None:
            raise ValueError(f"{taken} has a submodule {ADAPTER!r}, the name of a compensation's term, already")
        self.linears = {
            block: {f"{block}.{n}": m for n, m in module.named_modules() if is_matrix(m)}
            for block, module in self.blocks.items()
        }
        self.plans = plans_of(loaded, [name for group in self.linears.values() for name in group])
        self.batches = list(batches)
        self.fitted = len(self.batches)
        if recipe.correct and self.batches:
            if len(self.batches) == 1:
                self.batches = list(split(self.batches[0], recipe.qwt.held_out))
            self.fitted = len(self.batches) - held_out(len(self.batches), recipe.qwt.held_out)
        self.real = [real_tokens(model, batch) for batch in self.batches]
        self.distance = distance
        self.calls: list[dict[str, Arguments]] = []  # of each batch: what a block is called with
        self.called: set[str] = set()

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """May end in the middle: the caller puts the module back."""
        without_shortcuts(self.model)
        swap = Swap(self.model)
        began = time.perf_counter()
        first = next(iter(self.blocks))
        states, wanted = self._capture(first)
        left = self._leave()
        self._require_fit()
        inputs, held = states[: self.fitted], states[self.fitted :]
        records: dict[str, dict[str, Any]] = {}
        adapters: dict[str, dict[str, Any]] = {}
        weights = size = 0
        waiting: dict[str, Quantised] = {}  # linears of which a later block may have another name
        with progress(f"quantize {type(self.model).__name__}", len(self.blocks), "blocks") as advance:
            for number, (name, block) in enumerate(self.blocks.items(), 1):
                call, linears = self._call_of(name), self.linears[name]
                job = BlockJob(block, linears, self.plans, self.recipe, call, inputs, real=self.real)
                step = run_block(job, held, self._judge_of(block, wanted) if held else None)
                records |= {n: q.record for n, q in job.done.items()}
                if step.report is not None:
                    adapters[name] = step.report
                if step.term is not None:
                    adapters[name]["bytes"] = self._install(block, step.term)
                inputs, held = step.outputs, step.held
                waiting |= {n: q for n, q in job.done.items() if q.weight is not None}
                later = [module for other in list(self.blocks)[number:] for module in self.linears[other].values()]
                for linear in swap.not_among(later, waiting):  # now, so that no two models of floats are in memory
                    count, nbytes = swap.store(linear, waiting.pop(linear))
                    weights, size = weights + count, size + nbytes
                advance()
        for batch in self.batches[:1]:  # what cannot run on stored linears says so while it can still be put back
            swap.run(batch)
        kept = [self.blocks[name].get_submodule(ADAPTER) for name, entry in adapters.items() if entry["kept"]]
        tuned = self._finetune(kept, wanted) if self.recipe.qwt.finetune and kept and held else None
        added = sum(a.get("bytes", 0) for a in adapters.values())
        floats = swap.floats(aside=[getattr(block, ADAPTER, None) for block in self.blocks.values()], done=records)
        self._warn_of({name: n for name, n in floats.items() if name.rpartition(".")[0] not in self.plans}, weights)
        return {
            "per_linear": records,
            "left": left,
            "floats": floats,
            "adapters": adapters,
            "finetune": tuned,
            "bytes": size + added,
            "adapter_bytes": added,
            "bits_per_weight": 8 * (size + added) / max(weights, 1),
            "seconds": time.perf_counter() - began,
        }

    def _leave(self) -> list[str]:
        """Take the linears that are never called out of the plan, since nothing of ours would run in their place;
        their names."""
        known = uncalled(self.model)
        wanted = [name for name, plan in self.plans.items() if plan.format or plan.inputs]
        left = [n for n in wanted if (n not in self.called if self.batches else n in known)]
        if left and len(left) == len(wanted):
            raise ValueError(f"{left[0]} is never called as a module, nor is any other linear that is to be quantised")
        for group in self.linears.values():
            for name in set(left) & set(group):
                del group[name], self.plans[name]
        return left

    def _require_fit(self) -> None:
        for name, plan in self.plans.items():
            module = next(group[name] for group in self.linears.values() if name in group)
            require_shape(name, plan, *parameter_of(module).flatten(1).shape)
            if isinstance(module, nn.Conv2d) and plan.input_format and plan.input_format.group != "tensor":
                raise ValueError(
                    f"{name} is a convolution, whose inputs share one scale, but {plan.inputs} has many; "
                    f"name {plan.input_format.name.split('_')[0]}_tensor"
                )

    def _capture(self, first: str) -> tuple[list[Tensor], list[Tensor]]:
        """What the first block reads of each batch, and the float model's outputs for the held-out ones. Remembers
        with what else each block is called."""
        states: list[Tensor] = []
        wanted: list[Tensor] = []
        for number, batch in enumerate(self.batches):
            watch = Watch(self.blocks, {n: m for group in self.linears.values() for n, m in group.items()})
            try:
                output = run(self.model, batch)
            finally:
                watch.end()
            watch.require_all()
            states.append(watch.inputs[first])
            self.calls.append(watch.calls)
            self.called |= watch.called
            if number >= self.fitted or self.recipe.qwt.finetune:
                wanted.append(_result(output))
        self.teacher = wanted[: len(wanted) - (len(self.batches) - self.fitted)]
        return states, wanted[len(self.teacher) :]

    def _call_of(self, name: str):
        def call(block: nn.Module, number: int, x: Tensor) -> Tensor:
            args, kwargs, dtype = self.calls[number][name]
            return state_of(block(x.to(dtype), *args, **kwargs))

        return call

    def _judge_of(self, block: nn.Module, wanted: list[Tensor]):
        """The distance of the whole model's outputs, were these the block's outputs."""

        def judge(states: list[Tensor]) -> float:
            total = 0.0
            for i, (state, reference) in enumerate(zip(states, wanted, strict=True)):
                replace = block.register_forward_hook(lambda m, args, output, state=state: with_state(output, state))
                try:
                    total += float(self._measure(self.fitted + i, reference))
                finally:
                    replace.remove()
            return total / max(len(states), 1)

        return judge

    def _measure(self, number: int, wanted: Tensor) -> Tensor:
        """The distance of the model's output for a batch, as the model is now."""
        output = run(self.model, self.batches[number])
        found = _result(output)
        if self.distance is not None:
            return self.distance(wanted, found)
        measure = _divergence if hasattr(output, "logits") else _squared_error
        return measure(*(without_padding(x, self.real[number]) for x in (wanted, found)))

    def _warn_of(self, floats: Mapping[str, int], quantised: int) -> None:
        """Where nobody asked for it, and it is much."""
        share = sum(floats.values()) / max(sum(floats.values()) + quantised, 1)
        if share > NOTABLE:
            largest = max(floats, key=lambda name: floats[name])
            warn(
                f'{share:.0%} of the weights stay floats, the largest of them {largest}; the report has all in "floats"'
            )

    def _finetune(self, adapters: list[nn.Module], wanted: list[Tensor]) -> dict[str, Any]:
        """Train the terms towards the outputs of the float model."""

        def judge() -> float:
            return sum(float(self._measure(self.fitted + i, w)) for i, w in enumerate(wanted)) / len(wanted)

        options = self.recipe.qwt
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        return finetune(
            adapters, lambda i: self._measure(i, self.teacher[i]), self.fitted, judge, options.finetune, options.rate
        )

    def _install(self, block: nn.Module, term: Any) -> int:
        """The compensation as a part of the block; its size in bytes."""
        adapter = term.module()
        block.add_module(ADAPTER, adapter)
        block.register_forward_hook(_compensate)
        return sum(p.numel() * p.element_size() for p in (*adapter.parameters(), *adapter.buffers()))


def _compensate(block: nn.Module, args: tuple, output: Any) -> Any:
    adapter = block.get_submodule(ADAPTER)
    return with_state(output, state_of(output) + adapter(args[0]))


def _result(output: Any) -> Tensor:
    """What a model's output is judged by: logits, or the first tensor."""
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, Mapping):
        return next(v for v in output.values() if isinstance(v, Tensor))
    return state_of(output)


def _divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """KL(wanted || found) of two tensors of logits, mean over all but the last dimension, in nats."""
    p, q = wanted.double().log_softmax(-1), found.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def _squared_error(wanted: Tensor, found: Tensor) -> Tensor:
    return (wanted.double() - found.double()).square().sum() / wanted.double().square().sum().clamp(min=1e-30)
