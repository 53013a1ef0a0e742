"""A model folder: a Hugging Face folder with our files beside it. Torch-free at import: arrays in, arrays out.

Two forms of the same model. *Latent*: full-precision weights that training goes on from. *Packed*: codes and one scale
per linear, as transformers' autobitlinear reads them (FACTS 5.3), or our own where transformers has no form for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .files import atomic_open
from .layouts import LAYOUTS, Packed, Unpacked
from .models.config import ModelConfig, config_from_hf
from .tensorfile import StoredTensor, TensorFile, write_tensors
from .tokenizer import Tokenizer

OWN = "tritkit_"  # begins the model_type of what transformers cannot represent, so that it must refuse the folder
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
)

# What transformers itself runs as BitNet; everything else gets a model_type of our own.
HF_FORMATS = ("ternary", "a8")


def linear_names(config: ModelConfig) -> list[str]:
    """The linears of the layers, in order of computation."""
    inside = [*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down"))]
    return [f"model.layers.{i}.{name}" for i in range(config.num_hidden_layers) for name in inside]


def linear_shape(config: ModelConfig, name: str) -> tuple[int, int]:
    """[out, in] of a linear by its name."""
    heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = {
        "q_proj": (heads, config.hidden_size),
        "k_proj": (kv, config.hidden_size),
        "v_proj": (kv, config.hidden_size),
        "o_proj": (config.hidden_size, heads),
        "gate_proj": (config.intermediate_size, config.hidden_size),
        "up_proj": (config.intermediate_size, config.hidden_size),
        "down_proj": (config.hidden_size, config.intermediate_size),
    }
    return shapes[name.rsplit(".", 1)[1]]


@dataclass(frozen=True)
class ModelFolder:
    """An opened folder. ``layout`` is None where the linears are floats (full precision or latent)."""

    path: Path
    config: ModelConfig
    hf: dict[str, Any]
    layout: str | None
    tensors: Mapping[str, StoredTensor]

    @property
    def is_packed(self) -> bool:
        return self.layout is not None

    def tokenizer(self) -> Tokenizer:
        """Its tokenizer; ValueError where it has more tokens than the model has rows."""
        tokenizer = Tokenizer.load(self.path)
        if len(tokenizer) > self.config.vocab_size:
            raise ValueError(
                f"the tokenizer of {self.path} has {len(tokenizer)} tokens, but the model knows "
                f"{self.config.vocab_size}: they do not belong together"
            )
        return tokenizer

    def packed(self, name: str) -> Packed:
        """The stored arrays of a linear of a packed folder."""
        scale = self.tensors[f"{name}.weight_scale"].float32()
        return Packed({"weight": self.tensors[f"{name}.weight"].array, "weight_scale": scale})

    def codes(self, name: str) -> Unpacked:
        """Codes and scale of a linear of a packed folder; ValueError where the bytes are not what the layout says."""
        assert self.layout is not None
        return LAYOUTS[self.layout].unpack(self.packed(name), linear_shape(self.config, name))

    def file_bytes(self) -> int:
        """Size of the weights on disk."""
        return sum(f.stat().st_size for f in self.path.glob("*.safetensors") if f.name != "optimizer.safetensors")

    def parameters(self) -> int:
        """Weights of the model, tied ones counted once; codes count as weights, scales do not."""
        linears = set(linear_names(self.config))
        count = sum(int(np.prod(linear_shape(self.config, name))) for name in linears)
        return count + sum(
            t.array.size for key, t in self.tensors.items() if key.rsplit(".weight", 1)[0] not in linears
        )

    def bits_per_weight(self) -> float:
        """Measured: bytes that the linears of the layers take in the file, scales included, over their weights."""
        names = set(linear_names(self.config))
        stored = sum(t.array.nbytes for key, t in self.tensors.items() if key.rsplit(".weight", 1)[0] in names)
        return 8 * stored / sum(int(np.prod(linear_shape(self.config, name))) for name in names)


def read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds no JSON object")
    return tree


def open_folder(folder: Path | str) -> ModelFolder:
    """Open a model folder; ValueError says what is missing where it is none."""
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"there is no model folder {folder}")
    if not (path / "config.json").is_file():
        raise ValueError(f"{folder} is no model folder: it has no config.json")
    hf = read_json(path / "config.json")
    weights, activations, layout = _formats_of(hf)
    config = config_from_hf({**hf, "model_type": str(hf.get("model_type")).removeprefix(OWN)}, weights, activations)
    tensors = _tensor_files(path)
    for name in linear_names(config):
        if f"{name}.weight" not in tensors:
            raise ValueError(f"{folder} has no tensor {name}.weight: the weights do not fit config.json")
        found, wanted = tensors[f"{name}.weight"], linear_shape(config, name)
        if layout is None and found.array.shape != wanted:
            raise ValueError(f"{name}.weight has the shape {found.array.shape}, but config.json asks for {wanted}")
        if layout is not None and f"{name}.weight_scale" not in tensors:
            raise ValueError(f"{folder} has no tensor {name}.weight_scale, which the layout {layout} needs")
    return ModelFolder(path, config, hf, layout, tensors)


def _formats_of(hf: dict[str, Any]) -> tuple[str | None, str | None, str | None]:
    """Weight format, activation format and layout that quantization_config means."""
    q = hf.get("quantization_config")
    if q is None:
        return None, None, None
    if not isinstance(q, dict):
        raise ValueError(f"quantization_config of config.json is {q!r}, expected an object")
    method = q.get("quant_method")
    if method == "tritkit":
        if q.get("layout") is not None and q["layout"] not in LAYOUTS:
            raise ValueError(f"config.json has layout {q['layout']!r}; known are {', '.join(LAYOUTS)}")
        return q.get("weights"), q.get("activations"), q.get("layout")
    if method != "bitnet":
        raise ValueError(f"config.json has quant_method {method!r}; tritkit reads 'bitnet' and 'tritkit'")
    if q.get("use_rms_norm"):
        raise ValueError("config.json has use_rms_norm = true (a norm in every linear), which tritkit does not run yet")
    linear_class = q.get("linear_class", "bitlinear")
    if linear_class == "autobitlinear" and q.get("quantization_mode", "offline") == "online":
        return "ternary", "a8", None
    if linear_class not in ("bitlinear", "autobitlinear"):
        raise ValueError(f"config.json has linear_class {linear_class!r}; known are 'bitlinear' and 'autobitlinear'")
    return "ternary", "a8", f"hf_{linear_class}"


class _Shards(dict[str, StoredTensor]):
    """The tensors of several files by name."""

    def __missing__(self, name: str) -> StoredTensor:
        raise ValueError(f"no file of this model has a tensor {name!r}")


def _tensor_files(path: Path) -> Mapping[str, StoredTensor]:
    single = path / "model.safetensors"
    if single.is_file():
        return TensorFile(single)
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        raise ValueError(f"{path} is no model folder: it has no model.safetensors")
    names = read_json(index).get("weight_map", {})
    files = {file: TensorFile(path / Path(file).name) for file in sorted(set(names.values()))}
    return _Shards({name: files[file][name] for name, file in names.items()})


def write_folder(
    folder: Path | str,
    config: ModelConfig,
    tensors: Mapping[str, StoredTensor],
    tokenizer: Tokenizer,
    layout: str | None,
) -> None:
    """Write config, weights, tokenizer and generation config into ``folder``, each file atomically, weights first."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    write_tensors(path / "model.safetensors", tensors, {})
    tokenizer.save(path)
    stops = tokenizer.stop_ids
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops if len(stops) > 1 else tokenizer.eos_id}
    with atomic_open(path / "generation_config.json") as file:
        json.dump({**special, "do_sample": True, "temperature": 0.8}, file, indent=2)
    kinds = {t.dtype for name, t in tensors.items() if name.endswith("embed_tokens.weight")}
    dtype = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[kinds.pop()]
    tree = {**config.to_hf(), **special, "dtype": dtype, "torch_dtype": dtype}
    if config.weights is not None:
        tree["quantization_config"] = _quantization_config(config, layout)
        if (config.weights, config.activations) != HF_FORMATS or layout not in (None, "hf_autobitlinear"):
            tree["model_type"] = OWN + config.family
            tree["architectures"] = ["TritkitForCausalLM"]
    with atomic_open(path / "config.json") as file:
        json.dump(tree, file, indent=2)


def _quantization_config(config: ModelConfig, layout: str | None) -> dict[str, Any]:
    if (config.weights, config.activations) == HF_FORMATS and layout in (None, "hf_autobitlinear"):
        return {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "online" if layout is None else "offline",
            "modules_to_not_convert": None,
        }
    return {"quant_method": "tritkit", "weights": config.weights, "activations": config.activations, "layout": layout}


def copy_companions(source: Path, target: Path) -> None:
    """The files beside the weights that belong to the model whatever its form."""
    for name in COMPANIONS:
        if (source / name).is_file():
            with atomic_open(target / name, "wb") as file:
                file.write((source / name).read_bytes())


def float_to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 to raw bfloat16, rounded half to even as torch does; NaN stays NaN."""
    raw = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((raw + 0x7FFF + ((raw >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def unpacked_tensors(
    tensors: Mapping[str, StoredTensor], packed: set[str], dtype: str
) -> Iterator[tuple[str, StoredTensor]]:
    """What stays high precision in a packed folder: every tensor but those of the linears in ``packed``, as dtype."""
    for name, tensor in tensors.items():
        if name.rsplit(".weight", 1)[0] not in packed:
            values = tensor.float32()
            yield (
                name,
                StoredTensor("BF16", float_to_bf16(values)) if dtype == "bfloat16" else StoredTensor("F32", values),
            )
