"""Writing a model folder: config.json in transformers' words where it has them, weights, tokenizer. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import OWN
from .files import atomic_open
from .inputs import OUTLIERS, THRESHOLD
from .models.config import ModelConfig
from .models.shapes import EMBEDDING, linear_names
from .tensorfile import LazyTensor, StoredTensor, write_tensors
from .tokenizer import Tokenizer

# A file that is not there, named by config.json as the one with the weights: who asks for a class of transformers by
# its name is not stopped by model_type and would get latent weights without their rounding. hf.py overlooks it.
GUARD = {"transformers_weights": "import-tritkit-and-use-AutoModelForCausalLM.safetensors"}
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
)

# What transformers itself runs as BitNet; everything else gets a model_type of our own.
HF_FORMATS = ("ternary", "a8")


def write_folder(
    folder: Path | str,
    config: ModelConfig,
    tensors: Mapping[str, StoredTensor | LazyTensor],
    tokenizer: Tokenizer,
    layouts: Mapping[str, str],
    advance: Callable[[], None] = lambda: None,
    inputs: Mapping[str, str] = {},
    adapters: Sequence[int] = (),
    outlier_threshold: float = THRESHOLD,
) -> None:
    """Write config, weights, tokenizer and generation config into ``folder``, each file atomically, weights first.

    layouts: of the matrices whose tensors are codes. ``advance`` is called after each tensor. inputs, adapters,
    outlier_threshold: as in ModelFolder.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    write_tensors(path / "model.safetensors", tensors, {}, advance)
    tokenizer.save(path)
    stops = tokenizer.stop_ids
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops if len(stops) > 1 else tokenizer.eos_id}
    with atomic_open(path / "generation_config.json") as file:
        json.dump({**special, "do_sample": True, "temperature": 0.8}, file, indent=2)
    embedding = tensors[f"{EMBEDDING}.weight"].dtype
    dtype = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(embedding, "float32")
    tree = {**config.to_hf(), **special, "dtype": dtype, "torch_dtype": dtype}
    q = quantization_config(config, layouts, inputs, adapters, outlier_threshold)
    if q is not None:
        tree["quantization_config"] = q
        if q["quant_method"] == "tritkit":
            tree |= {"model_type": OWN + config.family, "architectures": ["TritkitForCausalLM"], **GUARD}
    with atomic_open(path / "config.json") as file:
        json.dump(tree, file, indent=2)


def quantization_config(
    config: ModelConfig,
    layouts: Mapping[str, str],
    inputs: Mapping[str, str] = {},
    adapters: Sequence[int] = (),
    outlier_threshold: float = THRESHOLD,
) -> dict[str, Any] | None:
    """What config.json says of the formats: in transformers' words where it has them, else in ours."""
    if config.weights is None and not layouts and not inputs and not adapters:
        return None
    excluded = [*config.full_precision, "lm_head"] if config.full_precision else None
    modules: dict[str, Any] = {"modules_to_not_convert": excluded and list(dict.fromkeys(excluded))}
    if config.linear_norm_eps:
        modules |= {"use_rms_norm": True, "rms_norm_eps": config.linear_norm_eps}
    ours = set(layouts.values())
    stored = set(layouts) == {n for n in linear_names(config) if config.is_low_bit(n)} and len(ours) == 1
    plain = not inputs and not adapters
    if (
        plain
        and (config.weights, config.activations) == HF_FORMATS
        and (not layouts or (stored and ours <= {"hf_autobitlinear", "hf_bitlinear"}))
    ):
        divides = ours == {"hf_bitlinear"}
        return {
            "quant_method": "bitnet",
            "linear_class": "bitlinear" if divides else "autobitlinear",
            **({} if divides else {"quantization_mode": "offline" if layouts else "online"}),
            **modules,
        }
    q = {"quant_method": "tritkit", "weights": config.weights, "activations": config.activations, **modules}
    if inputs:
        q["inputs"] = dict(inputs)
        if any(format.endswith(OUTLIERS) for format in inputs.values()):
            q["outlier_threshold"] = outlier_threshold
    if adapters:
        q["adapters"] = sorted(adapters)
    return {**q, "layout": ours.pop()} if stored else {**q, "layout": None, "layouts": dict(layouts)}


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


def as_dtype(name: str, values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 as the file's "F32", "F16" or "BF16" (raw); ValueError, with the tensor's name, for too large ones."""
    if dtype == "BF16":
        return float_to_bf16(values)
    if dtype == "F16" and values.size and np.abs(values).max() > np.finfo(np.float16).max:
        raise ValueError(f"{name} has values up to {np.abs(values).max():.6g}, too large for float16; bf16 holds them")
    return values.astype(np.float16 if dtype == "F16" else np.float32)


def unpacked_tensors(
    tensors: Mapping[str, StoredTensor], packed: set[str], dtype: str
) -> Iterator[tuple[str, StoredTensor]]:
    """What stays high precision in a packed folder: every tensor but those of the linears in ``packed``, as dtype,
    "BF16" or "F32"."""
    for name, tensor in tensors.items():
        if name.rsplit(".weight", 1)[0] not in packed:
            yield name, StoredTensor(dtype, as_dtype(name, tensor.float32(), dtype))
