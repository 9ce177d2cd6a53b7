"""Sees to it that sites get the result of a run who were away when it ended.

Flower brings messages only while a run goes on. So a run that has finished is started again, with
the same signed run-config, once a site is there that it owes something; its server app
then hands out what is left, and ends within seconds. No state is needed but what the run
folder has (``handing_out.py``): a server that is started anew finds out the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from fedpeft.deployment.keeper import works
from fedpeft.deployment.server_file import ServerFile
from fedpeft.deployment.submissions import Submission, submitted
from fedpeft.errors import FedPeftError
from fedpeft.flower.control import Control
from fedpeft.handing_out import owed

_EVERY = 10.0
"""Seconds between two looks."""
_FIRST, _LONGEST = 30.0, 86400.0
"""Seconds until a site is asked for the second time; each time twice as many, at most these."""
_ONLINE = "online"


@dataclass
class _Next:
    """When a run may be started again for its sites, after which pause, and who was there then."""

    due: float = 0.0
    pause: float = _FIRST
    there: frozenset[str] = frozenset()


class Deliveries:
    """Starts finished runs again for sites that are owed their result; see :meth:`look`."""

    def __init__(self, file: ServerFile, control: Control, tell: Callable[[str], None]) -> None:
        self._file, self._control, self._tell = file, control, tell
        self._next = dict[str, _Next]()
        self._looked = -_EVERY
        self._problems = dict[str, str]()

    def look(self, now: float) -> None:
        """Do what is to be done ``now``, in seconds of a clock that never goes back.

        Raises ``SiteError`` where the SuperLink does not answer.
        """
        if now - self._looked < _EVERY:
            return
        self._looked = now
        if not (runs := dict(self._owing())):
            return
        online = {site.name for site in self._control.sites() if site.state == _ONLINE}
        for run, sites in runs.items():
            if self._is_due(run, sites & online, now):
                self._start(run, sorted(sites & online))

    def _owing(self) -> Collection[tuple[Submission, frozenset[str]]]:
        """Return the finished runs that owe something to sites, and these."""
        found = []
        for run in submitted(self._file.home):
            try:
                if run.state.state == "finished" and (sites := owed(run.out)):
                    found.append((run, frozenset(sites)))
            except (FedPeftError, OSError, KeyError, TypeError) as error:
                if self._problems.get(run.name) != str(error):
                    self._problems[run.name] = str(error)
                    self._tell(f"warning: run {run.name}: {error}")
        return found

    def _is_due(self, run: Submission, there: frozenset[str], now: float) -> bool:
        """Tell whether to try now: soon for who has just come, ever more rarely for who stays."""
        after = self._next.setdefault(run.name, _Next())
        if there - after.there:
            after.due, after.pause = now, _FIRST
        after.there = there
        if not there or now < after.due or works(run):
            return False
        after.due, after.pause = now + after.pause, min(2 * after.pause, _LONGEST)
        return True

    def _start(self, run: Submission, sites: Collection[str]) -> None:
        out = str(run.out)
        if any(s.out == out and not s.ended for s in self._control.runs().values()):
            return
        try:
            self._control.start(run.app, run.config)
        except FedPeftError as error:
            self._tell(f"warning: run {run.name}: its result cannot be sent ({error})")
            return
        self._tell(f"run {run.name}: its result is sent to {', '.join(sites)}")
