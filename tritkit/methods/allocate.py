"""Which linear gets how many bits under a budget: measure every option of every linear, optimise the total.

The idea of EXL2 (FACTS 10.5) with another measure. What an option costs is what it is expected to add to the
divergence of the whole model: a change D of a linear changes its output for token t by D x_t, and with g_t the gradient
of log p of a token drawn from the model itself, KL is 1/2 E (g_t . D x_t)^2 to second order (the Fisher information).
One backward pass, layer by layer, gives every g_t; each option then costs one product. The total is minimised by taking
bits, from the cheapest options up, where they save most for each byte.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import ModelFolder
from ..inputs import input_format
from ..kernels.floats import linear
from ..models.shapes import linear_names, matrix_shape
from ..progress import progress
from . import NEED_INPUTS
from .blocks import BlockJob, collect, matrix_of, stages_of
from .calibration import Calibration
from .layerwise import layout_of
from .planning import is_weighed
from .recipe import LoadedRecipe, Plan, Recipe, Rule, Settings, plan_of, settings_of
from .recipe_check import KEEP
from .rtn import packed
from .stats import InputStats
from .stream import DecoderStream

SEQUENCES, TOKENS = 8, 512  # that the sensitivity is measured on, and as many others that methods are calibrated on
SEED = 0  # of the tokens that are drawn from the model


@dataclass(frozen=True)
class Option:
    """A format for a linear: its size in bytes, and the divergence in nats a position that it is expected to add."""

    format: str
    bytes: int
    cost: float


def rules_for(
    model: ModelFolder, loaded: LoadedRecipe, data: Calibration, importance: Mapping[str, Tensor] | None = None
) -> list[Rule]:
    """A rule for each linear that the recipe's rules name no format for, so that all linears together, and what is
    stored beside them, stay within the recipe's budget of bits a weight. importance: of their columns, float32 [in],
    in place of what the data says. ValueError where that cannot be."""
    bits = loaded.recipe.budget.bits
    assert bits is not None
    settings = settings_of(loaded, linear_names(model.config))
    shapes = [matrix_shape(model.config, name) for name in settings]
    budget, taken = int(bits * sum(rows * columns for rows, columns in shapes) / 8), beside_bytes(model, loaded)
    said = f"of the {budget:,} bytes of the budget, compensation and grids of inputs take {taken:,}"
    if taken >= budget:
        raise ValueError(f"{said}, which leaves nothing for the weights; give more bits, or leave out correct")
    options = measure(model, loaded, data, importance)
    try:
        chosen = choose(options, budget - taken)
    except ValueError as error:
        raise ValueError(f"{said}: {error}" if taken else str(error)) from None
    free = [name for name, values in settings.items() if values["format"] is None]
    return [Rule(match=name, format=chosen[name].format) for name in free]


def beside_bytes(model: ModelFolder, loaded: LoadedRecipe) -> int:
    """Of the terms of QwT, as if all were kept (float16 [hidden, hidden], float32 [hidden] a layer), and of the static
    grids of inputs (a float32 scale, and a zero where they are asymmetric)."""
    hidden, total = model.config.hidden_size, 0
    if loaded.recipe.correct == "qwt":
        total += model.config.num_hidden_layers * (2 * hidden * hidden + 4 * hidden)
    for values in settings_of(loaded, linear_names(model.config)).values():
        inputs = None if values["inputs"] is None else input_format(values["inputs"])
        if inputs is not None and inputs.is_static:
            total += 8 if inputs.is_asymmetric else 4
    return total


def choose(options: Mapping[str, list[Option]], budget: int) -> dict[str, Option]:
    """One option for each linear with the least total cost for at most ``budget`` bytes.

    Only options on the lower convex hull of (bytes, cost) are looked at; on it, buying the best saving for each byte
    first is optimal for the budget that is used. ValueError where even the smallest options are too large.
    """
    hulls = {name: hull(found) for name, found in options.items()}
    chosen = {name: points[0] for name, points in hulls.items()}
    used = sum(option.bytes for option in chosen.values())
    if used > budget:
        smallest = sorted({option.format for option in chosen.values()})
        raise ValueError(
            f"the budget of {budget:,} bytes is less than the {used:,} of the smallest options "
            f"({', '.join(smallest)}); give more bits, or smaller formats in budget.options"
        )
    queue = [(-_gain(points, 0), name, 0) for name, points in hulls.items() if len(points) > 1]
    heapq.heapify(queue)
    while queue:
        _, name, at = heapq.heappop(queue)
        points = hulls[name]
        more = points[at + 1].bytes - points[at].bytes
        if used + more > budget:
            continue  # too large for what is left; a smaller step of another linear may still fit
        used += more
        chosen[name] = points[at + 1]
        if at + 2 < len(points):
            heapq.heappush(queue, (-_gain(points, at + 1), name, at + 1))
    return chosen


def hull(options: list[Option]) -> list[Option]:
    """The options on the lower convex hull of (bytes, cost), from small to large."""
    points: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bytes, o.cost)):
        if points and option.cost >= points[-1].cost:
            continue
        while len(points) > 1 and _slope(points[-2], points[-1]) <= _slope(points[-2], option):
            points.pop()
        points.append(option)
    return points


def _slope(a: Option, b: Option) -> float:
    """Saving for each byte between two options."""
    return (a.cost - b.cost) / (b.bytes - a.bytes)


def _gain(points: list[Option], at: int) -> float:
    return _slope(points[at], points[at + 1])


def measure(
    model: ModelFolder, loaded: LoadedRecipe, data: Calibration, importance: Mapping[str, Tensor] | None = None
) -> dict[str, list[Option]]:
    """The options of every linear of the layers, measured on the float model; one that a rule gives a format has no
    other."""
    stream = DecoderStream(model)
    settings = settings_of(loaded, linear_names(model.config))
    paired, weighed = _uses_of_inputs(loaded, settings)
    each = max(len(data.fit) // 2, 1) if paired or weighed else SEQUENCES
    tokens = data.fit[: min(each, SEQUENCES), :TOKENS]
    apart = data.fit[len(tokens) : len(tokens) + SEQUENCES, :TOKENS]
    used = [tokens, apart if len(apart) else tokens] if paired or weighed else [tokens]
    layers = model.config.num_hidden_layers
    found: dict[str, list[Option]] = {}
    with progress(f"sensitivity of {model.path.name}", 2 * layers, "layers") as advance:
        states = [[stream.embed(some) for some in used]]
        with torch.no_grad():
            for number in range(layers):
                layer = stream.layer(number)
                states.append([stream.call(layer, 0, x) for x in states[-1]])
                advance()
        gradient = _drawn_gradient(stream, states.pop()[0])
        for number in reversed(range(layers)):
            x, *others = states.pop()
            layer, at = stream.layer(number), f"model.layers.{number}."
            linears = {n: layer.get_submodule(n[len(at) :]) for n in settings if n.startswith(at)}
            stats = _inputs(stream, layer, linears, others, paired)
            gradient, options = _layer(
                model, stream, loaded, layer, linears, x, stats, gradient, settings, importance or {}
            )
            found |= options
            advance()
    return {name: found[name] for name in linear_names(model.config)}


def _uses_of_inputs(loaded: LoadedRecipe, settings: Mapping[str, Settings]) -> tuple[bool, bool]:
    """Whether any linear's method uses products of what it reads, and whether any its mean squares."""
    each = [{**values, "format": format} for values in settings.values() for format in _formats(loaded, values)]
    plans = [plan_of(values) for values in each]
    weighed = loaded.recipe.importance and any(map(is_weighed, plans))
    return any(plan.method in NEED_INPUTS for plan in plans if plan.format is not None), weighed


def _formats(loaded: LoadedRecipe, values: Settings) -> list[str]:
    """The options of a linear: the one that a rule gives it, or those of the budget."""
    return [values["format"]] if values["format"] is not None else list(loaded.recipe.budget.options)


def _drawn_gradient(stream: DecoderStream, hidden: Tensor) -> Tensor:
    """Gradient of the sum of log p over all positions, at the last hidden state, for tokens drawn from p."""
    hidden = hidden.clone().requires_grad_(True)
    generator = torch.Generator().manual_seed(SEED)
    gradient = torch.zeros_like(hidden)
    for piece in stream.log_probabilities(hidden):
        drawn = torch.multinomial(piece.detach().exp(), 1, generator=generator)
        gradient += torch.autograd.grad(piece.gather(1, drawn).sum(), hidden, retain_graph=True)[0]
    return gradient


@torch.no_grad()
def _inputs(
    stream: DecoderStream, layer: nn.Module, linears: dict[str, nn.Module], others: list[Tensor], paired: bool
) -> dict[str, InputStats]:
    """Statistics of what the linears of a layer read, for methods that use any. others: inputs of the layer; not those
    that the cost is measured on, on which GPTQ would seem better than it is."""
    if not others:
        return {}
    job = BlockJob(layer, linears, dict.fromkeys(linears, Plan()), Recipe(), stream.call, others)
    return collect(job, stages_of(job, linears), paired=paired, sinks=paired)


def _layer(
    model: ModelFolder,
    stream: DecoderStream,
    loaded: LoadedRecipe,
    layer: nn.Module,
    linears: Mapping[str, nn.Module],
    x: Tensor,
    stats: Mapping[str, InputStats],
    gradient: Tensor,
    settings: Mapping[str, Settings],
    importance: Mapping[str, Tensor],
) -> tuple[Tensor, dict[str, list[Option]]]:
    """Options of one layer's linears, and the gradient at its input."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook_of(name: str):
        def hook(module: Any, args: tuple, output: Tensor) -> None:
            output.register_hook(lambda g: seen.__setitem__(name, (args[0].detach(), g)))

        return hook

    handles = [module.register_forward_hook(hook_of(name)) for name, module in linears.items()]
    x = x.clone().requires_grad_(True)
    torch.autograd.backward(stream.call(layer, 0, x), gradient)
    for handle in handles:
        handle.remove()
    found = {}
    with torch.no_grad():
        for name, module in linears.items():
            inputs, outward = (t.flatten(0, -2).float() for t in seen[name])
            known = stats.get(name)
            known = known.weighed(importance[name]) if known is not None and name in importance else known
            given = settings[name]
            names = _formats(loaded, given)
            if names == [KEEP]:
                found[name] = [Option(KEEP, stored_bytes(model, name), 0.0)]
                continue
            plans = [plan_of({**given, "format": format}) for format in names]
            found[name] = [
                _option(matrix_of(module), plan, loaded, known, inputs, outward)
                for plan in plans
                if plan.format is not None and not (plan.format.block and inputs.shape[1] % plan.format.block)
            ]
            if not found[name]:
                raise ValueError(f"none of the formats of budget.options divides a row of {name}, {inputs.shape[1]}")
    assert x.grad is not None
    return x.grad, found


def stored_bytes(model: ModelFolder, name: str) -> int:
    """What a linear takes as it is."""
    own = (key for key in model.tensors if key.rpartition(".")[0] == name and not key.endswith(".bias"))
    return sum(model.tensors[key].array.nbytes for key in own)


def _option(
    w: Tensor, plan: Plan, loaded: LoadedRecipe, stats: InputStats | None, inputs: Tensor, outward: Tensor
) -> Option:
    from . import METHODS

    assert plan.format is not None
    weight = METHODS[plan.method](w, plan, stats, loaded.recipe)
    change = (linear(inputs, weight.dequantize() - w) * outward).sum(-1)  # g_t . D x_t
    size = packed(weight, layout_of(plan)).nbytes
    return Option(plan.format.name, size, 0.5 * float(change.double().square().mean()))
