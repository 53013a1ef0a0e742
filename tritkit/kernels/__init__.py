"""Who multiplies, in torch: the integer product behind every linear whose weights and activations are codes.

One function over a table of back ends. ``reference`` is the float32 product of the codes, which is exact as long as
every partial sum stays below 2^24, and is the oracle of the others; ``cpu`` is torch's int8 product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FLOAT32_EXACT = 2**24  # integers up to here are exact in float32, sums of them too


def _reference(x_codes: Tensor, w_codes: Tensor) -> Tensor:
    """int32 [m, out] through float: float64 where sums could pass 2^24."""
    bound = x_codes.shape[1] * 128 * 128
    kind = torch.float32 if bound < FLOAT32_EXACT else torch.float64
    return (x_codes.to(kind) @ w_codes.to(kind).t()).to(torch.int32)


def _int8(x_codes: Tensor, w_codes: Tensor) -> Tensor:
    return torch._int_mm(x_codes, w_codes.t())


BACKENDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"reference": _reference, "cpu": _int8}


def backend_for(device: torch.device) -> str:
    """The fastest back end of a device that runs every shape. torch's int8 product on CUDA wants multiples of 8."""
    return "cpu" if device.type == "cpu" else "reference"


def integer_product(x_codes: Tensor, w_codes: Tensor, backend: str | None = None) -> Tensor:
    """x_codes int8 [m, in] times w_codes int8 [out, in] transposed: the exact int32 [m, out].

    Exact means: |sum| <= in * 128 * 128 must fit int32, so in may reach 131071.
    """
    return BACKENDS[backend or backend_for(x_codes.device)](x_codes, w_codes)
