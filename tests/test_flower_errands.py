"""Requests that are lost on the way: with ``every`` they are sent again, and the run ends alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message
from flwr.app import MessageType as Kind

from fedpeft.driver import simulate
from fedpeft.errors import RunError
from fedpeft.flower import errands
from fedpeft.flower.messages import read_packet
from tests.test_flower import SGD, FakeGrid, assert_same, config_of, result_of, serve
from tests.tiny import support_plan

pytestmark = pytest.mark.usefixtures("apart", "impatient")
LINES = {"correction": "scaffold", "trainer": SGD, "rounds": 3}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errands, "PAUSE", 0.05)


def losing(grid: FakeGrid, when: Callable[[int, int, str], int]) -> list[tuple[int, str]]:
    """Answer with the error code that ``when`` says of (how often asked, place, kind), if any.

    Returns where an answer was lost, as it happens.
    """
    play, lost, asked = grid.play, list[tuple[int, str]](), dict[tuple[int, str, bytes], int]()

    def playing(message: Message, place: int) -> Message:
        kind = message.metadata.message_type
        if kind == Kind.QUERY:
            return play(message, place)
        what = place, kind, read_packet(message.content)
        asked[what] = asked.get(what, 0) + 1
        if code := when(asked[what], place, kind):
            lost.append((place, kind))
            return Message(Error(code, "gone"), reply_to=message)
        return play(message, place)

    grid.play = playing  # type: ignore[method-assign]
    return lost


@pytest.mark.parametrize("code", [3, 5, 8], ids=["unavailable", "node killed", "app killed"])
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_run_whose_nodes_were_killed_ends_like_one_whose_were_not(
    bert: Path, tmp_path: Path, code: int, kind: str
) -> None:
    plan = support_plan(bert, **LINES)
    simulate(plan, out=tmp_path / "whole")
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out"), every=True), nodes=4)
    lost = losing(grid, lambda times, place, of: code * (place == 2 and of == kind and times < 3))
    serve(grid)
    assert_same(tmp_path / "whole", tmp_path / "out")
    assert lost == [(2, kind)] * 2 * 3


def test_what_was_trained_before_the_reply_was_lost_is_not_trained_again(
    bert: Path, tmp_path: Path
) -> None:
    plan = support_plan(bert, **LINES)
    simulate(plan, out=tmp_path / "whole")
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out"), every=True), nodes=4)
    play, replies = grid.play, dict[bytes, list[bytes]]()

    def after(message: Message, place: int) -> Message:
        reply = play(message, place)
        if message.metadata.message_type != Kind.TRAIN or place != 1:
            return reply
        told = replies.setdefault(read_packet(message.content), [])
        told.append(read_packet(reply.content))
        return reply if len(told) > 1 else Message(Error(5, "gone"), reply_to=message)

    grid.play = after  # type: ignore[method-assign]
    serve(grid)
    assert_same(tmp_path / "whole", tmp_path / "out")
    assert [len(told) for told in replies.values()] == [2, 2, 2]
    assert all(first == second for first, second in replies.values())


def test_a_node_that_is_away_is_waited_for_and_may_come_back_as_another(
    bert: Path, tmp_path: Path
) -> None:
    plan = support_plan(bert, **LINES)
    simulate(plan, out=tmp_path / "whole")
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out"), every=True), nodes=4)
    push, count = grid.push_messages, [0]
    (gone,) = [node for node, place in grid.nodes.items() if place == 3]

    def pushing(messages: Iterable[Message]) -> Iterable[str]:
        told = list(messages)
        count[0] += 1
        if count[0] == 14:  # in the second round
            grid.gone.add(gone)
        if count[0] == 20:
            grid.nodes[999] = grid.nodes[gone]
            grid.nodes = {n: p for n, p in grid.nodes.items() if n != gone}
        return push(told)

    grid.push_messages = pushing  # type: ignore[method-assign]
    serve(grid)
    assert_same(tmp_path / "whole", tmp_path / "out")
    assert count[0] > 4 + 3 * 8


def test_an_app_that_fails_for_a_reason_is_not_asked_for_ever(bert: Path, tmp_path: Path) -> None:
    plan = support_plan(bert, rounds=1, holdout=0)
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out"), every=True), nodes=4)
    grid.broken[2, "train"] = MemoryError("no room")
    serve(grid)
    _, history, _ = result_of(tmp_path / "out")
    assert "no room (code 2)" in history[0]["refused"]["client-002"]
    tried = [
        grid.nodes[m.metadata.dst_node_id] for m in grid.sent if m.metadata.message_type == "train"
    ]
    assert tried.count(2) == 4
    assert len(tried) == 7


def test_who_says_why_not_is_asked_once(bert: Path, tmp_path: Path) -> None:
    plan = support_plan(bert, rounds=1, holdout=0)
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out"), every=True), nodes=4)
    lost = losing(grid, lambda times, place, of: 100 * (place == 1))
    serve(grid)
    _, history, _ = result_of(tmp_path / "out")
    assert history[0]["refused"] == {"client-001": "gone"}
    assert lost == [(1, "train")]


def test_at_the_deadline_nobody_is_asked_again(bert: Path, tmp_path: Path) -> None:
    plan = support_plan(bert, rounds=1, holdout=0)
    config = config_of(plan, out=str(tmp_path / "out"), every=True, deadline=0.6)
    grid = FakeGrid(config, nodes=4)
    lost = losing(grid, lambda times, place, of: 5 * (place == 1))
    serve(grid)
    _, history, _ = result_of(tmp_path / "out")
    assert history[0]["refused"] == {"client-001": "no reply within 0.6 seconds"}
    assert len(lost) > 2


@pytest.mark.parametrize("every", [False, True])
def test_without_it_a_lost_reply_costs_the_round_alone(
    bert: Path, tmp_path: Path, every: bool
) -> None:
    plan = support_plan(bert, rounds=2, holdout=0)
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out"), every=every), nodes=4)
    losing(grid, lambda times, place, of: 5 * (place == 0 and times == 1))
    serve(grid)
    _, history, _ = result_of(tmp_path / "out")
    refused: list[dict[str, Any]] = [line.get("refused", {}) for line in history]
    assert refused == ([{}, {}] if every else [{"client-000": "gone (code 5)"}] * 2)


def test_where_nobody_ever_comes_the_first_greeting_still_ends(bert: Path, tmp_path: Path) -> None:
    plan = support_plan(bert, rounds=1, holdout=0)
    config = config_of(plan, out=str(tmp_path / "out"), every=True, wait=0.3)
    grid = FakeGrid(config, nodes=4)
    grid.nodes = {node: place for node, place in grid.nodes.items() if place != 3}
    with pytest.raises(RunError, match="client-003"):
        serve(grid)


@pytest.mark.parametrize("code", [5, 8], ids=["node killed", "app killed"])
@pytest.mark.parametrize("every", [False, True])
def test_a_node_that_is_killed_while_it_is_greeted_is_greeted_again(
    bert: Path, tmp_path: Path, code: int, every: bool
) -> None:
    plan = support_plan(bert, rounds=1, holdout=0)
    simulate(plan, out=tmp_path / "whole")
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out"), every=every), nodes=4)
    play, greeted = grid.play, list[int]()

    def playing(message: Message, place: int) -> Message:
        if message.metadata.message_type != Kind.QUERY:
            return play(message, place)
        greeted.append(place)
        lost = place == 2 and greeted.count(2) < 3
        return Message(Error(code, "gone"), reply_to=message) if lost else play(message, place)

    grid.play = playing  # type: ignore[method-assign]
    serve(grid)
    assert_same(tmp_path / "whole", tmp_path / "out")
    assert sorted(greeted) == [0, 1, 2, 2, 2, 3]


def test_an_app_that_always_crashes_at_the_greeting_ends_it(bert: Path, tmp_path: Path) -> None:
    plan = support_plan(bert, rounds=1, holdout=0)
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out")), nodes=4)
    play, greeted = grid.play, list[int]()

    def playing(message: Message, place: int) -> Message:
        greeted.append(place)
        return Message(Error(8, "gone"), reply_to=message) if place == 1 else play(message, place)

    grid.play = playing  # type: ignore[method-assign]
    with pytest.raises(RunError, match=r"client-001.*gone \(code 8\)"):
        serve(grid)
    assert greeted.count(1) == errands.TRIES
