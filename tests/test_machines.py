"""What stands around a federation of processes: the wire that counts, the kills, the readings."""

from __future__ import annotations

import math
import random
import socket
import threading
from collections import Counter
from pathlib import Path

import pytest

from fedpeft.durable import FAULTS
from fedpeft.faults import SENDING, fault
from simulations._machines import federation
from simulations._machines.federation import ROLES, Federation, dealt, pooled
from simulations._machines.relay import Relay
from simulations.chaos._kills import LAST_POINTS, POINTS, Killer, order
from simulations.soak.__main__ import Readings
from tests.tiny import support_plan


def test_a_relay_passes_bytes_on_and_counts_them_both_ways() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        relay = Relay(server.getsockname()[1])
        relay.begin()

        def answer() -> None:
            opened, _ = server.accept()
            with opened:
                got = b"".join(iter(lambda: opened.recv(1 << 16), b""))
                opened.sendall(got[:1000])

        threading.Thread(target=answer, daemon=True).start()
        data = random.Random(0).randbytes(300_000)
        with socket.create_connection(("127.0.0.1", relay.port)) as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            back = b"".join(iter(lambda: client.recv(1 << 16), b""))
        assert back == data[:1000]
        assert (relay.up, relay.down) == (len(data), 1000)
        relay.close()
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", relay.port)).close()


def test_points_of_kills_are_points_of_faults() -> None:
    assert {*POINTS, *LAST_POINTS} <= {*FAULTS, *SENDING}
    assert len(POINTS) == 4 + 3 * 6 + 3


@pytest.mark.parametrize(("kills", "short"), [(8, True), (30, False), (60, False)])
def test_kills_are_enough_and_of_all_kinds(kills: int, short: bool) -> None:
    found = Counter(order(kills, random.Random(3), short=short))
    assert found.total() >= kills
    assert {*found} <= {*POINTS, *ROLES}
    assert 1 <= found["SuperNode"] <= 2
    if not short:
        assert {*POINTS, *ROLES} == {*found}
    assert order(kills, random.Random(3), short=short) == order(
        kills, random.Random(3), short=short
    )


def test_a_process_is_told_once_where_to_die(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    died: list[int] = []
    monkeypatch.setattr("os.kill", lambda pid, number: died.append(number))
    monkeypatch.setenv("FEDPEFT_FAULT_FILE", str(tmp_path / "fault"))
    killer = Killer(None, tmp_path / "fault", random.Random(0))  # type: ignore[arg-type]
    killer.arm("reply.half")
    fault("reply.written")
    assert not killer.fell("reply.half", 3)
    fault("reply.half")
    assert killer.fell("reply.half", 4)
    assert (died, [(kill.what, kill.round) for kill in killer.done]) == ([9], [("reply.half", 4)])
    killer.arm("memory.begun")
    killer.disarm()
    fault("memory.begun")
    assert len(died) == 1


def test_slopes_are_those_of_the_second_half() -> None:
    grows = Readings([*range(20)], [(1 << 20) * (50 + 3 * n) for n in range(20)])
    assert grows.slope() == pytest.approx(300)
    settles = Readings([*range(20)], [(1 << 20) * min(50 + 3 * n, 60) for n in range(20)])
    assert settles.slope() == pytest.approx(0, abs=1e-9)
    assert math.isnan(Readings([1, 1, 1, 1], [5, 6, 7, 8]).slope())


def test_a_federation_s_files_are_those_of_users(bert: Path, tmp_path: Path) -> None:
    plan = support_plan(bert, clients=2)
    rows = dict(zip(("a", "b"), dealt(plan).values(), strict=True))
    made = Federation(tmp_path, rows)
    together = pooled(made, tmp_path / "all.jsonl").read_text().splitlines()
    assert len(together) == sum(map(len, rows.values()))
    from fedpeft.deployment.client_file import load_client
    from fedpeft.deployment.server_file import load_server

    assert load_client(tmp_path / "a" / "client.yaml").server == f"localhost:{made.relay.port}"
    assert load_server(tmp_path / "server.yaml").port == made.port
    assert not made.processes("SuperLink")
    made.stop()


@pytest.mark.parametrize(
    ("role", "line", "plays"),
    [
        ("server's SuperExec", "/x/flower-superexec --insecure", True),
        ("server's SuperExec", "python -m fedpeft.deployment.tied superexec --x", False),
        ("site's SuperExec", "python -m fedpeft.deployment.tied superexec --x", True),
        ("warm trainer", "python -m fedpeft.deployment.tied supernode", False),
    ],
)
def test_who_plays_which_part_is_told_by_command_lines(role: str, line: str, plays: bool) -> None:
    assert federation._plays(role, line) == plays
