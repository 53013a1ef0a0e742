"""tritkit: train, convert, quantise, understand and run language models whose weights are 1 to 8 bits wide.

The public names are few and are imported when they are first used, so that importing tritkit costs nothing. It makes
our folders known to transformers, should that be imported too.
"""

from __future__ import annotations

import importlib
from typing import Any

from . import hf_hook

__version__ = "0.1.0"

_PUBLIC = {
    "load": "tritkit.engine.load",
    "generate": "tritkit.engine.text",
    "train": "tritkit.trainer",
    "quantize": "tritkit.methods.modules",
    "evaluate": "tritkit.evals",
    "FORMATS": "tritkit.formats",
    "quantize_embeddings": "tritkit.embeddings",
    "search_embeddings": "tritkit.embeddings",
}

__all__ = [
    "FORMATS",
    "__version__",
    "evaluate",
    "generate",
    "load",
    "quantize",
    "quantize_embeddings",
    "search_embeddings",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tritkit' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


hf_hook.install()
