"""A site's supervisor: what it looks at, what it makes of each end, that no orphan is left."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fedpeft import cli
from fedpeft.deployment import certificates, client
from fedpeft.deployment.checks import check, describe
from fedpeft.deployment.client_file import ClientFile, Limits, load_client
from fedpeft.deployment.joining import STILL_ONLINE, Heard, Presence, judge
from fedpeft.deployment.restarts import pause_after
from fedpeft.deployment.signing import make_owner
from fedpeft.deployment.tied import Tied
from fedpeft.deployment.voice import Voice
from fedpeft.errors import RunError, SiteError
from fedpeft.logs import JsonLog
from tests.waiting import wait_until

ROOT = Path(__file__).parents[1]


def written(folder: Path, **lines: Any) -> ClientFile:
    given = {"site": "a", "server": "127.0.0.1:1", "insecure": True, "home": "home", **lines}
    (folder / "client.yaml").write_text(json.dumps(given))
    return load_client(folder / "client.yaml")


def looked(file: ClientFile) -> list[str]:
    return list(check(file, file.home / "warm"))


# --- before it joins -----------------------------------------------------------------------------


def test_what_a_site_finds_is_told(tmp_path: Path) -> None:
    make_owner(tmp_path / "certs", "alice")
    rows = [{"text": f"word {i}", "label": "yn"[i % 2]} for i in range(20)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = looked(
        written(
            tmp_path,
            data='jsonl(train="train.jsonl")',
            owners=["certs/owners/alice/owner.pub"],
            limits={"rank": 8, "epsilon": 2, "tasks": ["classify"], "metrics": False},
        )
    )
    assert found[0] == f"site a, home {tmp_path / 'home'}"
    assert found[1].startswith("data: records: 20")
    assert found[2] == "data: labels: n 10, y 10"
    warned = "warning: insecure: nothing that goes to 127.0.0.1:1 is encrypted or signed"
    told = "tasks classify; rank at most 8; epsilon 2 at delta 1e-05 over all runs; no metrics"
    assert found[-3:-1] == [warned, f"limits: {told} leave"]
    assert found[-1].startswith("owners: alice (SHA256:")


def test_a_site_without_data_or_owners_is_warned(tmp_path: Path) -> None:
    found = looked(written(tmp_path))
    assert "limits: none" in found
    assert [line.split(":")[1].strip() for line in found if line.startswith("warning: ")] == [
        *("data", "insecure", "owners")
    ]
    assert looked(written(tmp_path, owners=[]))[-1] == "owners: nobody, so no run is taken"


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        (Limits(), "none"),
        (Limits(models=("m", "/n"), rounds=3), "models m or /n; rounds at most 3"),
        (Limits(seconds=1.5, gain=True), "1.5 seconds a message; the gain may leave"),
        (
            Limits(client_epsilon=8.0, promised_only=True),
            "epsilon 8 at delta 1e-05 as a client; runs that promised nothing do not count",
        ),
    ],
)
def test_limits_in_a_line(limits: Limits, told: str) -> None:
    assert describe(limits) == told


def test_what_cannot_join_is_told_before_anything_starts(tmp_path: Path) -> None:
    lines: dict[str, Any] = {"insecure": False, "keys": "certs/sites/a", "server": "localhost:1"}
    with pytest.raises(SiteError, match=r"site.key: no such file; see fedpeft certs"):
        looked(written(tmp_path, **lines))
    assert list(certificates.make(tmp_path / "certs", ["localhost"], ["a"], 30))
    found = looked(written(tmp_path, **lines))
    away = "warning: server: localhost:1: cannot be reached (Connection refused); it is waited for"
    assert away in found
    (tmp_path / "certs/sites/a/site.key").chmod(0o644)
    with pytest.raises(SiteError, match="chmod 600"):
        looked(written(tmp_path, **lines))
    with pytest.raises(SiteError, match=r"other.pub: no such file"):
        looked(written(tmp_path, owners=["other.pub"]))
    with pytest.raises(RunError, match="at most 107 bytes"):
        looked(written(tmp_path, home="h" * 120))


def test_one_client_in_a_home(tmp_path: Path) -> None:
    from fedpeft.durable import locked

    file, told = written(tmp_path), io.StringIO()
    file.home.mkdir(mode=0o700)
    with locked(file.home, "home"), pytest.raises(RunError, match="a client runs here already"):
        client.serve(file, Voice(JsonLog(told)))


# --- what an end means ---------------------------------------------------------------------------


def heard(*lines: str) -> Heard:
    found = Heard()
    for line in lines:
        found.hear(line)
    return found


JOINED = "\x1b[92mINFO \x1b[0m:      SuperNode ID: 17"
NO = ("\x1b[91mERROR \x1b[0m:     Exit Code: 305", "[code: 2004] Failed to activate SuperNode.")


def test_flowers_words_are_understood() -> None:
    found = heard(JOINED)
    assert (found.node, found.exit, found.code) == (17, None, None)
    found = heard(*NO)
    assert (found.node, found.exit, found.code) == (None, 305, 2004)
    assert Heard().hear(JOINED) == "INFO :      SuperNode ID: 17"


def test_a_key_that_counts_as_online_is_waited_for_once(tmp_path: Path) -> None:
    presence = Presence(tmp_path)
    assert not presence.is_left
    presence.join(17)
    first = judge(1, heard(*NO), presence, 1, "a")
    assert (first.pause, "still takes this site to be online" in first.text) == (STILL_ONLINE, True)
    second = judge(1, heard(*NO), presence, 2, "a")
    assert second.pause == 5.0
    assert "it has to be given sites/a.pub, or another machine is using" in second.text


@pytest.mark.parametrize("code", [302, 303, 304, 600, 604, 605, 606])
def test_what_no_further_try_mends_ends_it(code: int, tmp_path: Path) -> None:
    with pytest.raises(SiteError, match=rf"\(Flower's exit code {code}\)"):
        judge(1, heard(f"ERROR :     Exit Code: {code}"), Presence(tmp_path), 1, "a")


def test_flower_has_the_codes_that_are_understood() -> None:
    from flwr.supercore.error import ApiErrorCode
    from flwr.supercore.exit import ExitCode

    from fedpeft.deployment.joining import _HOPELESS, _NOT_ACTIVE

    known = {v for k, v in vars(ExitCode).items() if k.isupper()}
    assert set(_HOPELESS) <= known
    assert ExitCode.SUPERNODE_CONNECTION_ERROR == 305
    assert ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED == _NOT_ACTIVE


def test_a_refusal_of_ours_ends_it_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match=r"^flwr 9: is not known$"):
        judge(2, heard("error: flwr 9: is not known"), Presence(tmp_path), 1, "a")


def test_other_ends_are_tried_again_ever_later(tmp_path: Path) -> None:
    presence = Presence(tmp_path)
    presence.join(17)
    pauses = [judge(-9, heard(JOINED), presence, n, "a").pause for n in range(1, 9)]
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60] == [pause_after(n) for n in range(1, 9)]
    assert presence.is_left  # nobody told the server
    sent_away = judge(0, heard(JOINED), presence, 1, "a")
    assert "its key was taken back, or clocks differ" in sent_away.text
    assert not presence.is_left
    assert "exit code 305" in judge(1, heard(NO[0]), presence, 1, "a").text
    told = (NO[0], "Failed to initialize the connection to the SuperLink.", "[SSL] it is over")
    expected = "the SuperNode could not join ([SSL] it is over)"
    assert judge(1, heard(*told), presence, 1, "a").text == expected


# --- which process, when -------------------------------------------------------------------------


class FakeChild:
    """A child that the test ends, and that says what the test says."""

    made: ClassVar[list[FakeChild]] = []

    def __init__(self, command: list[str], env: Any, folder: Path, heard: Any) -> None:
        self.kind, self.command, self.say = command[3], command, heard
        self.pid, self.begun, self.ended = 100 + len(self.made), 0.0, None
        self.stopped = False
        self.made.append(self)

    ended: int | None

    def status(self) -> int | None:
        return self.ended

    def stop(self) -> int:
        self.stopped, self.ended = True, 0
        return 0


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[client.Client, Path]:
    file = written(tmp_path)
    FakeChild.made = []
    monkeypatch.setattr(client, "Tied", FakeChild)
    made = client.Client(file, client.environment(file), Voice())
    made._begun = 0.0
    return made, file.home


def kinds() -> list[str]:
    return [child.kind for child in FakeChild.made]


def test_the_warm_trainer_comes_first_and_superexec_once_it_has_joined(
    site: tuple[client.Client, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    running, home = site
    (home / "flwr" / "apps" / "old").mkdir(parents=True)
    running.look(1.0)
    assert kinds() == ["warm"]
    FakeChild.made[0].say("warm trainer: /x")
    running.look(2.0)
    assert kinds() == ["warm", "supernode"]
    assert not (home / "flwr" / "apps").exists()  # what another one has unpacked
    running.look(3.0)
    assert not Presence(home).is_left
    node = FakeChild.made[1]
    node.say(JOINED)
    running.look(4.0)
    assert kinds() == ["warm", "supernode", "superexec"]
    assert Presence(home).is_left
    assert "joined: a is node 17 of 127.0.0.1:1\n" in capsys.readouterr().out
    executor = FakeChild.made[2].command
    port = node.command[node.command.index("--port") + 1]
    assert f"127.0.0.1:{port}" in executor
    assert str(node.pid) in executor
    secret = Path(executor[executor.index("--superexec-auth-secret-file") + 1])
    assert str(secret) in node.command
    assert secret.stat().st_mode & 0o777 == 0o600
    assert len(secret.read_text()) == 64
    running.stop()
    assert all(child.stopped for child in FakeChild.made)
    assert not Presence(home).is_left


def test_messages_do_without_a_warm_trainer_that_does_not_come(
    site: tuple[client.Client, Path],
) -> None:
    running, _ = site
    running.look(1.0)
    running.look(59.0)
    assert kinds() == ["warm"]
    running.look(61.0)
    assert kinds() == ["warm", "supernode"]


def test_each_is_started_again_and_superexec_with_its_supernode(
    site: tuple[client.Client, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    running, _ = site
    running.look(1.0)
    FakeChild.made[0].say("warm trainer: /x")
    running.look(2.0)
    FakeChild.made[1].say(JOINED)
    running.look(3.0)
    warm, node, executor = FakeChild.made
    warm.ended = -9
    running.look(4.0)
    running.look(4.9)
    assert kinds()[3:] == []
    running.look(5.0)
    assert kinds()[3:] == ["warm"]
    executor.ended = 1
    running.look(6.0)
    running.look(7.0)
    assert kinds()[4:] == ["superexec"]
    node.ended = FakeChild.made[-1].ended = -9
    running.look(8.0)
    running.look(9.0)
    assert kinds()[5:] == ["supernode"]  # no superexec of its own before it has joined
    again = FakeChild.made[-1]
    for line in NO:
        again.say(line)
    again.ended = 1
    running.look(10.0)
    running.look(10.0 + STILL_ONLINE - 0.1)
    assert kinds()[6:] == []
    running.look(10.0 + STILL_ONLINE)
    assert kinds()[6:] == ["supernode"]
    FakeChild.made[-1].say(JOINED)
    running.look(90.0)
    running.look(91.0)
    assert kinds()[7:] == ["superexec"]
    told = capsys.readouterr().err
    assert "the warm trainer was killed (signal 9); it is started again in 1 s" in told
    assert "still takes this site to be online; it is tried again in 75 s" in told


def test_what_can_never_join_ends_the_client(site: tuple[client.Client, Path]) -> None:
    running, _ = site
    running.look(61.0)
    FakeChild.made[1].say("ERROR :     Exit Code: 302")
    FakeChild.made[1].ended = 1
    with pytest.raises(SiteError, match="is none that Flower takes"):
        running.look(62.0)


# --- what is said --------------------------------------------------------------------------------


def test_lines_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    voice = Voice()
    voice.say("check", "limits: none")
    voice.say("check", "warning: insecure")
    voice.say("ended", "the SuperNode was killed", "warning")
    voice.pass_on("supernode", JOINED)
    voice.pass_on("supernode", "\x1b[0m")
    voice.fail("the command line says it")
    out, err = capsys.readouterr()
    assert out == "limits: none\n"
    assert err.splitlines() == [
        "warning: insecure",
        "warning: the SuperNode was killed",
        "supernode | INFO :      SuperNode ID: 17",
    ]


def test_structured_lines() -> None:
    told = io.StringIO()
    voice = Voice(JsonLog(told))
    voice.say("check", "warning: insecure")
    voice.say("joined", "joined: a")
    voice.pass_on("warm", "warm trainer: /x")
    voice.fail("why")
    lines = [json.loads(line) for line in told.getvalue().splitlines()]
    for line in lines:
        del line["time"]
    assert lines == [
        {"level": "warning", "event": "check", "text": "insecure"},
        {"level": "info", "event": "joined", "text": "joined: a"},
        {"level": "info", "event": "printed", "source": "warm", "text": "warm trainer: /x"},
        {"level": "error", "event": "stopped", "reason": "why"},
    ]


# --- children ------------------------------------------------------------------------------------

CHILD = """
import os, signal, subprocess, sys, time
from fedpeft.deployment.tied import tie

tie()
if sys.argv[2] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
own = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("pids", os.getpid(), own.pid, flush=True)
time.sleep(600)
"""

PARENT = """
import sys, time
from pathlib import Path
from fedpeft.deployment.tied import Tied

child = Tied([sys.executable, "-c", sys.argv[1], "x", "kind"], {}, Path("/"), print)
sys.stdout.reconfigure(line_buffering=True)
time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def pids(line: str) -> list[int]:
    return [int(word) for word in line.split()[1:]]


def test_children_end_with_a_parent_that_is_killed() -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PARENT.replace("{}", "dict(__import__('os').environ)"), CHILD]
    parent = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    found = pids(parent.stdout.readline())
    assert all(map(alive, found))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not any(map(alive, found)))


@pytest.mark.parametrize("manner", ["kind", "deaf"])
def test_a_child_is_stopped_with_its_own_children(manner: str, tmp_path: Path) -> None:
    lines: list[str] = []
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = Tied([sys.executable, "-c", CHILD, "x", manner], env, tmp_path, lines.append)
    wait_until(lambda: lines)
    found = pids(lines[0])
    assert child.status() is None
    assert found[0] == child.pid
    begun = time.monotonic()
    ended = -signal.SIGKILL if manner == "deaf" else -signal.SIGTERM
    assert child.stop(1.0 if manner == "deaf" else 600.0) == ended
    assert time.monotonic() - begun < 300
    assert child.status() == ended
    wait_until(lambda: not any(map(alive, found)))


def test_all_that_a_child_printed_is_heard_when_it_has_ended(tmp_path: Path) -> None:
    lines: list[str] = []
    program = "print('one'); print('two\\xff'); raise SystemExit(3)"
    child = Tied([sys.executable, "-c", program], dict(os.environ), tmp_path, lines.append)
    wait_until(lambda: child.status() is not None)
    assert child.status() == 3
    assert lines[0] == "one"
    assert len(lines) == 2


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_command_looks_and_tells_mistakes_in_a_line(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fedpeft(*arguments: str) -> tuple[int, str, str]:
        file = str(tmp_path / "client.yaml")
        monkeypatch.setattr(sys, "argv", ["fedpeft", "client", file, "--log", form, *arguments])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        out, err = capsys.readouterr()
        return int(exit.value.code or 0), out, err

    written(tmp_path)
    code, out, err = fedpeft("--check")
    told = [json.loads(line) for line in err.splitlines()] if form == "json" else out.splitlines()
    assert (code, "limits: none" in str(told)) == (0, True)
    assert not (tmp_path / "home").exists()
    written(tmp_path, owners=["none.pub"])
    code, _, err = fedpeft()
    assert code == 2
    assert err.splitlines()[-1].startswith(f"error: {tmp_path / 'none.pub'}: no such file")
    assert ('"event": "stopped"' in err) == (form == "json")
    (tmp_path / "client.yaml").write_text("site: a\nserver: h:1\nhome: x\nkey: y\n")
    code, _, err = fedpeft()
    assert (code, err.count("\n")) == (2, 1)
