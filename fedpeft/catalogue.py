"""What a plan can name, in words: the methods' own docstrings and defaults."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator

from fedpeft.errors import SpecError
from fedpeft.spec import find, names, nearest


def families() -> list[str]:
    """Return every family that a plan or the command line takes methods from."""
    from fedpeft.plan import PARTS

    return list(dict.fromkeys([*PARTS.values(), "presets", "models", "engine", "search"]))


def listed(family: str) -> list[str]:
    """Return the names of a family's methods. Raises ``SpecError`` for an unknown family."""
    return [name for name in names(family) if name != "chain"]


def summaries(family: str) -> Iterator[tuple[str, str]]:
    """Yield each method's name and what the first line of its file says: the paper, or what it is.

    Raises ``SpecError`` for an unknown family.
    """
    for name in listed(family):
        yield name, _first_paragraph(_file_doc(family, name))


def about(family: str, name: str) -> str:
    """Return a method's paper, its fields with their defaults, and its documentation.

    Raises ``SpecError`` where there is no such method.
    """
    if family == "models":
        if name not in listed(family):
            raise SpecError(f"there is no models method {name!r}{nearest(name, listed(family))}")
        return "\n\n".join([name, _file_doc(family, name)])
    cls = find(family, name)
    shown = ", ".join(
        f.name if f.default is dataclasses.MISSING else f"{f.name}={f.default!r}"
        for f in dataclasses.fields(cls)
        if f.init
    )
    return "\n\n".join([f"{name}({shown})", _file_doc(family, name), inspect.getdoc(cls) or ""])


def _file_doc(family: str, name: str) -> str:
    if family == "models":  # folders and files of base models, no methods
        import importlib

        return inspect.getdoc(importlib.import_module(f"fedpeft.models.{name}")) or ""
    return inspect.getdoc(sys.modules[find(family, name).__module__]) or ""


def _first_paragraph(text: str) -> str:
    return " ".join(text.partition("\n\n")[0].split())
