"""The layers of a folder, one after the other: what ``quantizer`` runs, and what it takes up again after a stop."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import ModelFolder
from ..layouts import LAYOUTS
from ..models.shapes import EMBEDDING, HEAD, linear_names, matrix_shape
from ..models.transformer import Layer
from ..progress import progress
from ..stored import InputQuantizer
from ..tensorfile import StoredTensor, TensorFile
from . import METHODS, rtn
from .blocks import BlockJob, collect, install, parameter_of
from .calibration import Calibration
from .finetune import finetune
from .partial import Partial, stored
from .qwt import Compensation
from .recipe import LoadedRecipe, Plan
from .record import record_of
from .stats import InputStats
from .steps import Step, run_block
from .stream import STRIP, DecoderStream
from .transforms import apply, folds, require_same, scale_of

CHECKED_TOKENS = 256  # of each held-out sequence: what the divergence of the whole model is measured on
CHUNK = 2048  # tokens of a batch of sequences


def layout_of(plan: Plan) -> str:
    """Where a format's codes are kept in a folder of several formats: ternary and binary ones as dense codes."""
    assert plan.format is not None
    return "dense" if plan.format.name in ("ternary", "binary") else plan.format.layout


class Layerwise:
    """The run over the layers of a folder."""

    def __init__(
        self,
        model: ModelFolder,
        loaded: LoadedRecipe,
        plans: dict[str, Plan],
        data: Calibration | None,
        partial: Partial,
        importance: Mapping[str, Tensor],
    ):
        self.model, self.loaded, self.plans, self.data, self.partial = model, loaded, plans, data, partial
        self.importance = importance
        self.stream = DecoderStream(model)
        self.records: dict[str, dict[str, Any]] = {}

    def run(self) -> None:
        config = self.model.config
        linears = [n for n in linear_names(config) if self.plans[n].format or self.plans[n].inputs]
        table = self._tables()
        inputs, held, reference = self._begin(table)
        title = f"quantize {self.model.path.name} ({self.loaded.recipe.name or 'recipe'})"
        done = self.partial.layers_done(config.num_hidden_layers)
        with progress(title, config.num_hidden_layers, "layers", done=done) as advance:
            for number in range(config.num_hidden_layers):
                if number < done:
                    step = self._again(number, inputs, held)
                else:
                    step = self._layer(number, inputs, held, reference)
                    worst = max((self.records[n].get("output_error", 0.0) for n in self.records), default=0.0)
                    advance(1, f"largest output error {worst:.2%}" if worst else "")
                inputs, held = step.outputs, step.held
        assert not linears or self.records

    def _tables(self) -> np.ndarray | None:
        """Embedding and head, which read nothing that is quantised; the embedding as the layers will see it."""
        table = None
        for name in (EMBEDDING, HEAD):
            plan = self.plans.get(name)
            if plan is None or plan.format is None:
                continue
            record = self.partial.record(name)
            if record is None:
                began = time.perf_counter()
                before = torch.from_numpy(self.model.floats(name))
                known = self.importance.get(name)  # of columns; there are no statistics of what tables read
                stats = None if known is None else InputStats(before.shape[1], paired=False).weighed(known)
                weight = METHODS[plan.method](before, plan, stats, self.loaded.recipe)
                arrays = rtn.packed(weight, layout_of(plan)).arrays
                after = weight.dequantize()
                seconds = time.perf_counter() - began
                record = record_of(before, after, weight, plan, stats, seconds, layout=layout_of(plan))
                self.partial.keep(name, {f"{name}.{k}": stored(a) for k, a in arrays.items()}, {name: record})
                record = self.partial.record(name)
            self.records |= record or {}
            if name == EMBEDDING and self.data is not None:
                shape = (self.model.config.vocab_size, self.model.config.hidden_size)
                table = LAYOUTS[layout_of(plan)].dequantize(self.partial.packed(name, name), shape)
        return table

    @torch.no_grad()
    def _begin(self, table: np.ndarray | None) -> tuple[list, list, list]:
        """Hidden states of the calibration and the held-out tokens in front of the first layer, and behind the last
        one of the float model."""
        if self.data is None:
            return [], [], []
        together = max(CHUNK // self.data.fit.shape[1], 1)
        inputs = [self.stream.embed(t, table) for t in self.data.fit.split(together)]
        short = self.data.held_out[:, :CHECKED_TOKENS]
        held = [self.stream.embed(t, table) for t in short.split(CHUNK // short.shape[1])] if len(short) else []
        recipe = self.loaded.recipe
        reference = []
        if held and recipe.correct and recipe.qwt.check:
            states = self.stream.finish([self.stream.embed(t) for t in short.split(CHUNK // short.shape[1])], 0)
            reference = [[p.half() for p in self.stream.log_probabilities(x)] for x in states]
        return inputs, held, reference

    def _layer(self, number: int, inputs: list, held: list, reference: list) -> Step:
        at = f"model.layers.{number}."
        layer = self.stream.layer(number)
        linears = {n: layer.get_submodule(n[len(at) :]) for n in linear_names(self.model.config) if n.startswith(at)}
        job = BlockJob(
            layer, linears, self.plans, self.loaded.recipe, self.stream.call, inputs, importance=dict(self.importance)
        )
        job.walk, job.layout_of = self.stream.walk, layout_of

        def judge(states: list) -> float:
            return self.stream.divergence(reference, self.stream.finish(states, number + 1))

        changed: list[str] = []

        def transform() -> None:
            changed.extend(self._transform(job, at))

        step = run_block(
            job, held, judge if reference else None, transform if self.loaded.recipe.transform is not None else None
        )
        tensors: dict[str, StoredTensor] = {}
        for name, found in job.done.items():
            if found.weight is not None:
                arrays = rtn.packed(found.weight, layout_of(self.plans[name])).arrays
                tensors |= {f"{name}.{k}": stored(a) for k, a in arrays.items()}
            if found.inputs is not None and found.inputs.scale is not None and found.inputs.zero is not None:
                tensors[f"{name}.input_scale"] = StoredTensor("F32", found.inputs.scale.reshape(1).numpy())
                if found.inputs.format.has_offset:
                    tensors[f"{name}.input_zero"] = StoredTensor("F32", found.inputs.zero.reshape(1).numpy())
        for name in changed:
            tensors[at + name] = StoredTensor("F32", layer.get_parameter(name).numpy())
        if step.term is not None:
            tensors[f"{at}adapter.weight"] = StoredTensor("F16", step.term.weight.numpy())
            tensors[f"{at}adapter.bias"] = StoredTensor("F32", step.term.bias.numpy())
        records = {name: found.record for name, found in job.done.items()}
        if step.report is not None:
            records[f"{at}adapter"] = step.report
        self.records |= records
        self.partial.keep(str(number), tensors, records)
        return step

    def _transform(self, job: BlockJob, at: str) -> list[str]:
        """Fold the recipe's scales into the layer; names of the parameters that are stored as floats and changed."""
        layer, changed = job.block, []
        before = job.call(layer, 0, job.inputs[0])
        for fold in folds(self.model.config):
            names = [at + reader for reader in fold.readers]
            if not self._can_take(at + fold.source) or any(self.plans[n].format is None for n in names):
                continue
            stats = collect(job, [names], paired=self.loaded.recipe.transform == "awq")[names[0]]
            scale = scale_of(layer, fold, stats, {r: self.plans[at + r] for r in fold.readers}, self.loaded.recipe)
            if scale is None:
                continue
            apply(layer, fold, scale)
            for name in set(names) & set(job.importance):  # of inputs that are smaller now
                job.importance[name] = job.importance[name] / scale.square()
            source = layer.get_submodule(fold.source)
            if at + fold.source not in self.plans or self.plans[at + fold.source].format is None:
                changed.append(f"{fold.source}.weight")
            if getattr(source, "bias", None) is not None:
                changed.append(f"{fold.source}.bias")
        require_same(before, job.call(layer, 0, job.inputs[0]), at.rstrip("."))
        return changed

    def _can_take(self, source: str) -> bool:
        """Whether other weights can be stored for it: not where codes stay as they are."""
        planned = source in self.plans and self.plans[source].format is not None
        return planned or source not in self.model.layouts

    @torch.no_grad()
    def _again(self, number: int, inputs: list, held: list) -> Step:
        """What a layer that an earlier run finished hands on."""
        self.records |= self.partial.record(str(number)) or {}
        if not inputs:
            return Step([], [])
        layer = self._finished(number)

        def through(states: list) -> list[Tensor]:
            return [self.stream.call(layer, i, x) for i, x in enumerate(states)]

        return Step(through(inputs), through(held))

    def _finished(self, number: int) -> Layer:
        """A layer as its part has it, dequantised, with its compensation."""
        at, tensors = f"model.layers.{number}.", self.partial.tensors(str(number))
        layer = self.stream.layer(number)
        for name in (n for n in linear_names(self.model.config) if n.startswith(at)):
            module, plan = layer.get_submodule(name[len(at) :]), self.plans[name]
            if plan.format is not None:
                packed = self.partial.packed(str(number), name)
                values = LAYOUTS[layout_of(plan)].dequantize(packed, matrix_shape(self.model.config, name))
                parameter_of(module).data = torch.from_numpy(values)
            quantizer = self._input_quantizer(plan, name, tensors)
            if quantizer is not None:
                install(module, quantizer)
        coded = {name for name, plan in self.plans.items() if plan.format is not None}
        for name, parameter in layer.named_parameters():
            if at + name in tensors and (at + name).removesuffix(".weight") not in coded:
                parameter.data = torch.from_numpy(tensors[at + name].float32())
        if f"{at}adapter.weight" in tensors:
            weight = torch.from_numpy(np.array(tensors[f"{at}adapter.weight"].array))
            layer.adapter = Compensation(weight, torch.from_numpy(tensors[f"{at}adapter.bias"].float32())).module()
        return layer

    def finetune(self) -> dict[str, Any] | None:
        """QwT*: train the terms on the calibration tokens, by the loss of the next token; None where there is none.

        All layers are in memory for it.
        """
        count = self.model.config.num_hidden_layers
        layers = [self._finished(number) for number in range(count)]
        adapters = {number: layer.adapter for number, layer in enumerate(layers) if layer.adapter is not None}
        data = self.data
        if not adapters or data is None or not len(data.held_out):
            return None
        table = self._tables()

        def loss_of(tokens: Tensor) -> Tensor:
            x = self.stream.embed(tokens, table)
            for layer in layers:
                x = self.stream.call(layer, 0, x)
            pieces = self.stream.log_probabilities(x[:, :-1])
            targets = tokens[:, 1:].flatten().split(STRIP)
            total = [p.gather(1, t[:, None]).sum() for p, t in zip(pieces, targets, strict=True)]
            return -torch.stack(total).sum() / tokens[:, 1:].numel()

        @torch.no_grad()
        def judge() -> float:
            return sum(float(loss_of(t[None])) for t in data.held_out) / len(data.held_out)

        options = self.loaded.recipe.qwt
        report = finetune(
            list(adapters.values()),
            lambda i: loss_of(data.fit[i][None]),
            len(data.fit),
            judge,
            options.finetune,
            options.rate,
        )
        if report["kept"]:
            tensors: dict[str, StoredTensor] = {}
            for number, adapter in adapters.items():
                at = f"model.layers.{number}.adapter"
                tensors[f"{at}.weight"] = StoredTensor("F16", adapter.weight.detach().numpy())
                tensors[f"{at}.bias"] = StoredTensor("F32", adapter.bias.detach().numpy())
            self.partial.keep("finetuned", tensors, {})
        return {name.replace("divergence", "nll"): value for name, value in report.items()}

    def _input_quantizer(self, plan: Plan, name: str, tensors: TensorFile) -> InputQuantizer | None:
        format = plan.input_format
        if format is None:
            return None
        if plan.inputs_range is None:
            return InputQuantizer(format, outliers=self.loaded.recipe.outlier_threshold if plan.outliers else None)
        scale = torch.from_numpy(tensors[f"{name}.input_scale"].float32())
        zero = torch.from_numpy(tensors[f"{name}.input_zero"].float32()) if format.has_offset else None
        return InputQuantizer(format, scale=scale, zero=zero)
