"""The file of a sweep: which rows it has, of which recipes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import results
from ..files import atomic_open
from ..jsonfile import read_object
from ..methods.recipe import LoadedRecipe
from .settings import Settings, require_same_files

SCHEMA = 1
PARENT = "parent"  # in place of the digest of a recipe: the model itself


class Book:
    """The file of a sweep: {"schema", "settings", "digests", "machine", "rows"}, written anew after each row."""

    def __init__(self, path: Path, tree: dict[str, Any]):
        self.path, self.tree = path, tree

    @classmethod
    def open(cls, path: Path, settings: Settings, digests: dict[str, str]) -> Book:
        if path.suffix != ".json":
            raise ValueError(f"--out is {path}, expected a name that ends in .json")
        if not path.absolute().parent.is_dir():
            raise ValueError(f"there is no folder {path.absolute().parent} to write {path.name} into")
        if not path.exists():
            begun = {"schema": SCHEMA, "settings": settings.tree(), "digests": digests, "machine": results.machine()}
            return cls(path, begun | {"rows": []})
        tree = read_object(path)
        rows = tree.get("rows")
        if tree.get("schema") != SCHEMA or not isinstance(rows, list) or not isinstance(tree.get("settings"), dict):
            raise ValueError(f"{path} is no file of a sweep; give another --out")
        if not all(
            isinstance(r, dict) and {"name", "digest", "metrics", "error", "exact", "seconds"} <= set(r) for r in rows
        ):
            raise ValueError(f"{path} has rows that are none of a sweep; give another --out")
        settings.require_same(tree["settings"], path)
        require_same_files(tree.get("digests"), digests, path)
        return cls(path, tree)

    def row(self, loaded: LoadedRecipe | None) -> dict[str, Any] | None:
        digest = PARENT if loaded is None else loaded.digest()
        return next((row for row in self.tree["rows"] if row["digest"] == digest), None)

    def has(self, loaded: LoadedRecipe | None) -> bool:
        """Whether it is there and did not fail."""
        row = self.row(loaded)
        return row is not None and row["error"] is None

    def mark(self, loaded: LoadedRecipe, exact: bool) -> None:
        """What a row that is there says of being exact may change from call to call."""
        row = self.row(loaded)
        if row is not None and row["exact"] != exact:
            row["exact"] = exact
            self.save()

    def add(self, row: dict[str, Any]) -> None:
        """At the end, or in the place of a row of the same recipe."""
        rows = self.tree["rows"]
        rows[:] = [other for other in rows if other["digest"] != row["digest"]] + [row]
        self.save()

    def order(self, wanted: Sequence[LoadedRecipe | None]) -> None:
        """The rows as their recipes were named, those of other calls behind them."""
        digests = [PARENT if loaded is None else loaded.digest() for loaded in wanted]
        before = [row["digest"] for row in self.tree["rows"]]
        self.tree["rows"].sort(key=lambda r: digests.index(r["digest"]) if r["digest"] in digests else len(digests))
        if before != [row["digest"] for row in self.tree["rows"]]:
            self.save()

    def save(self) -> None:
        with atomic_open(self.path) as file:
            json.dump(self.tree, file, indent=1)
            file.write("\n")
