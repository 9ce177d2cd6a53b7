"""What a site refuses of a plan before it is read: code and files that its owner did not allow.

To read a plan is to import what it names and to construct it. So its text is looked at first, and
what cannot be read for certain is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedpeft.data import _files
from fedpeft.deployment.client_file import ClientFile, Limits
from fedpeft.errors import FedPeftError
from fedpeft.plan import PARTS, expanded
from fedpeft.spec import Mention, find, mentions
from fedpeft.types import Filed, Pathed, Scalar


def unread_refusals(site: ClientFile, lines: Mapping[str, Scalar]) -> list[str]:
    """Return why a site does not even read these lines; empty where it does.

    Nothing from outside fedpeft is imported, and no file is opened.
    """
    limits, known = site.limits, {k: v for k, v in lines.items() if v not in ("", "none")}
    if found := list(_of_spec(limits, "preset", "presets", known.get("preset", ""))):
        return found
    try:
        known = expanded({k: v for k, v in known.items() if k in (*PARTS, "preset", "warm_start")})
    except FedPeftError as error:
        return [str(error)]
    plans = site.data is None  # a site with records of its own never loads the plan's
    for line, family in PARTS.items():
        found += _of_spec(limits, line, family, known.get(line, ""), reads=line != "data" or plans)
    if warm := known.get("warm_start"):
        found += _of_path(limits, "warm_start", str(warm))
    return found


def _of_spec(
    limits: Limits, line: str, family: str, spec: Any, *, reads: bool = True
) -> Iterator[str]:
    try:
        for mention in mentions(str(spec)) if spec else ():
            if mention.outside and mention.outside not in limits.modules:
                yield (
                    f"{line}: {mention.outside} is none of the modules from which plans may take "
                    "code here (limits.modules in client.yaml)"
                )
            elif reads:
                yield from _of_fields(limits, line, family, mention)
    except FedPeftError as error:
        yield f"{line}: {error}"


def _of_fields(limits: Limits, line: str, family: str, mention: Mention) -> Iterator[str]:
    method = find(family, mention.name, mention.outside)
    paths = list(method.paths(mention.given)) if _has(method, Pathed) else []
    if _has(method, Filed) and not isinstance(method.files, property):
        paths += [str(mention.given[k]) for k in method.files if mention.given.get(k) is not None]
    for path in paths:
        yield from _of_path(limits, line, path)


def _of_path(limits: Limits, line: str, text: str) -> Iterator[str]:
    allowed = [folder.resolve() for folder in limits.files]
    if "\0" in text:
        yield f"{line}: {text[:200]!r} is no path"
        return
    for path in _files.read_by(text):
        if not any(path.resolve().is_relative_to(folder) for folder in allowed):
            yield (
                f"{line}: {str(path)[:200]} is a path, and plans may name files here only in "
                f"{_listed(allowed)} (limits.files in client.yaml)"
            )


def _has(method: type, protocol: Any) -> bool:
    return all(hasattr(method, name) for name in vars(protocol) if not name.startswith("_"))


def _listed(folders: list[Path]) -> str:
    return ", ".join(map(str, folders)) or "no folder"
