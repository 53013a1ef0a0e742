"""llama.cpp as a contestant: the same model or shape as a GGUF file, run through the package llama-cpp-python.

A bitnet shape gets TQ2_0 linears and a Q6_K head, which is llama.cpp's usual way; a llama shape is F16 throughout.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import ModelFolder
from ..gguf import NUMBERS, TYPES, GGUFFile, tensor_bytes
from ..gguf_config import architecture_of, keys_of
from ..gguf_export import export_gguf
from ..gguf_model import ggml_name
from ..gguf_writer import NewTensor, write_gguf
from ..models.config import ModelConfig
from ..models.shapes import linear_names, linear_shape, norm_sizes
from ..progress import progress
from .child import Child
from .measure import Contestant, Work
from .shapes import draw, embedding_spread, linear_spread, normal_values, temporary_folder, ternary_words

PEERS = ("llama.cpp",)
FAMILIES = ("bitnet", "llama")  # whose names llama.cpp uses too
BLOCK = 256  # columns of a k-quant or a TQ2_0 block
N_BATCH = 512


def require(peer: str, config: ModelConfig, itself: bool = False) -> None:
    """ValueError, in one sentence, where this peer is not there or cannot run this shape. itself: it gets the model."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise ValueError(f"--peer {peer} needs its package: pip install llama-cpp-python")
    if itself:
        return
    if config.family not in FAMILIES or config.weights not in ("ternary", None):
        raise ValueError(f"{peer} has no format for {config.weights or 'full'} weights of the {config.family} family")
    odd = [n for n in (config.hidden_size, config.intermediate_size) if n % BLOCK]
    if config.weights and odd:
        raise ValueError(f"{peer}'s TQ2_0 has blocks of {BLOCK} columns, and {odd[0]} is no multiple of that")


@contextmanager
def random_gguf(name: str, config: ModelConfig) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The file for as long as the context lasts, and the facts of its row."""
    linear, head = ("tq2_0", "q6_k") if config.weights else ("f16", "f16")
    table = (config.vocab_size, config.hidden_size)
    tensors = {n: _random(linear, linear_shape(config, n), linear_spread(config, n)) for n in linear_names(config)}
    tensors["model.embed_tokens"] = _random(head, table, embedding_spread(config))
    read = _bytes(tensors)  # a token reads them all: the embedding is the head
    for norm, size in norm_sizes(config).items():
        tensors[norm] = NewTensor("f32", (size,), functools.partial(np.ones, size, np.float32))
    with temporary_folder(_bytes(tensors), f"the shape {name} for llama.cpp") as folder:
        write_without_vocabulary(folder / "model.gguf", config, tensors)
        facts = {"layout": linear, "head": head, "kv_bits": 16, "weight_bytes": read, "kv_bytes": _kv_bytes(config)}
        yield folder / "model.gguf", facts


def write_without_vocabulary(path: Path, config: ModelConfig, tensors: Mapping[str, NewTensor]) -> None:
    """A GGUF file of ``tensors``, which are under our names without ".weight"."""
    metadata = {**keys_of(config, config.family), "tokenizer.ggml.model": "no_vocab"}
    with progress("the same for llama.cpp", len(tensors), "tensors") as advance:
        write_gguf(path, metadata, {ggml_name(f"{n}.weight"): t for n, t in tensors.items()}, advance)


def _bytes(tensors: Mapping[str, NewTensor]) -> int:
    return sum(tensor_bytes(TYPES[NUMBERS[t.type]], t.shape) for t in tensors.values())


def _kv_bytes(config: ModelConfig) -> int:
    """Of one position: keys and values in float16."""
    return 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


@contextmanager
def model_gguf(model: ModelFolder) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The model itself as a file that llama.cpp runs, each matrix in the type that it has, and the facts of its row."""
    if model.container == "gguf":
        yield model.path, _facts(model.path, model.config)
        return
    with temporary_folder(2 * model.file_bytes(), "the model for llama.cpp") as folder:
        export_gguf(model, folder / "model.gguf")
        yield folder / "model.gguf", _facts(folder / "model.gguf", model.config)


def _facts(path: Path, config: ModelConfig) -> dict[str, Any]:
    file = GGUFFile(path)
    head = "token_embd.weight" if config.tie_word_embeddings else "output.weight"
    linears = [ggml_name(f"{name}.weight") for name in linear_names(config)]
    read = sum(file[name].data.nbytes for name in (*linears, head))
    layouts = "+".join(sorted({file.type_of(name) for name in linears}))
    head_type = file.type_of(head)
    return {
        "layout": layouts,
        "head": head_type,
        "kv_bits": 16,
        "weight_bytes": read,
        "kv_bytes": _kv_bytes(config),
    }


def runs(model: ModelFolder) -> bool:
    """Whether llama.cpp runs this very model; else it gets random weights of the same shape."""
    return architecture_of(model) != "bitnet-b1.58"


def _random(kind: str, shape: tuple[int, ...], spread: float) -> NewTensor:
    return NewTensor(kind, shape, lambda: np.concatenate(list(RANDOM[kind](math.prod(shape), spread))))


def _random_f16(count: int, spread: float) -> Iterator[np.ndarray]:
    yield from draw(np.random.SFC64(1), count, (spread * normal_values()).astype(np.float16))


def _random_tq2_0(count: int, spread: float) -> Iterator[np.ndarray]:
    """Blocks of 64 bytes, four codes each, and a float16 scale."""
    scale = np.float16(spread / math.sqrt(2 / 3))
    for codes in draw(np.random.SFC64(1), count // 8, ternary_words()):
        blocks = np.empty((len(codes) // 32, 33), np.uint16)
        blocks[:, :32], blocks[:, 32] = codes.reshape(-1, 32), scale.view(np.uint16)
        yield blocks


def _random_q6_k(count: int, spread: float) -> Iterator[np.ndarray]:
    """Blocks of 128 + 64 bytes of codes from -32 to 31, sixteen int8 scales, all 64 here, and a float16 scale."""
    scale = np.float16(spread / (64 * 64 / math.sqrt(12)))
    for codes in draw(np.random.SFC64(1), count // BLOCK * 96, np.arange(65536, dtype=np.uint16)):
        blocks = np.empty((len(codes) // 96, 105), np.uint16)
        blocks[:, :96], blocks[:, 96:104], blocks[:, 104] = codes.reshape(-1, 96), 64 | 64 << 8, scale.view(np.uint16)
        yield blocks


RANDOM = {"f16": _random_f16, "tq2_0": _random_tq2_0, "q6_k": _random_q6_k}


_KEPT: list[Any] = []  # what C calls for as long as the process lives


def _silence(lib: Any) -> None:
    """llama.cpp says nothing from now on. It keeps the callback for good, and so do we."""
    if not _KEPT:
        _KEPT.append(lib.llama_log_callback(lambda *_: None))
    lib.llama_log_set(_KEPT[0], None)


class LlamaCpp(Contestant):
    """A GGUF file with llama.cpp's own functions: llama_decode on batches, no sampling."""

    def __init__(self, path: Path, work: Work, threads: int, facts: dict[str, Any]):
        began = time.perf_counter()
        from llama_cpp import llama_cpp as lib

        super().__init__(work, threads)
        self.lib = lib
        _silence(lib)
        lib.llama_backend_init()
        options = lib.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = lib.llama_model_load_from_file(str(path).encode(), options)
        if not self.model:
            raise ValueError("llama.cpp cannot load its file")
        settings = lib.llama_context_default_params()
        self.prompt_sequence = work.batch if work.context else 0
        settings.n_seq_max = max(work.batch, self.prompt_sequence + 1)
        settings.n_ctx = -(-work.positions() // BLOCK) * BLOCK * settings.n_seq_max
        settings.n_batch = settings.n_ubatch = N_BATCH
        settings.n_threads = settings.n_threads_batch = threads
        self.context = lib.llama_init_from_model(self.model, settings)
        if not self.context:
            raise ValueError("llama.cpp cannot make a context of this size")
        self.memory = lib.llama_get_memory(self.context)
        self.batch = lib.llama_batch_init(max(N_BATCH, work.batch), 0, 1)
        self.vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.chance = np.random.default_rng(0)
        self.filled = False
        self.append([0], 0, 1)
        lib.llama_memory_clear(self.memory, True)
        self.facts = {
            "engine": "llama.cpp",
            "threads": threads,
            "isa": None,
            **facts,
            "ready_s": time.perf_counter() - began,
        }

    def prepare(self, test: str) -> None:
        remove = self.lib.llama_memory_seq_rm
        remove(self.memory, self.prompt_sequence, 0, -1)
        if test == "decode":
            for sequence in range(self.work.batch):
                if not self.filled:
                    for position in range(0, self.work.context, N_BATCH):
                        self.append([sequence], position, min(N_BATCH, self.work.context - position))
                remove(self.memory, sequence, self.work.context, -1)
            self.filled = True

    def prefill(self) -> Iterator[None]:
        for position in range(0, self.work.prompt, N_BATCH):
            self.append([self.prompt_sequence], position, min(N_BATCH, self.work.prompt - position))
            yield

    def decode(self) -> Iterator[None]:
        for i in range(self.work.tokens):
            self.append(range(self.work.batch), self.work.context + i, 1)
            yield

    def append(self, sequences: Sequence[int], position: int, count: int) -> None:
        """``count`` random tokens at a position of each sequence, and the logits after the last."""
        ids = self.chance.integers(0, self.vocab_size, len(sequences) * count)
        self.decode_tokens([(s, position + i, i == count - 1) for s in sequences for i in range(count)], ids)

    def decode_tokens(self, places: Sequence[tuple[int, int, bool]], ids: NDArray) -> None:
        """places: sequence, position, and whether the logits are wanted."""
        batch = self.batch
        batch.n_tokens = len(places)
        for i, (sequence, position, wanted) in enumerate(places):
            batch.token[i], batch.pos[i] = int(ids[i]), position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = wanted
        code = self.lib.llama_decode(self.context, batch)
        if code:
            raise ValueError(f"llama_decode gave {code}")
        self.lib.llama_synchronize(self.context)

    def logits(self, i: int) -> NDArray[np.float32]:
        """Those of the i-th token of the last batch."""
        return np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, i), (self.vocab_size,)).copy()


class _Reader(LlamaCpp):
    """The same for quality: windows of text instead of chance."""

    def losses(self, windows: Sequence[tuple[NDArray, NDArray]]) -> NDArray[np.float64]:
        found = []
        for tokens, targets in windows:
            self.lib.llama_memory_clear(self.memory, True)
            for start in range(0, len(tokens), N_BATCH):
                ids, scored = tokens[start : start + N_BATCH], targets[start : start + N_BATCH]
                self.decode_tokens([(0, start + i, bool(target >= 0)) for i, target in enumerate(scored)], ids)
                for i in np.flatnonzero(scored >= 0):
                    logits = self.logits(int(i)).astype(np.float64)
                    most = logits.max()
                    found.append(np.log(np.exp(logits - most).sum()) + most - logits[scored[i]])
        return np.array(found)


def losses(path: Path, windows: Sequence[tuple[NDArray, NDArray]], threads: int) -> NDArray[np.float64]:
    """Minus ln p of every target that is not -1, by llama.cpp, in a process of its own. windows: tokens, targets."""
    longest = max(len(tokens) for tokens, _ in windows)
    with Child("llama.cpp", _Reader, path, Work(longest, 1), threads, {}) as child:
        return child.call("losses", windows)
