"""Verbs of files: import, export, diff, inspect."""

from __future__ import annotations

from .options import parser_of


def import_(arguments: list[str]) -> int:
    """a model from the Hugging Face hub, a GGUF file or llama2.c to a model folder"""
    parser = parser_of(
        "import",
        "Make a model folder of SOURCE: the id of a model on the Hugging Face hub (owner/name, or\n"
        "owner/name/file.gguf), a folder of one (GPTQ and compressed-tensors too), a GGUF file, or a llama2.c\n"
        "checkpoint. Weights keep their bits: blocks of GGUF and groups of integers run as they are.",
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
    from ..importer import import_model
    from ..tables import print_metrics

    print_metrics(options.out, import_model(**vars(options)))
    return 0


def export(arguments: list[str]) -> int:
    """a model to a GGUF file, or to a folder for transformers"""
    parser = parser_of(
        "export",
        "Write MODEL as a GGUF file (OUT ends in .gguf) for llama.cpp, bitnet.cpp or ik_llama.cpp, or as a folder\n"
        "that transformers or vLLM loads without tritkit (--to). It is read back and compared before it gets its name.",
        "tritkit export models/mine mine.gguf --type tq2_0\n"
        "  tritkit export models/smol smol.gguf --type q4_k_m --imatrix smol.imatrix.gguf\n"
        "  tritkit export models/mine mine-hf --to hf-bitlinear\n"
        "  tritkit export models/smol-q4 smol-gptq --to gptq_v2",
    )
    from ..gguf_export import export_gguf
    from ..gguf_plan import WRITTEN
    from ..hf_export import KINDS, export_hf

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
        help="folder: ternary codes with scales that divide or multiply, plain floats, or integers as GPTQ or "
        "compressed-tensors have them",
    )
    parser.add_argument("--i2-s", choices=("x86", "arm"), help="GGUF: order of I2_S codes (default x86)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    options = parser.parse_args(arguments)
    from ..sources import open_model
    from ..tables import print_export

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
    from ..tables import print_differences

    return print_differences(options.a, options.b, options.all, options.i2_s, options.json)


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
    from ..tables import print_inspection

    print_inspection(options.model, options.i2_s, options.linears, options.json)
    return 0
