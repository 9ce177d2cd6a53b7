"""Runs that were asked for: kept on disk, started again where they died, given up in the end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest

from fedpeft.deployment.keeper import Keeper
from fedpeft.deployment.server_file import ServerFile
from fedpeft.deployment.submissions import (
    TRIES,
    State,
    Submission,
    died,
    ended,
    find,
    free_name,
    submit,
    submitted,
)
from fedpeft.durable import acquire
from fedpeft.errors import FedPeftError, RunError, SiteError
from fedpeft.flower.control import Control, Standing

NO_HEARTBEAT = "No heartbeat received from the task"


class Link:
    """Flower's SuperLink, as far as runs go."""

    def __init__(self) -> None:
        self.known: dict[int, Standing] = {}
        self.started: list[Mapping[str, Any]] = []
        self.refuses = ""

    def runs(self) -> dict[int, Standing]:
        return dict(self.known)

    def start(self, app: bytes, config: Mapping[str, Any]) -> int:
        if self.refuses:
            raise SiteError(self.refuses)
        self.started.append(config)
        number = 100 + len(self.started)
        self.known[number] = Standing(number, "", "", str(config["out"]))
        return number

    def stop(self, run: int) -> None:
        self.end(run, "stopped", "")

    def end(self, run: int, how: str, reason: str) -> None:
        self.known[run] = replace(self.known[run], ended=how, reason=reason)


class Scene:
    """A keeper at work in a home, without any process."""

    def __init__(self, home: Path) -> None:
        self.home, self.link, self.told = home, Link(), list[str]()
        self.file, self.now = ServerFile(keys=None, home=home), 0.0
        self.keeper = self.again()

    def look(self, seconds: float = 2.0) -> None:
        self.now += seconds
        self.keeper.look(self.now)

    def again(self) -> Keeper:
        """Return another keeper: the server was started again."""
        self.keeper = Keeper(self.file, cast(Control, self.link), self.told.append)
        return self.keeper

    def submit(self, name: str = "r") -> Submission:
        config: dict[str, Any] = {"out": str(self.file.runs / name), "resume": True, "rounds": 5}
        return submit(self.home, name, config, b"app")

    def play(self, run: Submission, rounds: int) -> None:
        """Make rounds durable."""
        run.out.mkdir(parents=True, exist_ok=True)
        with (run.out / "rounds.jsonl").open("a") as file:
            file.write("{}\n" * rounds)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_a_run_is_started_once_and_ends(scene: Scene) -> None:
    run = scene.submit()
    for _ in range(3):
        scene.look()
    assert len(scene.link.started) == 1
    assert scene.link.started[0]["resume"] is True
    assert run.state == State("running", run=101, starts=1)
    scene.link.end(101, "completed", "")
    scene.look()
    scene.look()
    assert run.state == State("finished", run=101, starts=1)
    assert scene.told == ["run r: running", "run r: finished"]


def test_one_that_died_goes_on_and_one_that_ended_for_a_reason_does_not(scene: Scene) -> None:
    run, other = scene.submit(), scene.submit("other")
    scene.look()
    scene.link.end(run.state.run, "failed", NO_HEARTBEAT)
    why = "ServerApp failed with exception: error: 2 of 4 clients are missing (a, b)"
    scene.link.end(other.state.run, "failed", why)
    scene.look()
    assert run.state.state == "waiting"
    assert other.state.state == "failed"
    assert other.state.reason == "2 of 4 clients are missing (a, b)"
    scene.look()
    assert run.state == State("running", 103, 2, 1, 0)
    assert scene.link.started[2] == scene.link.started[scene.link.started.index(run.config)]
    assert "run r: waiting (No heartbeat received from the task), it goes on from its last" in (
        "\n".join(scene.told)
    )


def test_rounds_count_as_progress_and_deaths_without_any_are_few(scene: Scene) -> None:
    run = scene.submit()

    def die(pause: float = 2.0) -> None:
        scene.look()
        scene.look(pause)
        scene.link.end(run.state.run, "failed", NO_HEARTBEAT)
        scene.look()

    for _ in range(10):  # a bad week
        scene.play(run, 1)
        die()
        assert run.state.state == "waiting"
    assert run.state.starts == 10
    for _ in range(TRIES - 2):
        die(60.0)
        assert run.state.state == "waiting"
    die(60.0)
    assert run.state.state == "failed"
    told = f"died {TRIES} times without a new round; the last time: {NO_HEARTBEAT}"
    assert run.state.reason == told
    before = len(scene.link.started)
    scene.look()
    assert len(scene.link.started) == before


def test_pauses_between_deaths_grow(scene: Scene) -> None:
    run, begun = scene.submit(), list[float]()
    while run.state.state != "failed":
        scene.look(1.0)
        if run.state.state == "running":
            begun.append(scene.now)
            scene.link.end(run.state.run, "failed", NO_HEARTBEAT)
    pauses = [after - before for before, after in pairwise(begun)]
    assert pauses == [2, 3, 4, 6, 10, *[17] * (TRIES - 6)], "two looks, and the pause"


def test_a_superlink_that_is_away_for_a_minute_costs_no_run(scene: Scene) -> None:
    run = scene.submit()
    scene.link.refuses = "server: does not answer"
    for _ in range(30):
        scene.look(2.0)
    scene.link.refuses = ""
    for _ in range(30):
        scene.look(2.0)
    assert run.state.state == "running"


def test_a_run_that_the_superlink_forgot_is_started_again(scene: Scene) -> None:
    run = scene.submit()
    scene.look()
    scene.link.known.clear()
    scene.look()
    assert "does not know it any more" in run.state.reason
    scene.look()
    assert run.state.run == 102


def test_a_server_that_died_before_it_noted_the_run_takes_it(scene: Scene) -> None:
    run = scene.submit()
    scene.link.start(b"app", run.config)
    scene.again()
    scene.look()
    assert run.state == State("running", run=101, starts=1)
    assert len(scene.link.started) == 1


def test_nothing_is_started_while_a_process_still_writes(scene: Scene) -> None:
    run = scene.submit()
    with open(acquire(run.out, "run"), "rb", closefd=True):
        scene.look()
        assert not scene.link.started
    scene.look()
    assert len(scene.link.started) == 1


def test_a_server_app_that_has_left_its_folder_is_dead(scene: Scene) -> None:
    run = scene.submit()
    for _ in range(20):  # loading, before it opens the folder
        scene.look()
    assert run.state.starts == 1
    with open(acquire(run.out, "run"), "rb", closefd=True):
        for _ in range(20):
            scene.look()
    scene.look(9.0)
    assert run.state.state == "running", "it may still say how it ended"
    scene.look(2.0)
    assert run.state.state == "waiting"
    assert run.state.reason == "its server app was killed"
    assert scene.link.known[101].ended == "stopped"
    scene.look()
    assert run.state.run == 102


def test_a_server_app_that_dies_before_it_opens_the_run_is_noticed(scene: Scene) -> None:
    """It holds what was submitted from its first moments on: reading data and sites take long."""
    run = scene.submit()
    scene.look()
    with open(acquire(run.folder, "run"), "rb", closefd=True):
        for _ in range(20):
            scene.look()
        assert run.state.starts == 1
    scene.look(9.0)
    assert run.state.state == "running"
    scene.look(2.0)
    assert (run.state.state, run.state.reason) == ("waiting", "its server app was killed")
    with open(acquire(run.folder, "run"), "rb", closefd=True):
        scene.look()
        assert run.state.state == "waiting", "one of before is still at work"
    scene.look()
    assert run.state.run == 102


@pytest.mark.parametrize("line", [{"sites": 3}, {"tries": "2"}, {"state": None}, {"run": True}])
def test_a_state_that_another_version_wrote_is_told_and_left_alone(
    scene: Scene, line: dict[str, Any]
) -> None:
    run, other = scene.submit(), scene.submit("other")
    written = json.dumps({"state": "waiting", **line})
    (other.folder / "state.json").write_text(written)
    for _ in range(3):
        scene.look()
    assert run.state.state == "running"
    (told,) = (line for line in scene.told if line.startswith("warning"))
    assert "is nothing that this fedpeft knows; go on with the version that wrote it" in told
    assert (other.folder / "state.json").read_text() == written


def test_a_submission_without_a_place_keeps_no_other_back(scene: Scene) -> None:
    run, other = scene.submit(), scene.submit("other")
    (other.folder / "config.json").write_text("{}")
    scene.look()
    assert run.state.state == "running"
    assert "config.json: does not say where the run is kept (out)" in "\n".join(scene.told)


def test_a_server_app_dies_with_the_server_that_started_it(scene: Scene) -> None:
    run = scene.submit()
    scene.look()
    scene.again()
    scene.look()
    scene.look(9.0)
    assert run.state.state == "running"
    scene.look(2.0)
    assert run.state.state == "waiting"


def test_a_server_may_be_started_again_as_often_as_wanted(scene: Scene) -> None:
    run = scene.submit()
    for starts in range(1, 8):
        scene.look()
        assert run.state == State("running", run=100 + starts, starts=starts)
        scene.again()
        if starts % 2:
            scene.link.end(run.state.run, "failed", "Task failed with unknown error.")
        else:
            scene.look()
            scene.look(11.0)
            continue
        scene.look()
    assert run.state.state == "waiting"


def test_a_run_that_has_finished_is_not_dead(scene: Scene) -> None:
    run = scene.submit()
    scene.look()
    with open(acquire(run.out, "run"), "rb", closefd=True):
        scene.look()
    (run.out / "result.json").write_text("{}")
    for _ in range(20):
        scene.look()
    assert run.state.state == "running"
    scene.link.end(101, "completed", "")
    scene.look()
    assert run.state.state == "finished"


def test_stopping(scene: Scene) -> None:
    one, two, three = (scene.submit(name) for name in ("one", "two", "three"))
    two.ask_to_stop()
    scene.look()
    assert two.state == State("stopped", reason="stopped before it began")
    one.ask_to_stop()
    one.ask_to_stop()
    scene.look()
    scene.look()
    assert one.state.state == "stopped"
    scene.link.end(three.state.run, "failed", NO_HEARTBEAT)
    three.ask_to_stop()
    for _ in range(3):
        scene.look()
    assert three.state.state == "stopped", "also where it died meanwhile"
    assert len(scene.link.started) == 2
    with pytest.raises(RunError, match="one: has stopped already"):
        one.ask_to_stop()


def test_what_the_superlink_does_not_take_is_given_up(scene: Scene) -> None:
    scene.link.refuses = "no such key"
    run = scene.submit()
    for _ in range(TRIES):
        scene.look()
        scene.look(60.0)
    assert run.state.state == "failed"
    assert run.state.reason.endswith("no such key")


def test_a_damaged_one_keeps_no_other_back(scene: Scene) -> None:
    run, damaged = scene.submit(), scene.submit("damaged")
    (damaged.folder / "state.json").write_text("{")
    scene.look()
    scene.look()
    assert run.state.state == "running"
    assert len([line for line in scene.told if "damaged; take the folder away" in line]) == 1


def test_one_that_failed_is_taken_up_with_the_same_plan(scene: Scene) -> None:
    run = scene.submit()
    config = run.config
    with pytest.raises(RunError, match="is waiting, there is nothing to take up"):
        run.take_up(config, b"app")
    scene.play(run, 2)
    run.state = State("failed", run=7, starts=4, tries=3, rounds=1, reason="full disk")
    with pytest.raises(RunError, match="rounds was 5, is 6; choose another --name"):
        run.take_up({**config, "rounds": 6}, b"app")
    assert run.state.state == "failed"
    run.take_up({**config, "wait": 5.0}, b"newer")
    assert run.state == State("waiting", run=7, starts=4, rounds=2)
    assert (run.config["wait"], run.app) == (5.0, b"newer")
    scene.look()
    assert run.state.state == "running"


def test_names(scene: Scene) -> None:
    scene.submit("r")
    with pytest.raises(RunError, match="r: there is a run of this name; choose another --name"):
        scene.submit("r")
    (scene.file.runs / "r-2").mkdir(parents=True)
    assert free_name(scene.home, "R") == "r-3"
    assert free_name(scene.home, "My plan") == "my-plan"
    assert free_name(scene.home, "__") == "run"
    with pytest.raises(SiteError, match="write small letters"):
        scene.submit("../r")
    with pytest.raises(SiteError, match=r"no run of this name was submitted; there is r$"):
        find(scene.home, "x")
    assert find(scene.home, "r").name == "r"


def test_a_kill_before_all_is_written_asks_for_nothing(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, data: bytes, kind: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fedpeft.deployment.submissions.create_file", killed)
        with pytest.raises(KeyboardInterrupt):
            scene.submit()
    assert not list(submitted(scene.home))
    scene.submit()
    assert [run.name for run in submitted(scene.home)] == ["r"]


def test_only_who_runs_the_server_can_read_what_was_asked(scene: Scene) -> None:
    run = scene.submit()
    assert run.folder.stat().st_mode & 0o777 == 0o700
    assert json.loads((run.folder / "config.json").read_text())["rounds"] == 5


@pytest.mark.parametrize("reason", ["", "Task failed with unknown error.", "value error: 3"])
def test_what_is_no_reason_of_ours_is_a_death(reason: str) -> None:
    assert ended(State("running", run=1), "failed", reason, 0).state == "waiting"


def test_tries_begin_anew_with_a_round() -> None:
    state = State("running", run=1, tries=2, rounds=4)
    assert died(state, 5, "x") == State("waiting", run=1, tries=1, rounds=5, reason="x")
    assert died(replace(state, tries=TRIES - 1), 4, "x").state == "failed"
    assert died(state, 4, "x", blamed=False) == State("waiting", 1, 0, 2, 4, "x")
    assert died(state, 6, "x", blamed=False) == State("waiting", 1, 0, 0, 6, "x")
    assert issubclass(RunError, FedPeftError)


def test_a_server_app_that_dies_while_it_hands_the_result_out_has_finished_its_run(
    tmp_path: Path,
) -> None:
    """Who is left gets it by ``deliveries.py``; before the result was written the run goes on."""
    scene = Scene(tmp_path)
    run = scene.submit()
    scene.look()
    for name, state in (("kept.json", "waiting"), ("result.json", "finished")):
        run.out.mkdir(parents=True, exist_ok=True)
        (run.out / name).write_text('{"sites": {}}')
        scene.link.end(run.state.run, "failed", NO_HEARTBEAT)
        scene.look()
        assert run.state.state == state
        scene.look()
    assert len(scene.link.started) == 2
