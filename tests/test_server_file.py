"""``server.yaml``: what it says, and every mistake in it told at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpeft.deployment.server_file import load_server
from fedpeft.errors import PlanError, SiteError


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    folder = tmp_path / "server"
    (folder / "sites").mkdir(parents=True)
    for name in ("ca.crt", "server.crt", "server.key"):
        (folder / name).write_text("")
    return folder


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "server.yaml"
    path.write_text(text)
    return path


def test_what_it_says(tmp_path: Path, keys: Path) -> None:
    text = "listen: 10.0.0.5:9093\nkeys: server\nhome: s\ndashboard: 127.0.0.1:8080\nthreads: 3\n"
    found = load_server(written(tmp_path, text))
    assert (found.host, found.port, found.local) == ("10.0.0.5", 9093, "10.0.0.5:9093")
    assert (found.keys, found.home, found.runs) == (keys, tmp_path / "s", tmp_path / "s" / "runs")
    assert (found.dashboard, found.threads) == (("127.0.0.1", 8080), 3)
    assert found.authority == keys / "ca.crt"


def test_what_it_need_not_say(tmp_path: Path, keys: Path) -> None:
    found = load_server(written(tmp_path, "keys: server\n"))
    assert (found.host, found.port, found.local) == ("0.0.0.0", 9092, "127.0.0.1:9092")
    assert (found.home, found.dashboard, found.threads) == (tmp_path / "state", None, 1)


def test_every_interface_is_reached_by_loopback(tmp_path: Path, keys: Path) -> None:
    found = load_server(written(tmp_path, "keys: server\nlisten: '[::]:9092'\n"))
    assert (found.host, found.local) == ("::", "[::1]:9092")


def test_insecure_is_for_this_machine(tmp_path: Path) -> None:
    found = load_server(written(tmp_path, "insecure: true\n"))
    assert (found.host, found.keys, found.authority) == ("127.0.0.1", None, None)
    with pytest.raises(PlanError, match=r"only on this machine; listen: 127\.0\.0\.1:9"):
        load_server(written(tmp_path, "insecure: true\nlisten: 0.0.0.0:9\n"))


def test_without_keys_nothing_is_served(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="keys: is missing: the folder server/ that fedpeft certs"):
        load_server(written(tmp_path, "listen: 127.0.0.1:9092\n"))


def test_every_mistake_at_once(tmp_path: Path, keys: Path) -> None:
    (keys / "server.key").unlink()
    text = "listn: 1:2\nkeys: server\nthreads: none\ninsecure: yes please\ndashboard: nowhere\n"
    with pytest.raises(PlanError) as caught:
        load_server(written(tmp_path, text))
    told = [problem.partition("server.yaml: ")[2] for problem in caught.value.problems]
    assert len(told) == 5
    assert told[0] == "insecure: 'yes please' must be true or false"
    assert told[1] == "threads: 'none' must be a whole number, at least 1"
    assert told[2] == "unknown line 'listn'; did you mean 'listen'?"
    assert told[3].startswith("dashboard: 'nowhere' is no address")
    assert told[4].endswith("server/server.key is not there; see fedpeft certs")


def test_keys_and_insecure_contradict(tmp_path: Path, keys: Path) -> None:
    with pytest.raises(PlanError, match="take one of the two lines away"):
        load_server(written(tmp_path, "keys: server\ninsecure: true\n"))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match=r"server\.yaml: no such file; give a server\.yaml"):
        load_server(tmp_path / "server.yaml")
