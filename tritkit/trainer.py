"""Training: text to a model folder. Resumable at every step, exact in what it resumes.

``tritkit.train`` is ``train`` below. Its state lives in OUT/training: tokens, and checkpoints that are written beside
and renamed, so that a kill at any moment leaves the last good one.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import statistics
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import config as settings_file
from . import results
from .checkpoint import open_folder
from .data import Batches, Tokens, documents, find_files, holdout, text_key, text_size, tokenize
from .files import atomic_open
from .folderfacts import describe
from .kernels import fastest_backend
from .layers import linear_for
from .memory import peak_memory_mib
from .models.config import ModelConfig
from .models.transformer import Transformer, build
from .optim import OptimConfig, make_optimizer, set_step
from .progress import console, progress
from .tokenizer import Tokenizer
from .trainstate import TrainState, read_latent, save_model

LossFunction = Callable[[Transformer, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from. What is held out for validation is never trained on: whole documents, or the tail of
    each where there are fewer than 50."""

    sources: tuple[str, ...] = ()  # files, folders, globs: .txt .txt.xz .txt.gz .txt.zst .jsonl
    text_field: str = "text"  # of .jsonl
    val: tuple[str, ...] = ()  # held-out text; empty: a share of the documents of sources
    val_share: float = 0.02
    tokenizer: str | None = None  # a folder or tokenizer.json; none: train one of model.vocab_size on sources
    cache: str | None = None  # a folder for the token files, to be shared by runs on the same text


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000
    batch_size: int = 16  # sequences a step
    micro_batch: int = 0  # sequences a forward pass; 0: all of the batch (fewer: gradient accumulation)
    sequence_length: int = 256
    seed: int = 0
    dtype: str = "auto"  # of the float products: "float32", "bfloat16"; auto: bfloat16 where the hardware has it
    device: str = "auto"
    compile: bool = False  # torch.compile: about a minute at the start, then 1.3x on a CPU
    init: str | None = None  # a latent folder to train on from, with its optimiser state if it was kept
    eval_every: int = 0  # steps between validations; 0: ten in all
    eval_tokens: int = 65536
    save_every: int = 0  # steps between checkpoints; 0: ten in all
    threads: int = 0  # CPU threads; 0: torch's choice

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "sequence_length", "eval_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, not {getattr(self, name)}")
        for name in ("micro_batch", "eval_every", "save_every", "threads", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name} must be at least 0, not {getattr(self, name)}")
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise ValueError(f"train.micro_batch {self.micro_batch} does not divide train.batch_size {self.batch_size}")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"train.dtype is {self.dtype!r}; known are 'auto', 'float32' and 'bfloat16'")


@dataclass(frozen=True)
class Settings:
    """All that a training run is made of; tritkit.toml in the folder is this, resolved."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


class TrainingStopped(Exception):
    """Training ended before its last step with its state saved. ``code`` is the exit code of the command line."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class LossNotFinite(TrainingStopped, ValueError):
    """The loss or its gradient is not a number: the settings are at fault, the last good checkpoint is intact."""


def compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """bfloat16 where there are units for it: emulated, it was measured 4.5 times slower than float32 on a CPU."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if device.type == "cuda":
        return torch.bfloat16
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    has_units = any(getattr(torch.cpu, name, lambda: False)() for name in checks)
    return torch.bfloat16 if device.type == "cpu" and has_units else torch.float32


def choose_device(name: str) -> torch.device:
    """The torch device of a setting; ValueError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"train.device is {name!r}, which this torch or this machine does not have") from None
    return device


def train(
    settings: Settings,
    out: Path | str,
    *,
    loss: LossFunction = Transformer.loss,
    keep_optimizer: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train a model into the folder ``out`` and return the metrics that were added to its results.json.

    Goes on from the last checkpoint where ``out`` has one of the same settings. Raises ValueError for settings or text
    that cannot work, LossNotFinite (a ValueError too), TrainingStopped (state saved) on Ctrl-C and on a full disk.
    """
    out = Path(out)
    t, context = settings.train, settings.model.max_position_embeddings
    if t.sequence_length > context:
        raise ValueError(
            f"train.sequence_length {t.sequence_length} is longer than the model's context, "
            f"model.max_position_embeddings {context}"
        )
    _files(settings.data)  # mistakes are found before hours of work, and before --overwrite lets go of anything
    linear_for(settings.model.weights, settings.model.activations)
    choose_device(t.device)
    if t.threads:
        torch.set_num_threads(t.threads)
    state = TrainState(out / "training")
    try:
        state.claim(settings_file.dump(settings), overwrite)
        tokenizer, tokens, held_out = prepare(settings, out / "training")
        config = settings.model.with_vocab(_padded(len(tokenizer)))
        run = _Run(dataclasses.replace(settings, model=config), out, state, tokens, held_out, loss)
        try:
            metrics = run.to_the_end()
            save_model(out, run.model, config, tokenizer)
            with atomic_open(out / "tritkit.toml") as file:
                file.write(settings_file.dump(settings))
            metrics = {**describe(open_folder(out)), **metrics}
            results.record(out, "train", dataclasses.asdict(settings), metrics, begins=True)
            state.finish(keep_optimizer, out, run.optimizer, run.model)
        except OSError as error:
            raise TrainingStopped(
                f"could not write to {out}: {error.strerror or error}; {state.last_good()}, and the same command goes "
                "on from there",
                2,
            ) from None
    finally:
        state.close()
    return metrics


def _padded(vocabulary: int) -> int:
    """Rows of the embedding: a multiple of 64, which every kernel likes. Generation never draws those beyond it."""
    return -(-vocabulary // 64) * 64


def _files(data: DataConfig) -> tuple[list[Path], list[Path]]:
    """The files of training text and of held-out text; ValueError where there are none or they overlap."""
    if not data.sources:
        raise ValueError("there is no text to train on: give --data FILE, a folder or a glob")
    files = find_files(data.sources)
    val_files = find_files(data.val) if data.val else []
    if set(files) & set(val_files):
        raise ValueError(f"{sorted(set(files) & set(val_files))[0]} is both training and held-out text")
    return files, val_files


def prepare(settings: Settings, folder: Path) -> tuple[Tokenizer, Tokens, Tokens]:
    """Tokenizer, training tokens and held-out tokens of the settings' text, kept under ``folder`` or data.cache."""
    data = settings.data
    files, val_files = _files(data)
    folder = Path(data.cache) if data.cache else folder
    folder.mkdir(parents=True, exist_ok=True)

    def training_texts():
        texts = documents(files, data.text_field)
        return texts if val_files else holdout(texts, data.val_share, held_out=False)

    def held_out_texts():
        if val_files:
            return documents(val_files, data.text_field)
        return holdout(documents(files, data.text_field), data.val_share, held_out=True)

    if data.tokenizer or settings.train.init:  # what is trained on keeps its vocabulary
        tokenizer = Tokenizer.load(str(data.tokenizer or settings.train.init))
    else:
        key = text_key([*files, *val_files], f"{data.text_field} {settings.model.vocab_size} {data.val_share}", None)
        size = sum(text_size(f) for f in files)
        tokenizer = _own_tokenizer(folder / f"tokenizer-{key[:16]}", training_texts, settings.model.vocab_size, size)
    streams = []
    for name, texts in (("train", training_texts), ("val", held_out_texts)):
        key = text_key([*files, *val_files], f"{data.text_field} {data.val_share} {name}", tokenizer)
        megabytes = sum(text_size(f) for f in (val_files if name == "val" and val_files else files)) / 1e6
        megabytes *= data.val_share if name == "val" and not val_files else 1
        with progress(f"tokens ({name})", megabytes, "MB") as advance:
            path = folder / f"{name}-{key[:16]}"
            streams.append(tokenize(texts(), tokenizer, path, key, lambda n: advance(n / 1e6)))
    return tokenizer, streams[0], streams[1]


def _own_tokenizer(folder: Path, texts: Callable, vocab_size: int, size: int) -> Tokenizer:
    if (folder / "tokenizer_config.json").is_file():
        return Tokenizer.load(folder)
    with progress(f"tokenizer of {vocab_size}", size / 1e6, "MB") as advance:
        tokenizer = Tokenizer.train(texts(), vocab_size, lambda n: advance(n / 1e6))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    return tokenizer


class _Run:
    """One training run: what ``train`` holds while it steps."""

    def __init__(
        self, settings: Settings, out: Path, state: TrainState, tokens: Tokens, held_out: Tokens, loss: LossFunction
    ):
        self.settings, self.out, self.state, self.loss = settings, out, state, loss
        t = settings.train
        if len(held_out.ids) < 2:
            raise ValueError("the held-out text is empty: give more text, --val or a larger data.val_share")
        self.device = choose_device(t.device)
        self.dtype = compute_dtype(t, self.device)
        self.batches = Batches(tokens.ids, t.sequence_length, t.batch_size, t.seed)
        self.held_out = held_out
        self.tokens = tokens
        self.model = build(settings.model, seed=t.seed).to(self.device)
        self.optimizer = make_optimizer(self.model, settings.optim)
        if t.init:
            read_latent(Path(t.init), self.model, self.optimizer, settings.model)
        state.text = str(zlib.crc32(tokens.ids.view("uint8").data))
        self.step = state.resume(self.model, self.optimizer)
        fastest_backend(self.device.type)  # measured now, where no compiler looks on
        compiled = torch.compile(loss) if t.compile else loss
        self.forward = lambda x, y: compiled(self.model, x, y)
        self.times: list[float] = []
        self.whole = True  # whether weights, step and log belong together

    def autocast(self):
        on = self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16) if on else nullcontext()

    def to_the_end(self) -> dict[str, Any]:
        t = self.settings.train
        started, first = time.monotonic(), self.step
        save_every = t.save_every or max(t.steps // 10, 1)
        eval_every = t.eval_every or max(t.steps // 10, 1)
        note, val = "", None
        try:
            total, done = (n * t.batch_size * t.sequence_length for n in (t.steps, self.step))
            with _late_interrupts() as asked, progress(f"train {self.out.name}", total, "tokens", done) as advance:
                while self.step < t.steps:
                    line = self.one_step()
                    if self.step % eval_every == 0 or self.step == t.steps:
                        val = line["val_loss"] = self.validate()
                    self.state.log(line)
                    self.whole = True
                    if self.step % save_every == 0 and self.step < t.steps:
                        self.state.save(self.step, self.model, self.optimizer)
                    note = f"loss {line['loss']:.3f}" + (f" held-out {val:.3f}" if val is not None else "")
                    advance(t.batch_size * t.sequence_length, note)
                    if asked():
                        raise KeyboardInterrupt
        except KeyboardInterrupt:
            if self.whole:
                self.state.save(self.step, self.model, self.optimizer)
            message = f"stopped after step {self.state.last_step()} of {t.steps}; the same command goes on from there"
            raise TrainingStopped(message, 130) from None
        self.state.save(self.step, self.model, self.optimizer)
        log = self.state.read_log()
        val = val if val is not None else log[-1].get("val_loss")
        seconds = time.monotonic() - started
        return {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "steps": t.steps,
            "tokens": t.steps * t.batch_size * t.sequence_length,
            "train_loss": statistics.fmean(entry["loss"] for entry in log[-50:]),
            "val_loss": val,
            "val_perplexity": None if val is None else math.exp(val),
            "step_seconds": statistics.median(self.times) if self.times else None,
            "train_seconds": seconds if first == 0 else None,  # of a run that was never stopped
            "train_peak_mib": peak_memory_mib(),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def one_step(self) -> dict[str, Any]:
        t, o = self.settings.train, self.settings.optim
        begin = time.perf_counter()
        lr = set_step(self.optimizer, o, self.step, t.steps)
        inputs, targets = (torch.from_numpy(a).to(self.device) for a in self.batches[self.step])
        micro = t.micro_batch or t.batch_size
        total = 0.0
        for x, y in zip(inputs.split(micro), targets.split(micro), strict=True):
            with self.autocast():
                loss = self.forward(x, y) * (micro / t.batch_size)
            loss.backward()
            total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), o.clip or math.inf)
        if not (math.isfinite(total) and math.isfinite(float(norm))):
            raise LossNotFinite(
                f"the loss of step {self.step + 1} is not a number (loss {total}, gradient norm {float(norm):.3g}); "
                f"{self.state.last_good()}: start again into another folder with a lower learning rate "
                f"(--optim.lr={o.lr / 2:g}) or a longer warm-up",
                2,
            )
        self.whole = False
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.times.append(time.perf_counter() - begin)
        return {
            "step": self.step,
            "loss": total,
            "lr": lr,
            "grad_norm": float(norm),
            "seconds": round(self.times[-1], 4),
        }

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss in nats a token over the first eval_tokens held-out tokens, in windows of the training length."""
        t = self.settings.train
        length = min(t.sequence_length, len(self.held_out.ids) - 1)
        windows = max(min(t.eval_tokens, len(self.held_out.ids) - 1) // length, 1)
        ids = torch.from_numpy(self.held_out.ids[: windows * length + 1].astype("int64"))
        inputs, targets = ids[:-1].view(windows, length), ids[1:].view(windows, length)
        total = 0.0
        for x, y in zip(inputs.split(t.batch_size), targets.split(t.batch_size), strict=True):
            with self.autocast():
                total += float(Transformer.loss(self.model, x.to(self.device), y.to(self.device))) * len(x)
        return total / windows


@contextmanager
def _late_interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C waits for the end of a step, where all that is saved belongs together; a second one does not wait.

    Yields a function that says whether it was pressed. Only the main thread can take signals.
    """
    pressed = False

    def note(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        console().print("stopping after this step; Ctrl-C again stops at once")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


DEFAULT_SETTINGS = Path(__file__).parent / "bundled" / "default.toml"


def load_settings(file: Path | str | None = None, overrides: dict[str, str] | None = None) -> Settings:
    """Settings from a TOML file (none: a small b1.58 model) and overrides; ValueError as in ``config.load``."""
    return settings_file.load(Settings, file or DEFAULT_SETTINGS, overrides)
