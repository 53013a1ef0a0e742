"""Linears in their own bits in the place of the float ones of somebody's module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..stored import StoredLinear
from . import rtn
from .batches import run
from .blocks import Quantised


class Swap:
    """Of one model; its float weights stay in memory, since an error may put them back."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.weights: dict[Tensor, Tensor] = {parameter: parameter.data for parameter in model.parameters()}
        self.replaced: dict[str, nn.Linear] = {}

    def not_among(self, later: Sequence[nn.Module], names: Iterable[str]) -> list[str]:
        """Those of the linears that are none of ``later`` under another name, the last ones first: of a module with
        several names the codes are those of the last."""
        found = {name: self.model.get_submodule(name) for name in names}
        return [name for name in reversed(found) if all(found[name] is not module for module in later)]

    def store(self, name: str, found: Quantised) -> tuple[int, int]:
        """A linear in its own bits in place of the float one, without the hook that rounds its inputs; returns how many
        weights it has and its bytes, which for a convolution, whose floats stay, are those that it would have."""
        assert found.weight is not None
        module = self.model.get_submodule(name)
        twin = next((other for other, old in self.replaced.items() if old is module), None)
        if twin is not None:  # another name of it
            self._replace(name, self.model.get_submodule(twin))
        if twin is not None or isinstance(module, StoredLinear):
            return 0, 0
        packed = rtn.packed(found.weight)
        if isinstance(module, nn.Linear):
            bias = None if module.bias is None else module.bias.detach()
            shape = (module.out_features, module.in_features)
            dtype, layout = module.weight.dtype, found.weight.format.layout
            self._replace(name, StoredLinear(layout, packed.arrays, shape, bias, found.inputs, dtype))
            self.replaced[name] = module
            if all(parameter is not module.weight for parameter in self.model.parameters()):
                module.weight.data = self.weights[module.weight]  # which is in memory anyway
        return found.weight.codes.numel(), packed.nbytes

    def _replace(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, module)

    def run(self, batch: Any) -> None:
        """Run the model on stored linears. Floats that are called through a reference that is none of a submodule stay;
        they get the same weights."""
        called: set[str] = set()
        handles = [
            module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
            for name, module in self.replaced.items()
        ]
        try:
            run(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()
        for name in called:
            stored, weight = self.model.get_submodule(name), self.replaced[name].weight
            assert isinstance(stored, StoredLinear)
            weight.data = stored.floats(slice(None)).to(weight.dtype)

    def floats(self, aside: Sequence[nn.Module | None], done: Mapping[str, Any]) -> dict[str, int]:
        """How many weights each tensor has that is still floats; aside: whose tensors do not count, beside embeddings;
        done: by the names of what is quantised, convolutions too."""
        uncounted = [m for m in self.model.modules() if isinstance(m, nn.Embedding)] + [
            m for m in aside if m is not None
        ]
        known = {id(p) for module in uncounted for p in module.parameters()}
        found = {name: p for name, p in self.model.named_parameters() if p.dim() > 1 and id(p) not in known}
        return {name: p.numel() for name, p in found.items() if name.rpartition(".")[0] not in done}
