"""Whatever a user names as a model, opened: a folder, a GGUF file, a llama2.c checkpoint. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

from .checkpoint import ModelFolder, open_folder

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(/[\w./-]+\.gguf)?")  # owner/name, a file of it
PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # how torch.save begins


def bundled_folder() -> Path:
    """The model that ships with tritkit."""
    return Path(__file__).parent / "bundled" / "model"


def open_model(source: Path | str, i2_s: str | None = None, tokenizer: Path | str | None = None) -> ModelFolder:
    """Open a model folder, a GGUF file or a llama2.c checkpoint; ValueError says what else it is.

    i2_s: "x86" or "arm", the order of I2_S codes, asked for where the file does not tell. tokenizer: a llama2.c
    tokenizer file (none: the tok*.bin or tokenizer.bin beside the checkpoint).
    """
    path = Path(source)
    if path.is_file():
        if path.suffix == ".gguf" or _begins(path, 4) == b"GGUF":
            from .gguf_model import open_gguf

            return open_gguf(path, i2_s)
        if path.suffix == ".safetensors" or path.name == "config.json":
            raise ValueError(f"{path} is one file of a model folder; give the folder {path.parent}")
        if _begins(path, 4).startswith(PICKLES):
            raise ValueError(f"{path} is a pickle, which could run any code when it is read; tritkit reads safetensors")
        from .llama2c import open_llama2c

        return open_llama2c(path, tokenizer)
    if not path.exists() and HUB_ID.fullmatch(str(source)):
        raise ValueError(
            f"there is no model folder {source}; if it is a model of the Hugging Face hub: "
            f"tritkit import {source} models/{path.name}"
        )
    return open_folder(path)


def _begins(path: Path, count: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(count)
