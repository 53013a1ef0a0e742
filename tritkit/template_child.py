"""The process that renders chat templates (see template.py): a question a line, an answer a line, both JSON.

Environment, filters and globals are those of transformers' apply_chat_template. It imports nothing of tritkit, so that
it starts fast and holds little.
"""

import json
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

LONGEST_REASON = 300  # characters


class Generation(Extension):
    """{% generation %} marks what an assistant said, for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _refuse(message: Any) -> Any:
    raise jinja2.TemplateError(str(message))


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=4)
def compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def answer(question: dict[str, Any]) -> dict[str, str]:
    parts, room = [], question["output"]
    try:
        for part in compiled(question["template"]).generate(**json.loads(question["variables"])):
            parts.append(part)
            room -= len(part)
            if room < 0:
                return {"error": f"makes more than {question['output']} characters of this conversation"}
        text = "".join(parts)
        text.encode()  # halves of characters, which no tokenizer takes
        return {"text": text}
    except jinja2.TemplateSyntaxError as error:
        reason = f"is no Jinja template: {error.message} (line {error.lineno})"
    except jinja2.exceptions.SecurityError as error:
        reason = f"asks for what templates may not have: {error}"
    except jinja2.TemplateError as error:
        reason = f"refuses this conversation: {error}"
    except MemoryError:
        reason = f"needs more than {question['memory'] >> 20} MiB for this conversation"
    except RecursionError:
        reason = "calls itself without end"
    except Exception as error:  # whatever a template can provoke: a division by zero, a number that is a text
        reason = f"fails on this conversation: {type(error).__name__}: {error}"
    return {"error": " ".join(reason.split())[:LONGEST_REASON]}


def _limit_memory(limit: int) -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):  # systems without it; time still bounds what can be taken
        pass


def _start_clock(seconds: float) -> None:
    if hasattr(signal, "setitimer"):  # of CPU time; the signal ends the process, whatever it runs
        signal.setitimer(signal.ITIMER_PROF, seconds)


def main() -> None:
    limited = False
    for line in sys.stdin:
        question = json.loads(line)
        if not limited:
            _limit_memory(question["memory"])
            limited = True
        _start_clock(question["seconds"])
        reply = json.dumps(answer(question))
        _start_clock(0)
        print(reply, flush=True)


if __name__ == "__main__":
    main()
