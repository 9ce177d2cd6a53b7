"""``simulations/_study``: what is kept of a run, and intervals of paired differences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from fedpeft import simulate
from fedpeft.federation import Federation, deal
from fedpeft.preflight import check
from fedpeft.spec import build
from fedpeft.types import Splits
from simulations._study import interval, runs, summary
from simulations._study.clock import Clock
from tests.tiny import support_plan


@pytest.mark.parametrize(
    ("degrees", "wanted"), [(1, 12.706205), (2, 4.302653), (4, 2.776445), (30, 2.042272)]
)
def test_widths_are_those_of_tables(degrees: int, wanted: float) -> None:
    differences = list(np.random.default_rng(0).normal(0.3, 1, degrees + 1))
    found, error = interval.paired(differences), np.std(differences, ddof=1) / (degrees + 1) ** 0.5
    assert (found.high - found.mean) / error == pytest.approx(wanted, abs=1e-6)


def test_intervals_are_those_of_a_paired_test() -> None:
    rng = np.random.default_rng(0)
    for count in range(2, 12):
        for level in (0.5, 0.95, 0.999):
            left, right = rng.normal(0.3, 1, count), rng.normal(0, 1, count)
            wanted = stats.ttest_rel(left, right).confidence_interval(level)
            found = interval.paired(list(left - right), level)
            assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), rel=1e-9)
            assert found.mean == pytest.approx((left - right).mean())


def test_verdicts() -> None:
    assert interval.Interval(1.0, -0.1, 2.1).verdict == "no difference"
    assert interval.Interval(1.0, 0.1, 1.9).verdict == "higher"
    assert interval.Interval(-1.0, -1.9, -0.1).verdict == "lower"
    with pytest.raises(ValueError, match="1 paired differences"):
        interval.paired([0.3])


def test_held_out_records_are_pooled_over_clients() -> None:
    splits = Splits(train=[{}] * 10, test=[], fingerprint="")
    held = {"a": np.arange(1), "b": np.arange(1, 4)}
    federation = Federation(splits, (), {"a": np.arange(4, 6), "b": np.arange(6, 10)}, held)
    per_client = {"a": {"accuracy": 1.0, "loss": 2.0}, "b": {"accuracy": 1 / 3, "loss": 0.4}}
    last = {"round": 3, "test/accuracy": 0.5, "per_client": per_client, "up_bytes": 7}
    found = runs.metrics(last, federation)
    assert found == {"held/accuracy": 0.5, "held/loss": 0.8, "test/accuracy": 0.5}


def test_the_majority_of_a_client_is_what_it_trains_on(bert: Path) -> None:
    plan = support_plan(bert)
    dealt = deal(plan)
    labels = [str(label) for label in plan.task.labels(dealt.splits.train) or []]
    right = sum(
        labels[i] == max(sorted(own := [labels[j] for j in dealt.train[c]]), key=own.count)
        for c in dealt.held
        for i in dealt.held[c]
    )
    total = sum(map(len, dealt.held.values()))
    found = runs.majority(plan, dealt)
    tests = [str(label) for label in plan.task.labels(dealt.splits.test or []) or []]
    assert found["test"] == round(max(map(tests.count, tests)) / len(tests), 6)
    assert found["held"] == pytest.approx(right / total, abs=0.11)  # ties may go either way


def test_the_clock_changes_nothing(bert: Path) -> None:
    plan = support_plan(bert, rounds=3)
    clock = Clock(build("engine", "inline(group=2)"))
    timed = simulate(plan, engine=clock, watch=clock)
    plain = simulate(plan, engine="inline(group=2)")
    for name, value in plain.tensors.items():
        np.testing.assert_array_equal(timed.tensors[name], value)
    seconds = sum(line["seconds"] for line in timed.history)
    assert 0 < (clock.per_round() or 0) < seconds


def test_texts_have_no_accuracy() -> None:
    splits = Splits(train=[{}] * 4, test=[], fingerprint="")
    rows = {"a": np.arange(1), "b": np.arange(1, 4)}
    per_client = {"a": {"loss": 2.0, "perplexity": 7.4}, "b": {"loss": 0.4, "perplexity": 1.5}}
    last = {"clients/perplexity": 4.4, "per_client": per_client}
    found = runs.metrics(last, Federation(splits, (), rows, rows))
    assert found == {"held/loss": 0.8, "clients/perplexity": 4.4}


def test_what_is_kept_of_a_run(bert: Path) -> None:
    plan = support_plan(bert, rounds=2, cohort="everyone")
    found = runs.play(plan, 0.01, 2)
    values = sum(int(np.prod(shape)) for shape in check(plan).shapes.values())
    clients = len(deal(plan).train)
    assert found["float32_bytes"] == 4 * values * clients * 2
    assert found["float32_bytes"] < found["up_bytes"] < found["float32_bytes"] + 2000 * clients * 2
    assert (found["rounds"], found["seed"], found["lr"], found["refused"]) == (
        2,
        plan.seed,
        0.01,
        0,
    )
    assert 0 <= found["metrics"]["held/accuracy"] <= 1
    assert {"held", "test"} == {*found["majority"]}


def test_spreads() -> None:
    assert summary.spread([]) == ""
    assert summary.spread([1.25]) == "1.2"
    assert summary.spread([1.0, 2.0, 3.0], 2) == "2.00 ± 1.00"
