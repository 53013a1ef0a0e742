"""Text that a model is calibrated on: sequences of tokens, drawn evenly from the documents in their order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data import documents, find_files
from ..tokenizer import Tokenizer

SPREAD = 4  # so many times the tokens that are wanted are read, and the sequences drawn evenly from them


@dataclass(frozen=True)
class Calibration:
    """sequences: of how many tokens ``fit`` (for methods) and ``held_out`` (to judge them) are, int64 [n, length]."""

    fit: Tensor
    held_out: Tensor
    sources: tuple[str, ...] = ()

    def digest(self) -> str:
        return hashlib.sha256(self.fit.numpy().tobytes() + self.held_out.numpy().tobytes()).hexdigest()[:16]


def read_calibration(
    tokenizer: Tokenizer,
    sources: Sequence[str],
    sequences: int = 32,
    length: int = 2048,
    held_out: int = 0,
    longest: int | None = None,
    text_field: str = "text",
) -> Calibration:
    """``sequences`` and ``held_out`` sequences of ``length`` tokens (at most ``longest``, the model's context) of text.

    Documents follow each other with the tokenizer's marks between them. A text with fewer sequences gives those that
    it has; ValueError where it has not even one of each kind that is wanted.
    """
    if sequences < 1 or length < 1:
        raise ValueError(f"calibration on {sequences} sequences of {length} tokens is none")
    length = min(length, longest) if longest else length
    wanted = sequences + held_out
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    pieces: list[np.ndarray] = []
    have = 0
    for text in documents(find_files(list(sources)), text_field):
        pieces.append(np.array([*begin, *tokenizer.encode(text, special=False), *end], np.int64))
        have += len(pieces[-1])
        if have >= SPREAD * wanted * length:
            break
    stream = np.concatenate(pieces) if pieces else np.empty(0, np.int64)
    least = 1 + bool(held_out)
    if len(stream) < least * length:
        raise ValueError(
            f"the calibration text has {len(stream)} tokens, fewer than {least} sequence{'s' * (least > 1)} of "
            f"{length}; give more text, or a smaller --length"
        )
    count = min(wanted, len(stream) // length)
    starts = np.linspace(0, len(stream) - length, count).astype(np.int64)
    rows = torch.from_numpy(np.stack([stream[s : s + length] for s in starts]))
    kept = min(held_out, count - 1)
    if not kept:
        return Calibration(rows, rows[:0], tuple(sources))
    # held-out ones from all over the text, not from its end
    apart = np.unique(np.linspace(0, count - 1, kept + 2)[1:-1].round().astype(int))
    fit = np.setdiff1d(np.arange(count), apart)
    return Calibration(rows[fit], rows[apart], tuple(sources))
