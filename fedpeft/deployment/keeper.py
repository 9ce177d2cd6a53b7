"""Sees to it that every run that was asked for runs to its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from fedpeft.deployment.restarts import pause_after
from fedpeft.deployment.server_file import ServerFile
from fedpeft.deployment.submissions import State, Submission, died, ended, submitted
from fedpeft.durable import is_held
from fedpeft.errors import FedPeftError
from fedpeft.flower.control import Control, Standing
from fedpeft.handing_out import is_handed_out

_KILLED = "its server app was killed"
_LONGEST = 15.0
"""Seconds at most between a death of the server app and its next start."""
GRACE = 10.0
"""Seconds that a server app which has let go of its run folder has to say how it ended."""


class Keeper:
    """Starts what waits, notes what has ended, starts again what has died; see :meth:`look`."""

    def __init__(self, file: ServerFile, control: Control, tell: Callable[[str], None]) -> None:
        self._file, self._control, self._tell = file, control, tell
        self._told: dict[str, str] = {}
        self._mine, self._worked = set[int](), dict[int, float]()
        self._due: dict[str, float] = {}

    def look(self, now: float) -> None:
        """Do what is to be done ``now``, in seconds of a clock that never goes back.

        Raises ``SiteError`` where the SuperLink does not answer.
        """
        waiting = list[Submission]()
        for each in submitted(self._file.home):
            try:
                if not each.state.over and each.out:
                    waiting.append(each)
            except FedPeftError as error:
                self._once(each.name, str(error))
        if waiting:
            runs = self._control.runs()
            for each in waiting:
                self._see_to(each, runs, now)

    def _see_to(self, run: Submission, runs: Mapping[int, Standing], now: float) -> None:
        state, standing = run.state, runs.get(run.state.run)
        mine = state.run in self._mine
        if state.state == "running":
            if standing and not standing.ended:
                if run.to_stop:
                    self._control.stop(state.run)
                elif self._is_dead(run, now):  # Flower itself would wait for a minute
                    self._control.stop(state.run)
                    self._note(run, died(state, run.rounds, _KILLED, blamed=mine))
                return
            gone = "the SuperLink does not know it any more"
            after = (
                ended(state, standing.ended, standing.reason, run.rounds, blamed=mine)
                if standing
                else died(state, run.rounds, gone, blamed=mine)
            )
            self._note(run, after)
        elif run.to_stop:
            self._note(run, replace(state, state="stopped", reason="stopped before it began"))
        elif works(run):  # a process of before still writes there
            pass
        elif now >= self._due.setdefault(run.name, now + _pause(state)):
            del self._due[run.name]
            self._start(run, runs)

    def _is_dead(self, run: Submission, now: float) -> bool:
        """Tell whether the server app once worked on the run, and has left it unfinished.

        One that another server has started died with it.
        """
        number = run.state.run
        if number not in self._mine:
            self._worked.setdefault(number, now)
        if works(run) or (run.out / "result.json").exists():
            self._worked[number] = now
        return now - self._worked.get(number, now) > GRACE

    def _start(self, run: Submission, runs: Mapping[int, Standing]) -> None:
        """Start a run, or take the one that was started when its number could not be noted."""
        state, out = run.state, str(run.out)
        known = (s.run for s in runs.values() if s.out == out and not s.ended)
        number = next(known, 0)
        if not number:
            try:
                number = self._control.start(run.app, run.config)
            except FedPeftError as error:
                self._note(run, died(state, run.rounds, str(error)))
                return
        self._mine.add(number)
        self._note(
            run, replace(state, state="running", run=number, starts=state.starts + 1, reason="")
        )

    def _note(self, run: Submission, state: State) -> None:
        if state.state == "waiting" and is_handed_out(run.out):
            state = replace(state, state="finished", reason="")  # deliveries.py sees to the rest
        run.state = found = state
        reason = f" ({found.reason})" if found.reason else ""
        again = ", it goes on from its last checkpoint" if found.state == "waiting" else ""
        self._tell(f"run {run.name}: {found.state}{reason}{again}")

    def _once(self, name: str, problem: str) -> None:
        if self._told.get(name) != problem:
            self._told[name] = problem
            self._tell(f"warning: run {name}: {problem}")


def _pause(state: State) -> float:
    """Return for how many seconds a run is left alone that died: after its first death, none."""
    return min(_LONGEST, pause_after(state.tries - 1)) if state.tries > 1 else 0.0


def works(run: Submission) -> bool:
    """Tell whether a server app is at work: it holds the submission from its first moments on."""
    return is_held(run.folder) or is_held(run.out)
