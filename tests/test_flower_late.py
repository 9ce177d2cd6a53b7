"""Clients on Flower's grid that are slow, silent, late, twofold, from elsewhere, or gone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from fedpeft import client_rounds
from fedpeft.errors import RunError
from fedpeft.flower.messages import read_packet
from fedpeft.plan import Plan
from fedpeft.wire import peek
from tests.test_flower import FakeGrid, config_of, result_of, serve
from tests.tiny import support_plan

pytestmark = pytest.mark.usefixtures("apart")
LOCAL = {"adapter": "lora(r=2, alpha=4, head='local')", "holdout": 0, "evaluate": ""}


def grid_of(plan: Plan, out: Path, **settings: Any) -> FakeGrid:
    return FakeGrid(config_of(plan, out=str(out), **settings), nodes=plan.clients or 0)


def trained(grid: FakeGrid) -> list[tuple[int, int]]:
    """Return the node's place and the round of each request to train."""
    asked = [m for m in grid.sent if m.metadata.message_type == "train"]
    rounds = [int(peek(read_packet(m.content))["round"]) for m in asked]
    return [(grid.nodes[m.metadata.dst_node_id], r) for m, r in zip(asked, rounds, strict=True)]


def before_each_push(grid: FakeGrid, act: Callable[[int], None]) -> None:
    """Call ``act`` with the number of requests to train, before each."""
    push, count = grid.push_messages, [0]

    def pushing(messages: Iterable[Message]) -> Iterable[str]:
        told = list(messages)
        count[0] += told[0].metadata.message_type == "train"
        act(count[0])
        return push(told)

    grid.push_messages = pushing  # type: ignore[method-assign]


def test_a_slow_client_blocks_no_step_and_its_update_counts_as_old(
    bert: Path, tmp_path: Path
) -> None:
    plan = support_plan(bert, schedule="buffered(size=2, concurrency=4)", rounds=8, **LOCAL)
    grid = grid_of(plan, tmp_path / "out")

    def slow_at_first(count: int) -> None:
        if count == 1:
            grid.slow[2] = 4

    before_each_push(grid, slow_at_first)
    serve(grid)
    _, history, _ = result_of(tmp_path / "out")
    assert [line["round"] for line in history] == list(range(8))
    assert all(len(line["replied"]) == 2 for line in history)
    came = next(line["round"] for line in history if "client-002" in line["replied"])
    assert came > 0
    assert history[came]["staleness"].get(str(came)) == 1
    assert trained(grid)[:4] == [(place, 0) for place in range(4)]


def test_what_was_under_way_is_asked_again_by_a_server_that_comes_back(
    bert: Path, tmp_path: Path
) -> None:
    plan = support_plan(bert, schedule="buffered(size=2, concurrency=4)", rounds=5, **LOCAL)
    grid = grid_of(plan, tmp_path / "out")
    grid.silent.add((3, "train"))

    def killed(count: int) -> None:
        if count == 9:
            raise KeyboardInterrupt

    before_each_push(grid, killed)
    with pytest.raises(KeyboardInterrupt):
        serve(grid)
    done = len((tmp_path / "out" / "rounds.jsonl").read_text().splitlines())
    assert 0 < done < 5
    again = grid_of(plan, tmp_path / "out", resume=True)
    serve(again)
    assert (3, 0) in trained(again)[:4]
    _, history, _ = result_of(tmp_path / "out")
    assert [line["round"] for line in history] == list(range(5))
    came = next(line for line in history if "client-003" in line["replied"])
    assert came["round"] >= done
    assert str(came["round"]) in came["staleness"]
    assert not any("memory" in str(line.get("refused")) for line in history)


def test_a_reply_to_a_version_that_is_no_longer_kept_is_dropped_with_a_line(
    bert: Path, tmp_path: Path
) -> None:
    schedule = "buffered(size=1, concurrency=4, max_staleness=1)"
    plan = support_plan(bert, schedule=schedule, rounds=9, **LOCAL)
    grid = grid_of(plan, tmp_path / "out")
    grid.silent.add((3, "train"))

    def wakes(count: int) -> None:
        if count == 9:
            grid.silent.clear()

    before_each_push(grid, wakes)
    serve(grid)
    _, history, _ = result_of(tmp_path / "out")
    reason = "its update would be 2 versions old, more than max_staleness=1"
    assert history[1]["refused"]["client-003"] == reason
    assert all(int(age) <= 1 for line in history for age in line["staleness"])
    strays = [line["round"] for line in history if "client-003" in line.get("strays", {})]
    assert strays
    assert not any("memory" in str(line.get("refused")) for line in history)


def test_at_the_plan_s_deadline_the_round_goes_on_and_the_late_reply_is_dropped_with_a_line(
    bert: Path, tmp_path: Path
) -> None:
    plan = support_plan(bert, schedule="sync(deadline=0.4, minimum=2)", rounds=3, **LOCAL)
    grid = grid_of(plan, tmp_path / "out")
    grid.silent.add((1, "train"))

    def wakes(count: int) -> None:
        if count == 9:
            grid.silent.clear()

    before_each_push(grid, wakes)
    serve(grid)
    _, history, _ = result_of(tmp_path / "out")
    late = {"client-001": "no reply within 0.4 seconds"}
    assert [line.get("refused") for line in history] == [late, late, None]
    assert history[2]["strays"] == {"client-001": "what it said came too late"}
    assert [len(line["replied"]) for line in history] == [3, 3, 4]


def test_over_selection_leaves_the_slowest_behind(bert: Path, tmp_path: Path) -> None:
    plan = support_plan(
        bert, schedule="sync(over=2)", cohort="uniform(size=2)", weighting="uniform", **LOCAL
    )
    grid = grid_of(plan, tmp_path / "out")
    grid.silent |= {(0, "train"), (3, "train")}
    serve(grid)
    _, history, _ = result_of(tmp_path / "out")
    for line in history:
        assert line["replied"] == ["client-001", "client-002"]
        assert line["refused"] == dict.fromkeys(
            ["client-000", "client-003"], "2 others were faster"
        )


def test_a_reply_that_comes_twice_counts_once(bert: Path, tmp_path: Path) -> None:
    plan = support_plan(bert, schedule="buffered(size=2, concurrency=4)", rounds=3, **LOCAL)
    grid, play = grid_of(plan, tmp_path / "out"), FakeGrid.play

    def twice(message: Message, place: int) -> Message:
        reply = play(grid, message, place)
        if place == 1 and message.metadata.message_type == "train":
            grid.extra.append(deepcopy(reply))
        return reply

    grid.play = twice  # type: ignore[method-assign]
    serve(grid)
    _, history, _ = result_of(tmp_path / "out")
    assert all(len({*line["replied"]}) == len(line["replied"]) == 2 for line in history)
    told = [reason for line in history for reason in line.get("strays", {}).values()]
    assert told
    assert {*told} == {"answers what nobody asked"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"round": 0}, "round 0"), ({"run": "finished"}, "belongs to run finished")],
)
def test_an_answer_to_another_round_or_run_is_refused(
    bert: Path, tmp_path: Path, change: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = support_plan(bert, **{**LOCAL, "adapter": "lora(r=2)"})
    grid = grid_of(plan, tmp_path / "out")
    told_back = client_rounds._told_back

    def lying(got: Any, *rest: Any) -> Any:
        found = told_back(got, *rest)
        if got.round != 1:
            return found
        lied.append(1)
        return {**found, **change} if lied == [1] else found

    lied: list[int] = []
    monkeypatch.setattr(client_rounds, "_told_back", lying)
    serve(grid)
    _, history, _ = result_of(tmp_path / "out")
    (why,) = history[1]["refused"].values()
    assert reason in why
    assert len(history[1]["replied"]) == 3


def test_nodes_leave_and_others_take_their_place(bert: Path, tmp_path: Path) -> None:
    plan = support_plan(bert, rounds=4, holdout=0, evaluate="")
    grid = grid_of(plan, tmp_path / "out")
    left = next(node for node, place in grid.nodes.items() if place == 2)

    def moving(count: int) -> None:
        if count == 4:  # after the first round has been sent
            grid.waiting = {m: w for m, w in grid.waiting.items() if w.metadata.dst_node_id != left}

    before_each_push(grid, moving)
    ids, calls = grid.get_node_ids, [0]

    def coming() -> Iterable[int]:
        rounds = sum(m.metadata.message_type == "train" for m in grid.sent)
        calls[0] += 1
        if rounds >= 4 and left in grid.nodes:
            del grid.nodes[left]
        if rounds >= 7:
            grid.nodes[999] = 2
        return ids()

    grid.get_node_ids = coming  # type: ignore[method-assign]
    grid.config["deadline"] = 0.4
    serve(grid)
    _, history, _ = result_of(tmp_path / "out")
    assert history[0]["asked"] == 4
    assert (history[1]["reachable"], history[1]["asked"]) == (3, 3)
    assert "client-002" not in history[1]["replied"]
    assert history[-1]["reachable"] == 4
    assert "client-002" in history[-1]["replied"]


def test_who_joins_and_plays_nobody_is_in_the_ledger(bert: Path, tmp_path: Path) -> None:
    """A federation grows by nodes that the plan has no client for, or that play another's."""
    plan = support_plan(bert, rounds=3, holdout=0, evaluate="")
    grid = grid_of(plan, tmp_path / "out")
    ids = grid.get_node_ids

    def coming() -> Iterable[int]:
        if sum(m.metadata.message_type == "train" for m in grid.sent) >= 4:
            grid.nodes.update({998: 4, 999: 2})
        return ids()

    grid.get_node_ids = coming  # type: ignore[method-assign]
    serve(grid)
    _, history, _ = result_of(tmp_path / "out")
    assert [len(line["replied"]) for line in history] == [4, 4, 4]
    strays = {name: why for line in history for name, why in line.get("strays", {}).items()}
    assert "as another node did" in strays["node 999"]
    assert strays["node 998"].startswith("plays nobody: ")
    assert len(strays) == 2


def test_when_everybody_has_left_the_run_waits_and_then_ends(bert: Path, tmp_path: Path) -> None:
    plan = support_plan(bert, rounds=4, holdout=0, evaluate="")
    grid = grid_of(plan, tmp_path / "out", wait=0.3)
    ids = grid.get_node_ids

    def leaving() -> Iterable[int]:
        gone = sum(m.metadata.message_type == "train" for m in grid.sent) >= 8
        return [] if gone else ids()

    grid.get_node_ids = leaving  # type: ignore[method-assign]
    with pytest.raises(RunError, match=r"no client was there for 0\.3 seconds"):
        serve(grid)
    done = (tmp_path / "out" / "rounds.jsonl").read_text().splitlines()
    assert len(done) == 2
