"""How the server hands a run's result out to its sites, and what it keeps of that.

::

    outgoing.safetensors   what sites are sent, until all have it
    kept.json              which sites keep it, and what they have told of their gain

Both are in the run folder, before the run is finished. Whoever is away is owed the result: the run
is taken up again for it (``deployment/deliveries.py``). What was sent before is sent again as it
was, so a site that has it answers at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedpeft.closing import Result, messages
from fedpeft.durable import replace_file
from fedpeft.engine._base import Handing
from fedpeft.errors import RunError, printable
from fedpeft.json_lines import mapping
from fedpeft.plan import Plan
from fedpeft.tensor_file import read_tensor_file, write_tensor_file
from fedpeft.tensors import prefixed, select
from fedpeft.types import Metrics

LATER = "later"
"""In an answer: the site lets its gain leave, and has not trained alone yet."""
GAIN = "gain/"
"""Before the names of what a site has gained, in its answer."""
_OUTGOING, _KEPT = "outgoing.safetensors", "kept.json"
_TOLD = ("run", "name", "plan", "rounds", "acks")
_MOST = 64
"""Numbers that a site may tell of its gain."""


@dataclass(frozen=True, slots=True)
class Site:
    """How a site stands: whether it keeps the result, and ``why`` not.

    ``gain`` is what it has told of its gain, metric by metric; ``later`` says that it may yet.
    """

    kept: bool = False
    why: str = "it was not asked yet"
    gain: Mapping[str, float] | None = None
    later: bool = False

    @property
    def owed(self) -> bool:
        """Whether there is a reason to ask it again."""
        return not self.kept or self.later


def prepare(folder: Path, result: Result, clients: list[str]) -> None:
    """Make durable what is handed out, before the run counts as finished."""
    flat = {**prefixed("adapter", result.adapter), **prefixed("edits", result.edits)}
    note = {k: getattr(result, k) for k in _TOLD}
    write_tensor_file(folder / _OUTGOING, flat, note, "kept", private=True)
    if not (folder / _KEPT).exists():
        _write(folder, {client: Site() for client in clients})


def standing(folder: Path) -> dict[str, Site]:
    """Return how the sites of a run stand; nobody, where its sites keep no result.

    Raises ``RunError`` where the file is damaged.
    """
    path = folder / _KEPT
    try:
        found = mapping(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    try:
        return {name: Site(**about) for name, about in (found or {})["sites"].items()}
    except (KeyError, TypeError, AttributeError):
        raise RunError(f"{path}: damaged; restore it, or take it away") from None


def is_handed_out(folder: Path) -> bool:
    """Tell whether a run has finished, and all that is left is to hand its result out."""
    return (folder / "result.json").exists() and (folder / _KEPT).exists()


def owed(folder: Path) -> list[str]:
    """Return which sites of a finished run are to be asked again."""
    if not is_handed_out(folder):
        return []
    return [name for name, site in standing(folder).items() if site.owed]


def outgoing(folder: Path) -> Result:
    """Return what sites are sent. Raises ``RunError`` where it is damaged."""
    flat, note = read_tensor_file(folder / _OUTGOING, "restore it")
    return Result(adapter=select(flat, "adapter"), edits=select(flat, "edits"), **note)


def hand_out(
    folder: Path,
    plan: Plan,
    engine: Handing,
    clients: Sequence[str],
    tell: Callable[[str], None],
) -> None:
    """Have ``clients`` keep the result; note who does.

    Raises ``RunError`` where the folder holds that of another plan.
    """
    result = outgoing(folder)
    if result.plan != plan.digest():
        raise RunError(f"{folder}: holds the result of another plan; choose another out")
    for client, answer in engine.hand_out(messages(result, clients)):
        found = _site(plan, answer)
        tell(f"{client} keeps the result" if found.kept else f"{client}: {found.why}")
        before = standing(folder)
        if not found.kept and before.get(client, found).kept:
            continue  # it has it, and was only asked for its gain
        _write(folder, {**before, client: found})


def _site(plan: Plan, answer: Metrics | Exception) -> Site:
    """Return what follows from an answer; what is no gain is left out."""
    if isinstance(answer, Exception):
        return Site(why=printable(str(answer)))
    gain = {
        name.removeprefix(GAIN): value
        for name, value in answer.items()
        if name.startswith(GAIN) and math.isfinite(value)
    }
    known = {f"{whose}{name}" for whose in ("", "personal/") for name in plan.task.measures}
    gain = {name: gain[name] for name in sorted(gain.keys() & known)[:_MOST]}
    return Site(True, "", gain or None, LATER in answer and not gain)


def _write(folder: Path, sites: Mapping[str, Site]) -> None:
    about: dict[str, Any] = {"sites": {name: asdict(site) for name, site in sites.items()}}
    replace_file(folder / _KEPT, [(json.dumps(about, indent=1) + "\n").encode()], "kept")
