"""A conversation in the terminal, through the model's own chat template (Jinja, sandboxed). Imports no torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .engine.load import load
from .engine.sampling import Sampling
from .engine.text import stream_ids, until_stop
from .tokenizer import Tokenizer

Message = dict[str, str]


def render(tokenizer: Tokenizer, messages: list[Message]) -> str:
    """The prompt that the template makes of a conversation, ending where the assistant begins. ValueError if none."""
    if not tokenizer.chat_template:
        raise ValueError(
            "this model has no chat template: it goes on with texts but was not taught to answer; "
            "use tritkit generate --prompt '...' instead"
        )
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def refuse(message: str) -> Any:
        raise TemplateError(message)

    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(tokenizer.chat_template).render(
            messages=messages,
            add_generation_prompt=True,
            bos_token=_content(tokenizer.config.get("bos_token")),
            eos_token=_content(tokenizer.config.get("eos_token")),
        )
    except TemplateError as error:
        raise ValueError(f"the chat template refuses this conversation: {error}") from None


def _content(token: Any) -> str:
    return token.get("content", "") if isinstance(token, dict) else token or ""


def converse(
    folder: Path | str | None,
    engine: str,
    threads: int,
    system: str | None,
    max_tokens: int,
    sampling: Sampling,
    stop: tuple[str, ...] = (),
) -> int:
    """Read lines from standard input, print answers; returns the exit code."""
    model = load(folder, engine, threads)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    render(model.tokenizer, [*messages, {"role": "user", "content": ""}])  # say at once where there is no template
    asks = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(asks).strip()
        except EOFError:
            return 0
        if not line:
            return 0
        messages.append({"role": "user", "content": line})
        ids = model.tokenizer.encode(render(model.tokenizer, messages), special=False)
        answer = ""
        pieces = model.tokenizer.stream(stream_ids(model, ids, max_tokens, sampling))
        for piece in until_stop(pieces, stop):
            print(piece, end="", flush=True)
            answer += piece
        print()
        messages.append({"role": "assistant", "content": answer})
