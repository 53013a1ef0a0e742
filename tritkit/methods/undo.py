"""What a module was before it was quantised, for a run that fails; the shortcuts of torch that it cannot take, and the
linears of transformers that are none of torch's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# What torch keeps of a module: parameters, buffers, children, hooks.
PARTS = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict))

# Modules of torch that hand the weights of linears to a kernel of their own, and the attribute that keeps them from it.
# An encoder then no longer cuts padded tokens out, which only changes outputs at those.
SHORTCUTS: dict[type[nn.Module], tuple[str, object]] = {
    nn.TransformerEncoder: ("use_nested_tensor", False),
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
}


class Snapshot:
    """Puts a module back. Weights are held on to, not copied: quantising replaces them and never writes into them."""

    def __init__(self, model: nn.Module):
        self.parts = [(m, part, vars(m)[part].copy()) for m in model.modules() for part in PARTS]
        self.weights = [(p, p.data, p.requires_grad) for p in model.parameters()]
        self.shortcuts = [
            (m, name, getattr(m, name))
            for m in model.modules()
            for kind, (name, _) in SHORTCUTS.items()
            if isinstance(m, kind) and hasattr(m, name)
        ]

    def restore(self) -> None:
        for module, part, before in self.parts:
            now = vars(module)[part]  # the same dict as ever, which handles of hooks refer to
            now.clear()
            now.update(before)
        for parameter, data, learns in self.weights:
            parameter.data = data
            parameter.requires_grad_(learns)
        for module, name, value in self.shortcuts:
            setattr(module, name, value)


def without_shortcuts(model: nn.Module) -> None:
    """From now on the model calls its linears."""
    for module in model.modules():
        for kind, (name, value) in SHORTCUTS.items():
            if isinstance(module, kind):
                setattr(module, name, value)


def with_linears(model: nn.Module) -> None:
    """From now on the ``Conv1D`` of transformers, which is a linear that keeps its weights as [in, out] (GPT-2), is one
    of torch's, on the same weights."""
    made: dict[int, nn.Linear] = {}  # one that has several names stays one
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() tells one of several names
            if child is not None and _is_conv1d(child):
                if id(child) not in made:
                    made[id(child)] = _linear_of(child)
                setattr(parent, name, made[id(child)])


def _is_conv1d(module: nn.Module) -> bool:
    """By its name and its parts: transformers need not be installed."""
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__ == "Conv1D" and hasattr(module, "nf") and isinstance(weight, Tensor) and weight.dim() == 2
    )


def _linear_of(module: nn.Module) -> nn.Linear:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, nn.Parameter) and isinstance(bias, nn.Parameter)
    with torch.device("meta"):
        linear = nn.Linear(*weight.shape)
    linear.weight = nn.Parameter(weight.data.t(), requires_grad=weight.requires_grad)
    linear.bias = bias
    return linear.train(module.training)
