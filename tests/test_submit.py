"""What is handed to the server: a plan that was checked wholly, settings, a signature."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedpeft import cli
from fedpeft.deployment import signing
from fedpeft.deployment.roster import write_roster
from fedpeft.deployment.server_file import ServerFile
from fedpeft.deployment.submissions import State, Submission, submitted
from fedpeft.deployment.submit import follow, send
from fedpeft.durable import acquire
from fedpeft.errors import FedPeftError, PlanError, RunError, SiteError
from fedpeft.flower_bundle import as_seen
from fedpeft.flower_config import read_config
from tests.tiny import support_lines, tiny_bert


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "My plan.yaml"
    path.write_text(yaml.safe_dump(support_lines(tiny_bert(tmp_path / "tiny" / "bert"))))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Iterator[ServerFile]:
    """A home in which a server seems to work."""
    home = tmp_path / "home"
    lock = acquire(home, "server's home")
    yield ServerFile(keys=tmp_path, home=home, threads=3)
    os.close(lock)


def sent(file: ServerFile, plan: Path, **options: Any) -> tuple[Submission, list[str]]:
    told: list[str] = []
    lines = options.pop("lines", {})
    return send(file, plan, lines, tell=told.append, **options), told


def test_the_whole_plan_and_how_it_is_run(file: ServerFile, plan: Path) -> None:
    run, told = sent(file, plan, lines={"rounds": "7", "wait": "60", "every": "true"})
    found, settings = read_config(run.config)
    assert (run.name, found.rounds, told) == ("my-plan", 7, [])
    assert (settings.wait, settings.every, settings.threads) == (60.0, True, 3)
    assert (settings.out, settings.resume) == (str(file.runs / "my-plan"), True)
    other, _ = sent(file, plan, lines={"rounds": "7"})
    assert 16 <= len(str(run.config["run"])) != run.config["run"] != other.config["run"]
    assert type(run.config["wait"]) is float, "what is signed keeps its kind"
    assert read_config(sent(file, plan)[0].config)[1].wait == 3600.0
    assert [each.name for each in submitted(file.home)] == ["my-plan", "my-plan-2", "my-plan-3"]


def test_a_signature_that_sites_accept(file: ServerFile, plan: Path, tmp_path: Path) -> None:
    signing.make_owner(tmp_path / "certs", "alice")
    place = tmp_path / "certs" / "owners" / "alice"
    run, _ = sent(file, plan, key=place / "owner.key")
    seen, app = as_seen(run.app, run.config), signing.hash_of(run.app)
    signing.verify(seen, app, [place / "owner.pub"])
    with pytest.raises(SiteError, match="the plan is not the one"):
        signing.verify({**seen, "rounds": 99}, app, [place / "owner.pub"])


TURNS = {
    "privacy": "user(noise_multiplier=0.5, participations=2)",
    "schedule": "buffered(size=2, concurrency=3)",
    "weighting": "uniform(denominator='expected')",
    "trainer": "plain(lr=0.1, steps=2)",
    "evaluate": "",
}


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ({"rouns": "3"}, "did you mean 'rounds'"),
        ({"wait": "soon"}, "wait: 'soon' must be a float"),
        ({"threads": "0"}, "threads: 0 must be at least 1"),
        ({"model": "/nowhere"}, "model: "),
        ({"cohort": "uniform(size=40)"}, "asks more clients than the 4 there are"),
        ({"availability": "bernoulli(mean=0.5)"}, "is for simulations"),
        ({"out": "/elsewhere"}, "out"),
        ({"signer": "me"}, "signer"),
        ({**TURNS, "every": "true"}, "every=true asks a client anew whose app broke down"),
        ({**TURNS, "trainer": "plain(lr=0.1, epochs=1)"}, r"more records.*; say steps=\.\.\."),
        ({**TURNS, "trainer": "plain(lr=0.1)"}, "takes more steps where a client has more records"),
        ({**TURNS, "trainer": "plain(lr=0.1, records=9)"}, "takes more steps where a client has"),
        ({"run": "me"}, "run"),
    ],
)
def test_what_does_not_fit_is_not_asked_for(
    file: ServerFile, plan: Path, lines: dict[str, str], problem: str
) -> None:
    with pytest.raises(FedPeftError, match=problem):
        sent(file, plan, lines=lines)
    assert not (file.home / "submitted").exists()


def test_a_home_without_a_server(plan: Path, tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="no server runs there; start it first"):
        sent(ServerFile(keys=None, home=tmp_path / "none"), plan)


def test_a_site_that_is_not_there_yet_is_told(file: ServerFile, plan: Path) -> None:
    write_roster(file.home / "roster.json", {7: "a"})
    task = 'classify(names="billing,cancel,delivery,login")'
    lines = {"data": 'sites(names="a,b")', "task": task, "partition": "", "clients": ""}
    text = {**yaml.safe_load(plan.read_text()), **lines}
    plan.write_text(yaml.safe_dump({k: v for k, v in text.items() if v}))
    _, told = sent(file, plan)
    about = [line for line in told if "no site of this server" in line]
    assert about == ["warning: data: b is no site of this server yet; the run waits for it (wait)"]


def test_taking_up_what_has_failed(file: ServerFile, plan: Path) -> None:
    run, _ = sent(file, plan, name="r")
    with pytest.raises(PlanError, match="--resume: say with --name which run is meant"):
        sent(file, plan, resume=True)
    with pytest.raises(SiteError, match="no run of this name was submitted; there is r"):
        sent(file, plan, name="x", resume=True)
    run.state = State("failed", run=4, starts=3, tries=3, reason="full disk")
    before = run.config["run"]
    with pytest.raises(RunError, match="rounds was 2, is 3; choose another --name"):
        sent(file, plan, name="r", resume=True, lines={"rounds": "3"})
    again, _ = sent(file, plan, name="r", resume=True, lines={"deadline": "9"})
    assert (again.state.state, again.config["deadline"]) == ("waiting", 9.0)
    assert again.config["run"] == before, "its sites take it for the same run"
    with pytest.raises(RunError, match="there is a run of this name"):
        sent(file, plan, name="r")


@pytest.mark.parametrize(
    ("state", "finished", "line"),
    [
        (State("finished"), True, "run my-plan has finished"),
        (State("failed", reason="no room"), False, "run my-plan has failed: no room"),
    ],
)
def test_following_one_that_is_over(
    file: ServerFile, plan: Path, state: State, finished: bool, line: str
) -> None:
    run, told = sent(file, plan)
    run.state = state
    assert follow(file, run, told.append) is finished
    assert told == [line]


def test_the_commands_say_what_is_wrong(
    tmp_path: Path, plan: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["fedpeft", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code in (1, 2)
        found = capsys.readouterr()
        return found.err + found.out

    config = tmp_path / "server.yaml"
    assert "server.yaml: no such file" in said("status", "--server", str(config))
    config.write_text("insecure: true\n")
    at = ("--server", str(config))
    assert "server: not running" in said("status", *at)
    assert "write LINE=VALUE" in said("submit", str(plan), "rounds", *at)
    assert "no server runs there" in said("submit", str(plan), *at)
    assert "there is none" in said("stop", "r", *at)
    assert "there is none" in said("follow", "../r", *at)
