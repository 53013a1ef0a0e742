"""QwT*: the terms of all blocks trained together after they were computed. arXiv 2411.13918, section 3.3 (FACTS 7.1).

Only the terms learn; the quantised weights stay what they are. The loss is the caller's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..progress import progress

Loss = Callable[[int], Tensor]  # number of a batch -> what is to fall, with a gradient


def finetune(
    adapters: Sequence[nn.Module], loss: Loss, batches: int, judge: Callable[[], float], epochs: int, rate: float
) -> dict[str, Any]:
    """Train the parameters of ``adapters`` for some epochs of ``batches`` batches with AdamW; judge: the divergence on
    held-out data. Terms that did not get better there become what they were. Weights are rounded to the dtype that
    they are stored in before they are judged."""
    before, first = [copy.deepcopy(a.state_dict()) for a in adapters], judge()
    kinds = [{n: p.dtype for n, p in a.named_parameters()} for a in adapters]
    parameters = []
    for adapter in adapters:
        for parameter in adapter.parameters():
            parameter.data = parameter.data.float()
            parameters.append(parameter.requires_grad_(True))
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    with progress("finetune the compensation", epochs * batches, "batches") as advance, torch.enable_grad():
        for _ in range(epochs):
            for number in range(batches):
                optimizer.zero_grad(set_to_none=True)
                value = loss(number)
                value.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                advance(1, f"loss {float(value.detach()):.4f}")
    for adapter, dtypes in zip(adapters, kinds, strict=True):
        for name, parameter in adapter.named_parameters():
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(dtypes[name])
    after = judge()
    better = after < first
    if not better:
        for adapter, state in zip(adapters, before, strict=True):
            adapter.load_state_dict(state)
    return {"epochs": epochs, "divergence_before": first, "divergence_after": after, "kept": better}
