"""What every engine can do: tokens in, logits or likelihoods out, for many sequences at once. numpy only."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Want = Literal["none", "last", "all", "nll"]


@dataclass(frozen=True)
class Job:
    """Tokens to append to a sequence, and what is wanted of them.

    want: "none"; "last", the logits after the last token; "all", the logits after each token; "nll", minus the
    natural logarithm of the probability of `targets`, one for each token, 0 where the target is -1.
    """

    sequence: int
    tokens: NDArray[np.int32]
    want: Want = "last"
    targets: NDArray[np.int32] | None = None


class Engine(Protocol):
    """A model that runs. A sequence is a number from `new` or `fork`; its keys and values stay in the engine."""

    name: str
    vocab_size: int
    context_length: int

    def new(self) -> int:
        """An empty sequence."""
        ...

    def step(self, jobs: Sequence[Job]) -> list[NDArray[np.float32] | None]:
        """Runs all jobs as one batch; float32 results in their order: none: None, last: [vocab], all: [t, vocab],
        nll: [t]. ValueError, and nothing changed, for an unknown sequence, a token outside the vocabulary, or more
        tokens than `context_length`."""
        ...

    def fork(self, sequence: int) -> int:
        """A new sequence with the same past."""
        ...

    def truncate(self, sequence: int, n: int) -> None:
        """Forgets all but the first n tokens."""
        ...

    def free(self, sequence: int) -> None:
        """Forgets the sequence."""
        ...

    def length(self, sequence: int) -> int:
        """Tokens that the sequence holds."""
        ...
