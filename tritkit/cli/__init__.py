"""The command line: a table of verbs. Each verb is a function that imports what it needs when it is called."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Sequence

from .files import diff, export, import_, inspect
from .making import pack, quantize, train
from .measuring import compare, evaluate, sweep
from .running import bench, chat, generate


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 1 where rows of a sweep failed, 2 for a mistake of the user,
    130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(overview())
            return 0
        if arguments[0] == "--version":
            from .. import __version__

            print(f"tritkit {__version__}")
            return 0
        verb = arguments[0]
        if verb not in VERBS:
            close = difflib.get_close_matches(verb, VERBS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(VERBS)}"
            raise ValueError(f"there is no verb {verb!r}; {hint}")
        return VERBS[verb](arguments[1:]) or 0
    except (ValueError, FileNotFoundError, MemoryError) as error:
        print(f"tritkit: {sentence(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"tritkit: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ntritkit: stopped", file=sys.stderr)
        return 130


def sentence(error: BaseException) -> str:
    """What an error says, in one line and without control characters: it may quote a file of a stranger."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def overview() -> str:
    rows = "\n".join(f"  {name:<9} {(verb.__doc__ or '').splitlines()[0]}" for name, verb in VERBS.items())
    return (
        "tritkit: language models whose weights are 1 to 8 bits wide.\n\n"
        f"usage: tritkit VERB ...\n\n{rows}\n\n"
        "tritkit VERB --help tells more. Try: tritkit generate --prompt 'Once upon a time'"
    )


VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "pack": pack,
    "quantize": quantize,
    "generate": generate,
    "chat": chat,
    "eval": evaluate,
    "sweep": sweep,
    "bench": bench,
    "import": import_,
    "export": export,
    "compare": compare,
    "inspect": inspect,
    "diff": diff,
}
