"""A model folder: a Hugging Face folder with our files beside it. Torch-free at import: arrays in, arrays out.

Two forms of the same model. *Latent*: full-precision weights that training goes on from. *Packed*: codes and one scale
per linear, as transformers' autobitlinear reads them (FACTS 5.3), or our own where transformers has no form for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .inputs import THRESHOLD, read_adapters, read_inputs, read_threshold, require_inputs
from .jsonfile import read_object, shown
from .layouts import GGML, LAYOUTS, Packed, Unpacked
from .models.config import ModelConfig, config_from_hf
from .models.shapes import linear_names, linear_shape, matrix_names, matrix_shape, norm_sizes
from .tensorfile import StoredTensor, TensorFile
from .tokenizer import Tokenizer

OWN = "tritkit_"  # begins the model_type of what transformers cannot represent, so that it must refuse the folder
CODEBOOKS = ("nf4", "nf4_dq", "fp4")
# Layouts that have a weight_scale, and what layouts may store beside "weight".
SCALED = ("hf_bitlinear", "hf_autobitlinear", "binary_rows", "dense", "i2_s_x86", "i2_s_arm", *CODEBOOKS)
EXTRAS = ("weight_scale", "weight_code", "weight_zero", "weight_scale_absmax", "weight_scale_mean")
FOREIGN = ("gptq", "compressed-tensors")  # quantisers whose folders foreign.py reads as dense


@dataclass(frozen=True)
class ModelFolder:
    """An opened model: a folder, or a file that is read as one. Tensors have Hugging Face's names.

    layouts: of the matrices that are stored as codes; what is not in it is stored as floats. container: what it was
    opened from, "folder", "gguf", "llama2.c" or one of FOREIGN. inputs: formats that the inputs of linears are rounded
    to (inputs.py). adapters: the layers that have one. outlier_threshold: of inputs with "+outliers".
    """

    path: Path
    config: ModelConfig
    hf: dict[str, Any]
    layouts: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]
    container: str = "folder"
    read_tokenizer: Callable[[], Tokenizer] | None = field(default=None, repr=False)
    inputs: Mapping[str, str] = field(default_factory=dict)
    adapters: tuple[int, ...] = ()
    outlier_threshold: float = THRESHOLD

    @property
    def is_packed(self) -> bool:
        """Whether linears of the layers are stored as codes."""
        return self.layout is not None

    @property
    def layout(self) -> str | None:
        """The layouts of the linears, joined by "+" where there are several; None where all are floats."""
        found = {self.layouts[name] for name in linear_names(self.config) if name in self.layouts}
        return "+".join(sorted(found)) or None

    def tokenizer(self) -> Tokenizer:
        """Its tokenizer; ValueError where it has more tokens than the model has rows."""
        tokenizer = Tokenizer.load(self.path) if self.read_tokenizer is None else self.read_tokenizer()
        if len(tokenizer) > self.config.vocab_size:
            raise ValueError(
                f"the tokenizer of {self.path} has {len(tokenizer)} tokens, but the model knows "
                f"{self.config.vocab_size}: they do not belong together"
            )
        return tokenizer

    def packed(self, name: str) -> Packed:
        """The stored arrays of a matrix of codes."""
        arrays = {"weight": self.tensors[f"{name}.weight"].array}
        for extra in EXTRAS:
            if f"{name}.{extra}" in self.tensors:
                stored = self.tensors[f"{name}.{extra}"]
                arrays[extra] = stored.float32() if stored.dtype in ("BF16", "F64") else stored.array
        return Packed(arrays)

    def input_grid(self, name: str) -> tuple[float, float | None] | None:
        """The stored scale, and the zero point if there is one, of the inputs of a linear; None where there is none."""
        if f"{name}.input_scale" not in self.tensors:
            return None
        scale = self.tensors[f"{name}.input_scale"].float32().item()
        has_zero = f"{name}.input_zero" in self.tensors
        return scale, self.tensors[f"{name}.input_zero"].float32().item() if has_zero else None

    def codes(self, name: str) -> Unpacked:
        """Codes and scales of a matrix of codes; ValueError where the bytes are not what the layout says."""
        try:
            return LAYOUTS[self.layouts[name]].unpack(self.packed(name), matrix_shape(self.config, name))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def floats(self, name: str) -> np.ndarray:
        """The values of a matrix, whatever its layout: a new array, float32 [rows, columns]."""
        if name not in self.layouts:
            return self.tensors[f"{name}.weight"].float32()
        try:
            return LAYOUTS[self.layouts[name]].dequantize(self.packed(name), matrix_shape(self.config, name))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def file_bytes(self) -> int:
        """Size of the weights on disk."""
        if self.path.is_file():
            return self.path.stat().st_size
        return sum(f.stat().st_size for f in self.path.glob("*.safetensors") if f.name != "optimizer.safetensors")

    def parameters(self) -> int:
        """Weights of the model, tied ones counted once; codes count as weights, scales do not."""
        matrices = set(matrix_names(self.config))
        count = sum(int(np.prod(matrix_shape(self.config, name))) for name in matrices)
        return count + sum(t.array.size for key, t in self.tensors.items() if _module(key) not in matrices)

    def bits_per_weight(self) -> float:
        """Measured: bytes that the linears of the layers take in the file, scales and adapters included, over the
        weights of the linears."""
        names = set(linear_names(self.config))
        stored = sum(
            t.array.nbytes for key, t in self.tensors.items() if _module(key) in names and not key.endswith(".bias")
        )
        added = {f"model.layers.{i}.adapter" for i in self.adapters}
        stored += sum(t.array.nbytes for key, t in self.tensors.items() if _module(key) in added)
        return 8 * stored / sum(int(np.prod(linear_shape(self.config, name))) for name in names)


def _module(key: str) -> str:
    """The matrix that a tensor belongs to: what stands before .weight, .weight_scale, .bias ..."""
    return key.rpartition(".")[0]


def read_config(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    """config.json of a folder, as it is and as tritkit understands it."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no model folder: it has no config.json")
    hf = read_object(folder / "config.json")
    weights, activations = _formats_of(hf)
    config = config_from_hf({**hf, "model_type": str(hf.get("model_type")).removeprefix(OWN)}, weights, activations)
    return hf, config


def open_folder(folder: Path | str) -> ModelFolder:
    """Open a model folder; ValueError says what is missing where it is none."""
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"there is no model folder {folder}")
    hf, config = read_config(path)
    q = _quantization(hf) or {}
    tensors = _tensor_files(path)
    if q.get("quant_method") in FOREIGN:
        from .foreign import read_foreign

        layouts, tensors = read_foreign(path, q, config, tensors)
        opened = ModelFolder(path, config, hf, layouts, tensors, container=str(q["quant_method"]))
        require_complete(opened)
        return opened
    opened = ModelFolder(
        path,
        config,
        hf,
        _layouts_of(hf, config),
        tensors,
        inputs=read_inputs(q, linear_names(config)),
        adapters=read_adapters(q, config.num_hidden_layers),
        outlier_threshold=read_threshold(q),
    )
    require_complete(opened)
    return opened


def require_complete(folder: ModelFolder) -> None:
    """ValueError with the first tensor that is missing, has not the shape that the config asks for, or is another
    architecture's: a norm or bias inside the layers that this model would not use."""
    config, tensors = folder.config, folder.tensors
    for name in matrix_names(config):
        if f"{name}.weight" not in tensors:
            raise ValueError(f"{folder.path} has no tensor {name}.weight: the weights do not fit config.json")
        if name not in folder.layouts:
            found, wanted = tensors[f"{name}.weight"].array.shape, matrix_shape(config, name)
            if found != wanted:
                raise ValueError(f"{name}.weight has the shape {found}, but config.json asks for {wanted}")
        elif folder.layouts[name] in GGML:
            stored, (rows, columns) = tensors[f"{name}.weight"], matrix_shape(config, name)
            layout = GGML[folder.layouts[name]]
            if stored.array.shape != (rows, layout.row_bytes(columns)) or stored.array.dtype != np.uint8:
                raise ValueError(
                    f"{name}.weight is {stored.dtype} {stored.array.shape}, but {rows} x {columns} weights in "
                    f"{layout.name} are bytes {(rows, layout.row_bytes(columns))}"
                )
        elif folder.layouts[name] in SCALED and f"{name}.weight_scale" not in tensors:
            raise ValueError(
                f"{folder.path} has no tensor {name}.weight_scale, which the layout {folder.layouts[name]} needs"
            )
    linears = linear_names(config)
    known = {f"{name}.rms_norm.weight" for name in linears if config.linear_norm_eps and config.is_low_bit(name)}
    known |= {f"{name}.bias" for name in linears if config.has_bias(name)} | {f"{n}.weight" for n in norm_sizes(config)}
    missing = next((name for name in sorted(known) if name not in tensors), None)
    if missing:
        raise ValueError(f"{folder.path} has no tensor {missing}: the weights do not fit config.json")
    known |= require_inputs(folder, {name: linear_shape(config, name)[1] for name in linears})
    owners = set(linears)
    for name in tensors:
        owner, _, kind = name.rpartition(".")
        is_linear = owner in owners and kind.startswith("weight")
        if name.startswith("model.layers.") and not (is_linear or name in known or kind == "inv_freq"):
            raise ValueError(
                f"{folder.path} has a tensor {name}, which config.json says nothing of: it is another model"
            )


def _quantization(hf: dict[str, Any]) -> dict[str, Any] | None:
    q = hf.get("quantization_config")
    if q is not None and not isinstance(q, dict):
        raise ValueError(f"quantization_config of config.json is {shown(q)}, expected an object")
    return q


def _formats_of(hf: dict[str, Any]) -> tuple[str | None, str | None]:
    """Weight format and activation format that quantization_config means."""
    q = _quantization(hf)
    if q is None:
        return None, None
    method = q.get("quant_method")
    if method == "tritkit":
        formats = q.get("weights"), q.get("activations")
        if not all(name is None or isinstance(name, str) for name in formats):
            raise ValueError(f"config.json has the formats {shown(formats)}, expected names")
        return formats
    if method in FOREIGN:
        return None, None
    if method != "bitnet":
        known = ", ".join(map(repr, ("bitnet", "tritkit", *FOREIGN)))
        raise ValueError(f"config.json has quant_method {shown(method)}; tritkit reads {known}")
    return "ternary", "a8"


def _layouts_of(hf: dict[str, Any], config: ModelConfig) -> dict[str, str]:
    """The layout of each matrix that is stored as codes, by quantization_config."""
    q = _quantization(hf)
    if q is None:
        return {}
    low_bit = [name for name in linear_names(config) if config.weights is None or config.is_low_bit(name)]
    if q.get("quant_method") == "tritkit":
        found = dict.fromkeys(low_bit, q["layout"]) if q.get("layout") is not None else {}
        others = q.get("layouts") or {}
        if not isinstance(others, dict):
            raise ValueError(f"config.json has layouts {shown(others)}, expected a table of names")
        known = set(matrix_names(config))
        for name, layout in others.items():
            if name not in known:
                raise ValueError(f"config.json has a layout for {shown(name)}, which is no matrix of this model")
            found.pop(name, None)
            if layout is not None:
                found[name] = layout
        for layout in found.values():
            if not isinstance(layout, str) or layout not in LAYOUTS:
                raise ValueError(f"config.json has layout {shown(layout)}; known are {', '.join(LAYOUTS)}")
        return found
    linear_class = q.get("linear_class", "bitlinear")
    mode = q.get("quantization_mode", "offline")
    if mode not in ("online", "offline"):
        raise ValueError(f"config.json has quantization_mode {shown(mode)}; known are 'online' and 'offline'")
    if linear_class == "autobitlinear" and mode == "online":
        return {}
    if linear_class not in ("bitlinear", "autobitlinear"):
        raise ValueError(f"config.json has linear_class {shown(linear_class)}, known are 'bitlinear', 'autobitlinear'")
    return dict.fromkeys(low_bit, f"hf_{linear_class}")


class _Shards(dict[str, StoredTensor]):
    """The tensors of several files by name."""

    def __missing__(self, name: str) -> StoredTensor:
        raise ValueError(f"no file of this model has a tensor {shown(name)}")


def _tensor_files(path: Path) -> Mapping[str, StoredTensor]:
    single = path / "model.safetensors"
    if single.is_file():
        return TensorFile(single)
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        pickles = [*path.glob("pytorch_model*.bin"), *path.glob("*.pth")]
        if pickles:
            raise ValueError(
                f"{path} has {pickles[0].name}, a pickle, which could run any code when it is read, and no "
                "model.safetensors; tritkit reads only that"
            )
        raise ValueError(f"{path} is no model folder: it has no model.safetensors")
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise ValueError(f"{index} has no weight_map of files by tensor")
    files = {}
    for file in sorted(set(names.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index} names {shown(file)}, which is no safetensors file beside it")
        files[file] = TensorFile(path / file)
    return _Shards({name: files[file][name] for name, file in names.items()})
