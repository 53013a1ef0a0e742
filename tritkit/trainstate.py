"""What a training run keeps on disk: checkpoints that cannot be half-written, and a log with each step once."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .checkpoint import open_folder
from .files import atomic_open
from .folderwriter import write_folder
from .models.config import ModelConfig
from .progress import warn
from .tensorfile import StoredTensor, TensorFile, write_tensors
from .tokenizer import Tokenizer

KEPT = 2  # checkpoints; the one before the last is the fallback where the last is damaged
SETTINGS = "settings.toml"
WRITTEN = (  # what a run writes into the model folder itself
    "model.safetensors",
    "optimizer.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tritkit.toml",
    "results.json",
    "log.jsonl",
)


class TrainState:
    """The folder OUT/training and OUT/log.jsonl."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.log_file = folder.parent / "log.jsonl"
        self.text = ""  # says which tokens it trains on: those of a checkpoint must be the same
        self._log: Any = None
        self._lock: Any = None

    def claim(self, settings: str, overwrite: bool) -> None:
        """Make the folder this run's own. ValueError where it holds a finished model or other settings, or where
        another run is at work in it. A finished model is only replaced when the new one is finished too."""
        out = self.folder.parent
        if (out / "config.json").is_file() and not self.checkpoints() and not overwrite:
            raise ValueError(f"{out} already holds a trained model; give another folder, or --overwrite")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.folder)
        if overwrite:
            for old in self.checkpoints():
                old.unlink()
        for stale in (*self.folder.glob(".*.tmp"), *(f for name in WRITTEN for f in out.glob(f".{name}.*.tmp"))):
            stale.unlink()
        before = self.folder / SETTINGS
        if self.checkpoints() and before.is_file() and before.read_text(encoding="utf-8") != settings:
            changed = [
                line
                for line in settings.splitlines()
                if line and line not in before.read_text(encoding="utf-8").splitlines()
            ]
            raise ValueError(
                f"{self.folder.parent} was begun with other settings ({'; '.join(changed) or 'one was left out'}); "
                "give another folder, or --overwrite to begin anew"
            )
        with atomic_open(before) as file:
            file.write(settings)

    def checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"))

    def last_step(self) -> int:
        files = self.checkpoints()
        return _step_of(files[-1]) if files else 0

    def last_good(self) -> str:
        """For the sentence that tells of a stop."""
        return (
            f"the last good checkpoint is that of step {self.last_step()}" if self.checkpoints() else "nothing was lost"
        )

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write the checkpoint of ``step`` and let go of old ones, in that order."""
        if self._log is not None:
            os.fsync(self._log.fileno())
        tensors = {**_model_tensors(model), **_optimizer_tensors(model, optimizer)}
        path = self.folder / f"step-{step:08d}.safetensors"
        if not path.is_file():
            _write_checked(path, tensors, {"step": str(step), "text": self.text})
        for old in self.checkpoints()[:-KEPT]:
            old.unlink()

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Load the newest checkpoint that is whole; returns its step, 0 where there is none. The log is cut back."""
        step = 0
        for path in reversed(self.checkpoints()):
            try:
                file = _read_checked(path)
                names = [f"{part}.{name}" for name, _ in model.named_parameters() for part in _parts(path)]
                if file.metadata.get("step") != str(_step_of(path)) or any(name not in file for name in names):
                    raise ValueError(f"{path.name} is damaged: its header does not fit its name")
            except ValueError as error:
                before = "the checkpoint before it" if len(self.checkpoints()) > 1 else "the start"
                warn(f"{error}; going on from {before}")
                path.unlink()
                continue
            if file.metadata.get("text") != self.text:
                raise ValueError(
                    f"{self.folder.parent} was begun on other text than this; give the text as it was, another folder, "
                    "or --overwrite to begin anew"
                )
            _load_model(file, model)
            _load_optimizer(file, model, optimizer)
            step = _step_of(path)
            break
        kept = [entry for entry in self.read_log() if entry["step"] <= step]
        with atomic_open(self.log_file) as out:
            out.writelines(json.dumps(entry) + "\n" for entry in kept)
        return step

    def read_log(self) -> list[dict[str, Any]]:
        """The logged steps in order; a last line that was cut off by a kill is not one."""
        lines = self.log_file.read_text(encoding="utf-8").splitlines(keepends=True) if self.log_file.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def log(self, entry: dict[str, Any]) -> None:
        if self._log is None:
            self._log = self.log_file.open("a", encoding="utf-8")
        self._log.write(json.dumps(entry) + "\n")
        self._log.flush()

    def close(self) -> None:
        """Let go of the log and of the lock."""
        for file in (self._log, self._lock):
            if file is not None:
                file.close()
        self._log = self._lock = None

    def finish(self, keep_optimizer: bool, out: Path, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """The model is saved: keep or drop what only training needs."""
        self.close()
        (out / "optimizer.safetensors").unlink(missing_ok=True)  # of a model that stood here before
        if keep_optimizer:
            _write_checked(out / "optimizer.safetensors", _optimizer_tensors(model, optimizer), {})
        shutil.rmtree(self.folder)


def _lock(folder: Path) -> Any:
    """An open file that no other process can lock, so that two runs never write into one folder."""
    file = (folder / "lock").open("w")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # no such locks on this system
        pass
    except BlockingIOError:
        file.close()
        raise ValueError(f"another run is training into {folder.parent}") from None
    return file


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.stem.split("-")[1])


def _parts(checkpoint: Path) -> tuple[str, ...]:
    """What a checkpoint holds of every parameter."""
    return ("param", "step", "exp_avg", "exp_avg_sq") if _step_of(checkpoint) else ("param",)


def save_model(out: Path, model: nn.Module, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """The latent folder: float32 weights that training can go on from."""
    write_folder(out, config, _model_tensors(model, prefix=""), tokenizer, layouts={})


def read_latent(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, config: ModelConfig) -> None:
    """Fill ``model`` from a latent folder, and the optimiser where the folder kept its state."""
    source = open_folder(folder)
    if source.is_packed:
        raise ValueError(f"{folder} is packed; training goes on from latent weights: give what it was packed from")
    _load_model(source.tensors, model, prefix="")
    kept = folder / "optimizer.safetensors"
    if kept.is_file():
        _load_optimizer(_read_checked(kept), model, optimizer)


def _array(tensor: Tensor) -> StoredTensor:
    return StoredTensor("F32", tensor.detach().to("cpu", torch.float32).contiguous().numpy())


def _model_tensors(model: nn.Module, prefix: str = "param.") -> dict[str, StoredTensor]:
    return {prefix + name: _array(p) for name, p in model.named_parameters()}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, StoredTensor]:
    return {
        f"{key}.{name}": _array(value)
        for name, p in model.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()
    }


def _load_model(tensors, model: nn.Module, prefix: str = "param.") -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            stored = tensors[prefix + name].float32()
            if stored.shape != tuple(p.shape):
                raise ValueError(f"{name} has the shape {stored.shape}, but the model asks for {tuple(p.shape)}")
            p.copy_(torch.from_numpy(stored))


def _load_optimizer(file: TensorFile, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for name, p in model.named_parameters():
        keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}.{name}" in file]
        if keys:
            # The fused Adam wants its step count on the parameter's device, too.
            optimizer.state[p] = {k: torch.from_numpy(file[f"{k}.{name}"].float32()).to(p.device) for k in keys}


def _write_checked(path: Path, tensors: dict[str, StoredTensor], metadata: dict[str, str]) -> None:
    """safetensors with the CRC-32 of its tensor bytes in its metadata."""
    crc = 0
    for tensor in tensors.values():
        crc = zlib.crc32(np.ascontiguousarray(tensor.array).reshape(-1).view(np.uint8).data, crc)
    write_tensors(path, tensors, {**metadata, "crc32": str(crc)})


def _read_checked(path: Path) -> TensorFile:
    file = TensorFile(path)
    if file.metadata.get("crc32") != str(file.checksum()):
        raise ValueError(f"{path.name} is damaged: its checksum does not fit its bytes")
    return file
