"""``tritkit quantize``: a float model folder and a recipe to a folder of quantised matrices.

Layer by layer, each on what the quantised layers before it hand on, so that memory holds one layer in float32 and the
activations of the calibration tokens, never a model. What a layer became is written as soon as it is done: a run that
was stopped goes on at the layer it was in.
"""

from __future__ import annotations

import hashlib
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import results
from ..checkpoint import ModelFolder, open_folder
from ..files import atomic_open
from ..folderfacts import describe
from ..folderwriter import copy_companions, write_folder
from ..models.shapes import EMBEDDING, HEAD, matrix_names, matrix_shape
from ..newfolder import beside, require_finite, require_new
from ..progress import console, warn
from ..sources import open_model
from ..tensorfile import StoredTensor
from .calibration import Calibration, read_calibration
from .collect import collect_importance
from .importance import read_importance
from .layerwise import Layerwise, layout_of
from .partial import Partial, partial_of
from .planning import (
    all_plans,
    needs_inputs,
    require_fit,
    require_plain,
    require_weighed,
    warnings_of,
    weighs_inputs,
    what_needs,
)
from .recipe import LoadedRecipe, Plan, Recipe, Rule, as_recipe


def quantize_folder(
    source: Path | str,
    out: Path | str,
    recipe: LoadedRecipe | Recipe | str | Path,
    calibration: Sequence[str | Path] | str | Path | None = None,
    *,
    sequences: int = 32,
    length: int = 2048,
    text_field: str = "text",
    overwrite: bool = False,
    measure_inputs: bool = True,
    imatrix: Path | str | None = None,
) -> dict[str, Any]:
    """Write the quantised form of the model ``source`` into the folder ``out`` and return its metrics.

    recipe: one in Python, a file, or a name. calibration: files, folders or globs of text, of which ``sequences``
    sequences of ``length`` tokens are taken; methods that need none use them to record what quantising does to the
    outputs, unless ``measure_inputs`` is False. None takes the bundled books where data is needed, () refuses that.
    imatrix: file of llama.cpp's importance matrix, which weighs the search; where there is none it is measured on the
    float model and the calibration text, and written. ValueError for anything that cannot be, and then nothing is.
    """
    began = time.perf_counter()
    loaded = given = as_recipe(recipe)
    out = Path(out)
    model = open_model(source)
    require_new(out, overwrite, model.path)
    require_plain(model)
    plans = all_plans(model, loaded, False)  # what they need does not depend on importance, which is not known yet
    require_fit(model, plans)
    if imatrix is not None:
        require_weighed(loaded, plans, imatrix)
    needs = next((what_needs(p, loaded) for p in plans.values() if needs_inputs(p, loaded)), None)
    measured = partial_of(out) / f"importance{Path(imatrix or '').suffix}"  # a stopped run goes on with it
    collects = imatrix is not None and (not Path(imatrix).exists() or _same_bytes(Path(imatrix), measured))
    sources = _texts(calibration, needs, imatrix if collects else None)
    for name, tensor in model.tensors.items():  # reads every byte: what can be refused without that has been
        require_finite(model, name, tensor)
    data = None
    if sources and (needs or collects or measure_inputs):
        held = held_out_of(loaded, sequences)
        data = read_calibration(
            model.tokenizer(), sources, sequences, length, held, model.config.max_position_embeddings, text_field
        )
    weights = {} if imatrix is None or collects else importance_of(model, Path(imatrix))
    how = "measured" if collects else _digest(weights)
    partial = Partial.begin(out, model, loaded, data, how, overwrite=overwrite, began=began)
    try:
        if collects:
            assert data is not None
            if not measured.exists():
                collect_importance(model, data).save(measured)
            weights = importance_of(model, measured)
        if loaded.recipe.budget.bits is not None:
            assert data is not None
            loaded = loaded.over(_rules(model, loaded, data, partial, weights))
        plans = all_plans(model, loaded, data is not None or imatrix is not None)
        for warning in warnings_of(model, plans):
            warn(warning)
        if data is not None and imatrix is None and weighs_inputs(loaded, plans):
            console().print("the search is weighed by the inputs on the calibration text", style="dim")
        quantizer = Layerwise(model, loaded, plans, data, partial, weights)
        quantizer.run()
        damped = [name for name, record in quantizer.records.items() if "note" in record]
        if damped:
            of = damped[0] if len(damped) == 1 else f"{len(damped)} linears ({damped[0]} ...)"
            warn(f"the second moments of inputs of {of} were singular; they were damped more than the recipe says")
        tuned = quantizer.finetune() if loaded.recipe.correct and loaded.recipe.qwt.finetune else None
        options: dict[str, Any] = {} if imatrix is None else {"imatrix": str(imatrix)}
        if data is not None:
            options |= {"calibration": sources, "sequences": sequences, "length": length, "text_field": text_field}
        if collects and imatrix is not None:
            with atomic_open(imatrix, "wb") as file:
                file.write(measured.read_bytes())
        metrics = _write(model, out, loaded, given.digest(), plans, quantizer, options, tuned)
    except ValueError:  # will not go better another time, so there is nothing to go on with
        if partial.is_new:
            partial.remove()
        raise
    partial.remove()
    return metrics


def held_out_of(loaded: LoadedRecipe, sequences: int) -> int:
    """Sequences beside those that methods are calibrated on, which judge what these have made."""
    return max(round(sequences * loaded.recipe.qwt.held_out), 1) if loaded.recipe.correct else 0


def _texts(given: Sequence[str | Path] | str | Path | None, needs: str | None, imatrix: Path | str | None) -> list[str]:
    """The names of the calibration texts: those that are given, or (None) the bundled books for what needs any. needs:
    that; imatrix: the file of importance that is to be measured. ValueError where there is none, but a need for it."""
    if imatrix is not None and not Path(imatrix).absolute().parent.is_dir():
        raise ValueError(f"there is no folder {Path(imatrix).absolute().parent} to write {Path(imatrix).name} into")
    if given is None and (needs or imatrix is not None):
        console().print("calibrating on the bundled books; --calibration TEXT names another text", style="dim")
        return [str(bundled_text())]
    found = [str(name) for name in ([given] if isinstance(given, str | Path) else given or ())]
    if imatrix is not None and not found:
        raise ValueError(f"there is no importance matrix {imatrix}; to measure one, give text with --calibration")
    if needs and not found:
        raise ValueError(f"{needs} needs calibration data; give text with --calibration")
    return found


def _same_bytes(a: Path, b: Path) -> bool:
    return a.is_file() and b.is_file() and a.read_bytes() == b.read_bytes()


def _rules(
    model: ModelFolder,
    loaded: LoadedRecipe,
    data: Calibration,
    partial: Partial,
    importance: Mapping[str, torch.Tensor],
) -> list[Rule]:
    """What a budget of bits becomes; what an earlier run found, which took long, is not measured again."""
    from .allocate import rules_for

    found = partial.record("rules")
    if found is None:
        found = {"rules": [asdict(rule) for rule in rules_for(model, loaded, data, importance)]}
        partial.keep("rules", {}, found)
    return [Rule(**rule) for rule in found["rules"]]


def _digest(weights: Mapping[str, torch.Tensor]) -> str:
    """What tells one importance of the columns from another."""
    found = hashlib.sha256()
    for name, values in weights.items():
        found.update(f"{name} {values.dtype} ".encode() + values.numpy().tobytes())
    return found.hexdigest()


def bundled_text() -> Path:
    """Books to calibrate on where the user names no text; no evaluation of ours is of them."""
    return Path(__file__).parent.parent / "bundled" / "text" / "train.txt.xz"


def _command(model: ModelFolder, options: Mapping[str, Any]) -> str:
    """What makes the folder again, with its tritkit.toml as the recipe."""
    words = ["tritkit", "quantize", str(model.path), "OUT", "THIS_FILE"]
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            words += [f"--{name.replace('_', '-')}", str(one)]
    return shlex.join(words)


def importance_of(model: ModelFolder, path: Path) -> dict[str, torch.Tensor]:
    """The importance of the columns of each matrix that the file speaks of."""
    found = read_importance(path)
    weights = {}
    for name in matrix_names(model.config):
        values = found.of(name)
        if values is None:
            continue
        if values.shape != (matrix_shape(model.config, name)[1],):
            raise ValueError(
                f"{path} has {len(values)} values for {name}, which has {matrix_shape(model.config, name)[1]} columns"
            )
        weights[name] = torch.from_numpy(values)
    if not weights:
        raise ValueError(f"{path} speaks of none of the linears of {model.path}")
    return weights


def _write(
    model: ModelFolder,
    out: Path,
    loaded: LoadedRecipe,
    digest: str,
    plans: dict[str, Plan],
    quantizer: Layerwise,
    options: Mapping[str, Any],
    tuned: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The finished folder, written beside and moved; returns its metrics, which results.json has too. digest: of the
    recipe as it was given, before a budget became rules; options: beside the recipe, what decides about the result."""
    coded = {name: layout_of(plan) for name, plan in plans.items() if plan.format is not None}
    layouts = {name: layout for name, layout in model.layouts.items() if name not in coded} | coded
    tensors: dict[str, StoredTensor] = {
        key: model.tensors[key] for key in model.tensors if key.rpartition(".")[0] not in coded or key.endswith(".bias")
    }
    for part in quantizer.partial.parts():
        tensors |= dict(quantizer.partial.tensors(part).items())
    extra: dict[str, Any] = {}
    inputs = {name: plan.inputs for name, plan in plans.items() if plan.inputs}
    adapters = [i for i in range(model.config.num_hidden_layers) if f"model.layers.{i}.adapter.weight" in tensors]
    if inputs:
        extra["inputs"] = inputs
    if adapters:
        extra["adapters"] = tuple(adapters)
    if any(plan.outliers for plan in plans.values()):
        extra["outlier_threshold"] = loaded.recipe.outlier_threshold
    with beside(out) as folder:
        write_folder(folder, model.config, tensors, model.tokenizer(), layouts, **extra)
        if model.path.is_dir():
            copy_companions(model.path, folder)
        with atomic_open(folder / "tritkit.toml") as file:
            file.write(f"# parent: {model.path}\n# {_command(model, options)}\n{loaded.text()}")
        written = open_folder(folder)
        for name in coded:
            for suffix, array in written.packed(name).arrays.items():
                if not np.array_equal(tensors[f"{name}.{suffix}"].array, array):
                    raise OSError(f"{folder} does not hold what was written to it: {name}.{suffix} differs")
        written.tokenizer()
    written = open_folder(out)
    metrics = describe(written)
    types: dict[str, int] = {}
    for name in matrix_names(model.config):
        plan = plans.get(name)
        kind = plan.format.name if plan and plan.format else layouts.get(name, "floats")
        types[kind] = types.get(kind, 0) + 1
    metrics |= {
        "weights": "+".join(
            sorted({p.format.name for n, p in plans.items() if p.format and n not in (EMBEDDING, HEAD)})
        ),
        "recipe": loaded.recipe.name,
        "recipe_digest": digest,
        "types": ", ".join(f"{count} {kind}" for kind, count in sorted(types.items(), key=lambda t: -t[1])),
        "adapters": len(adapters),
        "quantize_seconds": quantizer.partial.seconds(),
        **{f"finetune_{name}": value for name, value in (tuned or {}).items()},
    }
    if loaded.recipe.exact:
        metrics["exact"] = True
    if quantizer.data is not None:  # what the text and the model's context had room for
        metrics["calibration_sequences"], metrics["calibration_length"] = quantizer.data.fit.shape
    settings = {"parent": str(model.path), "recipe": loaded.text(), "calibration": [], **options}
    results.record(out, "quantize", settings, metrics, quantizer.records)
    return metrics
