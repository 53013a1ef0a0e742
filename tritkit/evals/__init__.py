"""How good, how fast. One file and one row in SUITES each."""

from .perplexity import evaluate

SUITES = {"perplexity": evaluate}

__all__ = ["SUITES", "evaluate"]
