"""Finished runs are started again for sites that were away, and for nobody else."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest

from fedpeft.deployment.deliveries import Deliveries
from fedpeft.deployment.server_file import ServerFile
from fedpeft.deployment.submissions import State, Submission, submit
from fedpeft.durable import acquire
from fedpeft.flower.control import Control, Site
from tests.test_submissions import Link


class Scene:
    """Deliveries at work in a home, without any process; ``online`` are who is there."""

    def __init__(self, home: Path) -> None:
        self.home, self.link, self.told = home, Link(), list[str]()
        self.online, self.asked = set[str](), 0
        self.file, self.now = ServerFile(keys=None, home=home), 0.0
        self.link.sites = self.sites  # type: ignore[attr-defined]
        self.again()

    def sites(self) -> list[Site]:
        self.asked += 1
        return [Site(1, s, "online" if s in self.online else "offline", b"", 0.0) for s in "abc"]

    def again(self) -> None:
        """Make others: the server was started again."""
        self.made = Deliveries(self.file, cast(Control, self.link), self.told.append)

    def look(self, seconds: float = 10.0) -> int:
        """Look once more; return how many runs were started."""
        before, self.now = len(self.link.started), self.now + seconds
        self.made.look(self.now)
        for number in [n for n, s in self.link.known.items() if not s.ended]:
            self.link.end(number, "completed", "")
        return len(self.link.started) - before

    def run(self, name: str = "r", state: str = "finished", **sites: bool | str) -> Submission:
        """Leave a run; a site keeps its result, does not, or has its gain told "later"."""
        out = self.file.runs / name
        config: dict[str, Any] = {"out": str(out), "resume": True, "signature": "s"}
        made = submit(self.home, name, config, b"app")
        made.state = State(state)
        out.mkdir(parents=True, exist_ok=True)
        (out / "result.json").write_text("{}")
        self.stand(made, **sites)
        return made

    def stand(self, run: Submission, **sites: bool | str) -> None:
        told = {s: {"kept": bool(k), "later": k == "later"} for s, k in sites.items()}
        (run.out / "kept.json").write_text(json.dumps({"sites": told}))


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path / "home")


def test_a_run_is_started_again_with_what_was_signed_once_a_site_is_there(scene: Scene) -> None:
    run = scene.run(a=True, b=False, c=False)
    scene.online = {"a"}
    assert [scene.look() for _ in range(5)] == [0] * 5
    scene.online = {"a", "b"}
    assert scene.look() == 1
    assert scene.link.started == [run.config]
    assert scene.told == ["run r: its result is sent to b"]
    assert run.state == State("finished")
    scene.stand(run, a=True, b=True, c=False)
    assert [scene.look(3600.0) for _ in range(5)] == [0] * 5
    scene.online = {"a", "b", "c"}
    assert scene.look() == 1
    scene.stand(run, a=True, b=True, c=True)
    before = scene.asked
    assert [scene.look(3600.0) for _ in range(5)] == [0] * 5
    assert scene.asked == before


def test_a_site_that_cannot_keep_it_is_asked_ever_more_rarely(scene: Scene) -> None:
    scene.run(a=False)
    scene.online = {"a"}
    times = [scene.now for _ in range(5 * 24 * 120) if scene.look(30.0)]
    pauses = [b - a for a, b in pairwise(times)]
    assert pauses[:4] == [30.0, 60.0, 120.0, 240.0]
    assert max(pauses) == 86400.0
    assert len(times) < 20  # within five days
    scene.online = set()
    scene.look()
    scene.online = {"a"}  # it was started anew, perhaps with room on its disk
    assert scene.look() == 1


def test_a_gain_that_may_come_later_is_asked_for(scene: Scene) -> None:
    run = scene.run(a="later", b=True)
    scene.online = {"a", "b"}
    assert scene.look() == 1
    scene.stand(run, a=True, b=True)
    assert scene.look(86400.0) == 0


@pytest.mark.parametrize("state", ["running", "waiting", "failed", "stopped"])
def test_what_has_not_finished_is_left_alone(scene: Scene, state: str) -> None:
    scene.run(state=state, a=False)
    scene.online = {"a"}
    assert scene.look() == 0


def test_no_second_server_app_is_started_beside_one_that_works(scene: Scene) -> None:
    run = scene.run(a=False)
    scene.online = {"a"}
    for folder in (run.out, run.folder):
        lock = acquire(folder, "run")
        assert scene.look() == 0
        os.close(lock)
    scene.made.look(scene.now + 10.0)  # whose run has not ended
    scene.again()
    scene.made.look(scene.now + 20.0)
    assert len(scene.link.started) == 1


def test_problems_are_told_once_and_the_others_go_on(scene: Scene) -> None:
    bad = scene.run("bad", a=False)
    (bad.out / "kept.json").write_text("{")
    scene.run("good", a=False)
    scene.online, scene.link.refuses = {"a"}, "did not take the run"
    assert scene.look() + scene.look() == 0
    assert len([t for t in scene.told if "bad" in t and "damaged" in t]) == 1
    assert "warning: run good: its result cannot be sent (did not take the run)" in scene.told
    scene.link.refuses = ""
    assert scene.look(60.0) == 1
