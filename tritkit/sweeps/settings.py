"""What a sweep measures and how: whatever makes two rows comparable, checked before anything runs. No torch."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import evals
from ..checkpoint import ModelFolder
from ..data import find_files
from ..engine.codes import NotNative
from ..engine.load import Model, load
from ..evals.perplexity import ScoredText, held_out_text, scored_text

SUITES = (*evals.SUITES, "speed")
MODEL_FILES = ("*.safetensors", "config.json", "tokenizer*")  # of a folder, what decides about its output
DIVERGENCE = "llama.cpp"  # the protocol at whose positions models are compared with their parent


@dataclass(frozen=True)
class Settings:
    """chunks, windows: how many of the llama.cpp and the gptq protocol (0: all of the text); the rest as ``eval`` and
    ``quantize`` have them."""

    model: str
    suites: tuple[str, ...] = ("perplexity", "divergence")
    data: tuple[str, ...] = ()
    chunks: int = 40
    windows: int = 10
    calibration: tuple[str, ...] = ()
    sequences: int = 32
    length: int = 2048
    text_field: str = "text"
    engine: str = "native"
    kv_bits: int | None = None
    head: str | None = None
    peer: str | None = None

    def __post_init__(self) -> None:
        for suite in self.suites:
            if suite not in SUITES:
                close = difflib.get_close_matches(suite, SUITES, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(SUITES)}"
                raise ValueError(f"there is no suite {suite!r}; {hint}")
        if not self.suites:
            raise ValueError(f"--suites is empty; known are {', '.join(SUITES)}")
        if self.peer is not None and not self.protocols():
            raise ValueError(f"--peer {self.peer} compares perplexities, but --suites has neither perplexity nor "
                             "divergence")  # fmt: skip
        for name in ("chunks", "windows"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} is {getattr(self, name)}, expected 0 (all of the text) or more")
        if self.data or self.calibration:
            both = set(find_files(self.data or (str(held_out_text()),))) & set(find_files(self.calibration))
            if both:
                raise ValueError(f"{min(both)} is both calibration and test; what is measured must be unseen")

    def length_of(self, model: ModelFolder) -> int:
        """Tokens of a calibration sequence, which the model's context bounds."""
        return min(self.length, model.config.max_position_embeddings)

    def tree(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    def digests(self, model: Path) -> dict[str, str]:
        """SHA-256 of what the files hold that the names of the settings mean now; model: its folder or file."""
        parts = [part for pattern in MODEL_FILES for part in model.glob(pattern)] if model.is_dir() else [model]
        return {
            "model": _sha256(sorted(part for part in parts if part.is_file())),
            "data": _sha256(find_files(self.data)),
            "calibration": _sha256(find_files(self.calibration)),
        }

    def protocols(self) -> tuple[str, ...]:
        """Those that are run."""
        if "perplexity" in self.suites:
            return ("llama.cpp", "gptq")
        return (DIVERGENCE,) if "divergence" in self.suites else ()

    def open(self, folder: Path | str, threads: int) -> Model:
        """The model with the engine that was asked for, or with torch where the native one refuses what it has.

        The head is as it is stored unless asked for otherwise: rounded to 8 bits it would be a change of its own. torch
        keeps it so, and keys and values in float32, whatever was asked for; rows say what they had.
        """
        head = self.head or "float"
        try:
            return load(folder, self.engine, threads, self.kv_bits, head)
        except NotNative:
            if self.engine != "native":
                raise
            return load(folder, "torch", threads)

    def texts(self, model: Model) -> dict[str, ScoredText]:
        """The windows of each protocol. ValueError where the text has not one."""
        found = {}
        for protocol in self.protocols():
            context = min({"llama.cpp": 512, "gptq": 2048}[protocol], model.engine.context_length)
            each = context - context // 2 - 1 if protocol == "llama.cpp" else context - 1
            count = self.chunks if protocol == "llama.cpp" else self.windows
            found[protocol] = scored_text(
                model, self.data or None, protocol=protocol, limit=count * each, text_field=self.text_field
            )
        return found

    def require_same(self, tree: dict[str, Any], path: Path) -> None:
        """ValueError where rows that are there were measured otherwise."""
        for name, value in self.tree().items():
            if tree.get(name) != value:
                option = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
                raise ValueError(f"the rows of {path} have {option} {_said(tree.get(name))}, not {_said(value)}; "
                                 "give another --out")  # fmt: skip


def require_same_files(stored: Any, digests: dict[str, str], path: Path) -> None:
    """ValueError where rows that are there were measured with files that have changed since."""
    if not isinstance(stored, dict):
        raise ValueError(f"the rows of {path} do not say what their model and texts held; give another --out")
    for name, digest in digests.items():
        if stored.get(name) != digest:
            what = "MODEL" if name == "model" else f"the text of --{name}"
            raise ValueError(f"{what} has changed since the rows of {path} were measured; give another --out")


def _sha256(files: Sequence[Path]) -> str:
    """Of the digests of some files, in their order."""
    every = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            every.update(hashlib.file_digest(file, "sha256").digest())
    return every.hexdigest()[:16]


def _said(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value)) or "none"
    return str(value)
