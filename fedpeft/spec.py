"""Turn ``"topk(density=0.01) | int8"`` into objects, and back.

A method is a frozen dataclass in ``fedpeft/<family>/<name>.py``. The file name is its name in a
plan and the class has the same letters. ``"mypkg.robust:Median(beta=0.2)"`` reaches outside the
package. A method that wraps another of its family takes it first: ``"feedback(topk | int8)"``.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import pkgutil
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

from fedpeft.errors import SpecError
from fedpeft.fields import check_fields
from fedpeft.types import (
    Adapter,
    Aggregator,
    Availability,
    Codec,
    Cohort,
    Correction,
    Latency,
    Partition,
    Personal,
    Preset,
    Privacy,
    Schedule,
    Search,
    ServerOptimizer,
    Simulation,
    Source,
    Task,
    Tracker,
    Trainer,
    Weighting,
)

PROTOCOLS: Mapping[str, Any] = {
    "adapters": Adapter,
    "aggregators": Aggregator,
    "availability": Availability,
    "codecs": Codec,
    "cohorts": Cohort,
    "corrections": Correction,
    "data": Source,
    "engine": Simulation,
    "latency": Latency,
    "optimizers": ServerOptimizer,
    "partitions": Partition,
    "personal": Personal,
    "presets": Preset,
    "privacy": Privacy,
    "schedules": Schedule,
    "search": Search,
    "tasks": Task,
    "track": Tracker,
    "trainers": Trainer,
    "weighting": Weighting,
}
"""Family to what its methods must be."""

_T = TypeVar("_T")
_PIECES = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[()\[\]{}|,]""", re.DOTALL)
"""What matters for cutting a chain, or a list of fields: quoted text, brackets, bars, commas."""
_CALL = re.compile(r"\s*([A-Za-z_]\w*)\s*\((.*)\)\s*", re.DOTALL)
_SPEC = re.compile(r"\s*[A-Za-z_][\w.]*\s*($|[(|:])")
"""How a call looks, and how what is wrapped begins."""
_WRAPPED = "wrapped"


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


def wrapped() -> Any:
    """Declare the field of a method that holds another one of its family; a spec has it first."""
    return field(metadata={_WRAPPED: True})


@dataclass_transform(
    frozen_default=True, kw_only_default=True, field_specifiers=(field, bounded, wrapped)
)
def method(cls: type[_T]) -> type[_T]:
    """Make ``cls`` a frozen, keyword-only dataclass whose fields are checked at construction.

    A method's own checks go into ``check(self)``, which may raise ``SpecError``.
    """

    def __post_init__(self: Any) -> None:
        check_fields(self)
        if hasattr(self, "check"):
            self.check()

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=True)(cls)


def build(family: str, spec: str) -> Any:
    """Build the method, or the chain of methods, that ``spec`` names.

    Raises ``SpecError`` with the nearest spelling where a name or a field is unknown.
    """
    made = []
    for stage in _cut(spec, "|"):
        outside, call = _split_module(stage)
        try:
            call, inner = _unwrapped(family, outside, call)
            node = ast.parse(call.strip(), mode="eval").body
        except SpecError:
            raise
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise SpecError(
                f"cannot read {spec[:200]!r}: write name, or name(field=value, ...)"
            ) from None
        made.append(_make(family, outside, node, inner))
    if len(made) == 1:
        return made[0]
    if "chain" not in names(family):
        raise SpecError(f"cannot read {spec[:200]!r}: {family} are not chained with |")
    return find(family, "chain")(stages=tuple(made))


def describe(part: Any, *, full: bool = False) -> str:
    """Return the canonical spec of ``part``: the fields that differ from their defaults, or all."""
    if hasattr(part, "stages"):
        return " | ".join(describe(stage, full=full) for stage in part.stages)
    given = {f.name: getattr(part, f.name) for f in fields(part) if f.init}
    known = [f for f in fields(part) if f.init and _WRAPPED not in f.metadata]
    shown = [f for f in known if full or f.default is MISSING or given[f.name] != f.default]
    inside = [describe(stage, full=full) for stage in _inside(part)]
    inner = ", ".join([*inside, *(f"{f.name}={given[f.name]!r}" for f in shown)])
    module = type(part).__module__
    parts = module.split(".")
    own = parts[0] == "fedpeft" and len(parts) == 3
    name = parts[-1] if own else f"{module}:{type(part).__name__}"
    return f"{name}({inner})" if inner else name


@dataclass(frozen=True, slots=True)
class Mention:
    """A method as a spec names it: the module of one from ``outside``, and its literal fields."""

    outside: str
    name: str
    given: Mapping[str, Any]


def mentions(spec: str) -> Iterator[Mention]:
    """Yield every method that a spec names, those that others wrap included; imports nothing.

    Raises ``SpecError`` for what it cannot read for certain, be it that :func:`build` could.
    """
    for stage in _cut(spec, "|"):
        outside, call = _split_module(stage)
        found = _CALL.fullmatch(call)
        name, given = (found[1] if found else call.strip()), dict[str, Any]()
        if not name.isidentifier():
            raise SpecError(f"cannot read {spec[:200]!r}: write name, or name(field=value, ...)")
        inner = [piece for piece in _cut(found[2], ",") if piece.strip()] if found else []
        for piece in inner:
            try:
                (keyword,) = ast.parse(f"f({piece})", mode="eval").body.keywords  # type: ignore[attr-defined]
                given[str(keyword.arg)] = _literal(name, keyword)
            except (SpecError, SyntaxError, ValueError, RecursionError, MemoryError):
                yield from mentions(re.sub(r"^\s*\w+\s*=(?!=)", "", piece))
        yield Mention(outside, "none" if name == "None" else name, given)


def digest_of(part: Any) -> str:
    """Return a digest of the source file of a method from outside the package, else nothing."""
    inside = "".join(digest_of(one) for one in getattr(part, "stages", _inside(part)))
    module = sys.modules[type(part).__module__]
    if module.__name__.startswith("fedpeft.") or not getattr(module, "__file__", None):
        return inside
    return hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest() + inside


def names(family: str) -> list[str]:
    """List the methods of a family by looking at its folder, once; nothing is imported."""
    return list(_names(family))


@cache
def _names(family: str) -> tuple[str, ...]:
    if not family.isidentifier():
        raise SpecError(f"there is no family {family!r}")
    found = importlib.util.find_spec(f"fedpeft.{family}")
    if found is None or not found.submodule_search_locations:
        raise SpecError(f"there is no family {family!r}")
    modules = pkgutil.iter_modules(list(found.submodule_search_locations))
    return tuple(sorted(m.name for m in modules if not m.name.startswith("_")))


def nearest(word: str, known: Sequence[str]) -> str:
    """Return ``; did you mean 'x'?`` where something is near, else what there is."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; there is {', '.join(known) or 'none'}"


def _split_module(stage: str) -> tuple[str, str]:
    """Return the module before the colon, if any, and the call."""
    if ":" not in stage.split("(", 1)[0]:
        return "", stage
    module, _, rest = stage.partition(":")
    module = module.strip()
    if not all(part.isidentifier() for part in module.split(".")):
        raise SpecError(f"{module!r} is no module; write package.module:Name(field=value, ...)")
    return module, rest


def _cut(spec: str, at: str) -> list[str]:
    """Cut at the bars, or commas, outside brackets and quotes."""
    found, start, depth = list[str](), 0, 0
    for piece in _PIECES.finditer(spec):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(piece[0], 0)
        if piece[0] == at and depth == 0:
            found.append(spec[start : piece.start()])
            start = piece.end()
    return [*found, spec[start:]]


def _unwrapped(family: str, outside: str, call: str) -> tuple[str, dict[str, Any]]:
    """Take the first argument out of a call where it is a spec: of a method that wraps another."""
    if (found := _CALL.fullmatch(call)) is None:
        return call, {}
    try:
        known = fields(find(family, found[1], outside))
    except SpecError:  # said where the whole call is read
        return call, {}
    first, *rest = _cut(found[2], ",")
    for name in (f.name for f in known if _WRAPPED in f.metadata):
        spec = re.sub(rf"^\s*{name}\s*=(?!=)", "", first)
        if _SPEC.match(spec):
            return f"{found[1]}({','.join(rest)})", {name: build(family, spec)}
    return call, {}


def _inside(part: Any) -> list[Any]:
    """Return what a method wraps, if it wraps another."""
    return [getattr(part, f.name) for f in fields(part) if _WRAPPED in f.metadata]


def _make(family: str, outside: str, node: ast.expr, inner: Mapping[str, Any]) -> Any:
    call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
    if isinstance(call.func, ast.Constant) and call.func.value is None:
        call.func = ast.Name(id="none")  # "none" is a method, Python's None is not
    if not isinstance(call.func, ast.Name):
        raise SpecError(f"write name(field=value, ...), not {_text(node)!r}")
    name = call.func.id
    cls = find(family, name, outside)
    known = [f.name for f in fields(cls) if f.init]
    if call.args:
        raise SpecError(f"{name}: name every value, as in {name}({(known or ['field'])[0]}=...)")
    given = dict(inner)
    for keyword in call.keywords:
        if keyword.arg is None or keyword.arg not in known:
            word = keyword.arg or ""
            close = [k for k in known if word.startswith(k)]  # rank: r
            close += difflib.get_close_matches(word, known, n=1, cutoff=0.6)
            hint = f"; did you mean {close[0]!r}?" if close else ";"
            has = ", ".join(known) or "no fields"
            raise SpecError(f"{name} has no field {keyword.arg or '**'!r}{hint} it has {has}")
        if keyword.arg in given:
            raise SpecError(f"{name}: {keyword.arg} is given twice")
        given[keyword.arg] = _literal(name, keyword)
    required = [f for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [f.name for f in required if f.init and f.name not in given]:
        raise SpecError(f"{name} needs {', '.join(missing)}")
    part = cls(**given)
    check_fields(part)
    protocol = PROTOCOLS.get(family, object)
    if lacks := [k for k in vars(protocol) if k[0] != "_" and not hasattr(part, k)]:
        raise SpecError(f"{name} is no {protocol.__name__}: it has no {', '.join(lacks)}")
    return part


def _literal(name: str, keyword: ast.keyword) -> Any:
    value = keyword.value
    if isinstance(value, ast.Name) and value.id in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[value.id]
    try:
        return ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        text = _text(value)
        raise SpecError(
            f"{name}: {keyword.arg}={text} is not a number, string, list or mapping"
            + (f"; write {keyword.arg}={text!r}" if text.isidentifier() else "")
        ) from None


def _text(node: ast.expr) -> str:
    try:
        return ast.unparse(node)[:80]
    except RecursionError:
        return "a deep nest"


def find(family: str, name: str, outside: str = "") -> Any:
    """Return the class of a method; ``outside`` is the module of one from elsewhere.

    Raises ``SpecError`` where there is none.
    """
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
    except Exception as error:
        if not outside:
            raise
        reason = f"{type(error).__name__}: {error}"
        raise SpecError(f"{module} cannot be imported ({reason})") from error
    letters = name.replace("_", "").lower()
    for attribute, value in vars(found).items():
        if (
            attribute.lower().replace("_", "") == letters
            and isinstance(value, type)
            and is_dataclass(value)
        ):
            return value
    raise SpecError(f"{module} defines no dataclass with the letters of {name!r}")
