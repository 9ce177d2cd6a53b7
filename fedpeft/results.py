"""What a site keeps of a run: the federation's adapter, its own, and a report that stays with it.

::

    results/<run>/
        adapter/              the PEFT folder that the server exports: the same tensors
        personal/             the site's own adapter, where the method personalises
        report.json           how they do on the site's held-out records; README.md is for reading
        tensors.safetensors   both adapters as fedpeft trains them, and of which plan they are

The folder is of one run, appears as a whole or not at all, and only ``fedpeft gain`` changes it
later: it adds to the report. The same message again finds it there, and changes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.closing import Result, read
from fedpeft.durable import (
    locked,
    make_private_folder,
    remove_folder,
    replace_file,
    replace_folder,
)
from fedpeft.errors import FedPeftError, RunError, SiteError, TrainError
from fedpeft.json_lines import mapping
from fedpeft.memory import NEVER, Memory
from fedpeft.plan import Plan
from fedpeft.site_report import Adapters, as_text, measured
from fedpeft.tensor_file import read_tensor_file, write_tensor_file
from fedpeft.tensors import is_finite, prefixed, select
from fedpeft.types import Tensors

if TYPE_CHECKING:
    from fedpeft.site import Site

_REPORT, _TEXT, _TENSORS = "report.json", "README.md", "tensors.safetensors"
_REMEDY = "restore it; the adapter is at the server, too"
_FEWEST = 4
"""Characters of a run's id that name it."""


@dataclass(frozen=True)
class Kept:
    """A site's ``results/<run>``, which is there."""

    folder: Path

    @cached_property
    def report(self) -> Mapping[str, Any]:
        """What is told of it. Raises ``SiteError`` where it is damaged."""
        path = self.folder / _REPORT
        found = mapping(path.read_bytes())
        if found is None or not {"run", "name", "rows", "gain"} <= found.keys():
            raise SiteError(f"{path}: damaged; {_REMEDY}")
        return found

    @property
    def name(self) -> str:
        """What the server calls the run."""
        try:
            return str(self.report["name"])
        except SiteError:
            return "damaged"

    @cached_property
    def about(self) -> tuple[Adapters, Mapping[str, Any]]:
        """The adapters, and what they are of: lines of the plan, rounds, digest of the message."""
        tensors, note = read_tensor_file(self.folder / _TENSORS, _REMEDY)
        return Adapters(select(tensors, "federated"), select(tensors, "personal")), note

    def add(self, rows: Mapping[str, Any], gain: Mapping[str, Any]) -> None:
        """Add to the report. Raises ``RunError`` where the disk is full; it is as it was then."""
        missing = {name: why for name, why in self.report["missing"].items() if name != "rows"}
        found = {**self.report, "rows": rows, "gain": gain, "missing": missing}
        with locked(self.folder, "report"):
            _write_report(self.folder, found)


def find(home: Path, run: str) -> Kept:
    """Return what a site keeps of a run: its id, the beginning of it, or the server's name of it.

    Raises ``SiteError`` where there is none, or several.
    """
    all_of_them = list(kept(home))
    found = [k for k in all_of_them if len(run) >= _FEWEST and k.folder.name.startswith(run)]
    found = found or [k for k in all_of_them if k.name == run]
    if len(found) == 1:
        return found[0]
    told = found or all_of_them
    known = ", ".join(f"{k.name} ({k.folder.name[:12]})" for k in told) or "none"
    if found:
        raise SiteError(f"{run[:80]!r}: names several runs: {known}; say the id in brackets")
    raise SiteError(f"{run[:80]!r}: this site keeps no result of such a run; there is {known}")


def kept(home: Path) -> Iterator[Kept]:
    """Yield every result that a site keeps."""
    for path in sorted((home / "results").glob(f"[!.]*/{_REPORT}")):
        yield Kept(path.parent)


def held(home: Path, run: str, message: bytes) -> Kept | None:
    """Return what is kept of a run, where this message has brought it.

    Raises ``RunError`` where another has: what a site keeps is not overwritten.
    """
    found = Kept(home / "results" / run)
    if not (found.folder / _REPORT).exists():
        return None
    if found.about[1].get("message") != _digest(message):
        raise RunError(f"run {run} has brought this site another result, which is kept")
    return found


def keep(
    home: Path,
    plan: Plan,
    site: Site,
    client: str,
    message: bytes,
    memory: Callable[[], Memory],
) -> Kept:
    """Keep the result that a message brings, with the client's own adapter, and report on both.

    What cannot be made of the latter is told in the report. Raises ``WireError`` for a message that
    brings none, ``RunError`` where the disk does not take it.
    """
    result = read(plan, site, client, message)
    why = dict[str, str]()
    try:
        own = personal(plan, site, client, result, memory)
    except FedPeftError as error:
        own, why["personal"] = {}, str(error)
    adapters = Adapters(result.tensors, own)
    report = {
        "run": result.run,
        "name": result.name,
        "site": client,
        "rounds": result.rounds,
        "records": {"training": len(site.train(client)), "held out": len(site.held(client))},
        "rows": {},
        "gain": {},
        "missing": why,
    }
    try:
        report["rows"] = measured(site, client, adapters)
    except FedPeftError as error:
        why["rows"] = str(error)
    about = {"lines": plan.lines(), "rounds": result.rounds, "message": _digest(message)}
    about |= {"data": site.fingerprint, "client": client}
    place = home / "results" / result.run
    try:
        _write(place, plan, site, adapters, about, report)
    except OSError as error:
        remove_folder(_temporary(place))
        cause = error.__cause__ if isinstance(error, RunError) else error
        reason = getattr(cause, "strerror", None) or "the disk does not take it"
        raise RunError(
            f"{client} cannot keep the result ({reason}); make room there, and it is sent again"
        ) from error
    return Kept(place)


def personal(
    plan: Plan, site: Site, client: str, result: Result, memory: Callable[[], Memory]
) -> Tensors:
    """Return the whole adapter that is a client's own at the end of a run; empty without any.

    It is what the client would evaluate as its own: what it keeps of it, or what it makes of the
    result. Raises ``FedPeftError`` where its memory is lost, none of its replies was used, or
    training was not finite.
    """
    from fedpeft.client_rounds import ALONE, Received
    from fedpeft.local_models import for_evaluation
    from fedpeft.tensors import narrowed, padded

    tables, ack = site.tables.of(client), result.acks[client]
    local, remembers = site.tables.roles(0).local, plan.personal.when == "rounds"
    if plan.personal.when == "never" and not local:
        return {}
    if ack == NEVER and (local or remembers):
        raise TrainError("none: it is made in rounds, and no reply of this site was used in any")
    mine = memory().at(ack, client) if local or remembers else {}
    shared = {k: v for k, v in result.tensors.items() if k in site.tables.shapes}
    rest = {k: v for k, v in result.tensors.items() if k not in shared or k in site.tables.once}
    tensors = {**narrowed(shared, tables.shapes), **select(mine, "local"), **rest}
    own = select(mine, "personal")
    # the round of the last evaluation: what is made for it is made again, to the same bits
    got = Received({}, result.rounds, ack, tensors, {}, {}, own, {}, {}, {})
    found = for_evaluation(plan, site, [client], [got], ALONE) or [tensors]
    if not is_finite(found[0]):
        raise TrainError("none: its training diverged")
    return padded(found, site.tables.shapes)[0]


def gain_told(found: Kept) -> Mapping[str, float] | None:
    """Return by how much the site's adapters do better than training alone, where that is known.

    Metric by metric; those of its own adapter begin with ``personal/``.
    """
    told = dict[str, float]()
    for whose, about in found.report["gain"].items():
        before = "" if whose == "federated" else f"{whose}/"
        told |= {f"{before}{name}": float(value) for name, value in about["by"].items()}
    return told or None


def _write(
    place: Path,
    plan: Plan,
    site: Site,
    adapters: Adapters,
    about: Mapping[str, Any],
    report: Mapping[str, Any],
) -> None:
    from fedpeft.export import write_adapter

    temporary = _temporary(place)
    make_private_folder(place.parent)
    remove_folder(temporary)
    temporary.mkdir(mode=0o700)
    own = prefixed("personal", adapters.personal)
    flat = {**prefixed("federated", adapters.federated), **own}
    write_tensor_file(temporary / _TENSORS, flat, about, "kept")
    whose = {"adapter": adapters.federated, "personal": adapters.personal}
    for name, tensors in whose.items():
        if tensors:
            write_adapter(temporary / name, plan, site, tensors, _card(plan, site, name, report))
    _write_report(temporary, report)
    replace_folder(place, temporary, "kept")


def _temporary(place: Path) -> Path:
    return place.with_name(f".{place.name}.new")


def _write_report(folder: Path, report: Mapping[str, Any]) -> None:
    text = json.dumps(dict(report), indent=1) + "\n"
    replace_file(folder / _TEXT, [as_text(report).encode()], "kept")
    replace_file(folder / _REPORT, [text.encode()], "kept")


def _card(plan: Plan, site: Site, name: str, report: Mapping[str, Any]) -> str:
    from fedpeft.model_card import front_matter

    what = {
        "adapter": "# Federated adapter\n\nThe result of the federation",
        "personal": f"# Personal adapter of {report['site']}\n\nMade beside that of the federation",
    }
    front = front_matter(plan, site.base.location.origin, {})
    lines = [f"{k}: {v}" for k, v in plan.lines().items()]
    said = f"{what[name]}, {report['rounds']} rounds of {report['name']} (run {report['run']})."
    return "\n".join([*front, said, "", "```yaml", *lines, "```", ""])


def _digest(message: bytes) -> str:
    return hashlib.blake2b(message, digest_size=16).hexdigest()
