"""Runs that were asked for, on disk: what the server has to start, and start again.

::

    submitted/<name>/
        app.fab        the app bundle
        config.json    the run-config: with it the run was asked for
        state.json     how it stands
        stop           it is to be stopped

A run is started again where its server app died. It resumes from its last checkpoint, since ``out``
is the same folder. One that was stopped, or ended for a reason of its own, is not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from fedpeft.data._site_names import RULE, is_site
from fedpeft.durable import create_file, make_private_folder, replace_file
from fedpeft.errors import RunError, SiteError
from fedpeft.flower.config import Settings
from fedpeft.json_lines import mapping
from fedpeft.types import Scalar

TRIES = 20
"""How often a run is started in vain: without a new round since the last time. With growing pauses
between them, these are some minutes."""
REFUSED = "error: "
"""Begins the reason of a server app that ended on purpose."""
_CHANGING = {field.name for field in fields(Settings)}
"""Lines on which no result depends; the run folder's own check guards the others once more."""
_ON_PURPOSE = f"exception: {REFUSED}"
_OVER = ("finished", "failed", "stopped")


@dataclass(frozen=True, slots=True)
class State:
    """How a submission stands.

    ``state`` is ``waiting``, ``running``, or one of those that are the end: ``finished``,
    ``failed``, ``stopped``. ``run`` is Flower's number of the newest start, 0 before the first;
    ``starts`` how many there were, ``tries`` those since the last checkpoint, ``rounds`` how many
    rounds were over at the newest; ``reason`` why it is as it is.
    """

    state: str = "waiting"
    run: int = 0
    starts: int = 0
    tries: int = 0
    rounds: int = 0
    reason: str = ""

    @property
    def over(self) -> bool:
        """Whether nothing more is done for it."""
        return self.state in _OVER


class Submission:
    """A run that was asked for; ``folder`` is ``home/submitted/<name>``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.name

    @property
    def config(self) -> dict[str, Scalar]:
        """The run-config."""
        return _read(self.folder / "config.json")

    @property
    def app(self) -> bytes:
        """The app bundle."""
        return (self.folder / "app.fab").read_bytes()

    @property
    def out(self) -> Path:
        """The run folder."""
        config = self.config
        if not config.get("out"):
            raise RunError(
                f"{self.folder}/config.json: does not say where the run is kept (out); take the "
                "folder away and submit the run again"
            )
        return Path(str(config["out"]))

    @property
    def state(self) -> State:
        """How it stands."""
        path = self.folder / "state.json"
        return _state(path, _read(path)) if path.exists() else State()

    @state.setter
    def state(self, state: State) -> None:
        text = json.dumps(asdict(state)) + "\n"
        replace_file(self.folder / "state.json", [text.encode()], "submission")

    @property
    def to_stop(self) -> bool:
        """Whether somebody wants it stopped."""
        return (self.folder / "stop").exists()

    @property
    def rounds(self) -> int:
        """How many of its rounds are durable."""
        try:
            return (self.out / "rounds.jsonl").read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def ask_to_stop(self) -> None:
        """Have the server stop it. Raises ``RunError`` where it is over."""
        if (state := self.state).over:
            raise RunError(f"{self.name}: has {state.state} already")
        if not self.to_stop:
            create_file(self.folder / "stop", b"", "submission")

    def take_up(self, config: Mapping[str, Scalar], app: bytes) -> None:
        """Have the server go on with one that is over, with the same plan.

        Raises ``RunError`` where it is not over, has finished, or was another plan's.
        """
        state = self.state
        if not state.over or state.state == "finished":
            raise RunError(f"{self.name}: is {state.state}, there is nothing to take up")
        before, after = (
            {k: v for k, v in each.items() if k not in _CHANGING} for each in (self.config, config)
        )
        if changed := sorted(k for k in {*before, *after} if before.get(k) != after.get(k)):
            raise RunError(
                f"{self.name}: {changed[0]} was {before.get(changed[0])!r}, is "
                f"{after.get(changed[0])!r}; choose another --name"
            )
        _write(self.folder / "config.json", config)
        replace_file(self.folder / "app.fab", [app], "submission")
        (self.folder / "stop").unlink(missing_ok=True)
        self.state = replace(state, state="waiting", tries=0, rounds=self.rounds, reason="")


def submit(home: Path, name: str, config: Mapping[str, Scalar], app: bytes) -> Submission:
    """Ask for a run. Raises ``RunError`` where the name is taken, or the disk is full."""
    check_name(name)
    found = Submission(home / "submitted" / name)
    if is_taken(home, name):
        raise RunError(f"{name}: there is a run of this name; choose another --name")
    make_private_folder(found.folder.parent)
    make_private_folder(found.folder)
    replace_file(found.folder / "app.fab", [app], "submission")
    text = json.dumps(dict(config), indent=1) + "\n"
    # from here on it is asked for
    create_file(found.folder / "config.json", text.encode(), "submission")
    return found


def find(home: Path, name: str) -> Submission:
    """Return the submission of a name. Raises ``SiteError`` where there is none."""
    found = home / "submitted" / name
    if not is_site(name) or not (found / "config.json").exists():
        known = ", ".join(each.name for each in submitted(home)) or "none"
        raise SiteError(f"{name[:80]!r}: no run of this name was submitted; there is {known}")
    return Submission(found)


def submitted(home: Path) -> Iterator[Submission]:
    """Yield every run that was asked for, by name."""
    for path in sorted((home / "submitted").glob("*/config.json")):
        yield Submission(path.parent)


def is_taken(home: Path, name: str) -> bool:
    """Tell whether a run of this name was asked for, or has left something."""
    return (home / "submitted" / name / "config.json").exists() or (home / "runs" / name).exists()


def check_name(name: str) -> None:
    """Raise ``SiteError`` for a name that could be no folder's on some machine."""
    if not is_site(name):
        raise SiteError(f"--name {name[:80]!r}: {RULE}")


def free_name(home: Path, wanted: str) -> str:
    """Return ``wanted`` as a name, with a number behind it where it is taken."""
    plain = re.sub(r"[^a-z0-9_-]", "-", wanted.lower()).lstrip("_-")[:55] or "run"
    names = (plain, *(f"{plain}-{i}" for i in range(2, 100_000)))
    return next(name for name in names if not is_taken(home, name))


def died(state: State, rounds: int, reason: str, *, blamed: bool = True) -> State:
    """Return the state after a death of the server app, with ``rounds`` over: go on, or give up.

    One that is not ``blamed`` died with the server, which may be started again as often as wanted.
    """
    tries = (0 if rounds > state.rounds else state.tries) + blamed
    if tries >= TRIES:
        told = f"died {tries} times without a new round; the last time: {reason}"
        return replace(state, state="failed", tries=tries, reason=told)
    return replace(state, state="waiting", tries=tries, rounds=rounds, reason=reason)


def ended(state: State, how: str, reason: str, rounds: int, *, blamed: bool = True) -> State:
    """Return the state after Flower's run has ended: ``completed``, ``stopped`` or ``failed``.

    ``rounds`` and ``blamed`` are those of :func:`died`.
    """
    if how == "completed":
        return replace(state, state="finished", reason="")
    if how == "stopped":
        return replace(state, state="stopped", reason="stopped by somebody")
    _, found, told = reason.partition(_ON_PURPOSE)
    if found:
        return replace(state, state="failed", reason=told)
    return died(state, rounds, reason or "no reason given", blamed=blamed)


def _state(path: Path, lines: Mapping[str, Any]) -> State:
    kinds = {field.name: type(field.default) for field in fields(State)}
    for name, value in lines.items():
        if type(value) is not kinds.get(name):
            raise RunError(
                f"{path}: {name}={value!r} is nothing that this fedpeft knows; go on with the "
                "version that wrote it, or take the folder away and submit the run again"
            )
    return State(**lines)


def _read(path: Path) -> dict[str, Any]:
    found = mapping(path.read_bytes())
    if found is None:
        raise RunError(f"{path}: damaged; take the folder away and submit the run again")
    return dict(found)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    replace_file(path, [(json.dumps(dict(content), indent=1) + "\n").encode()], "submission")
