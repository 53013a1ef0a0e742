"""Settings: a tree of dataclasses, filled from a TOML file and then from --a.b=value. Imports nothing of ours."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def load(kind: type[T], file: Path | str | None = None, overrides: dict[str, str] | None = None) -> T:
    """Fill the dataclass tree ``kind``: defaults, then the TOML file, then overrides {"a.b": "text"}.

    Raises ValueError, with the nearest right name, for a setting that does not exist, and for a value of another type.
    """
    return fill(kind, read_toml(file) if file is not None else {}, overrides)


def read_toml(file: Path | str) -> dict[str, Any]:
    """The tree of a TOML file; ValueError where there is none."""
    try:
        return tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no settings file {file}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a TOML file: {error}") from None


def fill(kind: type[T], tree: dict[str, Any], overrides: dict[str, str] | None = None) -> T:
    """The dataclass tree ``kind`` from a tree of values, then overrides {"a.b": "text"}; errors as in ``load``."""
    for dotted, text in (overrides or {}).items():
        node = tree
        *path, last = dotted.split(".")
        for part in path:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ValueError(f"setting {dotted!r}: {part!r} is a value, not a table")
        node[last] = _Text(text)
    return _fill(kind, tree, "")


def dump(tree: Any) -> str:
    """The whole tree as TOML that ``load`` reads back to an equal tree; settings that are None are left out."""
    lines: list[str] = []
    _dump(tree, "", lines)
    return "\n".join(lines).strip() + "\n"


def names(kind: type, prefix: str = "") -> list[str]:
    """All dotted setting names of a dataclass tree."""
    found: list[str] = []
    for name, hint in typing.get_type_hints(kind).items():
        inner = _dataclass_in(hint)
        found += names(inner, f"{prefix}{name}.") if inner else [prefix + name]
    return found


class _Text(str):
    """A value that came from the command line and still has to be read as the field's type."""


def _fill(kind: type[T], tree: dict[str, Any], prefix: str) -> T:
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, value in tree.items():
        if name not in hints:
            close = difflib.get_close_matches(prefix + name, names(kind, prefix), n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(names(kind, prefix))}"
            raise ValueError(f"there is no setting {prefix + name!r}{hint}")
        inner = _dataclass_in(hints[name])
        if inner:
            if not isinstance(value, dict):
                raise ValueError(f"setting {prefix + name!r} is a table of settings, not the value {value!r}")
            values[name] = _fill(inner, value, f"{prefix}{name}.")
        else:
            values[name] = _convert(value, hints[name], prefix + name)
    return kind(**values)


def _dataclass_in(hint: Any) -> type | None:
    return hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None


def _convert(value: Any, hint: Any, name: str) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if isinstance(value, _Text):
        if type(None) in options and value.lower() in ("none", ""):
            return None
        for option in options:
            try:
                if option is bool and value.lower() in ("true", "false"):
                    return value.lower() == "true"
                if option in (int, float):
                    return option(value)
                if option is str:
                    return str(value)
                if typing.get_origin(option) is tuple:
                    return tuple(part for part in value.split(",") if part)
            except ValueError:
                continue
    else:
        for option in options:
            if typing.get_origin(option) is tuple and isinstance(value, list):
                (inner, *_) = typing.get_args(option)
                if any(type(v) is not inner for v in value):
                    continue
                return tuple(value)
            if option is float and type(value) is int:
                return float(value)
            if isinstance(option, type) and type(value) is option:
                return value
    named = (str(o) if typing.get_origin(o) else getattr(o, "__name__", str(o)) for o in options)
    wanted = " or ".join(n for n in named if n != "NoneType")
    raise ValueError(f"setting {name!r} wants {wanted}, not {str(value)!r}")


def _dump(tree: Any, prefix: str, lines: list[str]) -> None:
    fields = dataclasses.fields(tree)
    plain = [f for f in fields if not dataclasses.is_dataclass(getattr(tree, f.name))]
    values = [(f.name, getattr(tree, f.name)) for f in plain]
    if prefix and any(value is not None for _, value in values):
        lines.append(f"\n[{prefix.rstrip('.')}]")
    lines += [f"{name} = {_toml(value)}" for name, value in values if value is not None]
    for field in fields:
        if field not in plain:
            _dump(getattr(tree, field.name), f"{prefix}{field.name}.", lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    # A JSON string is a TOML string but for the one control character that JSON does not escape.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
