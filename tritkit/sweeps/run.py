"""The rows of a sweep, one after the other: quantise, measure, append. A stopped sweep goes on where it was."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__, results
from ..checkpoint import ModelFolder
from ..engine.load import Model
from ..engine.native import usable_cores
from ..evals.divergence import Reference, keep_logits, kept_logits, logits_of, measure
from ..evals.perplexity import facts, score, summary
from ..folderfacts import describe
from ..methods.calibration import read_calibration
from ..methods.quantizer import bundled_text, held_out_of, quantize_folder
from ..methods.recipe import LoadedRecipe
from ..models.config import ModelConfig
from ..progress import console
from ..sources import open_model
from ..speed import peer
from ..speed.bench import measure as bench
from ..speed.measure import Work
from .book import PARENT, Book
from .estimate import SPEED_SECONDS, Estimate, Probe, said
from .kinds import calibration_of, method_of
from .settings import DIVERGENCE, Settings
from .unseen import require_unseen


def sweep(
    settings: Settings,
    recipes: Sequence[LoadedRecipe],
    out: Path | str,
    threads: int = 0,
    keep: bool = False,
    exact: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure the model and every recipe of it; returns what ``out`` holds: settings, machine, rows.

    Rows that ``out`` has of these recipes are not made again; failed ones are. keep: leave the quantised folders in
    OUT.work, beside OUT. exact: names of recipes whose grid is the one that the model lies on already. ValueError for
    what cannot be right for any row, before anything runs; what goes wrong with one row stands in that row.
    """
    out = Path(out)
    _require_names(recipes, exact)
    model = open_model(settings.model)
    book = Book.open(out, settings, settings.digests(model.path))
    _require_calibration(model, settings, recipes)
    if settings.peer is not None:
        peer.require(settings.peer, model.config, itself=True)
    wanted = [None, *recipes]
    for loaded in recipes:
        book.mark(loaded, _is_exact(loaded, exact))
    if not all(book.has(loaded) for loaded in wanted):
        _Sweep(settings, model, book, threads, keep, exact).run(wanted)
    book.order(wanted)
    return book.tree


def _is_exact(loaded: LoadedRecipe | None, exact: Sequence[str]) -> bool:
    return loaded is not None and (loaded.recipe.exact or loaded.recipe.name in exact)


def _require_names(recipes: Sequence[LoadedRecipe], exact: Sequence[str]) -> None:
    names = [loaded.recipe.name for loaded in recipes]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two recipes are named {name!r}; rename one")
    for name in exact:
        if name not in names:
            raise ValueError(f"--exact {name} is none of the recipes: {', '.join(names)}")


def _require_calibration(model: ModelFolder, settings: Settings, recipes: Sequence[LoadedRecipe]) -> None:
    """ValueError where the calibration text is too short."""
    texts = [calibration_of(model, settings, loaded) for loaded in recipes]
    if settings.calibration or None in texts:
        sources, longest = settings.calibration or [str(bundled_text())], model.config.max_position_embeddings
        read_calibration(model.tokenizer(), sources, 1, settings.length, 0, longest, settings.text_field)


class _Sweep:
    def __init__(
        self, settings: Settings, model: ModelFolder, book: Book, threads: int, keep: bool, exact: Sequence[str]
    ):
        self.settings, self.model, self.book, self.threads, self.keep = settings, model, book, threads, keep
        self.exact = exact
        self.work = book.path.with_suffix(".work")

    def run(self, wanted: Sequence[LoadedRecipe | None]) -> None:
        s, total = self.settings, len(wanted)
        todo = [loaded for loaded in wanted if not self.book.has(loaded)]
        parent = s.open(s.model, self.threads)
        self.texts = s.texts(parent)
        self._require_unseen(todo)
        estimate = self._estimate(parent)
        for loaded in wanted:
            row = self.book.row(loaded)
            if row is not None:
                estimate.learn_row(loaded, row)
        tokens = sum(len(w.tokens) for text in self.texts.values() for w in text.windows)
        _tell(
            f"sweep: {len(todo)} of {total} rows to do, about {said(estimate.left(todo))} "
            f"({tokens:,} tokens to read a row, {s.sequences} x {s.length_of(self.model)} to calibrate on)"
        )
        self.work.mkdir(exist_ok=True)
        self.reference = self._reference(parent) if "divergence" in s.suites else None
        _close(parent)
        for number, loaded in enumerate(todo, total - len(todo) + 1):
            began = time.perf_counter()
            row = self._row(loaded)
            row["seconds"] = time.perf_counter() - began
            row["time"] = datetime.now(UTC).isoformat(timespec="seconds")
            row |= {"version": __version__, "machine": results.machine(), "threads": self.threads or usable_cores()}
            self.book.add(row)
            estimate.learn_row(loaded, row)
            rest = todo[todo.index(loaded) + 1 :]
            left = f"; about {said(estimate.left(rest))} left" if rest else ""
            _tell(f"{number}/{total} {row['name']}: {_news(row)}, {said(row['seconds'])}{left}")
        for file in self.work.glob("*.logits"):
            file.unlink()
        with suppress(OSError):  # what else is in there is somebody's
            self.work.rmdir()

    def _require_unseen(self, todo: Sequence[LoadedRecipe | None]) -> None:
        """ValueError where the test text is among what the recipes are calibrated on."""
        s = self.settings
        wanted = [(calibration_of(self.model, s, r), held_out_of(r, s.sequences)) for r in todo if r is not None]
        test = [window.tokens for text in self.texts.values() for window in text.windows]
        for sources, held in {one for one in wanted if one[0] != ()} if test else ():
            names = [str(bundled_text())] if sources is None else list(sources)
            tokenizer, longest = self.model.tokenizer(), self.model.config.max_position_embeddings
            try:
                data = read_calibration(tokenizer, names, s.sequences, s.length, held, longest, s.text_field)
            except ValueError:  # too short for what is held out: the row will say so
                continue
            rows = [*data.fit.numpy(), *data.held_out.numpy()]
            require_unseen(rows, test, ", ".join(Path(name).name for name in names))

    def _estimate(self, parent: Model) -> Estimate:
        s, probe = self.settings, Probe.measure(parent, self.texts)
        tokens = sum(len(w.tokens) for text in self.texts.values() for w in text.windows)
        if s.peer is not None and DIVERGENCE in self.texts:  # about as fast as we are
            tokens += sum(len(w.tokens) for w in self.texts[DIVERGENCE].windows)
        evaluation = tokens * probe.token + SPEED_SECONDS * ("speed" in s.suites)
        return Estimate(self.model, s, probe, evaluation)

    def _reference(self, parent: Model) -> Reference:
        """The parent's logits: kept in a file where the disk has room, else computed for every row again."""
        text, vocab_size = self.texts[DIVERGENCE], parent.engine.vocab_size
        size = 4 * vocab_size * sum(int((window.targets >= 0).sum()) for window in text.windows)
        job = hashlib.sha256(json.dumps([self.settings.tree(), self.book.tree["digests"], vocab_size]).encode())
        for window in text.windows:
            job.update(window.tokens.tobytes())
        path = self.work / f"{job.hexdigest()[:16]}.logits"
        if not path.exists():
            if shutil.disk_usage(self.work).free < 2 * size:
                again = self.settings.open(self.settings.model, self.threads)
                return lambda i: logits_of(again.engine, text.windows[i])
            keep_logits(parent.engine, text, path)
        return kept_logits(path, text, vocab_size)

    def _row(self, loaded: LoadedRecipe | None) -> dict[str, Any]:
        name = self.model.path.name if loaded is None else loaded.recipe.name
        row: dict[str, Any] = {
            "name": name,
            "digest": PARENT if loaded is None else loaded.digest(),
            "recipe": None if loaded is None else loaded.text(),
            "exact": _is_exact(loaded, self.exact),
            "metrics": {},
            "error": None,
        }
        folder = self.work / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}-{row['digest'][:8]}"
        try:
            made = self._parent() if loaded is None else self._quantised(loaded, folder)
            row["method"] = "" if loaded is None else method_of(loaded)
            row["calibrated"] = loaded is not None and calibration_of(self.model, self.settings, loaded) != ()
            row["metrics"] = made | self._measured(Path(self.settings.model) if loaded is None else folder)
        except Exception as error:  # one recipe must not end a night's work, whatever is wrong with it
            text = " ".join(str(error).split())
            row["error"] = text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
        if not self.keep:
            for made_here in (folder, folder.with_name(f".{folder.name}.partial")):
                shutil.rmtree(made_here, ignore_errors=True)
        return row

    def _parent(self) -> dict[str, Any]:
        return describe(self.model)

    def _quantised(self, loaded: LoadedRecipe, folder: Path) -> dict[str, Any]:
        """The folder, made now or by a sweep that was stopped after it; its metrics."""
        s, calibration = self.settings, calibration_of(self.model, self.settings, loaded)
        digests = self.book.tree["digests"]
        origin: dict[str, Any] = {"recipe": loaded.digest(), "parent": str(self.model.path), "model": digests["model"]}
        if calibration != ():
            origin |= {name: s.tree()[name] for name in ("calibration", "sequences", "length", "text_field")}
            origin["text"] = digests["calibration"]
        runs = {run["verb"]: run for run in results.read(folder)}
        if "quantize" in runs and "sweep" in runs and runs["sweep"]["settings"] == origin:
            return runs["quantize"]["metrics"]
        metrics = quantize_folder(
            s.model,
            folder,
            loaded,
            calibration,
            sequences=s.sequences,
            length=s.length,
            text_field=s.text_field,
            overwrite=True,
        )
        results.record(folder, "sweep", origin, {})
        return metrics

    def _measured(self, folder: Path) -> dict[str, Any]:
        s = self.settings
        model = s.open(folder, self.threads)
        engine = model.engine.name
        metrics: dict[str, Any] = {**facts(model.engine), "eval_head": getattr(model.engine, "head", "float")}
        if self.reference is not None:  # the model's perplexity by this protocol comes out on the way
            metrics |= measure(model, self.texts[DIVERGENCE], self.reference)
        for protocol, text in self.texts.items():
            if f"{text.name}_perplexity" not in metrics:
                losses = score(model.engine, text.windows, f"perplexity ({protocol}) {folder.name}")
                metrics |= {**summary(text, *losses), **facts(model.engine)}
        if s.peer is not None and DIVERGENCE in self.texts:
            metrics |= self._peer(model.folder)
        config = model.folder.config
        _close(model)
        del model
        if "speed" in s.suites:
            asked = {"kv_bits": s.kv_bits, "head": s.head} if engine == "native" else {}
            rate, sd = decode_rate(folder, config, engine, self.threads, asked)
            metrics |= {f"{engine}_decode_rate": rate, f"{engine}_decode_rate_sd": sd}
        return metrics

    def _peer(self, model: ModelFolder) -> dict[str, Any]:
        """llama.cpp's perplexity of the same weights; why not, where a GGUF file cannot hold them or it fails."""
        text, cores = self.texts[DIVERGENCE], self.threads or usable_cores()
        with ExitStack() as stack:
            try:
                path, _ = stack.enter_context(peer.model_gguf(model))
            except ValueError as error:
                return {"peer_refusal": " ".join(str(error).split())}
            except RuntimeError as error:
                return {"peer_error": " ".join(str(error).split())}
            try:
                nll = peer.losses(path, [(w.tokens, w.targets) for w in text.windows], cores)
            except (ValueError, RuntimeError) as error:
                return {"peer_error": " ".join(str(error).split())}
        found = summary(text, nll, np.ones(len(nll)))
        return {"peer_perplexity": found[f"{text.name}_perplexity"],
                "peer_perplexity_error": found[f"{text.name}_perplexity_error"]}  # fmt: skip


def decode_rate(
    folder: Path, config: ModelConfig, engine: str, threads: int, asked: dict[str, Any]
) -> tuple[float, float]:
    """Tokens a second that one sequence decodes, as bench measures them, and their standard deviation."""
    room = config.max_position_embeddings
    work = Work(prompt=min(16, room), tokens=min(64, room))
    given = {name: value for name, value in asked.items() if value is not None}
    (row,), _ = bench(str(folder), folder, config, work, engine=engine, threads=threads, repeat=3, asked=given)
    return row["decode_tok_s"], row["decode_sd"]


def _close(model: Model) -> None:
    """The native engine has threads and memory of its own."""
    close = getattr(model.engine, "close", None)
    if close is not None:
        close()


def _news(row: dict[str, Any]) -> str:
    """A row in some words."""
    if row["error"] is not None:
        return f"failed: {row['error']}"
    metrics, names = row["metrics"], {"llama_cpp_perplexity": "perplexity", "gptq_perplexity": "perplexity (gptq)"}
    names |= {"divergence_kl": "KL"}
    found = [f"{said} {metrics[name]:.4g}" for name, said in names.items() if name in metrics]
    return ", ".join(found) or "done"


def _tell(line: str) -> None:
    console().print(line, soft_wrap=True)
