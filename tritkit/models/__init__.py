"""Model families. ``config`` is torch-free; the transformer is imported from ``tritkit.models.transformer``."""

from .config import ModelConfig, config_from_hf
from .families import FAMILIES

__all__ = ["FAMILIES", "ModelConfig", "config_from_hf"]
