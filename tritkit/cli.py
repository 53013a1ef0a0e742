"""The command line: a table of verbs. Each verb is a function here that imports what it needs when it is called."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 2 for a mistake of the user, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(overview())
            return 0
        if arguments[0] == "--version":
            from . import __version__

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


def parser_of(verb: str, description: str, example: str) -> Parser:
    return UserParser(
        prog=f"tritkit {verb}",
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _engine_options(parser: Parser) -> None:
    parser.add_argument("--engine", choices=("native", "torch"), default="native", help="who runs it (default native)")
    parser.add_argument("--threads", type=_threads, default=0, help="CPU threads (default: all usable cores)")
    parser.add_argument(
        "--kv-bits", type=int, choices=(32, 16, 8, 4, 3), help="bits of a cached key or value (default 16; torch: 32)"
    )
    parser.add_argument(
        "--head",
        choices=("float", "int8", "int6", "int4", "screen"),
        help="form of the output head (default: int8 where it is large; torch: float)",
    )


def _threads(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of threads")
    return int(text)


def _sampling_options(parser: Parser) -> None:
    parser.add_argument("--max-tokens", type=int, default=256, help="longest continuation in tokens (default 256)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="only the K likeliest tokens (default 0: all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="the likeliest tokens that sum to P (default 1: all)")
    parser.add_argument("--min-p", type=float, default=0.0, help="at least so likely, of the likeliest (default 0)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 repeats less (default 1)")
    parser.add_argument("--seed", type=int, help="same seed, same text (default: another one each time)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; may be repeated")


def _sampling(options: argparse.Namespace) -> Any:
    from .engine.sampling import Sampling

    return Sampling(
        options.temperature,
        options.top_k,
        options.top_p,
        options.min_p,
        options.repetition_penalty,
        options.seed,
    )


def train(arguments: list[str]) -> int:
    """text to a model folder, from scratch or from a latent folder"""
    parser = parser_of(
        "train",
        "Train a model on text. CONFIG is a TOML file of settings (none: a small b1.58 model); OUT\n"
        "becomes the model folder. The same command goes on after a stop.\n" + DOTTED,
        "tritkit train configs/demo-b158.toml runs/mine --data stories.txt --train.steps=500",
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="a .toml file")
    parser.add_argument("out", metavar="OUT", help="the model folder to write")
    parser.add_argument(
        "--data", action="append", default=[], help="a file, folder or glob: .txt(.xz|.gz|.zst), .jsonl"
    )
    parser.add_argument("--val", action="append", default=[], help="held-out text (default: 2 %% of the documents)")
    parser.add_argument("--text-field", help="field of .jsonl that holds the text (default text)")
    parser.add_argument("--threads", help="CPU threads (default: all cores)")
    parser.add_argument("--keep-optimizer", action="store_true", help="keep its state, so that later runs train on")
    parser.add_argument("--overwrite", action="store_true", help="begin anew where OUT holds something")
    options, rest = parser.parse_known_intermixed_args(arguments)
    overrides = _dotted(rest, parser)
    short = {"data.text_field": options.text_field, "train.threads": options.threads}
    overrides |= {name: value for name, value in short.items() if value is not None}
    from .trainer import TrainingStopped, load_settings
    from .trainer import train as run

    settings = load_settings(options.config, overrides)
    if options.data or options.val:
        import dataclasses

        given: dict[str, Any] = {k: tuple(v) for k, v in (("sources", options.data), ("val", options.val)) if v}
        settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, **given))
    try:
        metrics = run(settings, options.out, keep_optimizer=options.keep_optimizer, overwrite=options.overwrite)
    except TrainingStopped as stopped:
        print(f"tritkit: {stopped}", file=sys.stderr)
        return stopped.code
    from .tables import print_metrics

    print_metrics(options.out, metrics)
    return 0


def _dotted(rest: list[str], parser: Parser) -> dict[str, str]:
    overrides = {}
    for argument in rest:
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals or "." not in name:
            known = [option for option in parser._option_string_actions if option.startswith("--")]
            close = difflib.get_close_matches(argument, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "settings are written --a.b=value"
            raise ValueError(f"{parser.prog} does not know {argument!r}; {hint}")
        overrides[name] = value
    return overrides


def pack(arguments: list[str]) -> int:
    """a latent low-bit folder to its packed form"""
    parser = parser_of(
        "pack",
        "Round each linear of a trained b1.58 or b1 folder for good and store the codes.",
        "tritkit pack runs/mine runs/mine-packed",
    )
    parser.add_argument("model", metavar="MODEL", help="a latent model folder")
    parser.add_argument("out", metavar="OUT", help="the packed folder to write")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of embedding and norms (default bfloat16; float32 for transformers in float32)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what OUT holds")
    options = parser.parse_args(arguments)
    from .pack import pack as run
    from .tables import print_metrics

    print_metrics(options.out, run(options.model, options.out, options.dtype, options.overwrite))
    return 0


def quantize(arguments: list[str]) -> int:
    """a float model to one of 1 to 8 bits: round to nearest, GPTQ, k-quants, AWQ, QwT ... by a recipe"""
    parser = parser_of(
        "quantize",
        "Quantise the linears of MODEL after training. RECIPE is a TOML file, a mix of llama.cpp (q4_k_m), or the\n"
        "name of a format (int4_g64, nf4, q5_k, ternary); without one the options say it. A run that was stopped goes\n"
        "on at the layer it was in. Any setting of a recipe may follow as --a.b=value.",
        "tritkit quantize models/smol models/smol-q4 --format int4_g64 --method gptq --calibration wiki.txt",
    )
    parser.add_argument("model", metavar="MODEL", help="a model folder or a GGUF file")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="recipe file, mix or format")
    parser.add_argument("--format", help="of the weights: int{2..8}[_gN|_row|_tensor][_asym], nf4, q4_k, ternary ...")
    parser.add_argument("--method", help="rtn, gptq or search (default: search for ggml's formats, else rtn)")
    parser.add_argument("--range", help="how a grid is chosen: absmax, minmax, percentile, mse, entropy")
    parser.add_argument("--inputs", help="format of activations, for instance int8_row; +outliers for LLM.int8()")
    parser.add_argument("--inputs-range", help="static ranges of activations: absmax, minmax, percentile, mse, entropy")
    parser.add_argument("--transform", help="awq or smoothquant, folded into the neighbours first")
    parser.add_argument("--correct", help="qwt: a closed-form compensation of each layer")
    parser.add_argument("--embedding", help="format of the embedding (default: as it is)")
    parser.add_argument("--head", help="format of the output head, where the model has one of its own")
    parser.add_argument("--bits", type=float, help="mixed formats by measured sensitivity, so many bits a weight")
    parser.add_argument(
        "--calibration",
        action="append",
        default=[],
        metavar="TEXT",
        help="text, may be repeated (default: bundled books, for what needs any)",
    )
    parser.add_argument(
        "--imatrix", metavar="FILE", help="llama.cpp's importance matrix; measured and written where there is none"
    )
    parser.add_argument("--sequences", type=int, default=32, help="of calibration (default 32)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence (default 2048)")
    parser.add_argument("--text-field", default="text", help="field of .jsonl that holds the text")
    parser.add_argument("--overwrite", action="store_true", help="replace what OUT holds")
    options, rest = parser.parse_known_intermixed_args(arguments)
    overrides = _dotted(rest, parser)
    names = ("format", "method", "range", "inputs", "inputs_range", "transform", "correct", "embedding", "head")
    overrides |= {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.bits is not None:
        overrides["budget.bits"] = str(options.bits)
    from .methods.quantizer import quantize_folder
    from .methods.recipe import read_recipe
    from .tables import print_metrics

    metrics = quantize_folder(
        options.model,
        options.out,
        read_recipe(options.recipe, overrides),
        options.calibration or None,
        sequences=options.sequences,
        length=options.length,
        text_field=options.text_field,
        overwrite=options.overwrite,
        imatrix=options.imatrix,
    )
    print_metrics(options.out, metrics)
    return 0


def generate(arguments: list[str]) -> int:
    """a prompt and its continuation"""
    parser = parser_of(
        "generate",
        "Print the prompt and its continuation as it comes. MODEL is a model folder (none: the bundled model).",
        "tritkit generate --prompt 'Once upon a time' --max-tokens 200 --seed 1",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL")
    parser.add_argument("--prompt", default="", help="text to go on from (default: none, a new text)")
    _sampling_options(parser)
    _engine_options(parser)
    parser.add_argument("--quiet", action="store_true", help="no line of speed at the end")
    options = parser.parse_args(arguments)
    from .engine.load import load
    from .engine.text import Request, Timing, stream_text

    request = Request(options.prompt, options.max_tokens, _sampling(options), tuple(options.stop))
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
    _sampling_options(parser)
    _engine_options(parser)
    options = parser.parse_args(arguments)
    from .chat import converse

    return converse(
        options.model,
        options.engine,
        options.threads,
        options.kv_bits,
        options.head,
        options.system,
        options.max_tokens,
        _sampling(options),
        tuple(options.stop),
    )


def evaluate(arguments: list[str]) -> int:
    """perplexity and bits per byte on held-out text, or the divergence from a parent"""
    from .evals import SUITES

    parser = parser_of(
        "eval",
        "Perplexity of a model, added to its results.json. Protocols: document (each document from BOS to EOS, with\n"
        "bits per byte), llama.cpp (second halves of chunks of 512), gptq (whole windows of 2048). The suite\n"
        "divergence reads the same text with the model's parent too: KL divergence, and how often both find the same\n"
        "token the likeliest.",
        "tritkit eval runs/mine --data wiki.test.txt --protocol llama.cpp\n"
        "  tritkit eval models/smol-q4 --suite divergence --parent models/smol",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a model folder (none: the bundled model)")
    parser.add_argument("--suite", choices=SUITES, default="perplexity", help="what is measured (default perplexity)")
    parser.add_argument("--parent", metavar="MODEL", help="divergence: the model that this one was made of")
    parser.add_argument("--data", action="append", default=[], help="text (default: the bundled held-out books)")
    parser.add_argument("--protocol", choices=("document", "llama.cpp", "gptq"), default="document")
    parser.add_argument("--context", type=int, help="tokens of a window (default: the protocol's, at most the model's)")
    parser.add_argument("--limit", type=int, default=0, help="stop after so many scored tokens (default 0: all)")
    parser.add_argument("--text-field", default="text", help="field of .jsonl that holds the text")
    parser.add_argument("--no-record", action="store_true", help="do not add the numbers to results.json")
    _engine_options(parser)
    options = parser.parse_args(arguments)
    from . import results
    from .engine.load import load
    from .tables import print_metrics

    if (options.suite == "divergence") != (options.parent is not None):
        raise ValueError("--suite divergence and --parent MODEL need each other")
    if options.suite == "divergence" and options.head is None:
        options.head = "float"  # as it is stored: rounded to 8 bits it would be a change of its own
    engine = (options.engine, options.threads, options.kv_bits, options.head)
    model = load(options.model, *engine)
    metrics = SUITES[options.suite](
        model,
        options.data or None,
        protocol=options.protocol,
        context=options.context,
        limit=options.limit,
        text_field=options.text_field,
        **({} if options.parent is None else {"parent": load(options.parent, *engine)}),
    )
    settings = {k: v for k, v in vars(options).items() if k not in ("model", "no_record")}
    if not options.no_record and model.folder.container == "folder" and options.model is not None:
        results.record(options.model, "eval", settings, metrics)
    print_metrics(str(model.folder.path), metrics)
    return 0


def sweep(arguments: list[str]) -> int:
    """many recipes on one model, each quantised and measured: one table"""
    parser = parser_of(
        "sweep",
        "Quantise MODEL by each of the RECIPES (files, mixes or formats, as quantize takes them), measure each result\n"
        "and the model itself alike, and add a row of each to OUT, a .json file. It says how long it will take before\n"
        "it starts; stopped, it goes on with the same command. A recipe that fails has its sentence in its row.",
        "tritkit sweep models/smol recipes/*.toml q4_k_m --data wiki.test.txt --calibration other.txt --out sweep.json",
    )
    parser.add_argument("model", metavar="MODEL", help="a full-precision model folder or GGUF file")
    parser.add_argument("recipes", metavar="RECIPE", nargs="*", help="recipe file, mix or format")
    parser.add_argument("--out", required=True, metavar="FILE.json", help="where the rows are, and are added")
    parser.add_argument(
        "--suites",
        default="perplexity,divergence",
        help="perplexity (llama.cpp's and gptq's protocol), divergence (KL to MODEL), speed (decode)",
    )
    parser.add_argument("--data", action="append", default=[], help="test text (default: the bundled held-out books)")
    parser.add_argument(
        "--chunks", type=int, default=40, help="of 512 tokens, llama.cpp's protocol (default 40; 0 all)"
    )
    parser.add_argument("--windows", type=int, default=10, help="of 2048 tokens, gptq's protocol (default 10; 0: all)")
    parser.add_argument(
        "--calibration", action="append", default=[], metavar="TEXT", help="for methods (default: books)"
    )
    parser.add_argument("--sequences", type=int, default=32, help="of calibration (default 32)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence (default 2048)")
    parser.add_argument("--text-field", default="text", help="field of .jsonl that holds the text")
    parser.add_argument("--exact", action="append", default=[], metavar="NAME", help="mark: MODEL lies on this grid")
    parser.add_argument("--peer", choices=("llama.cpp",), help="its perplexity of the same weights beside ours")
    parser.add_argument(
        "--markdown", metavar="FILE", help="the table, into a new file or the place marked in an old one"
    )
    parser.add_argument("--keep", action="store_true", help="keep the quantised folders, in OUT.work")
    _engine_options(parser)
    options = parser.parse_args(arguments)
    from pathlib import Path

    from .methods.recipe import read_recipe
    from .sweeps.run import sweep as run
    from .sweeps.settings import Settings
    from .sweeps.table import print_sweep, require_place, write_markdown

    own = ("out", "recipes", "exact", "markdown", "keep", "threads")
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(options).items()}
    given = {k: v for k, v in given.items() if k not in own}
    given["suites"] = tuple(suite for suite in options.suites.replace(",", " ").split())
    settings = Settings(**given)
    recipes = [read_recipe(recipe) for recipe in options.recipes]
    if options.markdown is not None:
        require_place(Path(options.markdown))
    tree = run(settings, recipes, options.out, options.threads, options.keep, options.exact)
    print_sweep(tree)
    if options.markdown is not None:
        write_markdown(tree, Path(options.markdown))
    return 0


def bench(arguments: list[str]) -> int:
    """prefill and decode speed, memory, and how near they are to what the machine can do"""
    parser = parser_of(
        "bench",
        "Tokens a second of prefill and decode as llama-bench counts them (pp512, tg128), beside the machine's own\n"
        "limits, which are measured in the same run. A table, then one line of JSON; added to MODEL's results.json.",
        "tritkit bench --shape bitnet-2b4t --threads 2",
    )
    from .speed.bench import add_options, run

    add_options(parser)
    _engine_options(parser)
    return run(parser.parse_args(arguments))


def import_(arguments: list[str]) -> int:
    """a model from the Hugging Face hub, a GGUF file or llama2.c to a model folder"""
    parser = parser_of(
        "import",
        "Make a model folder of SOURCE: the id of a model on the Hugging Face hub (owner/name, or\n"
        "owner/name/file.gguf), a folder of one, a GGUF file, or a llama2.c checkpoint. Weights keep their bits:\n"
        "blocks of GGUF run as they are.",
        "tritkit import smollm2-q4_k_m.gguf models/smol",
    )
    parser.add_argument("source", metavar="SOURCE", help="hub id, folder, file.gguf or llama2.c file")
    parser.add_argument("out", metavar="OUT", help="the model folder to write")
    parser.add_argument("--revision", help="hub: branch, tag or commit (default: main)")
    parser.add_argument("--token", help="hub: access token (default: the one that is logged in)")
    parser.add_argument("--i2-s", choices=("x86", "arm"), help="order of I2_S codes, where the file does not tell")
    parser.add_argument("--tokenizer", help="llama2.c: its tokenizer file (default: the one beside it)")
    parser.add_argument("--overwrite", action="store_true", help="replace what OUT holds")
    options = parser.parse_args(arguments)
    from .importer import import_model
    from .tables import print_metrics

    print_metrics(options.out, import_model(**vars(options)))
    return 0


def export(arguments: list[str]) -> int:
    """a model to a GGUF file, or to a folder for transformers"""
    parser = parser_of(
        "export",
        "Write MODEL as a GGUF file (OUT ends in .gguf) for llama.cpp, bitnet.cpp or ik_llama.cpp, or as a folder\n"
        "that transformers loads without tritkit. It is read back and compared before it gets its name.",
        "tritkit export models/mine mine.gguf --type tq2_0\n"
        "  tritkit export models/smol smol.gguf --type q4_k_m --imatrix smol.imatrix.gguf\n"
        "  tritkit export models/mine mine-hf --to hf-bitlinear",
    )
    from .gguf_export import export_gguf
    from .gguf_plan import WRITTEN
    from .hf_export import KINDS, export_hf

    parser.add_argument("model", metavar="MODEL", help="a model folder, GGUF file or llama2.c file")
    parser.add_argument("out", metavar="OUT", help="FILE.gguf or a folder")
    parser.add_argument(
        "--type",
        help=f"GGUF: type of the linears, or mix of types: {', '.join(WRITTEN)} (default: what they are; ternary ones "
        "tq2_0)",
    )
    parser.add_argument("--pure", action="store_true", help="GGUF: every matrix of the type itself, no mix")
    parser.add_argument("--imatrix", metavar="FILE", help="GGUF: importance matrix of llama.cpp that weighs the search")
    parser.add_argument(
        "--embedding-type",
        help="GGUF: type of embedding and head (default: the type or what a mix has; tq: q8_0, i2_s: f16)",
    )
    parser.add_argument(
        "--to",
        type=lambda form: {"f16": "float16", "f32": "float32", "bfloat16": "bf16"}.get(form.lower(), form.lower()),
        choices=KINDS,
        help="folder: ternary codes with scales that divide or multiply, plain floats, or integers as GPTQ has them",
    )
    parser.add_argument("--i2-s", choices=("x86", "arm"), help="GGUF: order of I2_S codes (default x86)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    options = parser.parse_args(arguments)
    from .sources import open_model
    from .tables import print_export

    if options.out.lower().endswith(".gguf"):
        if options.to is not None:
            raise ValueError(f"--to {options.to} makes a folder, but {options.out} is a file; --type chooses its type")
        report = export_gguf(
            open_model(options.model),
            options.out,
            options.type,
            options.embedding_type,
            options.overwrite,
            options.i2_s,
            options.pure,
            options.imatrix,
        )
    else:
        if options.to is None or options.type is not None or options.embedding_type is not None:
            raise ValueError(f"{options.out} would be a folder: say --to ... for one, or OUT.gguf for a GGUF file")
        if options.i2_s is not None:
            raise ValueError(f"--i2-s is the order of codes in a GGUF file, but {options.out} would be a folder")
        if options.pure or options.imatrix is not None:
            raise ValueError(f"--pure and --imatrix are for GGUF files, but {options.out} would be a folder")
        report = export_hf(open_model(options.model), options.out, options.to, options.overwrite)
    print_export(options.out, report)
    return 0


def diff(arguments: list[str]) -> int:
    """the same weights? tensor by tensor, whatever the containers"""
    parser = parser_of(
        "diff",
        "Compare the weights of two models. Exit code 0: the same, but perhaps for the rounding of scales or floats;\n"
        "1: some are rounded to another type (requantised), or different.",
        "tritkit diff models/mine mine.gguf",
    )
    parser.add_argument("a", metavar="A", help="a model folder, GGUF file or llama2.c file")
    parser.add_argument("b", metavar="B", help="another one")
    parser.add_argument("--all", action="store_true", help="every tensor, not only those that are not equal")
    parser.add_argument("--i2-s", choices=("x86", "arm"), help="order of I2_S codes, where a file does not tell")
    parser.add_argument("--json", action="store_true", help="JSON for programs instead of a table")
    options = parser.parse_args(arguments)
    from .tables import print_differences

    return print_differences(options.a, options.b, options.all, options.i2_s, options.json)


def compare(arguments: list[str]) -> int:
    """one table of several folders' results"""
    parser = parser_of(
        "compare",
        "The newest number of every metric of several folders, side by side.",
        "tritkit compare runs/llama runs/b158-packed runs/b1-packed",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders with a results.json")
    parser.add_argument("--all", action="store_true", help="every metric, not only the main ones")
    parser.add_argument("--json", action="store_true", help="JSON for programs instead of a table")
    options = parser.parse_args(arguments)
    from .tables import print_comparison

    print_comparison(options.models, options.all, options.json)
    return 0


def inspect(arguments: list[str]) -> int:
    """what is this? formats, layouts, scales, tokenizer, what is odd"""
    parser = parser_of(
        "inspect",
        "What a model folder, GGUF file, llama2.c or safetensors file is and holds, what tritkit can do with it, and\n"
        "what is odd about it.",
        "tritkit inspect models/smol.gguf",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a folder or a file (none: the bundled model)")
    parser.add_argument("--linears", action="store_true", help="a row for each linear")
    parser.add_argument("--i2-s", choices=("x86", "arm"), help="order of I2_S codes, where the file does not tell")
    parser.add_argument("--json", action="store_true", help="JSON for programs instead of a table")
    options = parser.parse_args(arguments)
    from .tables import print_inspection

    print_inspection(options.model, options.i2_s, options.linears, options.json)
    return 0


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


if __name__ == "__main__":
    sys.exit(main())
