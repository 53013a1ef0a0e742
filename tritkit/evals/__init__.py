"""How good, how fast. One file and one row in SUITES each."""

from .perplexity import evaluate
from .speed import measure

SUITES = {"perplexity": evaluate, "speed": measure}

__all__ = ["SUITES", "evaluate", "measure"]
