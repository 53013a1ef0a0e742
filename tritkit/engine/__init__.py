"""What every engine can do: tokens in, logits or likelihoods out, for many sequences at once. numpy only."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

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
    kv_bits: int  # of a cached key or value

    def new(self) -> int:
        """An empty sequence."""
        ...

    def step(self, jobs: Sequence[Job]) -> list[NDArray[np.float32] | None]:
        """Runs all jobs as one batch; float32 results in their order: none: None, last: [vocab], all: [t, vocab],
        nll: [t]. ValueError for jobs that `checked` refuses. Whatever goes wrong on the way, Ctrl-C included, every
        sequence stays as long as it was."""
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


def checked(jobs: Sequence[Job], engine: Engine) -> list[Job]:
    """The jobs with their tokens and targets as int32. ValueError, in one sentence, for what no engine runs."""
    found = [_checked(job, engine) for job in jobs]
    seen: set[int] = set()
    for job in found:
        if job.sequence in seen:
            raise ValueError(f"sequence {job.sequence} occurs in two jobs of one step")
        seen.add(job.sequence)
    return found


def _checked(job: Job, engine: Engine) -> Job:
    name = f"sequence {job.sequence}"
    length = engine.length(job.sequence)
    tokens = _int32(job.tokens, 0, engine.vocab_size, "token", name)
    if not len(tokens):
        raise ValueError(f"{name} has a job without tokens")
    if length + len(tokens) > engine.context_length:
        raise ValueError(
            f"{name} would have {length + len(tokens)} tokens, more than the context length of {engine.context_length}"
        )
    if job.want not in get_args(Want):
        raise ValueError(f"want is {job.want!r}, expected one of {', '.join(get_args(Want))}")
    if job.want != "nll":
        return replace(job, tokens=tokens, targets=None)
    if job.targets is None:
        raise ValueError("want is 'nll' but targets is None")
    targets = _int32(job.targets, -1, engine.vocab_size, "target", name)
    if len(targets) != len(tokens):
        raise ValueError(f"targets has shape [{len(targets)}], expected [{len(tokens)}]")
    return replace(job, tokens=tokens, targets=targets)


def _int32(values: NDArray, least: int, vocab_size: int, what: str, name: str) -> NDArray[np.int32]:
    values = np.asarray(values)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise ValueError(
            f"{what}s of {name} are {values.dtype} with {values.ndim} dimensions, expected one dimension of integers"
        )
    outside = values[(values < least) | (values >= vocab_size)]
    if outside.size:
        raise ValueError(f"{what} {outside[0]} of {name} is outside the vocabulary of {vocab_size}")
    return np.ascontiguousarray(values, dtype=np.int32)
