"""How the next token is drawn. The work is done in C++ (csrc/sampling.cpp), without sorting the vocabulary."""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tritkit import _native


@dataclass(frozen=True)
class Sampling:
    """In the order in which they act, which is that of transformers.

    repetition_penalty  logits of tokens in the history: divided if positive, multiplied if negative; 1 is off
    temperature         divides the logits; 0 takes the most likely token, and nothing below matters
    top_k               the k most likely tokens, ties included; 0 is off
    top_p               the fewest most likely tokens that have p of the probability; 1 is off
    min_p               tokens at least min_p times as likely as the most likely one; 0 is off
    seed                same seed, same logits, same tokens; None takes a new one each time
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self):
        def require(good: bool, name: str, expected: str) -> None:
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {expected}")

        require(math.isfinite(self.temperature) and self.temperature >= 0, "temperature", "a number from 0 up")
        require(0 <= self.top_k < 2**31 and self.top_k == int(self.top_k), "top_k", "a whole number from 0 up")
        require(0 < self.top_p <= 1, "top_p", "more than 0 and at most 1")
        require(0 <= self.min_p <= 1, "min_p", "a number from 0 to 1")
        require(
            math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
            "repetition_penalty",
            "a number above 0",
        )
        require(self.seed is None or 0 <= self.seed < 2**64, "seed", "None or a whole number from 0 to 2^64 - 1")


class Sampler:
    """Draws tokens; holds the state of the random numbers, so one for each sequence."""

    def __init__(self, sampling: Sampling):
        self.seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        self._native = _native.Sampler(
            float(sampling.temperature),
            int(sampling.top_k),
            float(sampling.top_p),
            float(sampling.min_p),
            float(sampling.repetition_penalty),
            self.seed,
        )

    def sample(self, logits: NDArray[np.float32], history: Sequence[int] | NDArray[np.int32] = ()) -> int:
        """The next token for float32 logits [vocab]; history: the tokens that the repetition penalty applies to."""
        return self._native.sample(_logits(logits), np.asarray(history, dtype=np.int32))

    def distribution(
        self, logits: NDArray[np.float32], history: Sequence[int] | NDArray[np.int32] = ()
    ) -> NDArray[np.float64]:
        """The probabilities [vocab] that `sample` draws from, after all filters."""
        probabilities = np.zeros(len(logits))
        for token, p in self._native.distribution(_logits(logits), np.asarray(history, dtype=np.int32)):
            probabilities[token] = p
        return probabilities


def _logits(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    if logits.ndim != 1 or logits.size == 0:
        raise ValueError(f"logits have shape {list(logits.shape)}, expected [vocab]")
    return np.ascontiguousarray(logits, dtype=np.float32)
