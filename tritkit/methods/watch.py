"""Which modules of a model are its blocks, and looking on while the model runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..stored import StoredLinear
from .blocks import is_matrix, parameter_of

# What a block is called with beside its input, and the dtype of that.
Arguments = tuple[tuple, dict[str, Any], torch.dtype]

LISTS = (nn.ModuleList, nn.Sequential)
CACHES = ("past_key_value", "past_key_values", "layer_past", "cache_params")  # transformers' names for them


def blocks_of(model: nn.Module, named: str | Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The blocks by name, in their order. Unnamed: of the classes with at least two instances that are no matrices
    themselves, the one whose instances hold the most weights; of equals the outermost. A class whose instances stand in
    lists goes before one whose do not, unless it holds less than half as much: two towers are no blocks, nor are the
    attentions of an encoder and its decoder."""
    modules = dict(model.named_modules())
    if isinstance(named, str):
        if named not in modules or not isinstance(modules[named], LISTS):
            raise ValueError(f"{type(model).__name__} has no list of blocks named {named!r}")
        return {f"{named}.{child}": block for child, block in modules[named].named_children()}
    if named is not None:
        missing = next((name for name in named if name not in modules), None)
        if missing is not None:
            raise ValueError(f"{type(model).__name__} has no block named {missing!r}")
        return {name: modules[name] for name in named}
    best: dict[str, nn.Module] = {}
    most = 0
    for kind in dict.fromkeys(type(m) for m in modules.values()):
        if kind in (*LISTS, nn.ModuleDict):
            continue
        group = {n: m for n, m in modules.items() if type(m) is kind and not is_matrix(m)}
        weights = sum(parameter_of(m).numel() for g in group.values() for m in g.modules() if is_matrix(m))
        nested = any(a != b and b.startswith(f"{a}.") for a in group for b in group)
        listed = all(isinstance(modules[n.rpartition(".")[0]], LISTS) for n in group if n)
        weights *= 2 if listed else 1
        if len(group) > 1 and not nested and weights > most:
            best, most = group, weights
    if not best:
        raise ValueError(f"{type(model).__name__} has no repeated blocks that hold linears{_holders(model.modules())}; "
                         "name them with blocks=")  # fmt: skip
    return best


def require_linears(blocks: Mapping[str, nn.Module]) -> None:
    """ValueError where there is nothing in the blocks that can be quantised."""
    modules = [m for block in blocks.values() for m in block.modules()]
    if not any(map(is_matrix, modules)):
        raise ValueError(f"the blocks {_some(blocks)} hold no linears{_holders(modules)}")


def _some(blocks: Iterable[str]) -> str:
    names = list(blocks)
    return ", ".join(names[:3]) + " ..." * (len(names) > 3)


def _holders(modules: Iterable[nn.Module]) -> str:
    """In modules of which classes the weights are instead."""
    found = [m for m in modules if isinstance(m, StoredLinear) or any(p.dim() > 1 for p in m.parameters(False))]
    if any(isinstance(m, StoredLinear) for m in found):
        return ", they are quantised already"
    kinds = dict.fromkeys(type(m).__name__ for m in found if not is_matrix(m) and not isinstance(m, nn.Embedding))
    return f", their weights are in {', '.join(kinds)}" if kinds else ""


def uncalled(model: nn.Module) -> set[str]:
    """Names of the linears of which it is known that their weights are read without the module being called."""
    attentions = {name: m for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    return {f"{name}.{child}" for name, m in attentions.items() for child, _ in m.named_children()}


class Watch:
    """Looks on while the model runs once. inputs: of the first block; calls: what else each block is given; called:
    which of the linears are. ValueError where the blocks are not in sequence."""

    def __init__(self, blocks: Mapping[str, nn.Module], linears: Mapping[str, nn.Module]):
        self.inputs: dict[str, Tensor] = {}
        self.calls: dict[str, Arguments] = {}
        self.called: set[str] = set()
        self.before: Tensor | None = None
        self.unchanged: Callable[[], bool] = lambda: True  # whether the input of the block that runs is what it was
        self.blocks = list(blocks)
        self.handles: list[Any] = []
        for name, block in blocks.items():
            self.handles.append(block.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True))
            self.handles.append(block.register_forward_hook(partial(self._leave, name)))
        for name, linear in linears.items():
            self.handles.append(linear.register_forward_pre_hook(partial(self._note, name)))

    def _enter(self, name: str, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not args:
            raise ValueError(f"{name} is called by keywords alone, but a block reads its input as the first argument; "
                             "name the blocks with blocks=")  # fmt: skip
        if not args[0].numel():
            raise ValueError(f"{name} reads an input of shape {tuple(args[0].shape)}: a batch is empty")
        if not torch.isfinite(args[0]).all():
            raise ValueError(f"{name} reads values that are not finite: look at the batches and the weights before it")
        if name in self.calls:
            raise ValueError(f"{name} is called twice, so the blocks are not in sequence")
        follows = self.before is None or (self.before.shape == args[0].shape and torch.equal(self.before, args[0]))
        if not follows:
            raise ValueError(
                f"{name} does not read what the block before it makes: these blocks are not in sequence; "
                "name those of one part of the model with blocks=, and call this for each part"
            )
        if not self.inputs:
            self.inputs[name] = args[0].detach()
            if any(is_cache(v) and v.get_seq_length() for v in (*args[1:], *kwargs.values())):
                raise ValueError(f"{name} is called with keys and values of earlier tokens; give whole sequences")
        self.calls[name] = (*without_caches(args[1:], kwargs), args[0].dtype)
        self.unchanged = _unchanged(args[0])

    def _leave(self, name: str, block: nn.Module, args: tuple, output: Any) -> None:
        if not self.unchanged():
            raise ValueError(f"{name} writes over its input, which is needed afterwards; let it work on a copy")
        self.before = state_of(output).detach()

    def _note(self, name: str, linear: nn.Module, args: tuple) -> None:
        self.called.add(name)

    def end(self) -> None:
        for handle in self.handles:
            handle.remove()

    def require_all(self) -> None:
        """ValueError unless every block was called, in the order in which they were named."""
        called = list(self.calls)
        if called != self.blocks:
            missing = next((name for name in self.blocks if name not in self.calls), None)
            here, there = next((a, b) for a, b in zip(self.blocks, [*called, ""], strict=False) if a != b)
            what = f"{missing} is not called" if missing else f"{there} runs where {here} is named"
            order = "name them with blocks= in the order in which they run"
            raise ValueError(f"the blocks are {_some(self.blocks)}, but {what}; {order}")


def _unchanged(x: Tensor) -> Callable[[], bool]:
    """Says later whether x was not written to since; tensors of inference mode do not count that."""
    if x.is_inference():
        before = x.clone()
        return lambda: torch.equal(before, x)
    version = x._version
    return lambda: x._version == version


def is_cache(value: Any) -> bool:
    """Whether it is one of transformers' caches of keys and values."""
    return hasattr(value, "get_seq_length")


def without_caches(args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments for calling a block again: a cache would grow each time, and old keys and values would be read."""
    kept = {k: None if k in CACHES or is_cache(v) else v for k, v in kwargs.items()}
    if "use_cache" in kept:
        kept["use_cache"] = False
    return tuple(None if is_cache(v) else v for v in args), kept


def state_of(output: Any) -> Tensor:
    """The hidden state of what a block returns."""
    return output if isinstance(output, Tensor) else output[0]


def with_state(output: Any, state: Tensor) -> Any:
    """The same with another hidden state, which gets the dtype of the one before."""
    state = state.to(state_of(output).dtype)
    return state if isinstance(output, Tensor) else (state, *output[1:])
