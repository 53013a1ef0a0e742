"""Verbs that measure models: eval, sweep, compare."""

from __future__ import annotations

import sys
from typing import Any

from .options import calibration_options, engine_options, parser_of


def evaluate(arguments: list[str]) -> int:
    """perplexity and bits per byte on held-out text, or the divergence from a parent"""
    from ..evals import SUITES

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
    engine_options(parser)
    options = parser.parse_args(arguments)
    from .. import results
    from ..engine.load import load
    from ..tables import print_metrics

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
        "it starts; stopped, it goes on with the same command. A recipe that fails has its sentence in its row,\n"
        "and the exit code is 1.",
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
    calibration_options(parser)
    parser.add_argument("--exact", action="append", default=[], metavar="NAME", help="mark: MODEL lies on this grid")
    parser.add_argument("--peer", choices=("llama.cpp",), help="its perplexity of the same weights beside ours")
    parser.add_argument(
        "--markdown", metavar="FILE[#NAME]", help="the table, into a new file or the place marked in an old one"
    )
    parser.add_argument("--keep", action="store_true", help="keep the quantised folders, in OUT.work")
    engine_options(parser)
    options = parser.parse_args(arguments)
    from ..methods.recipe import read_recipe
    from ..sweeps.run import sweep as run
    from ..sweeps.settings import Settings
    from ..sweeps.table import print_sweep, require_place, write_markdown

    own = ("out", "recipes", "exact", "markdown", "keep", "threads")
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(options).items()}
    given = {k: v for k, v in given.items() if k not in own}
    given["suites"] = tuple(suite for suite in options.suites.replace(",", " ").split())
    settings = Settings(**given)
    recipes = [read_recipe(recipe) for recipe in options.recipes]
    if options.markdown is not None:
        require_place(options.markdown)
    tree = run(settings, recipes, options.out, options.threads, options.keep, options.exact)
    print_sweep(tree)
    if options.markdown is not None:
        write_markdown(tree, options.markdown)
    asked = tree["rows"][: 1 + len(recipes)]  # the model and these recipes; older rows come behind
    failed = [row["name"] for row in asked if row["error"] is not None]
    if failed:
        print(f"tritkit: {len(failed)} of {len(asked)} rows failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


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
    from ..tables import print_comparison

    print_comparison(options.models, options.all, options.json)
    return 0
