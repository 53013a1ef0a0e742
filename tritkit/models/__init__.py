"""Model families. ``config`` is torch-free; the transformer is imported from ``tritkit.models.transformer``."""

from .config import FAMILIES, ModelConfig, config_from_hf

__all__ = ["FAMILIES", "ModelConfig", "config_from_hf"]
