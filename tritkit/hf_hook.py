"""``import tritkit`` teaches transformers our own folders, and costs nothing where transformers is not used.

Their model_type is tritkit_FAMILY, which transformers by itself refuses. When it imports its table of model types, they
are added to it; the first config of such a folder brings in configs, models and the quantiser (hf.py), and torch.
"""

from __future__ import annotations

import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TABLE = "transformers.models.auto.configuration_auto"


class _WhenImported:
    """A finder that lets the others find the module TABLE and adds to it when it has run."""

    def __init__(self) -> None:
        self.asking = False

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TABLE or self.asking:
            return None
        self.asking = True
        try:
            specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if hasattr(finder, "find_spec"))
            spec = next((found for found in specs if found is not None), None)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_add(module: ModuleType) -> None:
                run(module)
                add_to(module)

            spec.loader.exec_module = run_and_add  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Add our model types now if transformers' table is there, else when it comes."""
    if TABLE in sys.modules:
        add_to(sys.modules[TABLE])
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())  # type: ignore[arg-type]


def add_to(table: ModuleType) -> None:
    """Our model types into transformers' table of them; a warning where that cannot be."""
    from .checkpoint import OWN
    from .models.config import FAMILIES

    try:
        for family in FAMILIES:
            table.CONFIG_MAPPING.register(OWN + family, _stand_in(OWN + family), exist_ok=True)
    except Exception as error:  # whoever imports transformers has asked for nothing of ours
        warnings.warn(f"tritkit could not make its folders known to transformers: {error!r}", stacklevel=2)


def _stand_in(model_type: str) -> type:
    """What is in the table until it is first used: transformers' own configs cannot be imported while the table is."""

    def real() -> Any:
        from .hf import register

        return register()[model_type]

    class StandIn:
        def __new__(cls, *arguments: Any, **settings: Any) -> Any:
            return real()(*arguments, **settings)

        @classmethod
        def from_dict(cls, *arguments: Any, **settings: Any) -> Any:
            return real().from_dict(*arguments, **settings)

        @classmethod
        def from_pretrained(cls, *arguments: Any, **settings: Any) -> Any:
            return real().from_pretrained(*arguments, **settings)

    StandIn.model_type = model_type  # type: ignore[attr-defined]
    return StandIn
