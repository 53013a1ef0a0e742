"""How good a model is. A file and a row in SUITES for each thing that is measured.

ngram.py has no row: a program by itself, it measures how far one comes without a model.
"""

from .perplexity import evaluate

SUITES = {"perplexity": evaluate}

__all__ = ["SUITES", "evaluate"]
