"""Matrices that run in the bits they are stored in, and activations that are rounded on the way into them.

What a file holds of a matrix stays as it is; floats are made strip by strip when a product needs them, and forgotten.

Shapes: i in features, o out features; rows = tokens of the whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from .formats import Format, Grid, format_of
from .kernels import integer_product
from .kernels.floats import linear
from .layers import Codes
from .layouts import LAYOUTS, Packed

STRIP = 1 << 22  # weights that are floats at once


class InputQuantizer(nn.Module):
    """Rounds activations to a format, [..., i] in and out, in their own dtype; the arithmetic is float32.

    Dynamic, where there is no ``scale``: every token (``int8_row``, ``a8``), every group of a token (``int8_g32``,
    ``a8_g32``) or the whole batch (``int8_tensor``) gets the grid that its own values ask for. Static: one grid from
    calibration for all that ever comes, x ~ scale * (code - zero), for formats of one scale a tensor.

    outliers: threshold of LLM.int8()'s mixed decomposition (Dettmers et al. 2022, arXiv 2208.07339, section 3.2):
    columns that hold an absolute value of at least so much, in any token of the batch, stay floats and do not count
    for the scales of the rest.
    """

    def __init__(
        self,
        format: Format | str,
        scale: float | Tensor | None = None,
        zero: float | Tensor | None = None,
        outliers: float | None = None,
    ):
        super().__init__()
        self.format = format_of(format) if isinstance(format, str) else format
        name = self.format.name
        if scale is None and zero is not None:
            raise ValueError(f"inputs in {name} have a zero point, but no scale to go with it")
        if scale is not None and self.format.group != "tensor":
            raise ValueError(f"inputs in {name} have a scale for each {self.format.group}, so none can be stored")
        if zero is not None and not self.format.has_offset:
            raise ValueError(f"inputs in {name} are symmetric, but they were given a zero point")
        if outliers is not None and not outliers > 0:
            raise ValueError(f"the threshold of outliers must be above 0, not {outliers}")
        self.outliers = outliers
        self.scale = nn.Buffer(_one(scale, "scale")) if scale is not None else None
        self.zero = nn.Buffer(_one(0.0 if zero is None else zero, "zero")) if scale is not None else None
        if self.scale is not None and not self.scale > 0:
            raise ValueError(f"the scale of inputs must be above 0, not {float(self.scale)}")

    @property
    def is_static(self) -> bool:
        return self.scale is not None

    def grid(self, x_rgk: Tensor) -> Grid:
        """The grid of a split, stored or fitted."""
        if self.scale is None or self.zero is None:
            return self.format.fit(x_rgk)
        scale = self.scale.reshape(1, 1, 1)
        return Grid.from_scale(scale, -scale * self.zero if self.format.has_offset else None)

    def encode(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Codes, integers in float32, as ``Format.split`` has them, [rows, groups, k], and their grid."""
        x_rgk = self.format.split(x.detach().float())
        grid = self.grid(x_rgk)
        return self.format.encode(x_rgk, grid), grid

    def forward(self, x: Tensor) -> Tensor:
        """The rounded values; where a gradient is wanted it goes straight through."""
        rounded = self._rounded(x).to(x.dtype)
        if torch.is_grad_enabled() and x.requires_grad:
            return x + (rounded - x).detach()
        return rounded

    def _rounded(self, x: Tensor) -> Tensor:
        if self.outliers is None:
            codes, grid = self.encode(x)
            return self.format.decode(codes, grid).reshape(x.shape)
        columns = self.outlier_columns(x)
        codes, grid = self.encode(x.masked_fill(columns, 0))
        return torch.where(columns, x.float(), self.format.decode(codes, grid).reshape(x.shape))

    def outlier_columns(self, x: Tensor) -> Tensor:
        """Which columns stay floats: bool [i]."""
        threshold = float("inf") if self.outliers is None else self.outliers
        return (x.detach().abs() >= threshold).flatten(0, -2).any(0)

    def extra_repr(self) -> str:
        kind = "static" if self.is_static else "dynamic"
        return f"{self.format.name}, {kind}" + (f", outliers={self.outliers}" if self.outliers else "")


class StoredMatrix(nn.Module):
    """A matrix [o, i] in a layout of LAYOUTS; its arrays are buffers under their own names, so a state dict of them is
    what the file holds.

    arrays: numpy, as ``Layout.pack`` returns them; they are copied, in their own dtypes. dtype: that of the weights
    whose place this takes in somebody's module, which may ask for it (transformers' T5 casts to ``wo.weight.dtype``):
    ``weight`` then is an empty tensor of that dtype, and the buffer of codes is ``codes``.
    """

    def __init__(
        self, layout: str, arrays: Mapping[str, np.ndarray], shape: tuple[int, int], dtype: torch.dtype | None = None
    ):
        super().__init__()
        self.layout = LAYOUTS[layout]
        self.out_features, self.in_features = shape
        self.places = {name: "codes" if dtype is not None and name == "weight" else name for name in arrays}
        for name, array in arrays.items():
            self.register_buffer(self.places[name], torch.from_numpy(np.array(array)))
        if dtype is not None:
            self.register_buffer("weight", torch.empty(0, dtype=dtype), persistent=False)
        self.strip = max(STRIP // self.in_features, 1)
        if self.layout.rows(self.packed(), shape, slice(0, 1)) is None:
            self.strip = self.out_features  # rows that are woven into each other

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def packed(self, some: slice | np.ndarray | None = None) -> Packed:
        """The arrays, or what they hold of some rows, as views where the buffers are on the CPU."""
        whole = Packed({name: getattr(self, place).numpy(force=True) for name, place in self.places.items()})
        return whole if some is None else self.layout.rows(whole, self.shape, some) or whole

    def floats(self, some: slice | np.ndarray) -> Tensor:
        """The values of some rows, float32 [rows, i], on the device of the buffers."""
        count = len(range(self.out_features)[some]) if isinstance(some, slice) else len(some)
        if self.strip == self.out_features:
            values = self.layout.dequantize(self.packed(), self.shape)[some]
        else:
            values = self.layout.dequantize(self.packed(some), (count, self.in_features))
        return torch.from_numpy(values).to(getattr(self, next(iter(self.places.values()))).device)

    def strips(self) -> list[slice]:
        """Runs of rows that are floats together."""
        return [slice(at, min(at + self.strip, self.out_features)) for at in range(0, self.out_features, self.strip)]

    def product(self, x: Tensor) -> Tensor:
        """x W^T, float32 [..., o] whatever x is."""
        x = x.float()
        y = x.new_empty(*x.shape[:-1], self.out_features)
        for some in self.strips():
            y[..., some] = linear(x, self.floats(some))
        return y

    def extra_repr(self) -> str:
        return f"{self.out_features} x {self.in_features}, {self.layout.name}"


class StoredEmbedding(StoredMatrix):
    """Rows by number, tokens int64 [b, t] to float32 [b, t, i]; only those rows become floats."""

    def forward(self, tokens: Tensor) -> Tensor:
        wanted, places = tokens.unique(return_inverse=True)
        return self.floats(wanted.numpy(force=True))[places]


class StoredLinear(StoredMatrix):
    """y = W x~ + b: ``inputs`` rounds x first (None: it stays float), W is what the bits say. Computes in float32,
    returns x's dtype.

    bias: float [o]. With ``inputs.outliers`` the product is LLM.int8()'s: columns of outliers in floats, all others
    as an exact product of int8 codes; the weights then need one scale a row.
    """

    def __init__(
        self,
        layout: str,
        arrays: Mapping[str, np.ndarray],
        shape: tuple[int, int],
        bias: Tensor | None = None,
        inputs: InputQuantizer | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(layout, arrays, shape, dtype)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.inputs = inputs
        if inputs is not None and inputs.outliers is not None:
            self._require_rows(inputs.format)

    def prepare(self, x: Tensor) -> Tensor:
        """x itself: nothing is shared between linears, whose inputs may have formats and scales of their own."""
        return x

    def forward(self, x: Tensor | Codes) -> Tensor:
        values = x.x if isinstance(x, Codes) else x
        if not values.is_floating_point():
            raise ValueError(
                f"a stored linear ({self.extra_repr()}) reads floats, not {str(values.dtype).removeprefix('torch.')}"
            )
        if self.inputs is None:
            y = self.product(values)
        elif self.inputs.outliers is None or (values.requires_grad and torch.is_grad_enabled()):
            y = self.product(self.inputs(values.float()))  # the same but for sums of floats, and has a gradient
        else:
            y = self._decomposed(values.float(), self.inputs)
        return (y if self.bias is None else y + self.bias).to(values.dtype)

    def _decomposed(self, x: Tensor, inputs: InputQuantizer) -> Tensor:
        """Float columns of outliers plus the integer product of the rest (arXiv 2208.07339 eq. 8)."""
        columns = inputs.outlier_columns(x)
        codes, grid = inputs.encode(x.masked_fill(columns, 0))
        codes = codes.flatten(1).to(torch.int8)
        outliers = x.reshape(len(codes), -1)[:, columns]
        y = x.new_empty(len(codes), self.out_features)
        for some in self.strips():
            rows = range(self.out_features)[some]
            matrix = self.layout.unpack(self.packed(some), (len(rows), self.in_features))
            w = torch.from_numpy(matrix.codes.astype(np.int8)).to(x.device)
            scale = torch.from_numpy(matrix.scale).to(x.device)[:, 0]
            part = integer_product(codes, w).float() * (grid.scale[:, 0] * scale)
            y[:, some] = part + outliers @ (w[:, columns].float() * scale[:, None]).t()
        return y.reshape(*x.shape[:-1], -1)

    def _require_rows(self, format: Format) -> None:
        """ValueError where the product with outliers is none of int8 codes with one scale a token and one a row."""
        if format.group != "row" or format.has_offset or not format.fits_int8:
            raise ValueError(f"outliers stay apart from int8 codes with one scale a token, not from {format.name}")
        sample = self.layout.unpack(self.packed(slice(0, 1)), (1, self.in_features)) if self.strips() else None
        if sample is None or sample.scale.shape[1] != 1 or sample.offset is not None:
            raise ValueError(f"outliers need weights with one scale a row, unlike these in {self.layout.name}")


def _one(value: float | Tensor, what: str) -> Tensor:
    """One finite float32 number, shape []; ValueError for anything else."""
    found = torch.as_tensor(value, dtype=torch.float32)
    if found.numel() != 1 or not found.isfinite().all():
        raise ValueError(f"the {what} of inputs must be one finite number, not {found.tolist()}")
    return found.detach().reshape(())
