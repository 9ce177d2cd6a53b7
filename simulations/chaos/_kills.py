"""What is killed, and when: at random, and at each moment that a fault is known to be worst."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from fedpeft.durable import MOMENTS
from fedpeft.faults import SENDING
from simulations._machines.federation import ROLES, Federation

ALL_ALONG = {"checkpoint": MOMENTS, "ledger": MOMENTS, "memory": MOMENTS, "reply": MOMENTS[:3]}
"""Kinds of files that are written in every round, at the server and at the sites, and when somebody
can die over them: a kept reply does not wait for the disk."""
AT_THE_END = ("adapter", "kept", "result")
POINTS = (*SENDING, *(f"{kind}.{at}" for kind, moments in ALL_ALONG.items() for at in moments))
LAST_POINTS = tuple(f"{kind}.{moment}" for kind in AT_THE_END for moment in MOMENTS)
_GLIMPSE = 30.0
"""Seconds for which a process is looked for that does not live long, or is being started again."""


@dataclass(frozen=True, slots=True)
class Kill:
    """What died: a ``role``'s process, or whoever came to a ``point``; ``after`` in seconds."""

    after: float
    what: str
    round: int


class Killer:
    """Kills a federation's processes, one after the other.

    ``rng`` draws who it is. ``told`` is the file by which a process is told where to die.
    """

    def __init__(self, federation: Federation, told: Path, rng: random.Random) -> None:
        self._federation, self._told, self._rng = federation, told, rng
        self._began = time.monotonic()
        self.done: list[Kill] = []

    def at_random(self, roles: Sequence[str], round: int) -> bool:
        """Kill a process of one of these ``roles``; tell whether there was any."""
        role = self._rng.choice(roles)
        until = time.monotonic() + _GLIMPSE
        while time.monotonic() < until:
            found = self._federation.processes(role)
            if found:
                chosen = self._rng.choice(sorted(found, key=lambda process: process.pid))
                return self._kill(chosen, role, round)
            time.sleep(0.05)
        return False

    def arm(self, point: str) -> None:
        """Have whoever comes to ``point`` first die there."""
        waiting = self._told.with_name(f".{self._told.name}")
        waiting.write_text(point)
        waiting.rename(self._told)

    def fell(self, point: str, round: int) -> bool:
        """Tell, and note, whether somebody has died there since."""
        if self._told.exists():
            return False
        self._note(point, round)
        return True

    def disarm(self) -> None:
        """Have nobody die."""
        self._told.unlink(missing_ok=True)

    def _kill(self, process: psutil.Process, role: str, round: int) -> bool:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            return False
        self._note(role, round)
        return True

    def _note(self, what: str, round: int) -> None:
        self.done.append(Kill(round_to(time.monotonic() - self._began), what, round))


def order(kills: int, rng: random.Random, *, short: bool) -> list[str]:
    """Return what to kill, in that order: points and roles, mixed, ``kills`` or more.

    A SuperNode is refused for a minute after it was killed, so there are few of those.
    """
    points = rng.sample(POINTS, kills // 2) if short else list(POINTS)
    slow = ["SuperNode"] * (1 if short else 2)
    quick = [role for role in ROLES if role != "SuperNode"]
    whole = [*points, *slow, *(quick if not short else rng.sample(quick, kills - len(points) - 1))]
    whole += rng.choices(quick, k=max(0, kills - len(whole)))
    rng.shuffle(whole)
    return whole


def round_to(seconds: float) -> float:
    """Return seconds as they are told."""
    return round(seconds, 1)
