"""What a run of ``quantize`` has finished so far, in a folder beside the one that it writes."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..checkpoint import EXTRAS, ModelFolder
from ..files import atomic_open
from ..jsonfile import read_object
from ..layouts import Packed
from ..models.shapes import EMBEDDING, HEAD
from ..tensorfile import StoredTensor, TensorFile, write_tensors
from .calibration import Calibration
from .recipe import LoadedRecipe

WORDS = {
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "float32": "F32",
}


def stored(array: np.ndarray) -> StoredTensor:
    """An array as a safetensors file names its dtype."""
    return StoredTensor(WORDS[array.dtype.name], array)


def partial_of(out: Path) -> Path:
    """Where a run that writes ``out`` keeps what it has."""
    return out.absolute().with_name(f".{out.name}.partial")


class Partial:
    """One part for each layer ("0", "1", ...), and for the embedding and head. A part is there when its .json is."""

    def __init__(self, folder: Path, is_new: bool, job: dict[str, Any], began: float):
        """is_new: nothing of an earlier run is in it. job: {"digest", "seconds"} of the runs before this one, which
        began at that perf_counter."""
        self.folder, self.is_new, self.job, self.began = folder, is_new, job, began

    @classmethod
    def begin(
        cls,
        out: Path,
        model: ModelFolder,
        loaded: LoadedRecipe,
        data: Calibration | None,
        *more: str,
        overwrite: bool = False,
        began: float | None = None,
    ) -> Partial:
        """The place for that work: what an earlier run of the very same left there, or a new one. more: what else
        the result depends on; began: when this run did, of perf_counter. ValueError where layers of another recipe,
        text or model are finished there, unless they may be dropped (overwrite)."""
        folder = partial_of(out)
        parts = [*model.path.glob("*.safetensors"), model.path / "config.json"]
        files = [model.path] if model.path.is_file() else sorted(parts)
        facts = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
        job = [facts, loaded.text(), None if data is None else data.digest(), __version__, *more]
        digest = hashlib.sha256(json.dumps(job).encode()).hexdigest()
        before = read_object(folder / "job.json") if (folder / "job.json").is_file() else {}
        is_new = before.get("digest") != digest
        if is_new:
            finished = len(_layers(folder))
            if finished and not overwrite:
                layers = "a finished layer" if finished == 1 else f"{finished} finished layers"
                raise ValueError(
                    f"{folder} holds {layers} of another recipe, text, model or version; --overwrite "
                    "drops that, the command that began it goes on with it"
                )
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            before = {"digest": digest, "seconds": 0.0}
        partial = cls(folder, is_new, before, time.perf_counter() if began is None else began)
        partial._note()
        return partial

    def seconds(self) -> float:
        """Since the beginning, in this run and those before it that got a part done."""
        return self.job["seconds"] + time.perf_counter() - self.began

    def _note(self) -> None:
        with atomic_open(self.folder / "job.json") as file:
            json.dump(self.job | {"seconds": self.seconds()}, file)

    def keep(self, part: str, tensors: dict[str, StoredTensor], records: dict[str, Any]) -> None:
        self._note()
        write_tensors(self.folder / f"{part}.safetensors", tensors, {})
        with atomic_open(self.folder / f"{part}.json") as file:
            json.dump(records, file)

    def record(self, part: str) -> dict[str, Any] | None:
        """The records of a part; None where it is not there."""
        path = self.folder / f"{part}.json"
        return read_object(path) if path.is_file() else None

    def tensors(self, part: str) -> TensorFile:
        return TensorFile(self.folder / f"{part}.safetensors")

    def packed(self, part: str, name: str) -> Packed:
        """The arrays of a matrix that a part holds."""
        tensors = self.tensors(part)
        suffixes = [s for s in ("weight", *EXTRAS) if f"{name}.{s}" in tensors]
        return Packed({s: tensors[f"{name}.{s}"].array for s in suffixes})

    def layers_done(self, layers: int) -> int:
        return next((i for i in range(layers) if self.record(str(i)) is None), layers)

    def parts(self) -> list[str]:
        """In the order in which a file of the model would have them."""
        tables = [name for name in (EMBEDDING, HEAD) if self.record(name) is not None]
        tuned = ["finetuned"] if self.record("finetuned") is not None else []  # over what the layers have
        return [*tables, *map(str, _layers(self.folder)), *tuned]

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _layers(folder: Path) -> list[int]:
    """Those that are finished."""
    return sorted(int(p.stem) for p in folder.glob("*.json") if p.stem.isdigit())
