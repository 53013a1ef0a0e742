"""How fast a model runs here, beside what the machine can do and beside other engines: the verb `bench`."""

from .bench import measure

__all__ = ["measure"]
