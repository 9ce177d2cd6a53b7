"""Replies on disk: the same message is trained for once, whatever dies in between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import client.app
from fedpeft import client_rounds, node
from fedpeft.flower.messages import read_packet
from fedpeft.replies import Replies
from tests.test_flower import SGD, FakeGrid, config_of, serve
from tests.tiny import support_plan, tiny_bert

ROOT = Path(__file__).parents[1]


@given(st.text(), st.binary(max_size=100), st.binary(max_size=100))
def test_a_reply_is_found_by_its_message(
    tmp_path_factory: pytest.TempPathFactory, client: str, message: bytes, reply: bytes
) -> None:
    replies = Replies(tmp_path_factory.mktemp("replies"))
    assert replies.find(client, message) is None
    replies.keep(client, message, reply)
    assert replies.find(client, message) == reply
    assert replies.find(client, message + b"x") is None
    assert replies.find(client + "x", message) is None
    replies.keep(client, b"later" + message, b"other")
    assert replies.find(client, message) is None


@pytest.mark.parametrize("at", [0, 31, 32, 63, 64, -1])
def test_a_damaged_reply_is_not_sent(tmp_path: Path, at: int) -> None:
    replies = Replies(tmp_path)
    replies.keep("a", b"message", b"reply")
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    assert replies.find("a", b"message") is None
    path.write_bytes(data[:40])
    assert replies.find("a", b"message") is None


def test_a_disk_that_does_not_take_it_is_said_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = list[str]()
    Replies(tmp_path / "file" / "run", said.append).keep("a", b"message", b"reply")
    assert len(said) == 1
    assert "a: its reply is not kept" in said[0]


@pytest.mark.parametrize("moment", ["begun", "half", "written"])
def test_a_kill_leaves_the_last_reply_or_the_new_one(tmp_path: Path, moment: str) -> None:
    Replies(tmp_path).keep("a", b"first", b"1" * 100)
    code = (
        "import sys; from pathlib import Path; from fedpeft.replies import Replies\n"
        "Replies(Path(sys.argv[1])).keep('a', b'second', b'2' * 100)"
    )
    env = os.environ | {"FEDPEFT_FAULT": f"reply.{moment}"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert Replies(tmp_path).find("a", b"first") == b"1" * 100


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("model") / "bert")


@pytest.mark.parametrize("correction", ["none", "scaffold"])
def test_a_message_that_comes_twice_is_trained_for_once(
    correction: str, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: None
) -> None:
    plan = support_plan(bert, correction=correction, trainer=SGD, rounds=1)
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out")), nodes=4)
    rounds, replies = list[str](), list[Any]()

    def counted(*given: Any, **named: Any) -> Any:
        rounds.append(given[2])
        return client_rounds.client_round(*given, **named)

    monkeypatch.setattr(node, "client_round", counted)
    played = grid.play

    def twice(message: Any, place: int) -> Any:
        first = played(message, place)
        if message.metadata.message_type == "train":
            replies.append((first.content, played(message, place).content))
        return first

    monkeypatch.setattr(grid, "play", twice)
    serve(grid)
    assert len(rounds) == len({*rounds}) == len(replies) == 4
    assert all(first == again for first, again in replies)
    kept = list((tmp_path / "home" / "replies").glob("*/*"))
    assert len(kept) == 4
    assert {path.parent.stat().st_mode & 0o777 for path in kept} == {0o700}


@pytest.mark.parametrize("correction", ["none", "scaffold"])
def test_a_kept_reply_takes_no_model(
    correction: str, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: None
) -> None:
    """A process that is asked again for what another one has trained loads nothing for it."""
    plan = support_plan(bert, correction=correction, trainer=SGD, rounds=1)
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out")), nodes=4)
    serve(grid)
    asked = next(m for m in grid.sent if m.metadata.message_type == "train")
    client.app.forget()
    monkeypatch.setattr(node, "Site", None)
    reply = grid.play(asked, grid.nodes[asked.metadata.dst_node_id])
    assert not reply.has_error()
    assert read_packet(reply.content)
