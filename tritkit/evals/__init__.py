"""How good a model is. A file and a row in SUITES for each thing that is measured.

ngram.py has no row: a program by itself, it measures how far one comes without a model.
"""

from collections.abc import Callable
from typing import Any

from . import divergence
from .perplexity import evaluate

SUITES: dict[str, Callable[..., dict[str, Any]]] = {"perplexity": evaluate, "divergence": divergence.evaluate}

__all__ = ["SUITES", "evaluate"]
