"""Chat templates: Jinja from strangers, rendered in a process of its own that may take little time, memory and room.

Jinja's sandbox keeps a template from our objects, but not from loops without end or texts of gigabytes, and what runs
inside one call of C cannot be stopped from Python. So a child process renders, under limits that the system enforces,
and is ended where it breaks them. It stays for the next conversation: after the first one, rendering takes no longer
than it would here.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

CHILD = Path(__file__).parent / "template_child.py"
LARGEST_TEMPLATE = 1 << 20  # bytes; those of real models have up to some 20,000
CPU_SECONDS = 1.0  # for one conversation
CLOCK_SECONDS = 20.0  # the same on a machine that is busy, or where the system cannot count a process's time
MEMORY = 512 << 20  # bytes, Python itself included
OUTPUT = 1 << 20  # characters beyond 4 times those of the conversation

_child: subprocess.Popen[str] | None = None
_lock = threading.Lock()


def render(template: str, variables: dict[str, Any]) -> str:
    """What the template makes of the variables (plain values); ValueError, one sentence, where it refuses or fails."""
    if len(template) > LARGEST_TEMPLATE:
        raise ValueError(f"the chat template has {len(template)} characters, more than any model needs")
    given = json.dumps(variables)
    limits = {"seconds": CPU_SECONDS, "memory": MEMORY, "output": OUTPUT + 4 * len(given)}
    with _lock:
        answer = _ask(json.dumps({"template": template, "variables": given, **limits}))
    reply = json.loads(answer)
    if "error" in reply:
        raise ValueError(f"the chat template {reply['error']}")
    return reply["text"]


def _ask(question: str) -> str:
    """One line to the child and one back. ValueError where it broke a limit, OSError where it does not even start."""
    global _child
    if _child is not None and _child.poll() is not None:
        close()
    if _child is None:
        _child = subprocess.Popen(
            [sys.executable, "-P", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="ascii",
            start_new_session=True,  # Ctrl-C is for us
        )
    child = _child
    assert child.stdin is not None and child.stdout is not None
    watch = threading.Timer(CLOCK_SECONDS, child.kill)
    watch.daemon = True
    watch.start()
    answer = ""
    try:
        child.stdin.write(question + "\n")
        child.stdin.flush()
        answer = child.stdout.readline()
    except BrokenPipeError:
        pass
    finally:  # also where Ctrl-C came in between: an answer that nobody read would be taken for the next one
        watch.cancel()
        if not answer.endswith("\n"):
            code = close()
    if answer.endswith("\n"):
        return answer
    if code > 0:
        raise OSError(f"the process that renders chat templates ends with exit code {code}: {sys.executable} {CHILD}")
    raise ValueError(
        f"the chat template takes more than {CPU_SECONDS:g} s or {MEMORY >> 20} MiB for this conversation: it was "
        "stopped"
    )


def close() -> int:
    """End the child, if there is one; its exit code, below 0 where a signal ended it."""
    global _child
    child, _child = _child, None
    if child is None:
        return 0
    with contextlib.suppress(subprocess.TimeoutExpired):  # it may be ending by itself, and say why
        child.wait(0.2)
    child.kill()
    with contextlib.suppress(BrokenPipeError):
        child.communicate()
    return child.returncode


atexit.register(close)
