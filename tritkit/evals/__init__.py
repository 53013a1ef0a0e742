"""How good, how fast. A file and a row in SUITES for each thing that is measured of a model.

ngram.py has no row: a program by itself, it measures how far one comes without a model.
"""

from .bench import measure
from .perplexity import evaluate

SUITES = {"perplexity": evaluate, "speed": measure}

__all__ = ["SUITES", "evaluate", "measure"]
