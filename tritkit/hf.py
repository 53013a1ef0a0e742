"""Our folders in transformers: the quantiser "tritkit", and models whose matrices stay in their own bits.

Linears compute as the torch engine's do: low-bit ones on integers, all others on floats that are made of the blocks for
each product. That is exact and saves memory, but it is not fast; ``tritkit generate`` is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .checkpoint import EMBEDDING, EXTRAS, GUARD, HEAD, OWN, ModelFolder, matrix_names, matrix_shape, open_folder
from .formats import Format, format_of
from .layers import BitLinear, PackedLinear, RMSNorm
from .layouts import GGML, LAYOUTS, Packed
from .models.config import FAMILIES, OWN_ARCHITECTURE
from .tensorfile import DTYPES

METHOD = "tritkit"
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


class Coded(nn.Module):
    """A matrix in one of LAYOUTS, its arrays under the names that they have in the folder."""

    def __init__(self, folder: ModelFolder, name: str):
        super().__init__()
        self.layout, self.shape = folder.layouts[name], matrix_shape(folder.config, name)
        self.keys = [key for key in ("weight", *EXTRAS) if f"{name}.{key}" in folder.tensors]
        for key in self.keys:
            stored = folder.tensors[f"{name}.{key}"]
            dtype = TORCH_DTYPES.get(stored.dtype)
            if dtype is None:
                dtype = torch.from_numpy(np.empty(0, DTYPES[stored.dtype])).dtype
            empty = torch.empty(stored.array.shape, dtype=dtype)
            if key == "weight":  # a parameter, since transformers ties heads to embeddings by their parameters
                self.weight = nn.Parameter(empty, requires_grad=False)
            else:
                self.register_buffer(key, empty)

    def packed(self) -> Packed:
        arrays = {}
        for key in self.keys:
            stored = getattr(self, key)
            arrays[key] = (stored.float() if stored.is_floating_point() else stored).cpu().numpy()
        return Packed(arrays)

    def extra_repr(self) -> str:
        return f"{self.shape[1]}, {self.shape[0]}, layout={self.layout}"


class CodedLinear(Coded):
    """A linear on codes. activations: what x is rounded to; None: floats."""

    def __init__(
        self, folder: ModelFolder, name: str, activations: Format | None = None, bias: nn.Parameter | None = None
    ):
        super().__init__(folder, name)
        self.out_features, self.in_features = self.shape
        self.activations, self.bias = activations, bias
        eps = folder.config.linear_norm_eps if activations is not None else 0.0
        self.rms_norm = RMSNorm(self.in_features, eps) if eps else None

    def forward(self, x: Tensor) -> Tensor:
        layout = LAYOUTS[self.layout]
        if self.activations is None:
            weight = torch.from_numpy(layout.dequantize(self.packed(), self.shape)).to(x.device, x.dtype)
            return F.linear(x, weight, self.bias)
        matrix = layout.unpack(self.packed(), self.shape)
        codes = torch.from_numpy(matrix.codes.astype(np.int8)).to(x.device)
        scale = torch.tensor(float(matrix.scale.max()), device=x.device)  # blocks without weights may have 0
        y = PackedLinear(codes, scale, self.activations)(x if self.rms_norm is None else self.rms_norm(x))
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class CodedEmbedding(Coded):
    """Rows of a matrix in blocks of ggml, as floats of the model's dtype."""

    def __init__(self, folder: ModelFolder, name: str, dtype: torch.dtype):
        super().__init__(folder, name)
        self.num_embeddings, self.embedding_dim = self.shape
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)  # follows .to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        seen, where = torch.unique(ids, return_inverse=True)
        rows = Packed({"weight": self.weight[seen].cpu().numpy()})
        values = torch.from_numpy(LAYOUTS[self.layout].dequantize(rows, (len(seen), self.shape[1])))
        return values.to(ids.device, self.get_buffer("like").dtype)[where]


class LatentLinear(BitLinear):
    """A linear of latent weights; what it returns has the dtype of what it is given, as transformers expects."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x).to(x.dtype)


class TritkitConfig(QuantizationConfigMixin):
    """quantization_config of our folders, kept as it is; ``checkpoint`` knows what it means."""

    def __init__(self, **entries: Any):
        self.__dict__.update(entries)
        self.quant_method = METHOD  # type: ignore[assignment]


class TritkitQuantizer(HfQuantizer):
    """Puts linears that run our formats where config.json and the files of the folder say so."""

    requires_calibration = True  # it reads what was quantised elsewhere

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **settings: Any) -> Any:
        if not checkpoint_files:
            raise ValueError("a model in tritkit's formats is loaded from its folder, not from a state dict")
        folder = open_folder(Path(checkpoint_files[0]).parent)
        c = folder.config
        low_bit = format_of(str(c.activations)) if c.weights is not None else None
        for name in matrix_names(c):
            old = model.get_submodule(name)
            if name == EMBEDDING and name in folder.layouts:
                new: nn.Module = CodedEmbedding(folder, name, old.weight.dtype)
                if c.tie_word_embeddings:  # the head is the same bytes
                    if folder.layouts[name] not in GGML:
                        raise ValueError(f"a tied embedding cannot be in the layout {folder.layouts[name]}")
                    model.set_submodule(HEAD, CodedLinear(folder, name))
            elif name in folder.layouts:
                new = CodedLinear(folder, name, low_bit if c.is_low_bit(name) and name != HEAD else None, old.bias)
            elif name != HEAD and name != EMBEDDING and c.is_low_bit(name):
                formats = format_of(str(c.weights)), format_of(str(c.activations))
                bias = old.bias is not None
                new = LatentLinear(old.in_features, old.out_features, *formats, bias, c.linear_norm_eps)
                new.to(old.weight.dtype)
            else:
                continue
            model.set_submodule(name, new)
        self.latent = not folder.is_packed
        return model

    def is_serializable(self, **settings: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Latent weights train as in ``tritkit train``; codes only run."""
        return getattr(self, "latent", False)


class _Unguarded:
    """What our configs have before those of transformers."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **settings: Any) -> Any:
        unguarded = {key: value for key, value in config_dict.items() if key not in GUARD}
        return super().from_dict(unguarded, **settings)  # type: ignore[misc]


CONFIGS: dict[str, type] = {}  # by model_type, once they are registered


def register() -> dict[str, type]:
    """Our configs, models and quantiser into transformers' tables, once; the configs by model_type."""
    if CONFIGS:
        return CONFIGS
    register_quantization_config(METHOD)(TritkitConfig)
    register_quantizer(METHOD)(TritkitQuantizer)
    for family, row in FAMILIES.items():
        kind, base = OWN + family, CONFIG_MAPPING[family]
        config = type(f"Tritkit{base.__name__}", (_Unguarded, base), {"model_type": kind})
        model = type(OWN_ARCHITECTURE, (getattr(transformers, row.architecture),), {"config_class": config})
        CONFIG_MAPPING.register(kind, config, exist_ok=True)  # instead of hf_hook's stand-in
        transformers.AutoModelForCausalLM.register(config, model)
        CONFIGS[kind] = config
    return CONFIGS
