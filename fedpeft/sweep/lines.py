"""Plan lines as a sweep sets them: a whole line, or a field of what the line has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from fedpeft.defaults import DEFAULTS
from fedpeft.errors import FedPeftError, PlanError
from fedpeft.plan import PARTS, Plan, expanded
from fedpeft.spec import build, describe, nearest

LINES = (*Plan.__dataclass_fields__, "preset")


def check_line(where: str, name: Any) -> None:
    """Raise ``PlanError`` for what is neither a plan line nor ``line.field``."""
    line, dot, field = str(name).partition(".")
    if line not in LINES:
        raise PlanError(f"{where}: {name!r} names no plan line{nearest(line, LINES)}")
    if dot and (line not in PARTS or not field.isidentifier()):
        raise PlanError(f"{where}: {name!r}: {line} has no fields; write {line}: [value, value]")


def with_fields(lines: Mapping[str, Any]) -> dict[str, Any]:
    """Return plan lines in which each ``line.field`` is set in what the line, or a preset, says.

    Raises ``PlanError`` where that has no such field, or several of its parts have.
    """
    own = {name: value for name, value in lines.items() if "." not in name}
    given = {name: value for name, value in lines.items() if "." in name}
    if not given:
        return own
    own = expanded(own)
    for name, value in given.items():
        line, _, field = name.partition(".")
        try:
            part = build(PARTS[line], str(own.get(line) or DEFAULTS.get(line, "none")))
            own[line] = describe(_with(name, part, field, value))
        except FedPeftError as error:
            raise PlanError(f"{name}: {error}") from None
    return own


def _with(name: str, part: Any, field: str, value: Any) -> Any:
    having = [one for one in _parts(part) if field in _fields(one)]
    if not having:
        known = [known for one in _parts(part) for known in _fields(one)]
        raise PlanError(f"{describe(part)} has no field {field!r}{nearest(field, known)}")
    if len(having) > 1:
        raise PlanError(f"{len(having)} parts of {describe(part)} have a field {field!r}; "
                        "give the whole line")  # fmt: skip
    return _replaced(part, having[0], field, value)


def _replaced(part: Any, meant: Any, field: str, value: Any) -> Any:
    if part is meant:
        return replace(part, **{field: value})
    changed = {
        f.name: tuple(_replaced(one, meant, field, value) for one in held)
        if isinstance(held, tuple)
        else _replaced(held, meant, field, value)
        for f in fields(part)
        if _holds(held := getattr(part, f.name))
    }
    return replace(part, **changed)


def _parts(part: Any) -> Iterator[Any]:
    """Yield a method and those that it holds: of a chain, or wrapped."""
    yield part
    for f in fields(part):
        held = getattr(part, f.name)
        if _holds(held):
            for one in held if isinstance(held, tuple) else (held,):
                yield from _parts(one)


def _fields(part: Any) -> list[str]:
    return [f.name for f in fields(part) if f.init and not _holds(getattr(part, f.name))]


def _holds(value: Any) -> bool:
    each = value if isinstance(value, tuple) and value else (value,)
    return all(is_dataclass(one) for one in each)
