"""A conversation in the terminal, through the model's own chat template. Imports no torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from . import template
from .engine.load import load
from .engine.sampling import Sampling
from .engine.text import stream_ids, until_stop
from .tokenizer import Tokenizer

Message = dict[str, str]
SPECIAL_TOKENS = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


def render(tokenizer: Tokenizer, messages: list[Message]) -> str:
    """The prompt that the template makes of a conversation, ending where the assistant begins. ValueError if none."""
    if not tokenizer.chat_template:
        raise ValueError(
            "this model has no chat template: it goes on with texts but was not taught to answer; "
            "use tritkit generate --prompt '...' instead"
        )
    specials = {name: _content(token) for name, token in tokenizer.config.items() if name in SPECIAL_TOKENS}
    return template.render(
        _template(tokenizer.chat_template),
        {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True, **specials},
    )


def _template(given: Any) -> str:
    """The template that a model answers with: the one there is, or of a list of them the one that is called default."""
    if isinstance(given, list):
        given = next((t.get("template") for t in given if isinstance(t, dict) and t.get("name") == "default"), None)
    if not isinstance(given, str):
        raise ValueError("the chat_template of this model is no text, and no list with one that is called default")
    return given


def _content(token: Any) -> str:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""


def fitted(tokenizer: Tokenizer, messages: list[Message], room: int) -> tuple[list[Message], list[int]]:
    """The conversation without the oldest turns that ``room`` tokens cannot hold, and its prompt in tokens.

    The system message and the newest message stay, however long.
    """
    first = int(messages[0]["role"] == "system")
    while True:
        ids = tokenizer.encode(render(tokenizer, messages), special=False)
        if len(ids) <= room or len(messages) - first < 3:
            return messages, ids
        messages = [*messages[:first], *messages[first + 2 :]]  # a question and its answer


def converse(
    folder: Path | str | None,
    engine: str,
    threads: int,
    kv_bits: int | None,
    head: str | None,
    system: str | None,
    max_tokens: int,
    sampling: Sampling,
    stop: tuple[str, ...] = (),
) -> int:
    """Read lines from standard input, print answers; returns the exit code.

    A conversation that outgrows the context loses its oldest turns. Up to half of the context is kept for the answer.
    """
    model = load(folder, engine, threads, kv_bits, head)
    context = model.engine.context_length
    room = context - max(1, min(max_tokens, context // 2))
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
        messages, ids = fitted(model.tokenizer, messages, room)
        answer = ""
        pieces = model.tokenizer.stream(stream_ids(model, ids, max_tokens, sampling))
        for piece in until_stop(pieces, stop):
            print(piece, end="", flush=True)
            answer += piece
        print()
        messages.append({"role": "assistant", "content": answer})
