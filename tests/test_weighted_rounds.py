"""Whole algorithms over many rounds in which clients come and go, beside float64 arithmetic."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fedpeft.diagnostics import weighted
from fedpeft.driver import simulate
from fedpeft.errors import PlanError
from fedpeft.last_updates import LastUpdates, Recall
from fedpeft.memory import InProcess, OnDisk
from fedpeft.preview import as_text, preview
from fedpeft.state import ServerState
from fedpeft.types import Tensors, Update, Weights
from fedpeft.watching import Quiet
from fedpeft.weighing import SPACES
from tests.quadratic import F64, Quadratic, play, quadratic_plan
from tests.tiny import support_plan

ROUNDS, CLIENTS, WIDTH, LR = 60, 7, 3, 0.05
RNG = np.random.default_rng(3)
CURVES = RNG.uniform(0.5, 3, (CLIENTS, WIDTH))
PLACES = RNG.normal(size=(CLIENTS, WIDTH))
TRACE = RNG.random((ROUNDS, CLIENTS)) < np.array([0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05])
"""Who replies in which round: the last client comes late and rarely."""
COPIES = (1, 2, 3, 4, 5, 6, 7)
NAMES = [f"client-{i}" for i in range(CLIENTS)]


@dataclass
class Server:
    """What an oracle has of a round: the updates [N, d] of all, and who was asked and replied."""

    asked: np.ndarray
    replied: np.ndarray
    state: dict[str, Any] = field(default_factory=dict)

    def step(self, deltas: F64, weights: F64, denominator: float) -> F64:
        counted = np.where(self.replied, weights, 0.0)
        found: F64 = (counted[:, None] * deltas).sum(0) / (denominator or 1)
        return found


def examples(at: Server, deltas: F64, copies: F64) -> F64:
    return at.step(deltas, copies, copies[at.asked].sum())


def uniform(at: Server, deltas: F64, copies: F64) -> F64:
    return at.step(deltas, np.ones(CLIENTS), at.asked.sum())


def fedau(cutoff: int) -> Callable[..., F64]:
    def rule(at: Server, deltas: F64, copies: F64) -> F64:
        lists = at.state.setdefault("lists", [[] for _ in range(CLIENTS)])
        waited = at.state.setdefault("waited", [0] * CLIENTS)
        weights = np.array([np.mean(own) if own else 1.0 for own in lists])
        for i in range(CLIENTS):
            waited[i] += 1
            if at.replied[i] or waited[i] == cutoff:
                lists[i].append(waited[i])
                waited[i] = 0
        return at.step(deltas, weights, CLIENTS)

    return rule


def known(at: Server, deltas: F64, copies: F64) -> F64:
    return at.step(deltas, 1 / np.array([0.9, *[0.5] * (CLIENTS - 1)]), CLIENTS)


def mifa(at: Server, deltas: F64, copies: F64) -> F64:
    last = at.state.setdefault("last", np.zeros_like(deltas))
    last[at.replied] = deltas[at.replied]
    found: F64 = last.mean(0)
    return found


def fedvarp(at: Server, deltas: F64, copies: F64) -> F64:
    last = at.state.setdefault("last", np.zeros_like(deltas))
    found: F64 = at.step(deltas - last, np.ones(CLIENTS), at.asked.sum()) + last.mean(0)
    last[at.replied] = deltas[at.replied]
    return found


RULES: Mapping[str, Callable[..., F64]] = {
    "examples": examples,
    "uniform": uniform,
    "fedau(cutoff=None)": fedau(10**9),
    "fedau(cutoff=4)": fedau(4),
    "known(rates='client-0=0.9, 0.5')": known,
    "mifa": mifa,
    "fedvarp": fedvarp,
}


def moved(x: F64, copies: Sequence[int]) -> F64:
    """Return how far each client goes from ``x``, one step of gradient descent per copy."""
    shrunk = (1 - LR * CURVES) ** np.array(copies)[:, None]
    found: F64 = (shrunk - 1) * (x - PLACES)
    return found


def plan_of(weighting: str, **lines: Any) -> Any:
    trainer = f"plain(optimizer='sgd', lr={LR}, epochs=1, batch=1)"
    return quadratic_plan(**{"weighting": weighting, "trainer": trainer, **lines})


def learner() -> Quadratic:
    return Quadratic(CURVES, PLACES)


def replying(round: int, name: str) -> bool:
    return bool(TRACE[round, NAMES.index(name)])


@pytest.mark.parametrize("cohort", ["everyone", "poisson(rate=0.5)"])
@pytest.mark.parametrize("weighting", RULES)
def test_whole_runs_are_those_of_the_rules(weighting: str, cohort: str) -> None:
    plan = plan_of(weighting, cohort=cohort)
    asked: list[np.ndarray] = []

    def answers(round: int, name: str) -> bool:
        while len(asked) <= round:
            asked.append(np.zeros(CLIENTS, bool))
        asked[round][NAMES.index(name)] = True
        return replying(round, name)

    states = list(play(plan, learner(), ROUNDS, copies=COPIES, replying=answers))
    asked += [np.zeros(CLIENTS, bool)] * (ROUNDS - len(asked))
    x, memory = np.zeros(WIDTH), dict[str, Any]()
    for round, state in enumerate(states):
        at = Server(asked[round], asked[round] & TRACE[round], memory)
        x = x + RULES[weighting](at, moved(x, COPIES), np.array(COPIES, float))
        np.testing.assert_allclose(state.params["x"], x, rtol=2e-5, atol=2e-6)
    assert np.abs(x).max() > 0.1


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("weighting", ["mifa", "fedvarp"])
def test_last_updates_count_at_the_present_rate(weighting: str, schedule: str) -> None:
    """They are divided by the rate of their round, and count times that of the present one."""
    trainer = f"plain(optimizer='sgd', lr={LR}, epochs=1, batch=1, schedule='{schedule}')"
    plan = plan_of(weighting, trainer=trainer)
    states = list(play(plan, learner(), ROUNDS, copies=COPIES, replying=replying))

    def rate(at: float) -> float:
        share = {"linear": 1 - at, "cosine": (1 + np.cos(np.pi * at)) / 2}[schedule]
        return float(LR * share)

    x, kept = np.zeros(WIDTH), np.zeros((CLIENTS, WIDTH))
    for round, state in enumerate(states):
        deltas = np.zeros((CLIENTS, WIDTH))
        for i, steps in enumerate(COPIES):
            y = x.copy()
            for step in range(steps):
                y -= rate((round + step / steps) / plan.rounds) * CURVES[i] * (y - PLACES[i])
            deltas[i] = y - x
        now, here = rate((round + 0.5) / plan.rounds), TRACE[round]
        before = kept.copy()
        kept[here] = deltas[here] / now
        if weighting == "mifa":
            x = x + now * kept.mean(0)
        else:
            x = x + (deltas - now * before)[here].sum(0) / CLIENTS + now * before.mean(0)
        np.testing.assert_allclose(state.params["x"], x, rtol=2e-5, atol=2e-6)
    assert np.abs(x).max() > 0.1


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fednova_ends_where_equal_steps_would_and_fedavg_does_not(momentum: float) -> None:
    """Its fixed point is that of ``sum n_i d_i``: the normalised updates of all clients."""
    trainer = f"plain(optimizer='sgd', lr=0.01, epochs=1, batch=1, momentum={momentum})"
    plan = quadratic_plan(weighting="fednova", trainer=trainer)
    *_, last = play(plan, learner(), 300, copies=COPIES)
    steps = np.array(COPIES)
    x, effort = np.zeros(WIDTH), np.zeros(CLIENTS)
    for i, count in enumerate(steps):  # |a|_1 by its definition: of each gradient, how often
        effort[i] = sum(sum(momentum**j for j in range(count - k)) for k in range(count))
    for _ in range(300):
        deltas = np.zeros((CLIENTS, WIDTH))
        for i, count in enumerate(steps):
            y, speed = x.copy(), np.zeros(WIDTH)
            for _ in range(count):
                speed = momentum * speed + CURVES[i] * (y - PLACES[i])
                y -= 0.01 * speed
            deltas[i] = y - x
        share = steps / steps.sum()
        x = x + (share @ effort) * (share / effort) @ deltas
    np.testing.assert_allclose(last.params["x"], x, rtol=1e-4, atol=1e-5)
    best = (steps[:, None] * CURVES * PLACES).sum(0) / (steps[:, None] * CURVES).sum(0)
    *_, plain = play(quadratic_plan(trainer=trainer), learner(), 300, copies=COPIES)
    off, far = (float(np.abs(s.params["x"] - best).max()) for s in (last, plain))
    assert off < 0.3 * far


def test_known_takes_the_rates_of_a_simulation() -> None:
    rates = dict(zip(NAMES, np.linspace(0.2, 0.8, CLIENTS).tolist(), strict=True))
    table = ", ".join(f"{name}={rate}" for name, rate in rates.items())
    told = play(plan_of("known"), learner(), 5, replying=replying, rates=rates)
    named = play(plan_of(f"known(rates={table!r})"), learner(), 5, replying=replying, rates={})
    for one, other in zip(told, named, strict=True):
        assert one.params["x"].tobytes() == other.params["x"].tobytes()
    with pytest.raises(PlanError, match=r"known has no rate of client 'client-0'.*use fedau"):
        next(play(plan_of("known"), learner(), 1, rates={}))


def test_a_simulation_tells_how_often_its_clients_take_part(bert: Path, tmp_path: Path) -> None:
    there = "bernoulli(rates='same', mean=0.5, dropout=0.2)"
    plan = support_plan(bert, weighting="known", availability=there, rounds=4)
    lines = [line for line in simulate(plan).history if line["replied"]]
    assert lines
    for line in lines:
        assert line["weight_least"] == pytest.approx(1 / (0.5 * 0.8) / 4)
    with pytest.raises(PlanError, match=r"known has no rate of client 'client-00[1-3]'"):
        simulate(support_plan(bert, weighting="known(rates='client-000=0.5')"))
    table = tmp_path / "rates.csv"
    rows = "".join(f"client-00{i},{i / 4}\n" for i in range(4))
    table.write_text(f"client,rate\n{rows}", encoding="utf-8")
    there = f"bernoulli(rates='table', file={str(table)!r})"
    with pytest.raises(PlanError, match=r"client 'client-000' never takes part"):
        simulate(support_plan(bert, weighting="known", availability=there))


# --- resuming -----------------------------------------------------------------------------------


def assert_same(one: ServerState, other: ServerState) -> None:
    pairs: list[tuple[Tensors, Tensors]] = [
        (one.params, other.params),
        (one.learned.scalars, other.learned.scalars),
        (one.last.total, other.last.total),
    ]
    for a, b in pairs:
        assert {k: v.tobytes() for k, v in a.items()} == {k: v.tobytes() for k, v in b.items()}
    assert one.learned.clients == other.learned.clients
    assert one.last.clients == other.last.clients


@pytest.mark.parametrize("weighting", ["fedau(cutoff=4)", "mifa", "fedvarp"])
def test_a_run_that_is_resumed_is_the_run_that_never_stopped(
    weighting: str, tmp_path: Path
) -> None:
    plan, how = plan_of(weighting), dict[str, Any](copies=COPIES, replying=replying)
    *_, whole = play(plan, learner(), 30, store=OnDisk(tmp_path / "whole"), **how)
    store = OnDisk(tmp_path / "updates")
    for state in play(plan, learner(), 17, store=store, **how):
        save_checkpoint(tmp_path / "states", Checkpoint(state), "d")
    newest = load_checkpoint(tmp_path / "states", "d")
    assert newest is not None
    assert_same(newest.state, state)
    (tmp_path / "states" / "state-000017.safetensors").unlink()  # updates of round 16 are there
    before = load_checkpoint(tmp_path / "states", "d")
    assert before is not None
    assert before.state.round == 16
    *_, resumed = play(plan, learner(), 30, store=store, state=before.state, **how)
    assert_same(resumed, whole)


class _Stopped(Exception):
    pass


class _Stops(Quiet):
    """Ends the run after its third round."""

    def round(self, line: Mapping[str, Any]) -> None:
        if line["round"] == 2:
            raise _Stopped


@pytest.mark.parametrize("weighting", ["fedau(cutoff=2)", "fedvarp"])
def test_a_run_folder_holds_what_a_weighting_needs(
    bert: Path, weighting: str, tmp_path: Path
) -> None:
    plan = support_plan(bert, weighting=weighting, cohort="uniform(size=2)", rounds=5)
    whole = simulate(plan, out=tmp_path / "whole")
    with pytest.raises(_Stopped):
        simulate(plan, out=tmp_path / "run", watch=_Stops())
    (tmp_path / "run/checkpoints/state-000003.safetensors").unlink()
    found = simulate(plan, out=tmp_path / "run", resume=True)
    assert {k: v.tobytes() for k, v in found.tensors.items()} == {
        k: v.tobytes() for k, v in whole.tensors.items()
    }
    kept = {p.name for p in (tmp_path / "run/updates").glob("*")}
    assert len(kept) == (whole.history[-1]["participants"] if weighting == "fedvarp" else 0)
    first = whole.history[0]
    assert first["weight_sum"] == pytest.approx({"fedvarp": 1.0}.get(weighting, 0.5))
    assert first["weight_least"] == first["weight_most"] == first["weight_sum"] / 2


def test_the_preview_says_what_weights_act_on_and_what_is_kept(bert: Path) -> None:
    for adapter, aggregator, expected in [
        ("lora(r=4, train='B')", "mean", "exact"),
        ("lora(r=4)", "mean", "factor"),
        ("lora(r=4)", "flexlora", "product"),
        ("lora(r=4, fresh='client')", "stack", "product"),
        ("full", "mean", "exact"),
    ]:
        plan = support_plan(bert, weighting="fedau", adapter=adapter, aggregator=aggregator)
        found = preview(plan)
        assert found["weights"] == {"space": expected}
        assert found["memory"]["last_updates_bytes"] == 0
        assert re.search(f"weights act on +{re.escape(SPACES[expected])}", as_text(found))
    found = preview(support_plan(bert, weighting="mifa", adapter="lora(r=4, train='B')"))
    travelling = found["parameters"]["travelling"]
    assert found["memory"]["last_updates_bytes"] == 2 * 4 * found["clients"] * travelling
    assert "last updates of all clients, on disk" in as_text(found)


def test_the_ledger_has_shares_of_the_denominator() -> None:
    weights = Weights({"a": 2.0, "b": 6.0, "c": 1.0}, 10.0)
    found = weighted(weights, ["a", "b"])
    assert found == {"weight_least": 0.2, "weight_most": 0.6, "weight_sum": 0.8}
    assert weighted(weights, []) == {"weight_sum": 0.0}


# --- last updates -------------------------------------------------------------------------------


def told(round: int, held: LastUpdates, store: InProcess, **values: float) -> LastUpdates:
    """Play a round in which clients send these values; the population is a, b and c."""
    recall = Recall(held, store, round, ["a", "b", "c"])
    updates = (Update(k, {"x": np.full(2, v, np.float32)}, 1.0, 1.0) for k, v in values.items())
    moving: Tensors = {"x": np.zeros(2, np.float32)}
    list(recall.changes(updates, moving, Weights(dict.fromkeys(values, 1.0), 3.0)))
    return recall.held


def test_who_leaves_is_forgotten_and_who_comes_back_begins_anew() -> None:
    store = InProcess()
    held = told(0, LastUpdates(), store, a=1.0, b=2.0)
    assert held.total["x"].tolist() == [3, 3]
    recall = Recall(held, store, 1, ["b", "c"])
    (mean,) = recall.changes([], {"x": np.zeros(2, np.float32)}, Weights({}, 5.0))
    assert (mean.delta["x"].tolist(), mean.weight) == ([1.0, 1.0], 5.0)
    assert recall.held.clients == ("b",)
    back = told(2, recall.held, store, a=7.0)
    assert (back.clients, back.total["x"].tolist()) == (("b", "a"), [9, 9])


def test_what_a_given_up_course_kept_does_not_count() -> None:
    store = InProcess()
    first = told(0, LastUpdates(), store, a=1.0)
    second = told(1, first, store, a=5.0)
    again = told(1, first, store, a=5.0)  # from the checkpoint before
    assert again.total["x"].tolist() == second.total["x"].tolist() == [5, 5]
    third = told(2, again, store, a=6.0)
    assert third.total["x"].tolist() == [6, 6]
    assert sorted(store.load("a").versions) == [1, 2]


def test_a_tensor_that_rests_in_a_round_keeps_its_last_update() -> None:
    store, weights = InProcess(), Weights({"a": 1.0}, 2.0)
    held = LastUpdates()
    for round, name in enumerate(["x", "y", "x"]):
        recall = Recall(held, store, round, ["a", "b"])
        moving: Tensors = {name: np.zeros(1, np.float32)}
        update = Update("a", {name: np.full(1, round + 1.0, np.float32)}, 1.0, 1.0)
        found = list(recall.changes([update], moving, weights))
        assert all([*u.delta] == [name] for u in found)
        held = recall.held
    assert {k: v.tolist() for k, v in held.total.items()} == {"x": [3.0], "y": [2.0]}
    assert found[0].delta["x"].tolist() == [0.5]
    assert found[1].delta["x"].tolist() == [2.0]


def test_without_a_place_for_last_updates_there_is_no_round() -> None:
    from fedpeft.rounds import server_round
    from fedpeft.state import start
    from fedpeft.tables import Tables

    plan = plan_of("mifa")
    tables = Tables(plan, {"x": (2,)})
    state = start(plan, tables, {"x": np.zeros(2, np.float32)})
    with pytest.raises(PlanError, match="no place to keep them"):
        server_round(plan, tables, state, "run", {"a": 1}, Weights({"a": 1.0}, 1.0), [])
