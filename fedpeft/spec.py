"""Turn ``"topk(density=0.01) | int8"`` into objects, and back.

A method is a frozen dataclass in ``fedpeft/<family>/<name>.py``. The file name is its name in a
plan and the class has the same letters. ``"mypkg.robust:Median(beta=0.2)"`` reaches outside the
package.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import pkgutil
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, dataclass_transform

from fedpeft.errors import SpecError

_T = TypeVar("_T")


def bounded(
    *,
    default: float | None,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
) -> Any:
    """Declare a numeric field with its range: ``low <= x <= high``, ``above < x < below``."""
    limits = {"low": low, "above": above, "high": high, "below": below}
    return field(default=default, metadata={k: v for k, v in limits.items() if v is not None})


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field, bounded))
def method(cls: type[_T]) -> type[_T]:
    """Make ``cls`` a frozen, keyword-only dataclass whose fields are checked at construction.

    A method's own checks go into ``check(self)``, which may raise ``SpecError``.
    """

    def __post_init__(self: Any) -> None:
        _check_fields(self)
        if hasattr(self, "check"):
            self.check()

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=True)(cls)


def build(family: str, spec: str) -> Any:
    """Build the method, or the chain of methods, that ``spec`` names.

    Raises ``SpecError`` with the nearest spelling where a name or a field is unknown.
    """
    outside, colon, call = _split_module(spec)
    try:
        node = ast.parse(call.strip(), mode="eval").body
    except SyntaxError:
        raise SpecError(f"cannot read {spec!r}: write name, or name(field=value, ...)") from None
    made = [_make(family, outside if colon else "", stage) for stage in _stages(node)]
    return made[0] if len(made) == 1 else _find(family, "chain")(stages=tuple(made))


def describe(part: Any, *, full: bool = False) -> str:
    """Return the canonical spec of ``part``: the fields that differ from their defaults, or all."""
    if hasattr(part, "stages"):
        return " | ".join(describe(stage, full=full) for stage in part.stages)
    given = {f.name: getattr(part, f.name) for f in fields(part)}
    shown = [f for f in fields(part) if full or f.default is MISSING or given[f.name] != f.default]
    inner = ", ".join(f"{f.name}={given[f.name]!r}" for f in shown)
    module = type(part).__module__
    parts = module.split(".")
    own = parts[0] == "fedpeft" and len(parts) == 3
    name = parts[-1] if own else f"{module}:{type(part).__name__}"
    return f"{name}({inner})" if inner else name


def names(family: str) -> list[str]:
    """List the methods of a family by looking at its folder; nothing is imported."""
    found = importlib.util.find_spec(f"fedpeft.{family}")
    if found is None or not found.submodule_search_locations:
        raise SpecError(f"there is no family {family!r}")
    modules = pkgutil.iter_modules(list(found.submodule_search_locations))
    return sorted(m.name for m in modules if not m.name.startswith("_"))


def nearest(word: str, known: Sequence[str]) -> str:
    """Return ``; did you mean 'x'?`` where something is near, else what there is."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; there is {', '.join(known) or 'none'}"


def _split_module(spec: str) -> tuple[str, str, str]:
    head = spec.split("(", 1)[0]
    if ":" not in head:
        return "", "", spec
    module, _, rest = spec.partition(":")
    return module.strip(), ":", rest


def _stages(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _stages(node.left) + _stages(node.right)
    return [node]


def _make(family: str, outside: str, node: ast.expr) -> Any:
    call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
    if isinstance(call.func, ast.Constant) and call.func.value is None:
        call.func = ast.Name(id="none")  # "none" is a method, Python's None is not
    if not isinstance(call.func, ast.Name):
        raise SpecError(f"write name(field=value, ...), not {ast.unparse(node)!r}")
    name = call.func.id
    cls = _find(family, name, outside)
    known = [f.name for f in fields(cls) if f.init]
    if call.args:
        raise SpecError(f"{name}: name every value, as in {name}({(known or ['field'])[0]}=...)")
    given: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None or keyword.arg not in known:
            close = difflib.get_close_matches(keyword.arg or "", known, n=1, cutoff=0.6)
            hint = f"; did you mean {close[0]!r}?" if close else ";"
            has = ", ".join(known) or "no fields"
            raise SpecError(f"{name} has no field {keyword.arg or '**'!r}{hint} it has {has}")
        given[keyword.arg] = _literal(name, keyword)
    required = [f.name for f in fields(cls) if f.default is MISSING and f.init]
    if missing := [k for k in required if k not in given]:
        raise SpecError(f"{name} needs {', '.join(missing)}")
    part = cls(**given)
    _check_fields(part)
    return part


def _literal(name: str, keyword: ast.keyword) -> Any:
    value = keyword.value
    if isinstance(value, ast.Name) and value.id in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[value.id]
    try:
        return ast.literal_eval(value)
    except ValueError:
        text = ast.unparse(value)
        raise SpecError(
            f"{name}: {keyword.arg}={text} is not a number, string, list or mapping"
            + (f"; write {keyword.arg}={text!r}" if text.isidentifier() else "")
        ) from None


def _find(family: str, name: str, outside: str = "") -> Any:
    module = outside or f"fedpeft.{family}.{name}"
    if outside and "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a console script does not look in the working folder
    if not outside and name not in names(family):
        raise SpecError(f"there is no {family} method {name!r}{nearest(name, names(family))}")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module + ".").startswith(error.name + "."):
            raise SpecError(f"there is no module {module!r} to take {name!r} from") from None
        raise
    letters = name.replace("_", "").lower()
    for attribute, value in vars(found).items():
        if (
            attribute.lower().replace("_", "") == letters
            and isinstance(value, type)
            and is_dataclass(value)
        ):
            return value
    raise SpecError(f"{module} defines no dataclass with the letters of {name!r}")


def _check_fields(part: Any) -> None:
    """Check types against annotations and numbers against their declared range."""
    hints = typing.get_type_hints(type(part))
    label = type(part).__module__.rsplit(".", 1)[-1]
    for f in fields(part):
        value = getattr(part, f.name)
        hint = hints.get(f.name, Any)
        if not _accepts(hint, value):
            raise SpecError(f"{label}: {f.name}={value!r} must be {_spell(hint)}")
        if f.metadata and isinstance(value, int | float):
            _check_range(label, f.name, value, f.metadata)


def _check_range(label: str, name: str, value: float, limits: typing.Mapping[str, Any]) -> None:
    words = {"low": "at least", "above": "above", "high": "at most", "below": "below"}
    good = {
        "low": lambda x: value >= x,
        "above": lambda x: value > x,
        "high": lambda x: value <= x,
        "below": lambda x: value < x,
    }
    if not all(good[k](limits[k]) for k in good if k in limits):
        text = " and ".join(f"{words[k]} {limits[k]:g}" for k in words if k in limits)
        raise SpecError(f"{label}: {name}={value!r} must be {text}")


def _accepts(hint: Any, value: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in args
    if origin in (typing.Union, types.UnionType):
        return any(_accepts(a, value) for a in args)
    if hint is None or hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    base = origin or hint
    return isinstance(value, base) if isinstance(base, type) else True


def _spell(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_spell(a) for a in args)
    words = {float: "a number", int: "a whole number", str: "a string", bool: "true or false"}
    return words.get(hint, "none" if hint is type(None) else getattr(hint, "__name__", str(hint)))
