"""What is handed to the server: a plan that was checked wholly, settings, a signature."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedpeft import cli
from fedpeft.deployment import signing
from fedpeft.deployment.roster import write_roster
from fedpeft.deployment.server_file import ServerFile
from fedpeft.deployment.signature_file import write_signed
from fedpeft.deployment.submissions import State, Submission, submitted
from fedpeft.deployment.submit import follow, plan_of, send, settings_of
from fedpeft.durable import acquire
from fedpeft.errors import FedPeftError, PlanError, RunError, SiteError
from fedpeft.flower.bundle import as_seen, bundle
from fedpeft.flower.config import read_config
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
    (note,) = sent(file, plan, lines={"wait": "9"})[1]
    assert note.startswith(
        "note: a client whose machine fails is left out of its round; every=true"
    )
    assert type(run.config["wait"]) is float, "what is signed keeps its kind"
    assert read_config(sent(file, plan)[0].config)[1].wait == 3600.0
    assert [each.name for each in submitted(file.home)] == [
        "my-plan",
        "my-plan-2",
        "my-plan-3",
        "my-plan-4",
    ]


def test_a_signature_that_sites_accept(file: ServerFile, plan: Path, tmp_path: Path) -> None:
    signing.make_owner(tmp_path / "certs", "alice")
    place = tmp_path / "certs" / "owners" / "alice"
    run, _ = sent(file, plan, key=place / "owner.key")
    seen, app = as_seen(run.app, run.config), signing.hash_of(run.app)
    signing.verify(seen, app, [place / "owner.pub"])
    with pytest.raises(SiteError, match="the plan is not the one"):
        signing.verify({**seen, "rounds": 99}, app, [place / "owner.pub"])


class Owner:
    """An owner on a machine of their own: a key, a copy of the plan, no server."""

    def __init__(self, folder: Path, plan: Path) -> None:
        self.plan, self.out = plan, folder / "run.signed"
        signing.make_owner(folder / "certs", "alice")
        self.key = folder / "certs" / "owners" / "alice" / "owner.key"

    def signs(self, **lines: str) -> Path:
        write_signed(self.out, plan_of(self.plan, lines), settings_of(lines), self.key)
        return self.out


@pytest.fixture
def owner(tmp_path: Path, plan: Path) -> Owner:
    return Owner(tmp_path / "owner", plan)


def test_what_was_signed_elsewhere_is_submitted_as_it_was_signed(
    file: ServerFile, plan: Path, owner: Owner
) -> None:
    path = owner.signs(rounds="7", deadline="90")
    owner.key.unlink()
    run, _ = sent(file, plan, signature=path, lines={"rounds": "7"})
    found, settings = read_config(run.config)
    assert (found.rounds, settings.deadline, settings.threads) == (7, 90.0, 1)
    assert (settings.out, settings.resume) == (str(file.runs / "my-plan"), True)
    signing.verify(
        as_seen(run.app, run.config), signing.hash_of(run.app), [owner.key.with_suffix(".pub")]
    )
    with pytest.raises(SiteError, match="was submitted as my-plan, and a signature is for one run"):
        sent(file, plan, signature=path, lines={"rounds": "7"})
    run.state = State("failed", run=4, starts=3, tries=3, reason="full disk")
    again, _ = sent(file, plan, signature=path, lines={"rounds": "7"}, name="my-plan", resume=True)
    assert (again.state.state, again.config) == ("waiting", run.config)


def test_a_signature_goes_on_with_its_own_run_alone(
    file: ServerFile, plan: Path, owner: Owner
) -> None:
    run, _ = sent(file, plan, name="r")
    run.state = State("failed")
    with pytest.raises(SiteError, match="is for another run than the one to go on with"):
        sent(file, plan, signature=owner.signs(), name="r", resume=True)


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ({"rounds": "3"}, "rounds was 2 where it was signed, and is 3; submit what was signed"),
        ({"deadline": "5"}, "deadline was 0.0 where it was signed, and is 5.0"),
        ({"adapter": "lora(r=2)"}, 'adapter was "lora(r=4'),
    ],
)
def test_a_signature_of_another_plan_or_other_settings(
    file: ServerFile, plan: Path, owner: Owner, lines: dict[str, str], problem: str
) -> None:
    with pytest.raises(SiteError, match=re.escape(problem)):
        sent(file, plan, signature=owner.signs(), lines=lines)
    assert not (file.home / "submitted").exists()


def test_a_signature_of_another_app(
    file: ServerFile, plan: Path, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, app = owner.signs(), bundle()
    monkeypatch.setattr("fedpeft.flower.bundle.bundle", lambda: app + b" ")
    with pytest.raises(SiteError, match=r"is for the app of fedpeft .* install the same on both"):
        sent(file, plan, signature=path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda told: told["config"].update(rounds=9), "a line was changed afterwards"),
        (lambda told: told.update(signature="x" * 40), "signature is damaged"),
        (lambda told: told.update(public="ssh-ed25519 AAAA"), "is no owner's public key"),
        (lambda told: told.update(signer="SHA256:else"), "none of this site's owners"),
        (lambda told: told.pop("app"), "is no signature of a run; make one with fedpeft sign"),
        (lambda told: told.update(config=[]), "is no signature of a run"),
        (lambda told: told.update(app=7), "is no signature of a run"),
    ],
)
def test_a_signature_file_that_was_changed(
    file: ServerFile, plan: Path, owner: Owner, change: Callable[[Any], Any], problem: str
) -> None:
    told = json.loads(owner.signs().read_text())
    change(told)
    owner.out.write_text(json.dumps(told))
    with pytest.raises(SiteError, match=f"run.signed: .*{problem}"):
        sent(file, plan, signature=owner.out)
    assert not (file.home / "submitted").exists()


def test_a_path_that_is_relative_to_where_it_is_submitted_was_not_signed(
    file: ServerFile, plan: Path, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = yaml.safe_load(plan.read_text())
    model = Path(lines["model"])
    plan.write_text(yaml.safe_dump({**lines, "model": f"./{model.name}"}))
    monkeypatch.chdir(model.parent)
    said = rf"model: \./{model.name} has a path that is relative .* write it as {model}, and sign"
    with pytest.raises(SiteError, match=said):
        sent(file, plan, signature=owner.signs())


def test_the_command_signs_and_overwrites_nothing(
    plan: Path, owner: Owner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sign", str(plan), "rounds=3", "--key", str(owner.key), "--out", str(owner.out)]
    monkeypatch.setattr("sys.argv", ["fedpeft", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)
    assert "fedpeft submit My plan.yaml --signature run.signed" in capsys.readouterr().out
    made = owner.out.read_bytes()
    assert json.loads(made)["config"]["rounds"] == 3
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "exists, and is not overwritten; choose another --out" in capsys.readouterr().err
    assert owner.out.read_bytes() == made


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
    run, told = sent(file, plan, lines={"every": "true"})
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
