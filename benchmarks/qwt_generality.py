"""QwT beyond language: after-training quantisation of an encoder, a ViT, a ResNet and an image-text model.

OMP_NUM_THREADS=1 python benchmarks/qwt_generality.py [encoder vit resnet towers] [--methods rtn gptq]
    [--settings W4A4 W3] [--text WIKI.txt.xz] [--test-text WIKI.txt] [--models runs/zoo] [--json runs/zoo/qwt.json]

For each model and setting three rows: plain quantisation (PTQ), the same with a compensation of each block (QwT), and
plain quantisation whose weights have the bytes that the compensations take. The linears and convolutions of the blocks
are quantised; patches, stem, embeddings, norms and head stay. Calibration: 16 batches of 32 from the training split,
and two more on which QwT's terms are judged; all quality is of the test split. Weights have one scale a row. Inputs
have one static range a tensor, to the 99.99th percentile, where the setting says static, else one scale a token.

Encoder: NDCG@10 of the task of benchmarks/embeddings.py, for which --text and --test-text are needed; ViT and ResNet:
accuracy; towers: zero-shot accuracy with prompts in a template that training never saw. Drift: how far outputs are
from the float model's, mean over test samples, in thousandths: KL of class probabilities in nats, for the encoder
1 - cosine; its error is that of the paired differences from PTQ, as that of the quality is. Seconds and milliseconds
are processor time: with OMP_NUM_THREADS=1 those of an idle machine.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import embeddings
import numpy as np
import torch
import torch.nn.functional as F
import zoo_models
from torch import Tensor, nn

from tritkit.embeddings import search_embeddings
from tritkit.formats import format_of
from tritkit.methods import rtn
from tritkit.methods.batches import held_out
from tritkit.methods.blocks import is_matrix, matrix_of
from tritkit.methods.modules import quantize
from tritkit.methods.recipe import LoadedRecipe, Recipe, Rule
from tritkit.methods.watch import blocks_of

BATCHES, HELD_OUT, SIZE = 16, 2, 32
TOKENS = 32  # of a text, for the encoder


@dataclass
class Part:
    """What is quantised on its own: its name in the model (none: all of it), its blocks, its calibration batches."""

    name: str
    blocks: str
    batches: list
    distance: Callable[[Tensor, Tensor], Tensor] | None = None

    def of(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(self.name)


@dataclass
class Task:
    """test: a score of each test sample, and outputs; drift: (float outputs, outputs) -> one number a sample; some: a
    batch for latency; tokens: whether inputs are tokens, so that each can have a scale."""

    model: nn.Module
    parts: list[Part]
    measure: str
    test: Callable[[nn.Module], tuple[np.ndarray, Tensor]]
    some: tuple
    drift: Callable[[Tensor, Tensor], Tensor]
    tokens: bool = True


def settings(task: Task, method: str) -> dict[str, Recipe]:
    static = dict(method=method, inputs_range="percentile")
    found = {
        "W4A4 static": Recipe(format="int4_row", inputs="int4_tensor_asym", **static),
        "W4A4": Recipe(format="int4_row", inputs="int4_row_asym", method=method),
        "W4A8 static": Recipe(format="int4_row", inputs="int8_tensor_asym", **static),
        "W3": Recipe(format="int3_row", method=method),
        "W2": Recipe(format="int2_row", method=method),
    }
    return {name: recipe for name, recipe in found.items() if task.tokens or name != "W4A4"}


def quantised(task: Task, recipes: list[LoadedRecipe]) -> tuple[nn.Module, dict]:
    """A copy of the model with each part quantised by its recipe, and the sums over the parts' reports."""
    model = copy.deepcopy(task.model)
    reports, start = [], time.process_time()
    for part, recipe in zip(task.parts, recipes, strict=True):
        batches, qwt = part.batches, recipe.recipe.qwt
        if not recipe.recipe.correct:  # on what QwT is fitted on, without the batches that it sets aside
            batches = batches[: len(batches) - held_out(len(batches), qwt.held_out)]
        reports.append(quantize(part.of(model), recipe, batches, blocks=part.blocks, distance=part.distance))
    facts = {key: sum(r[key] for r in reports) for key in ("bytes", "adapter_bytes")}
    facts["seconds"] = time.process_time() - start
    terms = [t for r in reports for t in r["adapters"].values()]
    facts |= {"terms": len(terms), "kept": sum(t["kept"] for t in terms)}
    facts["r2"] = float(np.mean([t["r2_held_out"] for t in terms])) if terms else None
    return model, facts


def equal_size(part: nn.Module, blocks: str, recipe: Recipe, size: int) -> LoadedRecipe:
    """The recipe with as many bits for the weights as fit into ``size`` bytes: all matrices have the same number of
    bits, or those that still fit, in the order of computation, have one more."""
    matrices = {
        f"{name}.{child}": matrix_of(m)
        for name, block in blocks_of(part, blocks).items()
        for child, m in block.named_modules()
        if is_matrix(m)
    }

    def nbytes(name: str, bits: int) -> int:
        return rtn.packed(format_of(f"int{bits}_row").quantize(matrices[name])).nbytes

    bits, fits = int(str(recipe.format)[3]), 0
    for more in range(bits, 9):
        if sum(nbytes(name, more) for name in matrices) <= size:
            fits = more
    left = size - sum(nbytes(name, fits) for name in matrices)
    rules = []
    for name in matrices if fits < 8 else ():
        more = nbytes(name, fits + 1) - nbytes(name, fits)
        if more <= left:
            left -= more
            rules.append(Rule(name, format=f"int{fits + 1}_row"))
    return LoadedRecipe(replace(recipe, format=f"int{fits}_row"), tuple(rules))


def milliseconds(models: dict[str, nn.Module], some: tuple) -> dict[str, float]:
    """Medians of a forward pass of one batch, the models in turns; of processor time, as other work may run beside."""
    samples: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(12):
            for name, model in models.items():
                start = time.process_time()
                model(*some)
                if turn:  # the first one warms up
                    samples[name].append(1e3 * (time.process_time() - start))
    return {name: float(np.median(found)) for name, found in samples.items()}


def run(name: str, task: Task, methods: list[str], only: list[str] | None = None) -> list[dict]:
    """A row for the float model and three for each method and setting, printed as they come."""
    scores, reference = task.test(task.model)
    weights = [matrix_of(m) for p in task.parts for b in blocks_of(p.of(task.model), p.blocks).values()
               for m in b.modules() if is_matrix(m)]  # fmt: skip
    count = sum(w.numel() for w in weights)
    rows = [{"model": name, "method": "", "setting": "float", "row": "", "score": scores.mean(), "bytes": 4 * count}]
    print(f"\n{name}: {count:,} weights in blocks, {task.measure} {scores.mean():.4f}\n", flush=True)
    print("| method | setting | | " + task.measure + " | to PTQ | drift | terms | R² | KiB | bits | seconds | ms |")
    print("| --- | --- | --- | --: | --: | --: | --: | --: | --: | --: | --: | --: |", flush=True)
    for method in methods:
        for setting, recipe in settings(task, method).items():
            if only and setting not in only:
                continue
            plain = LoadedRecipe(recipe)
            found, models = {}, {"float": task.model}
            models["PTQ"], found["PTQ"] = quantised(task, [plain] * len(task.parts))
            corrected = LoadedRecipe(replace(recipe, correct="qwt"))
            models["QwT"], found["QwT"] = quantised(task, [corrected] * len(task.parts))
            share = found["QwT"]["bytes"] / found["PTQ"]["bytes"]
            larger = []
            for part in task.parts:
                module = part.of(task.model)
                plain_bytes = sum(
                    rtn.packed(format_of(str(recipe.format)).quantize(matrix_of(m))).nbytes
                    for block in blocks_of(module, part.blocks).values()
                    for m in block.modules()
                    if is_matrix(m)
                )
                larger.append(equal_size(module, part.blocks, recipe, int(plain_bytes * share)))
            models["PTQ, same size"], found["PTQ, same size"] = quantised(task, larger)
            took = milliseconds(models, task.some)
            before, drifted = None, None
            for kind, facts in found.items():
                scores, outputs = task.test(models[kind])
                drift = 1e3 * task.drift(reference, outputs).double().numpy()
                before, drifted = (scores, drift) if kind == "PTQ" else (before, drifted)
                change, drifts = scores - before, drift - drifted
                row = {"model": name, "method": method, "setting": setting, "row": kind, "score": scores.mean(),
                       "to_ptq": change.mean(), "to_ptq_error": change.std() / len(change) ** 0.5,
                       "drift": drift.mean(), "drift_error": drifts.std() / len(drifts) ** 0.5, **facts,
                       "bits": 8 * facts["bytes"] / count, "ms": took[kind], "ms_float": took["float"]}  # fmt: skip
                rows.append(row)
                print(shown(row), flush=True)
    return rows


def shown(row: dict) -> str:
    """A line of the table."""
    has_terms = row["row"] == "QwT"
    cells = (
        row["method"],
        row["setting"],
        row["row"],
        f"{row['score']:.4f}",
        "" if row["row"] == "PTQ" else f"{row['to_ptq']:+.4f} ± {row['to_ptq_error']:.4f}",
        f"{row['drift']:.1f}" + ("" if row["row"] == "PTQ" else f" ± {row['drift_error']:.1f}"),
        f"{row['kept']} of {row['terms']}" if has_terms else "",
        f"{row['r2']:.2f}" if has_terms else "",
        f"{row['bytes'] / 1024:.0f}",
        f"{row['bits']:.2f}",
        f"{row['seconds']:.1f}",
        f"{row['ms']:.0f}",
    )
    return f"| {' | '.join(cells)} |"


def divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """KL of the classes' probabilities in nats, one number a sample."""
    p, q = wanted.log_softmax(-1), found.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def turned(wanted: Tensor, found: Tensor) -> Tensor:
    """1 - cosine, one number a sample."""
    return 1 - F.cosine_similarity(wanted, found)


def calibration(pictures: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    rows = torch.randperm(len(pictures))[: (BATCHES + HELD_OUT) * SIZE]
    return list(zoo_models.augmented(pictures[rows]).split(SIZE))


def picture_task(name: str, models: Path) -> Task:
    """The ViT or the ResNet. Convolutions have no tokens."""
    model = zoo_models.load(name, models)
    test_pictures, labels = zoo_models.fashion("t10k")

    def test(model: nn.Module) -> tuple[np.ndarray, Tensor]:
        with torch.inference_mode():
            outputs = torch.cat([model(p) for p in test_pictures.split(250)])
        return (outputs.argmax(-1) == labels).double().numpy(), outputs

    judge: Callable[[Tensor, Tensor], Tensor] = lambda wanted, found: divergence(wanted, found).mean()  # noqa: E731
    parts = [Part("", "blocks", calibration(zoo_models.fashion("train")[0]), judge)]
    return Task(model, parts, "accuracy", test, (test_pictures[:64],), divergence, tokens=name == "vit")


def towers_task(models: Path) -> Task:
    """Both towers are quantised. All prompts there are make 110 samples for the text tower, some held out."""
    model = zoo_models.load("towers", models)
    test_pictures, labels = zoo_models.fashion("t10k")
    words = zoo_models.prompts(zoo_models.UNSEEN_TEMPLATE)

    def test(model: nn.Module) -> tuple[np.ndarray, Tensor]:
        with torch.inference_mode():
            outputs = model.temperature.exp() * torch.cat([model(p, words) for p in test_pictures.split(250)])
        return (outputs.argmax(-1) == labels).double().numpy(), outputs

    texts = [zoo_models.prompts(template) for template in zoo_models.TEMPLATES]
    parts = [
        Part("image", "blocks", calibration(zoo_models.fashion("train")[0])),
        Part("text", "blocks", texts),
    ]
    return Task(model, parts, "accuracy", test, (test_pictures[:64], words), divergence)


def encoder_task(models: Path, text: Path | None, test_text: Path | None) -> Task:
    """Texts of one length for calibration, so that no padding counts."""
    if text is None or test_text is None:
        raise SystemExit("the encoder is calibrated on --text and tested on --test-text; one of them is missing")
    if text.resolve() == test_text.resolve():
        raise SystemExit("--text and --test-text are the same; what is measured must be unseen")
    model, tokenize = zoo_models.minilm(models)
    texts, _, _ = embeddings.cloze_task(text, 2000, 1, 1)
    long = [row for t in texts for row in zip(*tokenize([t], TOKENS), strict=True) if len(row[0]) == TOKENS]
    wanted = (BATCHES + HELD_OUT) * SIZE
    ids, mask = (torch.stack(parts) for parts in zip(*long[:wanted], strict=True))
    batches = list(zip(ids.split(SIZE), mask.split(SIZE), strict=True))
    passages, queries, answers = embeddings.cloze_task(test_text, 800, 300, 0)
    order = sorted(range(len(passages)), key=lambda i: len(passages[i]))

    def encode(model: nn.Module, texts: list[str]) -> Tensor:
        with torch.inference_mode():
            return torch.cat([model(*tokenize(texts[i : i + 50], TOKENS)) for i in range(0, len(texts), 50)])

    def test(model: nn.Module) -> tuple[np.ndarray, Tensor]:
        corpus = torch.empty(len(passages), 384)
        corpus[order] = encode(model, [passages[i] for i in order])
        found, _ = search_embeddings(encode(model, queries).numpy(), corpus.numpy(), "float32", embeddings.TOP_K)
        return embeddings.gains(found, answers), corpus

    return Task(
        model,
        [Part("", "bert.encoder.layer", batches)],
        "NDCG@10",
        test,
        tuple(part[:8] for part in batches[0]),
        turned,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["encoder", "vit", "resnet", "towers"], metavar="MODEL")
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--settings", nargs="+", help="some of them only, for instance W4A4 W3")
    parser.add_argument("--models", type=Path, default=Path("runs/zoo"))
    parser.add_argument("--text", type=Path, help="articles that the encoder is calibrated on")
    parser.add_argument("--test-text", type=Path, help="articles that the encoder is tested on")
    parser.add_argument("--json", type=Path, help="the rows in full")
    options = parser.parse_args()
    rows = []
    for name in options.names:
        if name == "encoder":
            task = encoder_task(options.models, options.text, options.test_text)
        else:
            task = towers_task(options.models) if name == "towers" else picture_task(name, options.models)
        rows += run(name, task, options.methods, options.settings)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
