"""QwT for blocks of convolutions: y = block(x) + K x + b with K a convolution of one pixel, in groups of channels.

As in the ResNet code of arXiv 2411.13918: one group for each 64 channels of the input, and the block's own stride.
Every group is a least squares problem of its own, over all pixels that the block keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import qwt
from .qwt import Pair

CHANNELS = 64  # of the input in a group


@dataclass(frozen=True)
class ConvCompensation:
    """weight: float16 [out, in / groups], bias: float32 [out], as they are stored. x: [b, in, h, w]."""

    weight: Tensor
    bias: Tensor
    stride: tuple[int, int]
    groups: int

    def __call__(self, x: Tensor) -> Tensor:
        return F.conv2d(x.float(), self.weight.float()[..., None, None], self.bias, self.stride, groups=self.groups)

    def module(self) -> ConvAdapter:
        """The same as a part of a model."""
        return ConvAdapter(self)


class ConvAdapter(nn.Module):
    """An additive branch on a block of convolutions, from the block's input; the product is one of float32."""

    def __init__(self, term: ConvCompensation):
        super().__init__()
        self.weight = nn.Parameter(term.weight, requires_grad=False)
        self.bias = nn.Parameter(term.bias, requires_grad=False)
        self.stride, self.groups = term.stride, term.groups

    def forward(self, x: Tensor) -> Tensor:
        return ConvCompensation(self.weight, self.bias, self.stride, self.groups)(x)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, stride={self.stride}, groups={self.groups}"


def solve(pairs: Sequence[Pair], ridge: float) -> ConvCompensation:
    """The least squares solution of ``qwt.solve`` in each group; x [b, in, h, w], missing [b, out, h', w'].

    ValueError where h' x w' is no multiple of strides over h x w.
    """
    if not pairs:
        raise ValueError("qwt needs calibration data; give batches of inputs")
    (_, inputs, *size), (_, outputs, *kept) = pairs[0][0].shape, pairs[0][1].shape
    down, right = stride_of(size[0], kept[0]), stride_of(size[1], kept[1])
    groups = groups_of(inputs, outputs)
    parts = []
    for group in range(groups):
        read = slice(group * inputs // groups, (group + 1) * inputs // groups)
        made = slice(group * outputs // groups, (group + 1) * outputs // groups)
        rows = ((_pixels(x[:, read, ::down, ::right]), _pixels(y[:, made])) for x, y in pairs)
        parts.append(qwt.solve(rows, ridge))
    weight, bias = torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts])
    return ConvCompensation(weight, bias, (down, right), groups)


def explained(pairs: Sequence[Pair], term: ConvCompensation) -> float:
    """R^2 of the term over pixels, as ``qwt.explained``."""
    return qwt.explained(((x, _pixels(y)) for x, y in pairs), lambda x: _pixels(term(x)))


def stride_of(before: int, after: int) -> int:
    """The stride by which a convolution of one pixel makes ``after`` places of ``before``."""
    for stride in range(1, before + 1):
        if (before - 1) // stride + 1 == after:
            return stride
    raise ValueError(f"qwt compensates blocks that keep every s-th pixel, but one makes {after} places of {before}")


def groups_of(inputs: int, outputs: int) -> int:
    """One for each CHANNELS of the input, or as many fewer as divide both sides."""
    return next(g for g in range(max(inputs // CHANNELS, 1), 0, -1) if inputs % g == 0 and outputs % g == 0)


def _pixels(x: Tensor) -> Tensor:
    """[b, c, h, w] as rows of channels, [b * h * w, c]."""
    return x.movedim(1, -1).flatten(0, -2)
