"""Which numbers of a format to choose. table.py has the table of methods; mixes.py and importance.py need no torch."""

from typing import Any


def __getattr__(name: str) -> Any:
    """The names of the table when they are asked for: its methods import torch."""
    if name in ("METHODS", "NEED_INPUTS", "Solve"):
        from . import table

        return getattr(table, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
