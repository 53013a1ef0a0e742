"""The linear layers and norms that models are built of.

Shapes: b batch, t tokens, i in features, o out features; rows = b * t.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .formats import Format, fake_quantize, format_of
from .kernels import integer_product
from .kernels.floats import linear


class RMSNorm(nn.Module):
    """x / rms(x) * weight in float32 (Zhang and Sennrich 2019), as LlamaRMSNorm and BitNetRMSNorm compute it."""

    def __init__(self, features: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps))


class Codes(NamedTuple):
    """Activations rounded once for all the linears that read them. values: int8 [rows, i], scale: [rows, 1]."""

    x: Tensor
    values: Tensor
    scale: Tensor


class Linear(nn.Linear):
    """A linear without bias by default, in full precision. ``prepare`` exists so that every kind of linear has it."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias=bias)

    def prepare(self, x: Tensor) -> Tensor | Codes:
        """What this linear wants to be given for x; shared by the linears that read the same x."""
        return x

    def forward(self, x: Tensor | Codes) -> Tensor:  # type: ignore[override]
        return linear(x.x if isinstance(x, Codes) else x, self.weight, self.bias)


def run_on_integers(weights: Format, activations: Format) -> bool:
    """Whether a product in these formats is one of int8 codes: one weight scale, one scale a token, no offset."""
    shared = weights.group == "tensor" and activations.group == "row"
    narrow = weights.fits_int8 and activations.fits_int8
    return shared and narrow and not (weights.has_offset or activations.has_offset)


class BitLinear(Linear):
    """A linear that trains with quantised weights and activations and keeps latent full-precision weights.

    Forward: y = (codes of x) . (codes of W) * scale of x * scale of W, an exact integer product (BitNet eq. 7 and
    b1.58 section 2 of the papers). Backward: straight through both roundings, so dL/dx = dL/dy . W~ and
    dL/dW = dL/dy^T . x~ with the rounded values.

    ``strength`` below 1 mixes the latent values in (warm-up of a conversion, FACTS 6.5) and runs in floating point.
    norm_eps: above 0 the input passes through a norm first (transformers' use_rms_norm); BitNet-b1.58-2B-4T has its
    norms outside.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        weights: Format,
        activations: Format,
        bias: bool = False,
        norm_eps: float = 0.0,
    ):
        super().__init__(in_features, out_features, bias)
        self.weights, self.activations = weights, activations
        self.rms_norm = RMSNorm(in_features, norm_eps) if norm_eps else None
        self.strength = 1.0

    @property
    def is_integer(self) -> bool:
        """Whether the product runs on int8 codes now."""
        return self.strength == 1.0 and run_on_integers(self.weights, self.activations)

    def prepare(self, x: Tensor) -> Tensor | Codes:
        """Codes of x; x itself where this linear has a norm of its own, so that nothing can be shared."""
        return self.encode(x) if self.is_integer and self.rms_norm is None else x

    def encode(self, x: Tensor) -> Codes:
        with torch.no_grad():
            rows = self.activations.split(x.detach().float())
            grid = self.activations.fit(rows)
            values = self.activations.encode(rows, grid).to(torch.int8)
        return Codes(x, values[:, 0], grid.scale[:, 0])

    def forward(self, x: Tensor | Codes) -> Tensor:  # type: ignore[override]
        if isinstance(x, Tensor):
            x = x if self.rms_norm is None else self.rms_norm(x)
            x = self.encode(x) if self.is_integer else x
        if isinstance(x, Codes):
            y = _IntegerLinear.apply(x.x, self.weight, x.values, x.scale, self.weights)
        else:
            w = fake_quantize(self.weight, self.weights, self.strength)
            y = F.linear(fake_quantize(x, self.activations, self.strength), w)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weights={self.weights.name}, activations={self.activations.name}"


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast is on with for this device, else None."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


class _IntegerLinear(torch.autograd.Function):
    """y = x~ W~^T by codes, with the straight-through gradient. Saves int8 codes: a quarter of the float memory."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, x_codes: Tensor, x_scale: Tensor, format: Format):  # type: ignore[override]
        w = weight.detach().float()
        w_rgk = format.split(w)
        grid = format.fit(w_rgk)
        w_codes = format.encode(w_rgk, grid).reshape(w.shape).to(torch.int8)
        w_scale = grid.scale.reshape(())
        y = integer_product(x_codes, w_codes).float().mul_(x_scale * w_scale)
        ctx.save_for_backward(x_codes, x_scale, w_codes, w_scale)
        ctx.dtypes = x.dtype, weight.dtype
        ctx.compute = autocast_dtype(x.device) or torch.float32
        return y.to(ctx.compute).reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        x_codes, x_scale, w_codes, w_scale = ctx.saved_tensors
        x_dtype, w_dtype = ctx.dtypes
        rows = gradient.reshape(-1, gradient.shape[-1])
        grad_x = grad_w = None
        # The scales go onto the gradient, so that the other factor stays a code: exact even in bfloat16.
        if ctx.needs_input_grad[0]:
            grad_x = (rows.to(ctx.compute) @ w_codes.to(ctx.compute)).to(x_dtype).mul_(w_scale)
            grad_x = grad_x.reshape(*gradient.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            scaled = (rows * x_scale).to(ctx.compute)
            grad_w = (scaled.t() @ x_codes.to(ctx.compute)).to(w_dtype)
        return grad_x, grad_w, None, None, None


class PackedLinear(nn.Module):
    """A linear that only runs: codes are kept as int8, the product is the same integer product as BitLinear's.

    codes: int8 [o, i]; scale: float32 scalar; activations: the format that x is rounded to; norm_eps as in BitLinear.
    """

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        activations: Format,
        bias: Tensor | None = None,
        norm_eps: float = 0.0,
    ):
        super().__init__()
        if activations.group != "row" or activations.has_offset or not activations.fits_int8:
            raise ValueError(
                f"packed weights run on int8 activations with one scale a token, not on {activations.name}"
            )
        self.codes, self.scale = nn.Buffer(codes), nn.Buffer(scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.activations = activations
        self.out_features, self.in_features = codes.shape
        self.rms_norm = RMSNorm(self.in_features, norm_eps) if norm_eps else None

    prepare, encode = BitLinear.prepare, BitLinear.encode
    is_integer = True

    def forward(self, x: Tensor | Codes) -> Tensor:
        if isinstance(x, Tensor):
            x = self.encode(x if self.rms_norm is None else self.rms_norm(x))  # type: ignore[misc]
        codes = x
        y = integer_product(codes.values, self.codes).float() * (codes.scale * self.scale)
        y = y.reshape(*codes.x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class Adapter(nn.Module):
    """An additive branch on a layer: W x + b, x the layer's input (QwT, arXiv 2411.13918). Begins as zero.

    weight: [out, in], float16 as it is stored, or float32 while it is fitted; bias: float32 [out]. The product is one
    of float32. In a decoder both sides are the hidden size, which is all that has to be given.
    """

    def __init__(self, outputs: int, inputs: int | None = None):
        super().__init__()
        shape = outputs, outputs if inputs is None else inputs
        self.weight = nn.Parameter(torch.zeros(shape, dtype=torch.float16), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(outputs), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x.float(), self.weight.float(), self.bias.float())


def linear_for(weights: str | None, activations: str | None, norm_eps: float = 0.0):
    """The class of linear for a pair of formats, as a function (in_features, out_features, bias=False) -> Linear."""
    if weights is None:
        return Linear
    if activations is None:
        raise ValueError(f"weights in {weights!r} need an activation format too, for instance activations = 'a8'")
    w, a = format_of(weights), format_of(activations)
    return lambda in_features, out_features, bias=False: BitLinear(in_features, out_features, w, a, bias, norm_eps)
