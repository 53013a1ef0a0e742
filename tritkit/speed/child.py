"""An object in a process of its own, called from here: so that its memory and its threads are nobody else's."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class Child:
    """``make(*arguments)`` in a new process; ``call`` runs a method of what it returned.

    A ValueError there is raised here; anything else is a RuntimeError with the traceback. Close it, or use ``with``.
    """

    def __init__(self, what: str, make: Callable[..., Any], *arguments: Any):
        self.what = what
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *arguments: Any) -> Any:
        self._pipe.send((method, arguments))
        return self._answer()

    def close(self) -> None:
        self._process.kill()  # it has nothing to put in order
        self._process.join()
        self._pipe.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> Any:
        try:
            kind, value = self._pipe.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            why = "was killed, as where memory runs out" if code == -signal.SIGKILL else f"ended with code {code}"
            raise ValueError(f"the process of {self.what} {why}") from None
        if kind == "refused":
            raise ValueError(value)
        if kind == "failed":
            raise RuntimeError(f"the process of {self.what} failed:\n{value}")
        return value


def _serve(pipe: Connection, make: Callable[..., Any], arguments: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business, and then it closes us
    target, method = None, ""
    while True:
        try:
            if target is None:
                target = make(*arguments)
                pipe.send(("value", None))
            else:
                pipe.send(("value", getattr(target, method)(*arguments)))
        except (ValueError, MemoryError) as error:
            pipe.send(("refused", str(error) or "there is not enough memory"))
        except Exception:
            pipe.send(("failed", traceback.format_exc()))
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
