"""Verbs that make models: train, pack, quantize."""

from __future__ import annotations

import sys
from typing import Any

from .options import DOTTED, calibration_options, dotted, parser_of


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
    overrides = dotted(rest, parser)
    short = {"data.text_field": options.text_field, "train.threads": options.threads}
    overrides |= {name: value for name, value in short.items() if value is not None}
    from ..trainer import TrainingStopped, load_settings
    from ..trainer import train as run

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
    from ..tables import print_metrics

    print_metrics(options.out, metrics)
    return 0


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
    from ..pack import pack as run
    from ..tables import print_metrics

    print_metrics(options.out, run(options.model, options.out, options.dtype, options.overwrite))
    return 0


def quantize(arguments: list[str]) -> int:
    """a float model to one of 1 to 8 bits: round to nearest, GPTQ, k-quants, AWQ, QwT ... by a recipe"""
    parser = parser_of(
        "quantize",
        "Quantise the linears of MODEL after training. RECIPE is a TOML file, a mix of llama.cpp (q4_k_m), or the\n"
        "name of a format (int4_g64, nf4, q5_k, ternary); without one the options say it. A run that was stopped goes\n"
        "on at the layer it was in. Any setting of a recipe may follow: --gptq.damping=0.02, --importance=false\n"
        "(docs/quantisation.md lists them).",
        "tritkit quantize models/smol models/smol-q4 --format int4_g64 --method gptq --calibration wiki.txt",
    )
    parser.add_argument("model", metavar="MODEL", help="a model folder or a GGUF file")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="recipe file, mix or format")
    parser.add_argument("--format", help="of the weights: int{2..8}[_gN|_row|_tensor][_asym], nf4, q4_k, ternary ...")
    parser.add_argument(
        "--method",
        help="rtn, gptq or search (default: search for ggml's formats, gptq where --bits stands for RECIPE, else rtn)",
    )
    parser.add_argument("--range", help="how a grid is chosen: absmax, minmax, percentile, mse, entropy")
    parser.add_argument("--inputs", help="format of activations, for instance int8_row; +outliers for LLM.int8()")
    parser.add_argument("--inputs-range", help="static ranges of activations: absmax, minmax, percentile, mse, entropy")
    parser.add_argument("--transform", help="awq or smoothquant, folded into the neighbours first")
    parser.add_argument("--correct", help="qwt: a closed-form compensation of each layer")
    parser.add_argument("--embedding", help="format of the embedding (default: as it is)")
    parser.add_argument("--head", help="format of the output head, where the model has one of its own")
    parser.add_argument("--bits", type=float, help="mixed formats by measured sensitivity, so many bits a weight")
    calibration_options(parser)
    parser.add_argument(
        "--imatrix", metavar="FILE", help="llama.cpp's importance matrix; measured and written where there is none"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what OUT holds")
    options, rest = parser.parse_known_intermixed_args(arguments)
    from ..config import names as settings_of
    from ..methods.recipe import Recipe, read_recipe

    overrides = dotted(rest, parser, [name for name in settings_of(Recipe) if "." not in name])
    names = ("format", "method", "range", "inputs", "inputs_range", "transform", "correct", "embedding", "head")
    overrides |= {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.bits is not None:
        overrides["budget.bits"] = str(options.bits)
        if options.recipe is None:  # the calibration that a budget needs is GPTQ's too, and with it bits go further
            overrides.setdefault("method", "gptq")
    from ..methods.quantizer import quantize_folder
    from ..progress import console
    from ..tables import print_metrics

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
    if "calibration_sequences" not in metrics:
        line = "nothing is recorded of inputs and outputs, since no text was read; --calibration TEXT has them measured"
        console().print(line, style="dim", soft_wrap=True)
    return 0
