"""AdamW and the schedules: the two-stage one of BitNet b1.58 and the plain linear one of its full-precision twin."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .layers import Linear


@dataclass(frozen=True)
class OptimConfig:
    """ "The Era of 1-bit LLMs: Training Tips" (FACTS 3.1). Rates are per step of Adam; decay acts on latent weights."""

    schedule: str = "two-stage"  # or "linear": one line, constant weight decay
    lr: float = 1.5e-3  # peak of the first stage
    lr_2: float = 0.0  # peak of the second stage's line; 0: two thirds of lr, the ratio of the paper's 700M
    warmup_steps: int = 375
    weight_decay: float = 0.1  # two-stage: zero from the midpoint
    beta_1: float = 0.9
    beta_2: float = 0.95
    clip: float = 1.0  # largest norm of the whole gradient; 0: no clipping

    def __post_init__(self) -> None:
        if self.schedule not in ("two-stage", "linear"):
            raise ValueError(f"optim.schedule is {self.schedule!r}; known are 'two-stage' and 'linear'")
        if not self.lr > 0:
            raise ValueError(f"optim.lr must be above 0, not {self.lr}")
        for name in ("lr_2", "warmup_steps", "weight_decay", "clip"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"optim.{name} must be at least 0, not {getattr(self, name)}")
        for name in ("beta_1", "beta_2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name} must be from 0 up to, but not, 1; it is {getattr(self, name)}")

    def second_stage(self, step: int, steps: int) -> bool:
        return self.schedule == "two-stage" and 2 * step >= steps

    def lr_at(self, step: int, steps: int) -> float:
        """warm(t) * peak of the stage * (1 - t / T): the second stage goes on along the LINE of the lower peak."""
        peak = (self.lr_2 or self.lr * 2 / 3) if self.second_stage(step, steps) else self.lr
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return warm * peak * (1 - step / steps)

    def weight_decay_at(self, step: int, steps: int) -> float:
        return 0.0 if self.second_stage(step, steps) else self.weight_decay


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW that decays the 2-D weights of linears and nothing else: no norm, bias or embedding."""
    decayed = [m.weight for m in model.modules() if isinstance(m, Linear)]
    chosen = {id(p) for p in decayed}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": decayed, "decays": True}, {"params": rest, "decays": False, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta_1, config.beta_2), fused=True)


def set_step(optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, steps: int) -> float:
    """Set this step's learning rate and weight decay; returns the rate."""
    lr = config.lr_at(step, steps)
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = config.weight_decay_at(step, steps) if group["decays"] else 0.0
    return lr
