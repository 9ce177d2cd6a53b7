"""How long simulated clients take, and the clock of whole runs."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft import simulate
from fedpeft.driver import plan_digest
from fedpeft.errors import PlanError
from fedpeft.flower.config import run_config
from fedpeft.preview import preview
from fedpeft.rng import derive
from fedpeft.spec import build
from fedpeft.types import Crowd, Latency
from tests.killing import Ended, Runs
from tests.test_resume import content
from tests.tiny import support_plan

ASYNCHRONOUS: dict[str, Any] = {
    "schedule": "buffered(size=2, concurrency=3, max_staleness=2)",
    "latency": "lognormal(slow=0.3, factor=5)",
    "correction": "none",
    "cohort": "everyone",
    "rounds": 6,
    "compare": "",
}


def crowd(clients: int, labels: int = 3, seed: int = 0) -> Crowd:
    mix = np.random.default_rng(1).dirichlet(np.full(labels, 0.3), clients)
    return Crowd([f"c{i:03d}" for i in range(clients)], mix, seed)


def drawn(latency: Latency, speed: float = 1.0, count: int = 4000) -> np.ndarray:
    return np.array([latency.seconds(speed, derive(0, i)) for i in range(count)])


def test_times_are_log_normal() -> None:
    latency = build("latency", "lognormal(median=60, sigma=0.5)")
    logs = np.log(drawn(latency, 2.0))
    assert np.mean(logs) == pytest.approx(np.log(120), abs=4 * 0.5 / np.sqrt(4000))
    assert np.std(logs) == pytest.approx(0.5, rel=0.05)
    exact = build("latency", "lognormal(median=60, sigma=0)")
    assert {*drawn(exact, 3.0, 5)} == {180.0}
    assert {*drawn(build("latency", "none"), 3.0, 5)} == {0.0}


def test_a_share_of_the_clients_is_slow_all_run() -> None:
    latency = build("latency", "lognormal(slow=0.25, factor=8)")
    speeds = latency.speeds(crowd(40))
    assert sorted(speeds) == [1.0] * 30 + [8.0] * 10
    assert np.array_equal(latency.speeds(crowd(40)), speeds)
    assert not np.array_equal(latency.speeds(crowd(40, seed=1)), speeds)
    several = build("latency", "lognormal(devices=0.4)").speeds(crowd(4000))
    assert np.std(np.log(several)) == pytest.approx(0.4, rel=0.05)


def test_stragglers_may_hold_most_of_the_rarest_label() -> None:
    latency = build("latency", "lognormal(slow=0.25, stragglers='rarest')")
    found = crowd(40)
    mix = np.concatenate([found.mix * 0.9, np.zeros((40, 1))], 1)  # a label that nobody has
    mix[:5, 1] += 0.1
    speeds = latency.speeds(Crowd(found.names, mix, 0))
    rarest = np.argmin(mix[:, :3].sum(0))
    assert mix[speeds > 1, rarest].min() >= mix[speeds == 1, rarest].max()
    assert np.sum(speeds > 1) == 10
    with pytest.raises(PlanError, match="needs labels"):
        latency.speeds(Crowd(found.names, np.zeros((40, 0)), 0))


def test_the_line_is_for_simulations_and_no_part_of_older_plans(bert: Path) -> None:
    plain = support_plan(bert)
    assert plan_digest(plain) == plan_digest(support_plan(bert, latency="none", schedule="sync"))
    assert not {"schedule", "latency"} & {*plain.identity()}
    with pytest.raises(PlanError, match="latency: lognormal is for simulations"):
        run_config(support_plan(bert, latency="lognormal"))
    with pytest.raises(PlanError, match="stragglers='drawn'"):
        support_plan(bert, task="causal_lm", latency="lognormal(slow=0.1, stragglers='rarest')")


def test_the_clock_stands_beside_the_rounds(bert: Path) -> None:
    lines = {"latency": "lognormal(median=60, sigma=0, slow=0.25, factor=10)", "rounds": 3}
    sync = simulate(support_plan(bert, **lines)).history
    short = simulate(support_plan(bert, schedule="sync(deadline=90)", **lines)).history
    assert [line["clock"] for line in sync] == [600.0, 1200.0, 1800.0]
    assert [line["clock"] for line in short] == [90.0, 180.0, 270.0]
    assert [len(line["refused"]) for line in short] == [1, 1, 1]
    assert all("clock" not in line for line in simulate(support_plan(bert, rounds=1)).history)


def test_clients_that_share_passes_are_the_same_to_rounding(bert: Path) -> None:
    plan = support_plan(bert, **ASYNCHRONOUS)
    alone, grouped = simulate(plan), simulate(plan, engine="inline(group=4)")
    for one, other in zip(alone.history, grouped.history, strict=True):
        for name in ("replied", "asked", "clock", "staleness"):
            assert one[name] == other[name]
    for name, value in alone.tensors.items():
        np.testing.assert_allclose(grouped.tensors[name], value, atol=2e-5)


def test_the_preview_counts_who_is_asked_and_who_replies(bert: Path) -> None:
    def found(**lines: str) -> tuple[float, float, float]:
        said = preview(support_plan(bert, cohort=lines.pop("cohort", "uniform(size=2)"), **lines))
        sizes = said["bytes"]
        down, up = (
            sizes[f"{way}_per_round"] / sizes[f"{way}_per_client"] for way in ("down", "up")
        )
        return said["cohort"], round(down, 3), round(up, 3)

    assert found() == (2, 2, 2)
    assert found(schedule="sync(over=1.5)") == (3, 3, 2)
    assert found(schedule="sync(over=5)") == (4, 4, 2)
    assert found(schedule="buffered(size=3)", cohort="everyone") == (3, 3, 3)


@pytest.fixture(scope="module")
def whole(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    path = tmp_path_factory.mktemp("whole") / "run"
    ended = runs(path, **ASYNCHRONOUS)
    assert (ended.signal, ended.error) == (0, "")
    return path, ended


FAULTS = ("memory.renamed:3", "checkpoint.half:2", "checkpoint.settled:3", "ledger.half:4")


@pytest.mark.parametrize("fault", FAULTS)
def test_what_was_under_way_outlives_a_kill(
    runs: Runs, whole: tuple[Path, Ended], tmp_path: Path, fault: str
) -> None:
    path = tmp_path / "run"
    killed = runs(path, fault=fault, **ASYNCHRONOUS)
    assert killed.signal == signal.SIGKILL
    ended = runs(path, resume=True, **ASYNCHRONOUS)
    assert (ended.error, ended.tensors) == ("", whole[1].tensors)

    def ledger(folder: Path) -> list[dict[str, Any]]:
        lines = [json.loads(text) for text in (folder / "rounds.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if "seconds" not in k} for line in lines]

    assert ledger(path) == ledger(whole[0])
    assert any("1" in line["staleness"] for line in ledger(path))
    for name, data in content(whole[0]).items():
        if name.startswith(("memory/", "adapter/adapter_model")):
            assert content(path)[name] == data, name
