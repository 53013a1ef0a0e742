"""Imports point down or stay on their floor (DESIGN: the house)."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "tritkit"

# The floor of every package or module of ours; what is not named here has none and may not be imported from below.
FLOORS = {
    "layouts": 0, "formats": 0,
    "kernels": 1,
    "layers": 2, "stored": 2, "models": 2, "tokenizer": 2, "tokenizer_guard": 2,
    "data": 3, "optim": 3, "trainer": 3, "trainstate": 3, "checkpoint": 3, "pack": 3, "folderfacts": 3,
    "tensorfile": 3, "gguf": 3, "gguf_writer": 3, "gguf_config": 3, "gguf_model": 3, "llama2c": 3, "sources": 3,
    "inputs": 3, "importer": 3, "hub": 3, "newfolder": 3, "folderwriter": 3,
    "difference": 3, "gguf_export": 3, "gguf_plan": 3, "gguf_check": 3, "gguf_tokenizer": 3, "gguf_vocab": 3,
    "pretokenizers": 3, "spm": 3, "hf_export": 3, "foreign": 3, "foreign_export": 3,
    "hf": 3, "hf_hook": 3, "inspection": 3,
    "methods": 3,
    "engine": 4, "evals": 4, "chat": 4, "template": 4, "template_child": 4,
    "embeddings": 3,
    "tables": 5, "speed": 5, "sweeps": 5, "cli": 6, "__main__": 7,
}  # fmt: skip
EVERYWHERE = {"config", "results", "files", "jsonfile", "progress", "memory"}
TORCH_FREE = {"layouts", "tokenizer", "models.config", "models", "data", "checkpoint", "folderfacts", "tables", "cli",
              "tensorfile", "gguf", "gguf_writer", "gguf_config", "gguf_model", "llama2c", "sources", "importer", "hub",
              "difference", "gguf_export", "gguf_plan", "methods.mixes", "methods.importance",
              "gguf_check", "gguf_tokenizer", "gguf_vocab", "pretokenizers", "spm", "hf_export", "hf_hook",
              "foreign", "foreign_export",
              "inspection", "newfolder", "inputs", "folderwriter", "models.shapes",
              "chat", "template", "tokenizer_guard", "engine",
              "embeddings",
              "engine.load", "engine.native", "evals", *EVERYWHERE}  # fmt: skip


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield path, parts[:-1] if parts[-1] == "__init__" else parts


def top_level(tree):
    """Statements that run when a module is imported: not the bodies of functions, nor what only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from top_level(node)


def imports(path, parts, lazy):
    """(module of ours or foreign package, line) of every import statement of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = parts if path.name == "__init__.py" else parts[:-1]
    for node in ast.walk(tree) if lazy else top_level(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split("."), node.lineno
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = ["tritkit", *package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            else:
                base = (node.module or "").split(".")
            base = [b for b in base if b]
            for alias in node.names:
                yield [*base, alias.name], node.lineno


def ours(path, parts, lazy=True):
    for target, line in imports(path, parts, lazy):
        if target[0] == "tritkit" and len(target) > 1:
            yield target[1], line


ALL = [(path, parts) for path, parts in modules() if parts]


def test_every_module_has_a_place():
    assert {parts[0] for _, parts in ALL} == set(FLOORS) | EVERYWHERE


def test_contributing_says_the_same_floors():
    text = (ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = {name: int(floor) for name, floor in re.findall(r"^  (\w+)(?:\.py|/) +FLOOR (\d)", text, re.M)}
    assert named == {name: floor for name, floor in FLOORS.items() if name != "__main__"}
    (anyone,) = re.findall(r"Imports point down, or stay on their floor; (.*?) may be\s+imported by anyone", text, re.S)
    assert set(re.findall(r"`(\w+)`", anyone)) == EVERYWHERE


def test_every_eval_but_the_program_has_a_row():
    from tritkit.evals import SUITES

    files = {path.stem for path in (ROOT / "evals").glob("*.py")} - {"__init__", "ngram"}
    assert {suite.__module__.split(".")[-1] for suite in SUITES.values()} == files


@pytest.mark.parametrize(("path", "parts"), ALL, ids=lambda v: ".".join(v) if isinstance(v, tuple) else "")
def test_imports_point_down(path, parts):
    own = FLOORS.get(parts[0])
    for name, line in ours(path, parts):
        if name in ("__version__", "_native") or name in EVERYWHERE:
            continue
        assert own is not None, f"{path}:{line}: {parts[0]} may be imported by anyone, so it may not import {name}"
        assert name in FLOORS, f"{path}:{line}: {name} has no floor"
        assert FLOORS[name] <= own, f"{path}:{line}: {parts[0]} (floor {own}) imports {name} (floor {FLOORS[name]})"


def test_the_bottom_imports_nothing_of_ours():
    for path, parts in ALL:
        if parts[0] == "layouts":
            native = {"_native"} if parts == ("layouts", "search") else set()  # ggml's quantisers are C++
            assert {n for n, _ in ours(path, parts)} <= {"layouts", *native}, path
            foreign = {t[0] for t, _ in imports(path, parts, lazy=True)} - {"tritkit", "__future__"}
            assert foreign <= {"numpy", "abc", "dataclasses", "typing"}, path
        if parts[0] == "formats":
            assert {n for n, _ in ours(path, parts)} <= {"formats", "layouts", *EVERYWHERE}, path


def test_torch_is_not_imported_on_the_way_to_running():
    """At import, by itself; a test of the engine sees to the whole of a native run."""
    for path, parts in ALL:
        if ".".join(parts) in TORCH_FREE:
            foreign = {t[0] for t, _ in imports(path, parts, lazy=False)}
            assert not foreign & {"torch", "transformers"}, path


def test_only_the_native_engine_the_bench_and_the_quantisers_name_the_extension():
    for path, parts in ALL:
        uses = [line for target, line in imports(path, parts, lazy=True) if "_native" in target]
        assert not uses or parts[0] in ("engine", "speed") or parts == ("layouts", "search"), f"{path}:{uses}"
