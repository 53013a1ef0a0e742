"""Verbs that run models: generate, chat, bench."""

from __future__ import annotations

import sys

from .options import engine_options, parser_of, sampling, sampling_options


def generate(arguments: list[str]) -> int:
    """a prompt and its continuation"""
    parser = parser_of(
        "generate",
        "Print the prompt and its continuation as it comes. MODEL is a model folder (none: the bundled model).",
        "tritkit generate --prompt 'Once upon a time' --max-tokens 200 --seed 1",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL")
    parser.add_argument("--prompt", default="", help="text to go on from (default: none, a new text)")
    sampling_options(parser)
    engine_options(parser)
    parser.add_argument("--quiet", action="store_true", help="no line of speed at the end")
    options = parser.parse_args(arguments)
    from ..engine.load import load
    from ..engine.text import Request, Timing, stream_text

    request = Request(options.prompt, options.max_tokens, sampling(options), tuple(options.stop))
    model = load(options.model, options.engine, options.threads, options.kv_bits, options.head)
    timing = Timing()
    pieces = stream_text(model, request, timing)
    first = next(pieces, "")  # a prompt that is refused is not printed either
    print(options.prompt + first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    if not options.quiet:
        print(
            f"[{timing.tokens} tokens, {timing.decode_rate:.0f} tokens/s with the {model.engine.name} engine, "
            f"prompt of {timing.prompt_tokens} tokens in {timing.prefill_seconds * 1e3:.0f} ms]",
            file=sys.stderr,
        )
    return 0


def chat(arguments: list[str]) -> int:
    """talk with a model that has a chat template"""
    parser = parser_of(
        "chat",
        "A conversation in the terminal; an empty line or Ctrl-D ends it.",
        "tritkit chat models/assistant --system 'Be brief.'",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a model folder (none: the bundled model)")
    parser.add_argument("--system", help="the system message")
    sampling_options(parser)
    engine_options(parser)
    options = parser.parse_args(arguments)
    from ..chat import converse

    return converse(
        options.model,
        options.engine,
        options.threads,
        options.kv_bits,
        options.head,
        options.system,
        options.max_tokens,
        sampling(options),
        tuple(options.stop),
    )


def bench(arguments: list[str]) -> int:
    """prefill and decode speed, memory, and how near they are to what the machine can do"""
    parser = parser_of(
        "bench",
        "Tokens a second of prefill and decode as llama-bench counts them (pp512, tg128), beside the machine's own\n"
        "limits, which are measured in the same run. A table, then one line of JSON; added to MODEL's results.json.",
        "tritkit bench --shape bitnet-2b4t --threads 2",
    )
    from ..speed.bench import add_options, run

    add_options(parser)
    engine_options(parser)
    return run(parser.parse_args(arguments))
