from __future__ import annotations

import os
import signal

from fedpeft.deployment.restarts import LAST, STEADY, Restarts, how_ended, pause_after
from fedpeft.deployment.signals import handled


def test_ever_later_until_it_has_lived_for_long() -> None:
    found, now, pauses = Restarts(), 100.0, list[float]()
    for _ in range(8):
        begun, now = now, now + 1
        found.note_end(begun, now)
        pauses.append(found.wait(now))
        assert found.due == now + pauses[-1]
        now = found.due
    assert pauses == [1, 2, 4, 8, 16, 32, LAST, LAST] == [pause_after(n) for n in range(1, 9)]
    assert found.note_end(now, now + STEADY + 1) == 1
    assert found.wait(500.0) == 1.0
    assert (found.wait(500.0, 75.0), found.due) == (75.0, 575.0)


def test_how_a_process_ended() -> None:
    assert how_ended(-9) == "was killed (signal 9)"
    assert how_ended(3) == "ended (status 3)"


def test_signals_do_what_is_wanted_for_a_while() -> None:
    told, before = list[str](), signal.getsignal(signal.SIGUSR1)
    with handled({signal.SIGUSR1: lambda: told.append("one")}):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert told == ["one"]
    assert signal.getsignal(signal.SIGUSR1) == before
