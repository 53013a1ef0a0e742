"""Small valid files of every kind that tritkit reads, which the fuzzer damages. Made here, so that none is in git."""

from __future__ import annotations

import base64
import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tritkit.checkpoint import EXTRAS, open_folder
from tritkit.folderwriter import write_folder
from tritkit.gguf_export import export_gguf
from tritkit.hf_export import export_hf
from tritkit.layouts import LAYOUTS, Unpacked
from tritkit.layouts.codebook import SecondLevel
from tritkit.methods.importance import Importance
from tritkit.models.config import ModelConfig, config_from_hf
from tritkit.models.rope import Rope
from tritkit.models.shapes import linear_names, matrix_names, matrix_shape, norm_sizes
from tritkit.spm import BYTES
from tritkit.tensorfile import StoredTensor
from tritkit.tokenizer import Tokenizer

WORDS = ["the cat sat on a mat and saw the moon", "Café — naïve? 12 345\n  two owls sang of rain"] * 20
SIZES: dict[str, Any] = {"vocab_size": 272, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
WIDE = {**SIZES, "hidden_size": 256, "intermediate_size": 256}
LLAMA3 = Rope("llama3", 8.0, 8192, 1.0, 4.0)
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

# family, layout of the linears (None: floats), other entries
MODELS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "llama": ("llama", None, {**SIZES, "rope": LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "qwen3": ("qwen3", "q8_0", {**SIZES, "head_dim": 32, "tie_word_embeddings": False}),
    "mistral": ("mistral", "q4_1", {**SIZES, "rope": Rope("linear", 2.0)}),
    "bitnet": ("bitnet", "hf_autobitlinear", {**SIZES, "full_precision": ("model.layers.0.mlp.down_proj", "lm_head")}),
    "falcon": ("llama", "hf_bitlinear", {**SIZES, "linear_norm_eps": 1e-5}),
    "wide": ("bitnet", "tq2_0", WIDE),
    "dense": ("llama", "dense", SIZES),
    "asymmetric": ("llama", "dense", SIZES),
    "nf4": ("llama", "nf4", SIZES),
    "nf4 twice": ("llama", "nf4_dq", SIZES),
}
# Folders of other projects: of which model
FOREIGN = {"gptq": "dense", "gptq_v2": "asymmetric", "compressed-tensors": "asymmetric"}
DTYPES = {"uint8": "U8", "int16": "I16", "float16": "F16", "float32": "F32"}
# GGUF files: of which model, in which type
GGUFS = {"llama": "f32", "qwen3": None, "mistral": None, "wide": "tq1_0", "wide i2_s": "i2_s"}


def model_folder(path: Path, name: str, tokenizer: Tokenizer) -> Path:
    """Write one of MODELS with random weights."""
    family, layout, entries = MODELS[name]
    low_bit = layout is not None and (layout.startswith(("hf", "tq")))
    formats = {"weights": "ternary", "activations": "a8"} if low_bit else {}
    config = ModelConfig(family=family, **formats, **entries)
    chance = np.random.default_rng(len(name))
    tensors, layouts = {}, {}

    def floats(name: str, *shape: int) -> None:
        tensors[f"{name}.weight"] = StoredTensor("F32", chance.normal(0, 0.1, shape).astype(np.float32))

    linears = linear_names(config)
    for matrix in matrix_names(config):
        shape = matrix_shape(config, matrix)
        if layout is None or matrix not in linears or (low_bit and not config.is_low_bit(matrix)):
            floats(matrix, *shape)
            continue
        layouts[matrix] = layout
        if low_bit:
            codes = chance.integers(-1, 2, shape).astype(np.int16)
            scale = np.full((shape[0], shape[1] // 256) if layout == "tq2_0" else (1, 1), 0.5, np.float32)
            arrays = LAYOUTS[layout].pack(Unpacked(codes, scale)).arrays
        elif layout in ("dense", "nf4", "nf4_dq"):
            arrays = LAYOUTS[layout].pack(integers(layout, name == "dense", shape, chance)).arrays
        else:
            arrays = LAYOUTS[layout].quantize(chance.normal(0, 0.1, shape).astype(np.float32)).arrays  # type: ignore[attr-defined]
        tensors |= {
            f"{matrix}.{e}": StoredTensor(DTYPES[arrays[e].dtype.name], arrays[e])
            for e in ("weight", *EXTRAS)
            if e in arrays
        }
    for norm, size in norm_sizes(config).items():
        floats(norm, size)
    for linear in linears:
        if config.has_bias(linear):
            tensors[f"{linear}.bias"] = StoredTensor("F32", np.ones(matrix_shape(config, linear)[0], np.float32))
        if config.linear_norm_eps and config.is_low_bit(linear):
            floats(f"{linear}.rms_norm", matrix_shape(config, linear)[1])
    write_folder(path, config, tensors, tokenizer, layouts)
    return path


def integers(layout: str, symmetric: bool, shape: tuple[int, int], chance: np.random.Generator) -> Unpacked:
    """Four bits in groups of 16."""
    scale = chance.uniform(0.01, 0.02, (shape[0], shape[1] // 16)).astype(np.float16).astype(np.float32)
    codes = chance.integers(0, 16, shape).astype(np.int16)
    if layout != "dense":
        second = SecondLevel.of(scale) if layout == "nf4_dq" else None
        return Unpacked(codes, scale if second is None else second.scale(), levels=second)
    if symmetric:
        return Unpacked(codes - 8, scale)
    return Unpacked(codes, scale, -scale * chance.integers(0, 16, scale.shape).astype(np.float32))


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer.train(WORDS, SIZES["vocab_size"])
    tokenizer.config["chat_template"] = TEMPLATE
    return tokenizer


def llama2c_tokenizer() -> bytes:
    """259 tokens and some words in llama2.c's file."""
    words = ["<unk>", "\n<s>\n", "\n</s>\n", *BYTES, *" thecandomsr", "th", "the", "at", " the"]
    raw = b"".join(struct.pack("<fi", -float(i), len(word.encode())) + word.encode() for i, word in enumerate(words))
    return struct.pack("<i", 12) + raw


def llama2c_checkpoint() -> bytes:
    dim, hidden, layers, heads, kv_heads, vocabulary, context = 8, 12, 2, 2, 1, 275, 4
    floats = vocabulary * dim + layers * (2 * dim + 2 * dim * dim + 2 * 4 * dim + 3 * dim * hidden) + dim + context * 4
    values = np.random.default_rng(0).normal(0, 0.1, floats).astype(np.float32)
    return struct.pack("<7i", dim, hidden, layers, heads, kv_heads, vocabulary, context) + values.tobytes()


def sentencepiece(folder: Path) -> bytes:
    """A tokenizer.json of SentencePiece's kind."""
    from tritkit.gguf_tokenizer import tokenizer_from_llama2c

    (folder / "tok.bin").write_bytes(llama2c_tokenizer())
    return tokenizer_from_llama2c(folder / "tok.bin", 275).inner.to_str().encode()


def variants(raw: bytes) -> list[bytes]:
    """The parts that other tokenizers have, in one that works."""
    tree = json.loads(raw)
    split = {"type": "Split", "pattern": {"Regex": r"\p{L}+|\s"}, "behavior": "Isolated", "invert": False}
    charsmap = base64.b64encode(struct.pack("<I", 2048) + bytes(2048) + b"a\0").decode()
    normalizers = [
        {"type": "NFC"},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        {"type": "Prepend", "prepend": "a"},
        {"type": "Strip", "strip_left": True, "strip_right": False},
        {"type": "BertNormalizer", **dict.fromkeys(("clean_text", "handle_chinese_chars", "lowercase"), True)},
        {
            "type": "Precompiled",
            "precompiled_charsmap": charsmap,
        },
    ]
    cuts = [
        split,
        {"type": "Digits", "individual_digits": True},
        {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": True},
        {"type": "Punctuation", "behavior": "Isolated"},
        {"type": "FixedLength", "length": 5},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ]
    decoders = [
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
        {"type": "Replace", "pattern": {"String": "a"}, "content": "b"},
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
    ]
    posts = [
        {
            "type": "RobertaProcessing",
            "sep": ["b", 1],
            "cls": ["a", 0],
            "trim_offsets": True,
            "add_prefix_space": False,
        },
        tree["post_processor"],
    ]
    padding = {
        "strategy": {"Fixed": 8},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
    }
    models: list[dict[str, Any]] = [
        {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0], ["the", -2.0]], "byte_fallback": False},
        {"type": "WordPiece", "unk_token": "u", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
         "vocab": {"u": 0, "the": 1, "##t": 2}},
        {"type": "WordLevel", "unk_token": "u", "vocab": {"u": 0, "the": 1}},
        {**tree["model"], "continuing_subword_prefix": "", "end_of_word_suffix": "", "byte_fallback": True},
    ]  # fmt: skip
    sequences = {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "post_processor": {"type": "Sequence", "processors": posts},
        "padding": {**padding, "pad_type_id": 0, "pad_token": "a"},
        "truncation": {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0},
    }
    found = [{**tree, key: value} for key, value in sequences.items()]
    found += [{**tree, "model": model} for model in models]
    found += [{**tree, "normalizer": step} for step in normalizers] + [{**tree, "decoder": step} for step in decoders]
    return [json.dumps(each).encode() for each in found]


def every_seed() -> dict[str, list[tuple[str, dict[str, bytes]]]]:
    """By reader: (the file that is damaged, all files of its folder by name)."""
    found: dict[str, list[tuple[str, dict[str, bytes]]]] = {
        name: [] for name in ("gguf", "safetensors", "tokenizer", "config", "llama2c", "imatrix")
    }
    with tempfile.TemporaryDirectory() as name:
        top, tokenizer = Path(name), byte_level()
        for model in MODELS:
            folder = model_folder(top / model, model, tokenizer)
            files = {file.name: file.read_bytes() for file in folder.iterdir()}
            found["safetensors"].append(("model.safetensors", files))
            found["config"].append(("config.json", files))
        for to, model in FOREIGN.items():
            export_hf(open_folder(top / model), top / to, to)
            files = {file.name: file.read_bytes() for file in (top / to).iterdir()}
            found["safetensors"].append(("model.safetensors", files))
            found["config"].append(("config.json", files))
        files = {file.name: file.read_bytes() for file in (top / "llama").iterdir()}
        header, weights = files["config.json"], files.pop("model.safetensors")
        length = struct.unpack("<Q", weights[:8])[0]
        names = [key for key in json.loads(weights[8 : 8 + length]) if key != "__metadata__"]
        index = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "a.safetensors")}).encode()
        sharded = {**files, "a.safetensors": weights, "model.safetensors.index.json": index}
        found["config"].append(("model.safetensors.index.json", sharded))
        rich = {**json.loads(header), "sliding_window": 4096, "layer_types": ["full_attention"], "num_experts": 0}
        found["config"].append(
            ("config.json", {**files, "model.safetensors": weights, "config.json": json.dumps(rich).encode()})
        )
        assert config_from_hf(rich, None, None)
        words = {n: files[n] for n in ("tokenizer.json", "tokenizer_config.json", "generation_config.json")}
        words["chat_template.jinja"] = TEMPLATE.encode()
        found["tokenizer"] = [(each, words) for each in words for _ in range(1 + 5 * (each == "tokenizer.json"))]
        found["tokenizer"] += [("tokenizer.json", {**words, "tokenizer.json": sentencepiece(top)})] * 3
        for variant in variants(words["tokenizer.json"]):
            found["tokenizer"].append(("tokenizer.json", {**words, "tokenizer.json": variant}))
        found["tokenizer"].append(("tok275.bin", {"tok275.bin": llama2c_tokenizer()}))
        for model, kind in GGUFS.items():
            out = top / "model.gguf"
            out.unlink(missing_ok=True)
            export_gguf(open_folder(top / model.split()[0]), out, kind)
            found["gguf"].append(("model.gguf", {"model.gguf": out.read_bytes()}))
        checkpoint = {"model.bin": llama2c_checkpoint(), "tok275.bin": llama2c_tokenizer()}
        found["llama2c"].append(("model.bin", checkpoint))
        found["llama2c"].append(("tok275.bin", checkpoint))
        importance = Importance(datasets=["text"])
        for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
            importance.add(name, np.arange(24.0), 600)
        for end in ("dat", "gguf"):
            importance.save(top / f"imatrix.{end}")
            found["imatrix"].append((f"imatrix.{end}", {f"imatrix.{end}": (top / f"imatrix.{end}").read_bytes()}))
        found["inspect"] = [seed for kind in ("gguf", "safetensors", "config", "llama2c") for seed in found[kind]]
    return found
