"""What a run of real machines was, computed again in simulation: the same adapter, to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, RecordDict
from typer.testing import CliRunner

from fedpeft.cli import app
from fedpeft.driver import simulate
from fedpeft.errors import RunError
from fedpeft.export import read_tensors
from fedpeft.flower.messages import packet_record
from fedpeft.plan import Plan
from fedpeft.replay import Record, replay, threads_of
from tests.test_flower import SGD, FakeGrid, config_of, result_of, serve
from tests.test_flower_late import before_each_push
from tests.tiny import support_plan

pytestmark = pytest.mark.usefixtures("apart")
SCAFFOLD = {"correction": "scaffold", "trainer": SGD, "rounds": 4, "holdout": 0, "evaluate": "test"}


def failing(grid: FakeGrid) -> None:
    """One client fails in the second round alone."""

    def act(count: int) -> None:
        grid.broken = {(2, "train"): MemoryError("no room")} if 4 < count <= 8 else {}

    before_each_push(grid, act)


def silent(grid: FakeGrid) -> None:
    """One client does not answer in the first two rounds."""
    grid.silent = {(1, "train")}

    def act(count: int) -> None:
        if count == 9:
            grid.silent.clear()

    before_each_push(grid, act)


def rubbish(grid: FakeGrid) -> None:
    """One client answers with bytes that are no packet, after it has trained."""
    play = grid.play

    def playing(message: Message, place: int) -> Message:
        reply, kind = play(message, place), message.metadata.message_type
        if kind != "train" or place != 3 or 8 <= len(grid.sent) <= 12:
            return reply
        content: RecordDict = packet_record(b"rubbish")
        return Message(content, reply_to=message)

    grid.play = playing  # type: ignore[method-assign]


def slow(grid: FakeGrid) -> None:
    """One client takes several steps of the others for its first round."""

    def act(count: int) -> None:
        if count == 1:
            grid.slow[2] = 4

    before_each_push(grid, act)


def away(grid: FakeGrid) -> None:
    """One client is not there in the second round."""
    everybody, asked = dict(grid.nodes), [0]
    before_each_push(grid, lambda count: asked.__setitem__(0, count))

    def there() -> list[int]:
        return [node for node, place in everybody.items() if place or not 4 <= asked[0] < 7]

    grid.get_node_ids = there  # type: ignore[method-assign]


def played(plan: Plan, out: Path, trouble: Callable[[FakeGrid], None], **settings: Any) -> FakeGrid:
    grid = FakeGrid(config_of(plan, out=str(out), **settings), nodes=plan.clients or 0)
    trouble(grid)
    serve(grid)
    return grid


@pytest.mark.parametrize(
    ("lines", "trouble", "settings"),
    [
        (SCAFFOLD, failing, {}),
        (SCAFFOLD, silent, {"deadline": 0.3}),
        (SCAFFOLD, rubbish, {}),
        (SCAFFOLD, away, {}),
        ({"schedule": "buffered(size=2, concurrency=4)", "rounds": 8, "holdout": 0}, slow, {}),
        ({"aggregator": "fedask", "adapter": "lora(r=2, alpha=4)", "rounds": 3}, failing, {}),
        ({"weighting": "fedvarp", "rounds": 4, "holdout": 0}, failing, {}),
        ({"adapter": "lora(r=2, alpha=4, head='local')", "rounds": 4}, failing, {}),
    ],
    ids=["failing", "silent", "rubbish", "away", "slow", "fedask", "fedvarp", "local-head"],
)
def test_a_replay_has_the_adapter_of_the_run(
    bert: Path,
    tmp_path: Path,
    lines: dict[str, Any],
    trouble: Callable[[FakeGrid], None],
    settings: dict[str, Any],
) -> None:
    plan = support_plan(bert, **lines)
    played(plan, tmp_path / "run", trouble, **settings)
    found = replay(tmp_path / "run", plan, out=tmp_path / "again")
    assert found.differ == {}
    _, then, _ = result_of(tmp_path / "run")
    _, now, _ = result_of(tmp_path / "again")
    assert [line["replied"] for line in now] == [line["replied"] for line in then]
    assert any(
        line.get("refused") or line["reachable"] < 4 or {*line.get("staleness", "0")} != {"0"}
        for line in then
    )
    simulate(plan, out=tmp_path / "untroubled", engine="inline(group=1)")
    untroubled, run = (read_tensors(tmp_path / n / "adapter") for n in ("untroubled", "run"))
    assert any(untroubled[k].tobytes() != run[k].tobytes() for k in run)  # the trouble counted


def test_a_run_that_was_killed_is_replayed_as_it_went_on(bert: Path, tmp_path: Path) -> None:
    plan = support_plan(bert, schedule="buffered(size=2, concurrency=4)", rounds=6, holdout=0)
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "run")), nodes=4)

    def killed(count: int) -> None:
        if count == 9:
            raise KeyboardInterrupt

    before_each_push(grid, killed)
    with pytest.raises(KeyboardInterrupt):
        serve(grid)
    again = FakeGrid(config_of(plan, out=str(tmp_path / "run"), resume=True), nodes=4)
    slow(again)
    serve(again)
    assert replay(tmp_path / "run", plan, out=tmp_path / "again").differ == {}


def test_a_round_that_was_cut_short_is_in_the_record_once(bert: Path, tmp_path: Path) -> None:
    """Killed between the record and the checkpoint of a round: it is played, and told, anew."""
    plan = support_plan(bert, **SCAFFOLD)
    played(plan, tmp_path / "whole", failing)
    lines = (tmp_path / "whole" / "course.jsonl").read_text().splitlines(keepends=True)
    for torn, end in ((lines[2], 9), (lines[2][:9], 9), (lines[0][:9], 1)):
        out = tmp_path / f"torn-{len(torn)}-{end}"
        short = FakeGrid(config_of(plan, out=str(out)), nodes=4)

        def killed(count: int, end: int = end) -> None:
            if count == end:
                raise KeyboardInterrupt

        before_each_push(short, killed)
        with pytest.raises(KeyboardInterrupt):
            serve(short)
        with (out / "course.jsonl").open("a") as file:
            file.write(torn)
        played(plan, out, lambda _: None, resume=True)
        assert [course["round"] for course in Record.of(out).courses] == [0, 1, 2, 3]
        assert replay(out, plan, out=out.with_name(f"{out.name}-again")).differ == {}


def test_a_replay_of_another_plan_is_told_apart(bert: Path, tmp_path: Path) -> None:
    plan = support_plan(bert, **SCAFFOLD)
    played(plan, tmp_path / "run", failing)
    other = support_plan(bert, **{**SCAFFOLD, "seed": 5})
    found = replay(tmp_path / "run", other, out=tmp_path / "seed")
    assert found.differ
    assert min(found.differ.values()) > 0
    fewer = support_plan(bert, **{**SCAFFOLD, "cohort": "uniform(size=2)"})
    with pytest.raises(RunError, match=r"round|another plan"):
        replay(
            tmp_path / "run", support_plan(bert, **{**SCAFFOLD, "rounds": 5}), out=tmp_path / "l"
        )
    assert replay(tmp_path / "run", fewer, out=tmp_path / "fewer").differ


def test_what_has_no_record_is_refused(bert: Path, tmp_path: Path) -> None:
    plan = support_plan(bert, rounds=1, holdout=0)
    simulate(plan, out=tmp_path / "simulated")
    with pytest.raises(RunError, match="was simulated, or hides who took part"):
        replay(tmp_path / "simulated", plan, out=tmp_path / "again")
    with pytest.raises(RunError, match="give a run folder"):
        replay(tmp_path, plan, out=tmp_path / "again")
    (tmp_path / "simulated" / "result.json").unlink()
    with pytest.raises(RunError, match="has not finished"):
        replay(tmp_path / "simulated", plan, out=tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "line",
    ['{"round": 0}', '{"round": 0, "began": 1.0, "away": [], "came": [[1]]}', '{"round": 3}'],
)
def test_a_damaged_record_is_refused(bert: Path, tmp_path: Path, line: str) -> None:
    plan = support_plan(bert, rounds=1, holdout=0)
    played(plan, tmp_path / "run", lambda _: None)
    (tmp_path / "run" / "course.jsonl").write_text(line + "\n")
    with pytest.raises(RunError, match=r"course\.jsonl: is not that of its 1 rounds"):
        replay(tmp_path / "run", plan, out=tmp_path / "again")


def test_a_private_run_tells_nobody_who_came(bert: Path, tmp_path: Path) -> None:
    lines = {"privacy": "user(noise_multiplier=1.0, clip=0.5)", "holdout": 0, "evaluate": "test"}
    even = {"weighting": "uniform(denominator='expected')", "cohort": "poisson(rate=0.5)"}
    plan = support_plan(bert, rounds=1, **lines, **even)
    played(plan, tmp_path / "run", lambda _: None)
    assert not (tmp_path / "run" / "course.jsonl").exists()
    with pytest.raises(RunError, match="hides who took part"):
        replay(tmp_path / "run", plan, out=tmp_path / "again")


def test_the_command_says_whether_the_adapter_is_the_same(bert: Path, tmp_path: Path) -> None:
    plan = support_plan(bert, **SCAFFOLD)
    run = tmp_path / "run"
    played(plan, run, failing)
    found = CliRunner().invoke(app, ["replay", str(run)])
    assert found.exit_code == 0, found.output
    assert f"{run}: the same adapter, bit for bit" in found.output.replace("\n", " ")
    assert json.loads((tmp_path / "run-replayed" / "versions.json").read_text())["threads"] == (
        threads_of(run)
    )
    other = ["replay", str(run), "seed=9", "--out", str(tmp_path / "other")]
    found = CliRunner().invoke(app, other)
    assert found.exit_code == 1
    assert "tensors differ, most" in found.output
