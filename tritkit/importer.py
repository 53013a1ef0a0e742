"""``tritkit import``: a model from anywhere to a model folder. Every byte of weights stays what it was.

GGUF's block types stay in their own bits; floats keep their dtype; q and k rows of llama.cpp's order are re-ordered.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from . import results
from .checkpoint import FOREIGN, ModelFolder, open_folder
from .files import atomic_open
from .folderfacts import describe
from .folderwriter import copy_companions, write_folder
from .layouts import LAYOUTS
from .models.shapes import matrix_names
from .newfolder import beside, require_finite, require_new
from .progress import progress
from .sources import HUB_ID, open_model
from .tensorfile import LazyTensor, write_tensors


def import_model(
    source: Path | str,
    out: Path | str,
    overwrite: bool = False,
    i2_s: str | None = None,
    tokenizer: Path | str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> dict[str, Any]:
    """Write the model ``source`` into the folder ``out`` and return what it is.

    source: a Hugging Face folder, of GPTQ or compressed-tensors too, a GGUF file, a llama2.c checkpoint, or the id of a
    model on the Hugging Face hub (owner/name or owner/name/file.gguf), of which ``revision`` (a branch, tag or commit)
    is downloaded with ``token`` (none: the one that is logged in). i2_s, tokenizer: see ``open_model``. ValueError for
    what tritkit cannot run, and nothing is written.
    """
    out, path = Path(out), Path(source)
    if not str(out).strip() or out == Path():
        raise ValueError("the folder to write has no name")
    require_new(out, overwrite)
    if not path.exists():
        if not HUB_ID.fullmatch(str(source)):
            raise ValueError(f"there is no file or folder {source}, and it is no id of a model (owner/name) either")
        if path.parent.is_dir():
            raise ValueError(f"there is no file or folder {source}")
        from .hub import download

        path = download(str(source), revision, token)
    elif revision is not None or token is not None:
        option = "--token" if revision is None else "--revision"
        raise ValueError(f"{option} is for models of the Hugging Face hub, but {source} is here already")
    model = open_model(path, i2_s, tokenizer)
    if tokenizer is not None and model.container != "llama2.c":
        raise ValueError(f"--tokenizer is for llama2.c checkpoints, but {source} brings its own")
    if i2_s is not None and (model.container != "gguf" or f"i2_s_{i2_s}" not in model.layouts.values()):
        raise ValueError(f"--i2-s is the order of I2_S codes in a GGUF file, but {source} is none that has such codes")
    require_new(out, overwrite, model.path)
    words = model.tokenizer()
    tensors = {name: _lazy(model, name) for name in model.tensors}
    settings = {"source": str(source), "container": model.container, "revision": revision}
    with beside(out) as folder, progress(f"import {model.path.name}", len(tensors), "tensors") as advance:
        if model.container == "folder":
            folder.mkdir()
            write_tensors(folder / "model.safetensors", tensors, {}, advance)
            copy_companions(model.path, folder)
            for extra in sorted(model.path.glob("LICENSE*")):
                shutil.copyfile(extra, folder / extra.name)
            with atomic_open(folder / "config.json") as file:
                json.dump(model.hf, file, indent=2)
        else:
            write_folder(folder, model.config, tensors, words, model.layouts, advance)
            if model.container in FOREIGN:
                copy_companions(model.path, folder)
        with atomic_open(folder / "tritkit.toml") as file:
            lines = (f"{key} = {json.dumps(value)}\n" for key, value in settings.items() if value is not None)
            file.write("[import]\n" + "".join(lines))
        written = open_folder(folder)
        _verify(model, written)
        written.tokenizer()
    metrics = describe(open_folder(out))
    results.record(out, "import", settings, metrics)
    return metrics


def _lazy(model: ModelFolder, name: str) -> LazyTensor:
    """A tensor that is checked when it is copied: a scale that is not finite makes garbage of its whole block."""
    stored = model.tensors[name]  # a view into the file, or a copy where rows are re-ordered: not kept

    def make() -> np.ndarray:
        tensor = model.tensors[name]
        require_finite(model, name, tensor)
        return tensor.array

    return LazyTensor(stored.dtype, stored.array.shape, make)


def _verify(model: ModelFolder, written: ModelFolder) -> None:
    """What was written is what was read, tensor by tensor."""
    for name in model.tensors:
        ours, theirs = written.tensors[name], model.tensors[name]
        if ours.dtype != theirs.dtype or not np.array_equal(_bits(ours.array), _bits(theirs.array)):
            raise OSError(f"{written.path} does not hold what was written to it: {name} differs")
    if dict(written.layouts) != dict(model.layouts):
        raise OSError(f"{written.path} does not hold what was written to it: its layouts differ")
    assert all(layout in LAYOUTS for layout in written.layouts.values())
    assert matrix_names(written.config) == matrix_names(model.config)


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
