"""Processes that are started again when they die."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedpeft.deployment.children import Child
from tests.waiting import wait_until


@pytest.fixture
def told() -> list[str]:
    return []


def child(tmp_path: Path, program: str, told: list[str]) -> Child:
    command = [sys.executable, "-I", "-c", program]
    return Child("it", command, dict(os.environ), tmp_path / "logs" / "it.log", told.append)


@pytest.fixture
def sleeper(tmp_path: Path, told: list[str]) -> Iterator[Child]:
    made = child(tmp_path, "print('up', flush=True); import time; time.sleep(900)", told)
    yield made
    made.stop()


def test_it_is_started_once_and_again_after_its_death(sleeper: Child, told: list[str]) -> None:
    assert sleeper.look(0.0)
    assert not sleeper.look(5.0)
    first = sleeper.pid
    assert first
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: sleeper.pid is None)
    assert not sleeper.look(10.0), "not at once"
    assert "it was killed (signal 9); it is started again in 1 s" in told[0]
    assert not sleeper.look(10.9)
    assert sleeper.look(11.1)
    assert sleeper.pid not in (None, first)


def test_what_dies_again_and_again_waits_longer(tmp_path: Path, told: list[str]) -> None:
    dies = child(tmp_path, "print('no room'); raise SystemExit(3)", told)
    now, waits = 0.0, []
    for _ in range(9):
        assert dies.look(now)
        wait_until(lambda: dies.pid is None)
        dies.look(now)
        before = now
        while not dies._restarts.due <= now:
            now += 0.5
        waits.append(now - before)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert "it ended (status 3); it is started again in 60 s" in told[-1]
    assert told[-1].endswith("it.log: no room")
    now += 61.0
    dies.look(now)
    wait_until(lambda: dies.pid is None)
    dies.look(now + 100.0)
    assert "in 1 s" in told[-1], "what has lived for a minute begins anew"
    dies.stop()


def test_what_it_prints_is_kept(tmp_path: Path, sleeper: Child) -> None:
    log = tmp_path / "logs" / "it.log"
    sleeper.look(0.0)
    wait_until(lambda: "up" in log.read_text())
    sleeper.stop()
    sleeper.look(1.0)
    wait_until(lambda: log.read_text().count("up") == 2)
    assert log.read_text().count("---") == 2


def test_a_long_log_gives_way(tmp_path: Path, sleeper: Child) -> None:
    log = tmp_path / "logs" / "it.log"
    log.parent.mkdir()
    with log.open("wb") as file:
        file.truncate((20 << 20) + 1)
    sleeper.look(0.0)
    assert log.stat().st_size < 1000
    assert (tmp_path / "logs" / "it.log.old").stat().st_size == (20 << 20) + 1


def test_one_that_does_not_listen_is_killed(tmp_path: Path, told: list[str]) -> None:
    program = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    deaf = child(tmp_path, program + "print('up', flush=True); time.sleep(900)", told)
    deaf.look(0.0)
    wait_until(lambda: "up" in (tmp_path / "logs" / "it.log").read_text())
    deaf.stop(0.2)
    assert deaf.pid is None
