"""``fedpeft server`` with Flower's real processes: who gets in, who does not, what comes back."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import ssl
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedpeft.addresses import free_port
from fedpeft.deployment import handshake
from fedpeft.errors import SiteError
from tests.deployed import Deployment, environment, other_machine, pid_of
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

ASK = """
import json, ssl, sys, urllib.error, urllib.request
trust = ssl._create_unverified_context()
address, token, found = sys.argv[1], sys.argv[2], {}
for path in sys.argv[3:]:
    headers = {"authorization": "Bearer " + token, "content-type": "application/protobuf"}
    request = urllib.request.Request("https://" + address + path, b"", headers, method="POST")
    try:
        found[path] = urllib.request.urlopen(request, context=trust, timeout=60).status
    except urllib.error.HTTPError as error:
        found[path] = (error.code, error.headers.get("x-fedpeft-gate"))
print(json.dumps(found))
"""
PATHS = ("/v1/control/list-runs", "/v1/runtime/acquire-task", "/health", "/v1/fleet/pull-messages")


def ask(address: str, token: str, before: list[str], **options: Any) -> dict[str, Any]:
    """Return what becomes of POSTs, each its status and whether the gate refused, by a process."""
    command = [*before, "/usr/bin/env", "python3", "-I", "-c", ASK, address, token, *PATHS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_the_gate_before_a_real_superlink(tmp_path: Path) -> None:
    """Strangers and other users, even with the token, reach nothing but the sites' part."""
    here, there = "10.213.7.1", "10.213.7.2"
    made = Deployment(tmp_path, ["a", "b"], host="0.0.0.0")
    with other_machine(here, there) as inside, made.serving():
        file = made.file
        token = (file.home / "control.token").read_text()
        refused = [403, "1"]
        mine = ask(file.local, token, [])
        assert mine["/v1/control/list-runs"] == 200
        assert mine["/v1/runtime/acquire-task"] == 200, "Flower asks for nothing more"
        assert mine["/v1/fleet/pull-messages"] == [401, None], "Flower asks for a site's key"
        without = ask(file.local, "guessed", [])
        assert without["/v1/control/list-runs"] == refused
        for answers in (
            ask(f"{here}:{file.port}", token, inside),
            ask(file.local, token, [], user=65534),
        ):
            assert answers.pop("/v1/fleet/pull-messages") == [401, None]
            assert list(answers.values()) == [refused] * 3
        own = ask(f"{here}:{file.port}", token, [])
        assert own["/v1/control/list-runs"] == 200, "this machine by an address of its own"
        with made.control() as control:
            assert {(s.name, s.state) for s in control.sites()} == {
                ("a", "registered"),
                ("b", "registered"),
            }
        assert announced(file.port, 1 << 30) == (413, "1")


def announced(port: int, length: int) -> tuple[int, str | None]:
    """Return the answer to a request of a length, before any of it is sent."""
    trust = ssl._create_unverified_context()
    opened = http.client.HTTPSConnection("127.0.0.1", port, context=trust, timeout=60)
    with contextlib.closing(opened):
        opened.putrequest("POST", "/v1/fleet/push-object")
        opened.putheader("content-length", str(length))
        opened.endheaders()
        answer = opened.getresponse()
        return answer.status, answer.headers.get("x-fedpeft-gate")


def test_sites_processes_and_the_page(tmp_path: Path) -> None:
    """Processes that are killed come back; sites come and go by files of keys."""
    made = Deployment(tmp_path, ["a", "b"])
    with made.serving() as server:
        file = made.file
        assert handshake.probe("127.0.0.1", file.port, made.certs / "sites" / "a" / "ca.crt")
        roster = json.loads((file.home / "roster.json").read_text())
        assert sorted(roster.values()) == ["a", "b"]

        with urllib.request.urlopen(f"http://127.0.0.1:{made.page}/api/runs") as answer:
            shown = json.loads(answer.read())
        states = [(row["site"], row["state"], row["heard"]) for row in shown["sites"]]
        assert states == [("a", "never seen", ""), ("b", "never seen", "")]

        for word in ("fedpeft.flower.superlink", "flower-superexec"):
            old = pid_of(word, tmp_path)
            os.kill(old, signal.SIGKILL)
            wait_until(lambda w=word, o=old: running(w, tmp_path) not in (None, o))  # type: ignore[misc]
        wait_until(lambda: made.told.count("serving at") == 2)

        (made.certs / "server" / "sites" / "b.pub").unlink()
        server.send_signal(signal.SIGHUP)
        wait_until(lambda: "1 sites: a" in made.told)
        assert "site b: its key is taken back" in made.told
        again = json.loads((file.home / "roster.json").read_text())
        assert again == {node: name for node, name in roster.items() if name == "a"}

        second = made.fedpeft("server", "server.yaml")
        assert second.returncode == 2
        assert "another process is writing this server's home" in second.stderr
    assert "Traceback" not in made.told
    assert server.returncode == 0
    assert {s.name for s in sites_after(made)} == {"a", "b"}, "the database outlives the processes"
    with pytest.raises(SiteError, match="does not answer"), made.control() as control:
        control.sites()


def sites_after(made: Deployment) -> list[Any]:
    with made.serving(), made.control() as control:
        return control.sites()


def running(word: str, folder: Path) -> int | None:
    try:
        return pid_of(word, folder)
    except AssertionError:
        return None


def test_structured_lines_of_a_server(tmp_path: Path) -> None:
    """Each line is JSON, from the start to what stops it; without keys a warning is among them."""
    config, port, page = tmp_path / "server.yaml", free_port(), free_port()
    config.write_text(f"insecure: true\nlisten: 127.0.0.1:{port}\ndashboard: 127.0.0.1:{page}\n")
    command = [sys.executable, "-m", "fedpeft", "server", str(config), "--log", "json"]
    log = tmp_path / "log"
    with log.open("wb") as told:
        made = subprocess.Popen(command, env=environment(), stdout=told, stderr=told)
    try:
        wait_until(lambda: '"serving"' in log.read_text() or made.poll() is not None)
        again = subprocess.run(command, env=environment(), capture_output=True, text=True)
        os.kill(pid_of("fedpeft.flower.superlink", tmp_path), signal.SIGKILL)
        wait_until(lambda: log.read_text().count('"serving"') == 2)
    finally:
        made.terminate()
        made.wait(60)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {"time", "level", "event", "text"} == {key for line in lines for key in line}
    events = [(line["event"], line["level"]) for line in lines]
    assert events == [
        *(("check", "warning"), ("page", "info"), ("serving", "info")),
        *(("ended", "info"), ("serving", "info")),
    ]
    assert again.returncode == 2
    last = json.loads(again.stderr.splitlines()[0])
    assert (last["event"], last["level"]) == ("stopped", "error")
    assert "another process is writing this server's home" in last["reason"]


def test_without_keys_on_loopback_a_warning(tmp_path: Path) -> None:
    config = tmp_path / "server.yaml"
    port = free_port()
    config.write_text(f"insecure: true\nlisten: 127.0.0.1:{port}\n")
    command = [sys.executable, "-m", "fedpeft", "server", str(config)]
    log = tmp_path / "log"
    with log.open("wb") as told:
        made = subprocess.Popen(command, env=environment(), stdout=told, stderr=told)
    try:
        wait_until(lambda: "serving at" in log.read_text() or made.poll() is not None)
        text = log.read_text()
        assert "warning: insecure: nothing is encrypted and sites show no keys" in text
        assert httpx.post(f"http://127.0.0.1:{port}/v1/control/list-runs").status_code == 403
    finally:
        made.terminate()
        made.wait(60)
