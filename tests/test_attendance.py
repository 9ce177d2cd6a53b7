"""Clients that are away, and clients that drop out, in whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft import simulate
from fedpeft.attendance import Attendance
from fedpeft.cohorts.uniform import Uniform
from fedpeft.driver import plan_digest
from fedpeft.errors import PlanError
from fedpeft.federation import deal
from fedpeft.flower.config import read_config, run_config
from fedpeft.plan import Plan
from fedpeft.preview import as_text, preview
from fedpeft.rng import derive
from fedpeft.types import Tensors
from tests.tiny import support_plan


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


SOME = "bernoulli(rates='same', mean=0.5)"


CLIENTS = [f"client-{i:03d}" for i in range(4)]


def attendance(plan: Plan) -> Attendance:
    return Attendance(plan, deal(plan).crowd(plan.seed))


def lost_of(plan: Plan, round: int) -> list[str]:
    return [c for c in CLIENTS if attendance(plan).drops_out(c, round)]


def test_the_label_mix_is_that_of_the_training_records(bert: Path) -> None:
    federation = deal(support_plan(bert, holdout=0.3, clients=6))
    crowd = federation.crowd(0)
    assert crowd.names == tuple(sorted(federation.train))
    for name, found in zip(crowd.names, crowd.mix, strict=True):
        labels = [federation.splits.train[i]["label"] for i in federation.train[name]]
        expected = [labels.count(c) / len(labels) for c in federation.classes]
        np.testing.assert_allclose(found, expected, atol=1e-15)


def test_a_task_without_labels_has_no_mix_and_refuses_rates_by_labels(llama: Path) -> None:
    lines: dict[str, Any] = {"task": "causal_lm(max_length=24)", "partition": "iid"}
    assert deal(support_plan(llama, **lines)).crowd(0).mix.shape == (4, 0)
    with pytest.raises(PlanError, match="availability: bernoulli makes rates from labels"):
        support_plan(llama, **lines, availability="bernoulli")


def test_only_those_within_reach_are_asked_and_the_ledger_says_how_many(bert: Path) -> None:
    plan = support_plan(bert, availability=SOME, rounds=6)
    found = simulate(plan).history
    for line in found:
        there = attendance(plan).reachable(line["round"])
        coins = derive(0, "availability", line["round"]).random(4) < 0.5
        assert there == [f"client-{i:03d}" for i in np.flatnonzero(coins)]
        assert line["replied"] == there
        assert line["reachable"] == line["asked"] == len(there)
    assert len({line["asked"] for line in found}) > 1


def test_a_round_in_which_nobody_is_there_is_a_zero_step(bert: Path, tmp_path: Path) -> None:
    spans = "".join(f"client-{i:03d},{s},{s + 1}\n" for i in range(4) for s in (0, 2))
    path = tmp_path / "gap.csv"
    path.write_text("client,start,end\n" + spans)
    spec = f"trace(file={str(path)!r})"
    plan = support_plan(bert, availability=spec, rounds=3, optimizer="sgd(momentum=0)")
    whole = simulate(plan)
    assert [line["reachable"] for line in whole.history] == [4, 0, 4]
    gap = whole.history[1]
    assert (gap["replied"], gap["up_bytes"], gap["down_bytes"]) == ([], 0, 0)
    assert gap["test/loss"] == whole.history[0]["test/loss"]


def test_dropouts_are_missing_replies(bert: Path) -> None:
    plan = support_plan(bert, availability="always(dropout=0.5)", rounds=5)
    found = simulate(plan).history
    for line in found:
        lost = lost_of(plan, line["round"])
        assert line["asked"] == line["reachable"] == 4
        assert {*line["replied"]} == {*CLIENTS} - {*lost}
        assert line.get("refused", {}) == dict.fromkeys(lost, "no reply")
    assert 0 < sum(len(line["replied"]) for line in found) < 20


def test_who_drops_out_counts_in_the_denominator(bert: Path) -> None:
    """The step is that of the others, smaller by the share of records that is missing."""
    lines: dict[str, Any] = {"rounds": 1, "weighting": "uniform", "partition": "iid"}
    plan = support_plan(bert, availability="always(dropout=0.5)", **lines)
    lost = lost_of(plan, 0)
    assert 0 < len(lost) < 4
    with_lost = simulate(plan)
    path = bert.parent / "others.csv"
    rates = "".join(f"client-{i:03d},{int(f'client-{i:03d}' not in lost)}\n" for i in range(4))
    path.write_text("client,rate\n" + rates)
    there = f"bernoulli(rates='table', file={str(path)!r})"
    without = simulate(support_plan(bert, availability=there, **lines))
    never = f"bernoulli(rates='table', file={str(path)!r}, dropout=0.999999)"
    start = simulate(support_plan(bert, availability=never, **lines))
    assert start.history[0]["replied"] == []
    share = (4 - len(lost)) / 4
    for name, first in start.tensors.items():
        step, whole = with_lost.tensors[name] - first, without.tensors[name] - first
        np.testing.assert_allclose(step, share * whole, atol=1e-6)


@pytest.mark.parametrize("spec", ["markov(mean=0.5, dropout=0.2)", "cyclic(mean=0.5, length=4)"])
def test_a_run_that_stops_goes_on_with_the_same_clients(
    bert: Path, tmp_path: Path, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = support_plan(bert, availability=spec, rounds=6)
    whole = simulate(plan)
    real = Attendance.reachable

    def stops(self: Attendance, round: int) -> Any:
        if round == 4:
            raise KeyboardInterrupt
        return real(self, round)

    monkeypatch.setattr(Attendance, "reachable", stops)
    with pytest.raises(KeyboardInterrupt):
        simulate(plan, out=tmp_path / "run")
    monkeypatch.undo()
    found = simulate(plan, out=tmp_path / "run", resume=True)
    assert same(found.tensors, whole.tensors)
    assert [x["replied"] for x in found.history] == [x["replied"] for x in whole.history]


def test_groups_and_processes_meet_the_same_clients(bert: Path) -> None:
    plan = support_plan(bert, availability="markov(mean=0.5, dropout=0.2)", rounds=4)
    one, grouped, apart = (
        simulate(plan, engine=engine)
        for engine in ("inline", "inline(group=4)", "processes(workers=2, threads=1)")
    )
    replied = [line["replied"] for line in one.history]
    assert [line["replied"] for line in grouped.history] == replied
    assert [line["replied"] for line in apart.history] == replied
    assert same(apart.tensors, one.tensors)


# --- cohorts -------------------------------------------------------------------------------------


def test_a_cohort_of_fixed_size_takes_those_that_are_there() -> None:
    cohort, rng = Uniform(size=3), np.random.default_rng(0)
    assert cohort.choose(["a", "b"], rng) == ["a", "b"]
    assert cohort.choose([], rng) == []
    assert len(cohort.choose(["a", "b", "c", "d"], rng)) == 3


def test_more_than_there_are_is_refused_before_the_run(bert: Path) -> None:
    with pytest.raises(PlanError, match=r"uniform\(size=5\) asks more clients than the 4 there"):
        simulate(support_plan(bert, cohort="uniform(size=5)"))


@pytest.mark.parametrize(
    ("cohort", "expected"),
    [
        ("everyone", 2.0),
        ("poisson(rate=0.5)", 1.0),
        ("uniform(size=1)", 1.0),
        ("uniform(size=3)", 2),
    ],
)
def test_the_expected_cohort_is_of_those_within_reach(
    bert: Path, cohort: str, expected: float
) -> None:
    plan = support_plan(bert, availability=SOME, cohort=cohort)
    assert attendance(plan).expected == pytest.approx(expected)
    assert attendance(support_plan(bert)).expected == 4
    found = preview(plan)
    assert found["cohort"] == pytest.approx(expected)
    assert "4, 2 of them within reach on average" in as_text(found)
    assert "within reach" not in as_text(preview(support_plan(bert)))


@pytest.mark.parametrize("cohort", ["everyone", "poisson(rate=0.4)", "uniform(size=2)"])
@pytest.mark.parametrize("spec", ["always(", "bernoulli(rates='independent', mean=0.6, "])
def test_participation_is_how_often_clients_reply(bert: Path, cohort: str, spec: str) -> None:
    found = attendance(support_plan(bert, availability=f"{spec}dropout=0)", cohort=cohort))
    plan = support_plan(bert, availability=f"{spec}dropout=0.25)", cohort=cohort)
    dropping, rounds = attendance(plan), 4000
    counts = dict.fromkeys(CLIENTS, 0)
    for round in range(rounds):
        names = dropping.reachable(round)
        for client in plan.cohort.choose(names, derive(0, round, "cohort")):
            counts[client] += not dropping.drops_out(client, round)
    rough = 0.1 if spec != "always(" and cohort.startswith("uniform") else 0.0
    for client in CLIENTS:
        assert dropping.participation[client] == pytest.approx(0.75 * found.participation[client])
        apart = abs(counts[client] / rounds - dropping.participation[client])
        assert apart < rough + 5 * (0.25 / rounds) ** 0.5


def test_dropouts_are_not_counted_as_uplink(bert: Path) -> None:
    plain, dropping = (
        preview(support_plan(bert, availability=spec))["bytes"]
        for spec in ("always", "always(dropout=0.25)")
    )
    assert dropping["up_per_round"] == round(0.75 * plain["up_per_round"])
    assert dropping["down_per_round"] == plain["down_per_round"]


# --- the line of the plan ------------------------------------------------------------------------


def test_real_machines_refuse_it_with_the_remedy(bert: Path) -> None:
    plan = support_plan(bert, availability="cyclic")
    message = r"availability: cyclic is for simulations.*say availability: always, or use"
    with pytest.raises(PlanError, match=message):
        run_config(plan)
    config = {**run_config(support_plan(bert)), "availability": "cyclic"}
    with pytest.raises(PlanError, match=message):
        read_config(config)


def test_plans_without_the_line_are_what_they_were(bert: Path) -> None:
    plan = support_plan(bert)
    assert plan.lines()["availability"] == "always(dropout=0.0)"
    assert "availability" not in plan.identity()
    assert "availability" in support_plan(bert, availability="always(dropout=0.1)").identity()


def test_the_content_of_a_table_is_part_of_the_run(bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "rates.csv"
    plan = support_plan(bert, availability=f"bernoulli(rates='table', file={str(path)!r})")
    found = []
    for rate in (0.5, 0.6):
        path.write_text("client,rate\n" + "".join(f"client-{i:03d},{rate}\n" for i in range(4)))
        found.append(plan_digest(plan))
    assert found[0] != found[1]


def test_a_table_that_does_not_fit_is_refused_before_the_run(bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "rates.csv"
    path.write_text("client,rate\nclient-000,1\n")
    plan = support_plan(bert, availability=f"bernoulli(rates='table', file={str(path)!r})")
    with pytest.raises(PlanError, match=r"availability: .*no row for 3 of 4 clients"):
        simulate(plan)
