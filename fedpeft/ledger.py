"""What a client has spent of its privacy: one file, across rounds, runs and restarts.

A round counts before its training begins, so one that is cut short has counted. Its secret key is
made from the ledger's own and from all that its training depends on: the same round, played again,
is the same release and counts once; another broadcast under its number is another release. One that
was answered is never played again: asked for once more, it is another release, too.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from fedpeft.durable import file_name, is_file_name, make_folder, replace_file, writing
from fedpeft.errors import BudgetError, RunError
from fedpeft.rng import derived
from fedpeft.types import Sampling

_KEY = 32
CLIENT = "client"
"""The unit of what a client spends of all its records as one."""
NOTHING = "nothing"
"""The unit of what was released without a promise: of epsilon no number is enough."""


@dataclass(frozen=True, slots=True)
class Release:
    """One round's training on a data set: of which run and broadcast, and what it takes.

    ``broadcast`` is a digest of the plan, the packet and all else that its training depends on.
    ``rate``, ``noise`` and ``steps`` are those of its steps; ``unit`` says whom they hide: of its
    records by its own noise, the client itself (``CLIENT``) by the server's, or ``NOTHING``.
    ``again`` counts the equal ones that were answered before, ``timed`` says that its promise
    assumes of times and failures that they depend on nobody's records.
    """

    data: str
    run: str
    round: int
    broadcast: str
    unit: str
    rate: float
    noise: float
    steps: int
    again: int = 0
    timed: bool = False

    @property
    def of(self) -> tuple[str, str, int, str, int]:
        """What was trained on, and from what: equal where several units are hidden at once."""
        return self.data, self.run, self.round, self.broadcast, self.again

    @property
    def kind(self) -> str:
        """Whose releases are counted together: ``CLIENT``, ``NOTHING``, or a client's records."""
        return self.unit if self.unit in (CLIENT, NOTHING) else "records"


def unpromised(data: str, run: str) -> Release:
    """Return what a run without a promise releases of a data set, once for all its rounds."""
    return Release(data, run, 0, "", NOTHING, 1.0, 0.0, 0)


@dataclass(frozen=True, slots=True)
class Charge:
    """A release, how many of its kind there may be in its run, and a site's (epsilon, delta).

    The limit is of what was spent of the same data set; with ``all_data`` of any, where records may
    come and go and each set has some of those before. With ``promised_only`` it leaves out what was
    released without a promise.
    """

    release: Release
    rounds: float
    limit: tuple[float, float] | None = None
    all_data: bool = False
    promised_only: bool = False


@dataclass(frozen=True, slots=True)
class Ledger:
    """A client's secret, its releases, the oldest first, and those whose reply may have left."""

    key: bytes = field(default_factory=partial(secrets.token_bytes, _KEY))
    releases: Sequence[Release] = ()
    answered: frozenset[Release] = frozenset()

    def rounds(self, run: str, kind: str) -> int:
        """Return how many releases of a kind there were in a run."""
        return sum((each.run, each.kind) == (run, kind) for each in self.releases)

    def unanswered(self, release: Release) -> Release:
        """Return the release as which it is played now: one that was not answered."""
        while release in self.answered:
            release = replace(release, again=release.again + 1)
        return release

    def others(self, data: str | None, unit: str) -> list[str]:
        """Return whom those rounds on a data set, or any, hide that do not hide this ``unit``."""
        hidden = {release.of for release in self.releases if release.unit == unit}
        own = (release for release in self.releases if data in (None, release.data))
        return sorted({release.unit for release in own if release.of not in hidden})

    def epsilon(self, data: str | None, delta: float, unit: str | None = None) -> float:
        """Return what all releases of a data set, or any, have spent together at ``delta``, by PLD.

        Where they hide different units, only those of one ``unit`` add up: a unit of many records
        is hidden by steps that hide single ones only at many times their epsilon. It is infinite
        where any of them promised nothing.
        """
        from fedpeft.privacy._together import composed

        steps: dict[tuple[float, float], int] = {}
        own = [r for r in self.releases if data in (None, r.data) and unit in (None, r.unit)]
        if any(release.unit == NOTHING for release in own):
            return math.inf
        for release in own:
            kind = release.rate, release.noise
            steps[kind] = steps.get(kind, 0) + release.steps
        kinds = sorted((*kind, count) for kind, count in steps.items())
        return composed(tuple((Sampling("coins", 1, r), n, c) for r, n, c in kinds), delta)[0]


class Ledgers(Protocol):
    """Where the ledgers of the clients of one process are."""

    def read(self, client: str) -> Ledger:
        """Return a client's ledger; a new one where there is none."""
        ...

    def write(self, client: str, ledger: Ledger) -> None:
        """Keep it, before anything follows from it."""
        ...

    def alone(self, client: str) -> AbstractContextManager[None]:
        """Let nobody else read or write a client's ledger for a while."""
        ...


class InProcessLedgers:
    """Ledgers that end with the process."""

    def __init__(self) -> None:
        self._held: dict[str, Ledger] = {}

    def read(self, client: str) -> Ledger:
        """Return a client's ledger."""
        return self._held.get(client) or Ledger()

    def write(self, client: str, ledger: Ledger) -> None:
        """Keep it."""
        self._held[client] = ledger

    def alone(self, client: str) -> AbstractContextManager[None]:
        """Do nothing: no other process can reach it."""
        return nullcontext()


class OnDiskLedgers:
    """One file per client, that its owner alone may read, replaced atomically."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, client: str) -> Ledger:
        """Return a client's ledger. Raises ``RunError`` where its file is damaged."""
        path = self._path(client)
        return _read(path, client)[1] if path.exists() else Ledger()

    def all(self) -> Iterator[tuple[str, Ledger]]:
        """Yield every client with its ledger. Raises ``RunError`` where a file is damaged."""
        for path in filter(_is_ledger, sorted(self.folder.glob("*.json"))):
            yield _read(path, path.stem)

    def foreign(self) -> list[Path]:
        """Return the files beside the ledgers that look like them and are none."""
        return [path for path in sorted(self.folder.glob("*.json")) if not _is_ledger(path)]

    def write(self, client: str, ledger: Ledger) -> None:
        """Keep it, durable at once. Raises ``RunError`` where the disk does not take it."""
        told: dict[str, Any] = {"client": client, "key": ledger.key.hex()}
        told["releases"] = [
            {**asdict(release), "answered": release in ledger.answered}
            for release in ledger.releases
        ]
        text = json.dumps(told, indent=1) + "\n"
        replace_file(self._path(client), [text.encode()], "spending", private=True)

    @contextmanager
    def alone(self, client: str) -> Iterator[None]:
        """Wait for other processes, perhaps of other runs."""
        path = self._path(client)
        with writing(path):
            make_folder(path.parent)
            lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _path(self, client: str) -> Path:
        return self.folder / f"{file_name(client)}.json"


def _is_ledger(path: Path) -> bool:
    """Whether this is a ledger, damaged or not: by its name, or else by what it holds."""
    with suppress(OSError):
        return is_file_name(path.stem) or b'"releases"' in path.read_bytes()
    return True


def _read(path: Path, client: str) -> tuple[str, Ledger]:
    try:
        told = json.loads(path.read_bytes())
        answered = [release.pop("answered", False) for release in told["releases"]]
        releases = [Release(**release) for release in told["releases"]]
        key = bytes.fromhex(told["key"])
        if len(key) != _KEY:
            raise ValueError("a short key could be guessed, and with it all noise")
        ended = frozenset(each for each, done in zip(releases, answered, strict=True) if done)
        return str(told["client"]), Ledger(key, releases, ended)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise RunError(
            f"{path}: damaged; restore it: without it nobody knows what client {client} has spent "
            "of its privacy"
        ) from None


def spent(
    folder: Path, delta: float, warn: Callable[[str], None] = lambda _: None
) -> Iterator[dict[str, Any]]:
    """Yield what each client has spent of each data set, by the ledgers in a folder or a run's.

    Of several data sets also what it has spent of all together, as if they were one.

    ``warn`` is told of files that are no ledgers. Raises ``RunError`` where there are none, or one
    is damaged.
    """
    inner = folder / "memory" / "ledgers"
    ledgers = OnDiskLedgers(inner if inner.is_dir() else folder)
    for path in ledgers.foreign():
        warn(f"{path}: no ledger, left out")
    held = list(ledgers.all())
    if not held:
        raise RunError(f"{folder}: holds no ledgers; give a run folder, or a node's ledgers/")
    for client, ledger in held:
        for unit in sorted({release.unit for release in ledger.releases}):
            sets = sorted({r.data for r in ledger.releases if r.unit == unit})
            for data in [*sets, *([None] if len(sets) > 1 else [])]:
                yield _told(client, ledger, data, delta, unit)


def _told(client: str, ledger: Ledger, data: str | None, delta: float, unit: str) -> dict[str, Any]:
    """Return what was spent of a data set, or of all, as ``data`` says."""
    own = [r for r in ledger.releases if data in (None, r.data) and r.unit == unit]
    return {
        "client": client,
        "data": "all of it" if data is None else data[:12],
        "unit": unit,
        "adversary": _adversary(unit),
        "runs": len({release.run for release in own}),
        "rounds": len(own),
        "epsilon": ledger.epsilon(data, delta, unit),
        "assumes": list(_assumed(own)),
    }


def _assumed(releases: Sequence[Release]) -> Iterator[str]:
    """Yield under what conditions beyond those of each plan their epsilon holds."""
    if any(release.timed for release in releases):
        yield (
            "when the client was there, and when or whether its replies and errors came, depended "
            "on nobody's records"
        )
    if len({(r.rate, r.noise) for r in releases if r.rate < 1}) > 1:
        yield "noise and batches of a run were not chosen by what earlier ones had released"


def _adversary(unit: str) -> str:
    """Return from whom a release hides its unit."""
    if unit == NOTHING:
        return "nobody"
    if unit == CLIENT:
        return "readers of released models, where the server adds the noise"
    return "the server, other clients and readers of the model"


def charge(
    ledgers: Ledgers,
    client: str,
    release: Release,
    *,
    rounds: int,
    limit: tuple[float, float] | None = None,
) -> bytes:
    """Write ``release`` down, unless it is, and return its key; see :func:`charge_all`."""
    return charge_all(ledgers, client, [Charge(release, rounds, limit)])[0]


def charge_all(ledgers: Ledgers, client: str, charges: Sequence[Charge]) -> list[bytes]:
    """Write what one round releases down, unless it is, and return a key of each release.

    What is written down and was not answered counts once, and has the same key, however often it is
    asked for; what was answered is charged again, with another key. Raises ``BudgetError`` where a
    run would have made more releases of a kind than it may, or where the data set's epsilon would
    be above a site's limit or unknown, since rounds before have not hidden the same unit, or
    nothing; nothing is written then.
    """
    with ledgers.alone(client):
        ledger = ledgers.read(client)
        charges = [replace(each, release=ledger.unanswered(each.release)) for each in charges]
        if new := [each for each in charges if each.release not in ledger.releases]:
            releases = [*ledger.releases, *(each.release for each in new)]
            after = replace(ledger, releases=releases)
            for each in new:
                _check(after, each)
            ledgers.write(client, after)
    told = [json.dumps(asdict(each.release), sort_keys=True) for each in charges]
    return [derived(ledger.key, text) for text in told]


def answer(ledgers: Ledgers, client: str, run: str) -> None:
    """Write down that what a client has released in a run may leave it: durable when this returns.

    None of it is played again. Raises ``RunError`` where the disk does not take it.
    """
    with ledgers.alone(client):
        ledger = ledgers.read(client)
        own = {each for each in ledger.releases if each.run == run and each.unit != NOTHING}
        if new := own - ledger.answered:
            ledgers.write(client, replace(ledger, answered=ledger.answered | new))


def _check(after: Ledger, charge: Charge) -> None:
    """Raise ``BudgetError`` where a ledger's newest ``charge`` is one too many."""
    last, limit = charge.release, charge.limit
    if after.rounds(last.run, last.kind) > charge.rounds:
        raise BudgetError(
            f"has taken part in the {charge.rounds} rounds that its promise is for, and trains no "
            "more in this run"
        )
    if limit is None:
        return
    data = None if charge.all_data else last.data
    kinds = after.others(data, last.unit)
    if NOTHING in kinds and not charge.promised_only:
        raise BudgetError(
            "has trained on the same records in runs that promised nothing, so what these have "
            "spent has no bound, and its site has a limit; the site may have it count only what "
            "was promised (promised_only in its limits, promised-only at a node)"
        )
    if kinds := [unit for unit in kinds if unit != NOTHING]:
        raise BudgetError(
            f"has spent privacy of the same records with another unit ({', '.join(kinds)}) than "
            f"{last.unit}, and what both come to is not known; its site has a limit"
        )
    if (spent := after.epsilon(data, limit[1], last.unit)) > limit[0]:
        what = "as a client" if last.unit == CLIENT else "of these records"
        raise BudgetError(
            f"would have spent epsilon {spent:.3f} at delta {limit[1]:g} {what}, and its site "
            f"allows {limit[0]:g}"
        )
