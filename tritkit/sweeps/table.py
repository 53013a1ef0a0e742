"""The table of a sweep: on the screen, and in Markdown for documents. Reads the rows alone; imports no torch."""

from __future__ import annotations

import math
import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..files import atomic_open

Row = dict[str, Any]
LARGE = 1000.0  # perplexities of ruins, whose fractions say nothing


def _with_error(name: str, digits: int, of: float = 1.0) -> Callable[[Row], str]:
    """So many digits behind the point, and more where the error begins later."""

    def write(row: Row) -> str:
        value, error = row["metrics"].get(name), row["metrics"].get(f"{name}_error")
        if value is None:
            return ""
        if value >= LARGE:
            return f"{value:,.0f} ± {error:,.0f}" if error else f"{value:,.0f}"
        if not error:
            return f"{of * value:.{digits}f}"
        shown = max(digits, -math.floor(math.log10(of * error)))
        return f"{of * value:.{shown}f} ± {of * error:.{shown}f}"

    return write


def _number(name: str, write: Callable[[Any], str]) -> Callable[[Row], str]:
    return lambda row: "" if row["metrics"].get(name) is None else write(row["metrics"][name])


def _recipe(row: Row) -> dict[str, Any]:
    return tomllib.loads(row["recipe"]) if row["recipe"] else {}


def _formats(row: Row) -> str:
    """The types that its matrices really have, and what its activations become."""
    recipe = _recipe(row)
    found = row["metrics"].get("types") or row["metrics"].get("layout", "")
    inputs, range = recipe.get("inputs"), recipe.get("inputs_range")
    return found + (f"; inputs {inputs}" if inputs else "") + (f" by {range}" if inputs and range else "")


def _method(row: Row) -> str:
    """With how many layers kept a term, where there is a correction: none may be left of it."""
    recipe = _recipe(row)
    layers = row["metrics"].get("adapters")
    correct = recipe.get("correct") and recipe["correct"] + (
        "" if layers is None else f" ({layers} layer{'s' * (layers != 1)})"
    )
    return " + ".join(part for part in (recipe.get("transform"), row.get("method"), correct) if part)


def _told_apart(rows: Sequence[Row]) -> list[Row]:
    """Rows of recipes that had one name, since a file was changed between two calls, with their digests behind it."""
    count = Counter(row["name"] for row in rows)
    return [{**row, "name": f"{row['name']} ({row['digest'][:8]})"} if count[row["name"]] > 1 else row for row in rows]


def _rate(row: Row) -> str:
    metrics = row["metrics"]
    found = []
    for engine in ("native", "torch"):
        rate, sd = metrics.get(f"{engine}_decode_rate"), metrics.get(f"{engine}_decode_rate_sd")
        if rate is not None:
            found.append(f"{rate:.0f}" + (f" ± {sd:.0f}" if sd is not None else "") + " (torch)" * (engine == "torch"))
    return ", ".join(found)


COLUMNS: dict[str, Callable[[Row], str]] = {
    "recipe": lambda row: row["name"] + " †" * bool(row["exact"]),
    "matrices": _formats,
    "method": _method,
    "bits per weight": _number("bits_per_weight", lambda v: f"{v:.2f}"),
    "MB": _number("file_bytes", lambda v: f"{v / 1e6:.1f}"),
    "perplexity, llama.cpp's protocol": _with_error("llama_cpp_perplexity", 3),
    "llama.cpp itself": _number("peer_perplexity", lambda v: f"{v:.3f}"),
    "perplexity, gptq's protocol": _with_error("gptq_perplexity", 3),
    "KL to the parent, nats": _with_error("divergence_kl", 4),
    "same top token, %": _with_error("divergence_top1", 2, 100),
    "quantise, s": _number("quantize_seconds", lambda v: f"{v:.0f}"),
    "decode, tokens/s": _rate,
}


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Those that at least one row has something for."""
    return [name for name, write in COLUMNS.items() if any(write(row) for row in rows)]


def notes(tree: dict[str, Any]) -> list[str]:
    """What the numbers say nothing without, a sentence each."""
    rows, settings = _told_apart(tree["rows"]), tree["settings"]
    known = [row["metrics"] for row in rows if row["error"] is None]
    found = []
    for name, protocol in (("llama_cpp", "llama.cpp"), ("gptq", "gptq")):
        m = next((m for m in known if f"{name}_tokens" in m), None)
        if m is not None:
            found.append(f"{protocol}: {m[f'{name}_tokens']:,} predictions in windows of {m[f'{name}_context']} of "
                         f"{m[f'{name}_text']}.")  # fmt: skip
    calibrated = [row for row in rows if row.get("calibrated") and row["error"] is None]
    if calibrated:
        names = ", ".join(Path(source).name for source in settings["calibration"]) or "the bundled books"
        size = " or ".join(dict.fromkeys(_calibration(row, settings) for row in calibrated))
        found.append(f"Calibration, where a method has one: {size} tokens of {names}.")
    found += _engines(rows)
    if any(row["exact"] for row in rows):
        found.append("† is exact by construction: the parent's weights lie on this very grid already.")
    found += _peer(rows)
    if any("quantize_seconds" in row["metrics"] or _rate(row) for row in rows):
        found.append("Seconds and tokens a second (± standard deviation of 3 runs) were measured row by row, at times "
                     "when the machine may have been faster or slower.")  # fmt: skip
    machines: dict[str, list[str]] = {}
    for row in rows:
        machines.setdefault(_machine(row, tree), []).append(row["name"])
    if len(machines) < 2:
        found += [f"Machine: {name}." for name in machines or {_machine({}, tree): []}]
    else:
        found += [f"Machine of {', '.join(those)}: {name}." for name, those in machines.items()]
    return found


def _machine(row: Row, tree: dict[str, Any]) -> str:
    """On what a row was measured."""
    machine = row.get("machine", tree["machine"])
    threads = row.get("threads", machine["cores"])
    used = "" if threads == machine["cores"] else f", {threads} thread{'s' * (threads != 1)}"
    return f"{machine['cpu']}, {machine['cores']} cores{used}"


def _peer(rows: Sequence[Row]) -> list[str]:
    """Why llama.cpp has no number where it has none."""
    found = [f"llama.cpp failed on {row['name']}: {row['metrics']['peer_error']}." for row in rows
             if "peer_error" in row["metrics"]]  # fmt: skip
    if any("peer_refusal" in row["metrics"] for row in rows):
        found.append("llama.cpp itself has numbers of the rows whose weights, inputs and terms a GGUF file can hold.")
    return found


def _calibration(row: Row, settings: dict[str, Any]) -> str:
    """What was used, which text and context bound."""
    asked = {"calibration_sequences": settings["sequences"], "calibration_length": settings["length"]}
    used = asked | row["metrics"]
    return f"{used['calibration_sequences']} x {used['calibration_length']}"


def _engines(rows: Sequence[Row]) -> list[str]:
    """Which engine ran what, and what is not the same in all rows."""
    names: dict[str, dict[str, list[str]]] = {"native": {}, "torch": {}}  # by what they keep beside the weights
    for row in rows:
        m = row["metrics"]
        if "eval_engine" in m:
            how = f"keys and values of {m['eval_kv_bits']} bits, head {m.get('eval_head', 'as stored')}"
            names[m["eval_engine"]].setdefault(how, []).append(row["name"])
    found = []
    for engine, every in names.items():
        usual = max(every, key=lambda how: len(every[how]), default=None)
        for how, those in every.items():
            refused = engine == "torch" and names["native"]
            who = ", ".join(those) + (", which the native engine refuses," if refused else "")
            subject = "Rows are" if how == usual and not refused else f"{who} {'is' if len(those) == 1 else 'are'}"
            found.append(f"{subject} run by the {engine} engine: {how}.")
    plain = {r["metrics"].get("eval_engine") for r in rows if r["recipe"] and not _recipe(r).get("inputs")}
    if "native" in plain:
        torch = "; in torch on floats" if "torch" in plain else ""
        found.append("Quantised matrices whose recipe has no inputs run natively on activations rounded to int8 in "
                     f"groups of 32 (a8_g32), as in llama.cpp{torch}.")  # fmt: skip
    return found


def print_sweep(tree: dict[str, Any]) -> None:
    rows = _told_apart(tree["rows"])
    screen = Console()
    screen = screen if screen.is_terminal else Console(width=200)
    names = columns_of(rows)
    table = Table()
    for name in names:
        table.add_column(name, justify="left" if name in ("recipe", "matrices", "method") else "right", overflow="fold")
    for row in rows:
        if row["error"] is None:
            table.add_row(*(COLUMNS[name](row) for name in names))
    screen.print(table)
    for row in rows:
        if row["error"] is not None:
            screen.print(f"{row['name']} failed: {row['error']}", soft_wrap=True, highlight=False, markup=False)
    for note in notes(tree):
        screen.print(note, soft_wrap=True, highlight=False, markup=False)


def markdown(tree: dict[str, Any]) -> str:
    rows = _told_apart(tree["rows"])
    names = columns_of(rows)

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"

    text = line(names) + line(["---" if n in ("recipe", "matrices", "method") else "---:" for n in names])
    text += "".join(line([COLUMNS[name](row) for name in names]) for row in rows if row["error"] is None)
    failed = [f"{row['name']} failed: {row['error']}" for row in rows if row["error"] is not None]
    return text + "\n" + "".join(f"* {note}\n" for note in [*failed, *notes(tree)])


def require_place(place: str) -> None:
    """ValueError unless ``place``, FILE or FILE#NAME, is a free name, or a document with a place for the table."""
    path, name = _split(place)
    if not path.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {path.absolute().parent} to write {path.name} into")
    if path.exists():
        _parts(path, name)


def write_markdown(tree: dict[str, Any], place: str) -> None:
    """The table into its place in a document, or into a new file."""
    path, name = _split(place)
    begin, end = _marks(name)
    before, after = _parts(path, name) if path.exists() else ("", "")
    with atomic_open(path) as file:
        file.write(f"{before}{begin}\n{markdown(tree)}{end}{after or chr(10)}")


def _split(place: str) -> tuple[Path, str]:
    """A document has one place without a name, and as many with one as it likes."""
    path, _, name = place.partition("#")
    return Path(path), name


def _marks(name: str) -> tuple[str, str]:
    """Between these a document has the table."""
    name = f" {name}" if name else ""
    return f"<!-- sweep{name} -->", f"<!-- /sweep{name} -->"


def _parts(path: Path, name: str) -> tuple[str, str]:
    text, marks = path.read_text(encoding="utf-8"), _marks(name)
    before, begin, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise ValueError(f"{path} has no place for the table: a line {marks[0]} and a line {marks[1]} mark it")
    return before, after
