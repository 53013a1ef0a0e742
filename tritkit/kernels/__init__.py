"""Who multiplies, in torch: the integer product behind every linear whose weights and activations are codes.

One function over a table of back ends, all of them exact. ``reference`` is the float product of the codes in a type
wide enough that no partial sum is rounded; ``int8`` is torch's own int8 product, where the device has one.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

FLOAT32_EXACT = 2**24  # integers up to here are exact in float32, sums of them too


def _reference(x_codes: Tensor, w_codes: Tensor) -> Tensor:
    low, high = torch.aminmax(w_codes)
    bound = x_codes.shape[1] * 128 * max(-int(low), int(high))
    kind = torch.float32 if bound < FLOAT32_EXACT else torch.float64
    return (x_codes.to(kind) @ w_codes.to(kind).t()).to(torch.int32)


def _int8(x_codes: Tensor, w_codes: Tensor) -> Tensor:
    if x_codes.is_cuda and (x_codes.shape[0] <= 16 or x_codes.shape[1] % 8 or w_codes.shape[0] % 8):
        return _reference(x_codes, w_codes)  # shapes that cuBLAS refuses
    return torch._int_mm(x_codes, w_codes.t())


BACKENDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"reference": _reference, "int8": _int8}


def integer_product(x_codes: Tensor, w_codes: Tensor, backend: str | None = None) -> Tensor:
    """x_codes int8 [m, in] times w_codes int8 [out, in] transposed: the exact int32 [m, out].

    Exact as long as |sum| fits int32: any ``in`` up to 131071. backend: a row of BACKENDS, none: the faster one.
    """
    device = x_codes.device.type
    return BACKENDS[backend or _FASTEST.get(device) or fastest_backend(device)](x_codes, w_codes)


_FASTEST: dict[str, str] = {}  # by device, once it was measured


def fastest_backend(device: str) -> str:
    """Measured once a process on a small product: torch's int8 product is 4 to 9 times the float32 rate where the
    CPU has VNNI, and a plain loop where it has not. Which one is taken changes no result."""
    if device in _FASTEST:
        return _FASTEST[device]
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randint(-1, 2, (256, 256), generator=generator).to(device, torch.int8) for _ in range(2))
    seconds = {}
    for name, product in BACKENDS.items():
        try:
            product(x, w)
            begin = time.perf_counter()
            int(product(x, w)[0, 0])  # waits for the device
            seconds[name] = time.perf_counter() - begin
        except RuntimeError:  # this device has no such product
            continue
    _FASTEST[device] = min(seconds, key=lambda name: seconds[name])
    return _FASTEST[device]
