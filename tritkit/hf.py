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

from .checkpoint import EXTRAS, OWN, ModelFolder, open_folder
from .folderwriter import GUARD
from .formats import Format, format_of
from .inputs import input_format
from .layers import Adapter, BitLinear, PackedLinear, RMSNorm
from .layouts import LAYOUTS, Packed
from .layouts.translate import one_scale
from .models.config import FAMILIES, OWN_ARCHITECTURE
from .models.shapes import EMBEDDING, HEAD, matrix_names, matrix_shape
from .stored import InputQuantizer
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

    def rows(self, some: np.ndarray | None = None) -> Tensor:
        """The values of these rows, or of all, float32."""
        layout, packed, count = LAYOUTS[self.layout], self.packed(), self.shape[0]
        if some is not None:
            part = layout.rows(packed, self.shape, some)
            packed, count = (packed, count) if part is None else (part, len(some))
            if part is None:
                return torch.from_numpy(layout.dequantize(packed, self.shape)[some])
        return torch.from_numpy(layout.dequantize(packed, (count, self.shape[1])))

    def extra_repr(self) -> str:
        return f"{self.shape[1]}, {self.shape[0]}, layout={self.layout}"


class CodedLinear(Coded):
    """A linear on codes. activations: of low-bit linears; others round x to what the folder says, or not at all."""

    def __init__(
        self, folder: ModelFolder, name: str, activations: Format | None = None, bias: nn.Parameter | None = None
    ):
        super().__init__(folder, name)
        self.out_features, self.in_features = self.shape
        self.activations, self.bias = activations, bias
        eps = folder.config.linear_norm_eps if activations is not None else 0.0
        self.rms_norm = RMSNorm(self.in_features, eps) if eps else None
        self.inputs, self.threshold = folder.inputs.get(name), folder.outlier_threshold
        if folder.input_grid(name) is not None:
            self.register_buffer("input_scale", torch.empty(1))
        if f"{name}.input_zero" in folder.tensors:
            self.register_buffer("input_zero", torch.empty(1))

    def rounded(self, x: Tensor) -> Tensor:
        """Inputs as the folder wants them."""
        if self.inputs is None:
            return x
        inputs = input_format(self.inputs)
        scale, zero = (getattr(self, key, None) for key in ("input_scale", "input_zero"))
        threshold = self.threshold if inputs.has_outliers else None
        return InputQuantizer(inputs.name, scale, zero, threshold)(x).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        layout = LAYOUTS[self.layout]
        if self.activations is None:
            return F.linear(self.rounded(x), self.rows().to(x.device, x.dtype), self.bias)
        matrix = one_scale(layout.unpack(self.packed(), self.shape), self.layout)
        codes = torch.from_numpy(matrix.codes.astype(np.int8)).to(x.device)
        scale = torch.tensor(float(matrix.scale[0, 0]), device=x.device)
        y = PackedLinear(codes, scale, self.activations)(x if self.rms_norm is None else self.rms_norm(x))
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class CodedEmbedding(Coded):
    """Rows of a matrix of codes, as floats of the model's dtype."""

    def __init__(self, folder: ModelFolder, name: str, dtype: torch.dtype):
        super().__init__(folder, name)
        self.num_embeddings, self.embedding_dim = self.shape
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)  # follows .to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        seen, where = torch.unique(ids, return_inverse=True)
        return self.rows(seen.cpu().numpy()).to(ids.device, self.get_buffer("like").dtype)[where]


def _add_adapter(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """What a layer returns, with its adapter's part."""
    return output + layer.adapter(inputs[0]).to(output.dtype)  # type: ignore[operator]


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
                new: Any = CodedEmbedding(folder, name, old.weight.dtype)
                if c.tie_word_embeddings:  # the head is the same bytes
                    if len(new.keys) > 1:  # transformers ties parameters by their name, and these have several
                        raise ValueError(
                            f"transformers cannot tie a head to an embedding in the layout {folder.layouts[name]}; "
                            "tritkit generate runs this folder"
                        )
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
        for i in folder.adapters:
            layer = model.get_submodule(f"model.layers.{i}")
            layer.adapter = Adapter(c.hidden_size)
            layer.register_forward_hook(_add_adapter)
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
