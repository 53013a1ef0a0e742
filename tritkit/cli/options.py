"""What verbs share on the command line: the parser, groups of options, settings by their dotted names."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Collection
from typing import Any

Parser = argparse.ArgumentParser
DOTTED = "--a.b=value sets any setting of the tree; tritkit.toml of a trained folder lists them all."


class UserParser(argparse.ArgumentParser):
    """One sentence and exit code 2 for a mistake, with the nearest right name where there is one."""

    def error(self, message: str) -> Any:
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            wrong = message.removeprefix(prefix).split()[0].partition("=")[0]
            close = difflib.get_close_matches(wrong, self._option_string_actions, n=1)
            message = f"{self.prog} does not know {wrong!r}" + (f"; did you mean {close[0]}?" if close else "")
        raise ValueError(f"{message} (see {self.prog} --help)")


def parser_of(verb: str, description: str, example: str) -> Parser:
    return UserParser(
        prog=f"tritkit {verb}",
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def engine_options(parser: Parser) -> None:
    parser.add_argument("--engine", choices=("native", "torch"), default="native", help="who runs it (default native)")
    parser.add_argument("--threads", type=_thread_count, default=0, help="CPU threads (default: all usable cores)")
    parser.add_argument(
        "--kv-bits", type=int, choices=(32, 16, 8, 4, 3), help="bits of a cached key or value (default 16; torch: 32)"
    )
    parser.add_argument(
        "--head",
        choices=("float", "int8", "int6", "int4", "screen"),
        help="form of the output head (default: int8 where it is large; torch: float)",
    )


def _thread_count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of threads")
    return int(text)


def calibration_options(parser: Parser) -> None:
    parser.add_argument(
        "--calibration",
        action="append",
        default=[],
        metavar="TEXT",
        help="text, may be repeated (default: bundled books, for what needs any)",
    )
    parser.add_argument("--sequences", type=int, default=32, help="of calibration (default 32)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence (default 2048)")
    parser.add_argument("--text-field", default="text", help="field of .jsonl that holds the text")


def sampling_options(parser: Parser) -> None:
    parser.add_argument("--max-tokens", type=int, default=256, help="longest continuation in tokens (default 256)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="only the K likeliest tokens (default 0: all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="the likeliest tokens that sum to P (default 1: all)")
    parser.add_argument("--min-p", type=float, default=0.0, help="at least so likely, of the likeliest (default 0)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 repeats less (default 1)")
    parser.add_argument("--seed", type=int, help="same seed, same text (default: another one each time)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; may be repeated")


def sampling(options: argparse.Namespace) -> Any:
    from ..engine.sampling import Sampling

    return Sampling(
        options.temperature,
        options.top_k,
        options.top_p,
        options.min_p,
        options.repetition_penalty,
        options.seed,
    )


def dotted(rest: list[str], parser: Parser, plain: Collection[str] = ()) -> dict[str, str]:
    """Settings by their dotted names, from --a.b=value; plain: those without a dot."""
    overrides = {}
    for argument in rest:
        name, equals, value = argument.removeprefix("--").partition("=")
        name = name if "." in name else name.replace("-", "_")
        if not argument.startswith("--") or not equals or ("." not in name and name not in plain):
            known = [option for option in parser._option_string_actions if option.startswith("--")]
            known += [f"--{name}=" for name in plain]
            close = difflib.get_close_matches(argument, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "settings are written --a.b=value"
            raise ValueError(f"{parser.prog} does not know {argument!r}; {hint}")
        overrides[name] = value
    return overrides
