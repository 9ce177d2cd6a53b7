"""Adapters of the clients' own: what they become, and that the federation never notices them."""

from __future__ import annotations

import importlib
import io
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from fedpeft import Plan, simulate
from fedpeft.broadcasts import messages
from fedpeft.client_rounds import ALONE, receive
from fedpeft.data._batching import lengths_of, stream
from fedpeft.engine._player import Player
from fedpeft.errors import PlanError
from fedpeft.evaluation import group_evaluation, reported
from fedpeft.grouping import Grouping
from fedpeft.local_models import after_round, for_evaluation
from fedpeft.memory import InProcess, Memory
from fedpeft.plan import _ADDED
from fedpeft.preview import as_text, preview
from fedpeft.rng import derive, derive_seed
from fedpeft.spec import build
from fedpeft.stacking import stack
from fedpeft.tables import Tables
from fedpeft.tensor_file import read_tensor_file
from fedpeft.tensors import narrowed, select
from fedpeft.terminal import show_result
from fedpeft.types import Metrics, Stacked, Tensors
from tests.architectures import checkpoint, fresh_base
from tests.camp import (
    CLASSES,
    CLASSIFY,
    SGD,
    SIZES,
    WIDE,
    Camp,
    Moment,
    apart,
    camp_of,
    first_round,
    passes_of,
    second_round,
    train,
    train_alone,
)
from tests.killing import LINES, Runs
from tests.quadratic import F64, Quadratic, play, quadratic_plan
from tests.test_flower import FakeGrid, config_of, result_of, serve
from tests.test_mixed_ranks import same, untimed
from tests.test_resume import Whole, check_same, killed
from tests.tiny import support_plan

EXACT = 1e-9
LR, STEPS = 0.2, 4
"""Of the local SGD of ``quadratic_plan``."""
MIXED = "r=4, alpha=8, ranks='anna=2,dora=2,ben=3,carl=1,4'"
ADAPTERS = ["r=3, alpha=6", f"{MIXED}, head='local'", "r=3, local='B', head='local', dropout=0.3"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def bowls() -> Quadratic:
    rng = np.random.default_rng(5)
    return Quadratic(rng.uniform(0.5, 2.0, (6, 3)), rng.normal(0, 3, (6, 3)))


def kept_of(memories: InProcess, client: str) -> Tensors:
    """Return the personal adapter that the last version of a memory holds."""
    versions = memories.load(client).versions
    return select(versions[max(versions)], "personal") if versions else {}


# --- Ditto on quadratics -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lines",
    [
        {},
        {"correction": "scaffold", "uplink": "half"},
        {"correction": "fedprox(mu=1.0)", "optimizer": "adam(lr=0.1)"},
        {"cohort": "uniform(size=2)"},
    ],
)
@pytest.mark.parametrize("lam", [0.0, 0.3, 2.0])
def test_ditto_is_what_a_second_implementation_says(
    bowls: Quadratic, lam: float, lines: dict[str, Any]
) -> None:
    plan = quadratic_plan(personal=f"ditto(lam={lam})", **lines)
    memories, count = InProcess(), len(bowls.curves)
    v, w, moved = np.zeros((count, 3)), np.zeros(3), np.zeros(count, int)
    for round, state in enumerate(play(plan, bowls, 6, memories)):
        for i in range(count):
            if state.acks.get(f"client-{i}") == round:
                moved[i] += 1
                for _ in range(STEPS):
                    pull = bowls.curves[i] * (v[i] - bowls.places[i]) + lam * (v[i] - w)
                    v[i] = v[i] - LR * pull
        w = state.params["x"].astype(np.float64)
    assert moved.min() < moved.max() or "cohort" not in lines
    for i in range(count):
        found = kept_of(memories, f"client-{i}").get("x", np.zeros(3))
        np.testing.assert_allclose(found, v[i], rtol=1e-5, atol=1e-5)


def test_its_rate_falls_with_the_rounds(bowls: Quadratic) -> None:
    trainer = f"plain(optimizer='sgd', lr={LR}, steps={STEPS}, batch=1, schedule='linear')"
    plan = quadratic_plan(personal="ditto(lam=0)", trainer=trainer, rounds=6)
    memories, v = InProcess(), np.zeros(3)
    for round, _ in enumerate(play(plan, bowls, 4, memories)):
        for step in range(STEPS):
            rate = LR * (1 - (round + step / STEPS) / 6)
            v = v - rate * bowls.curves[2] * (v - bowls.places[2])
    np.testing.assert_allclose(kept_of(memories, "client-2")["x"], v, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapter", ["r=4, train='B', init='orthonormal'"])
def test_gradients_are_preconditioned_as_the_shared_ones(
    camps: Callable[..., Camp], adapter: str
) -> None:
    plain, through = (
        camps("ditto", adapter, SGD.replace("lr=0.5", f"lr=0.05, precondition={on}"))
        for on in (False, True)
    )
    moment = first_round(plain)
    found = [train(camp, moment, ["anna"]).updates["anna"] for camp in (plain, through)]
    matrices = through.plan.adapter.precondition(through.watched.job.fixed)
    assert matrices
    for name, matrix in matrices.items():
        assert not np.allclose(found[0][name], found[1][name])
        np.testing.assert_allclose(found[1][name], found[0][name] @ matrix[0].numpy(), atol=1e-9)


@pytest.mark.parametrize("lam", [0.0, 0.5, 3.0])
def test_ditto_ends_at_the_optimum_of_its_objective(bowls: Quadratic, lam: float) -> None:
    plan, memories = quadratic_plan(personal=f"ditto(lam={lam})"), InProcess()
    *_, last = play(plan, bowls, 60, memories)
    w = last.params["x"].astype(np.float64)
    optimum: F64 = (bowls.curves * bowls.places + lam * w) / (bowls.curves + lam)
    for i, place in enumerate(optimum):
        np.testing.assert_allclose(kept_of(memories, f"client-{i}")["x"], place, atol=1e-4)
    if lam == 0:
        np.testing.assert_allclose(optimum, bowls.places)


def test_the_shared_state_is_that_without_personal_adapters(bowls: Quadratic) -> None:
    lines = {"correction": "scaffold", "cohort": "uniform(size=3)"}
    expected = list(play(quadratic_plan(**lines), bowls, 5))
    for found, state in zip(
        play(quadratic_plan(personal="ditto(lam=2.0)", **lines), bowls, 5), expected, strict=True
    ):
        assert np.array_equal(found.params["x"], state.params["x"])
        assert found.acks == state.acks


# --- on a model ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Path:
    return checkpoint("bert", tmp_path_factory.mktemp("personal") / "bert", bert)


@pytest.fixture
def camps(folder: Path) -> Iterator[Callable[..., Camp]]:
    """Return a way to set up clients of one BERT in double precision."""
    base = fresh_base(folder, CLASSIFY, CLASSES, double=False)
    base.model.to(torch.float64)
    made: list[Camp] = []

    def make(
        personal: str, adapter: str = ADAPTERS[0], trainer: str = SGD, correction: str = "none"
    ) -> Camp:
        camp = camp_of(base, "bert", trainer, correction, adapter)
        camp.plan = replace(camp.plan, personal=build("personal", personal))
        camp.tables = Tables(camp.plan, camp.tables.shapes)
        made.append(camp)
        return camp

    yield make
    for camp in made:
        camp.spy.detach()


def sgd(
    camp: Camp, client: str, begun: Tensors, shared: Tensors, seed: int, lam: float, lr: float = 0.5
) -> dict[str, np.ndarray]:
    """Train one client by itself, in double precision; return how far it moved.

    ``shared`` is what it is pulled to, for the names that it is pulled in.
    """
    whole = {**camp.initial, **begun}
    trains = camp.tables.trained
    stacked: Stacked = {k: v.double() for k, v in stack([whole], torch.device("cpu")).items()}
    params = {k: v.clone() for k, v in stacked.items() if k in trains}
    fixed = {k: v for k, v in stacked.items() if k not in trains}
    records = camp.records[client]
    batches = stream(lengths_of(records), 2, derive(seed, "order"), math.ceil(len(records) / 2))
    for step, rows in enumerate(batches):
        batch = camp.learner.collate([records[i] for i in rows], [1 / len(rows)] * len(rows))
        masks = [derive_seed(seed, "dropout", step, 0)]
        grads, _ = camp.learner.grads(params, fixed, batch, masks)
        for name, grad in grads.items():
            if name in shared:
                grad = grad + lam * (params[name] - torch.from_numpy(shared[name]).double())
            params[name] = params[name] - lr * grad
    return {k: (v - stacked[k]).numpy()[0] for k, v in params.items()}


def sent_to(camp: Camp, moment: Moment, client: str) -> Tensors:
    (asked,) = moment.asked(camp, [client])
    return receive(camp.plan, camp, asked, training=True).tensors


@pytest.mark.parametrize("adapter", ["r=3, alpha=6, dropout=0.3", *ADAPTERS[2:]])
@pytest.mark.parametrize("correction", ["none", "scaffold"])
def test_ditto_is_its_gradient_and_nothing_else(
    camps: Callable[..., Camp], adapter: str, correction: str
) -> None:
    camp = camps("ditto(lam=0.7)", adapter, correction=correction)
    moment = second_round(camp)
    trained = train(camp, moment, list(SIZES), WIDE)
    down = camp.tables.down(1)["adapter"]
    for client in SIZES:
        begun = select(moment.memories[client].versions[0], "personal")
        assert begun.keys() == camp.tables.trained
        shared = {k: v for k, v in sent_to(camp, moment, client).items() if k in down}
        seed = derive_seed(camp.plan.seed, 1, client, "personal")
        moved = sgd(camp, client, begun, shared, seed, 0.7)
        assert apart(trained.updates[client], moved) < EXACT
        news = select(trained.played[client].memory.versions[1], "personal")
        for name, value in moved.items():
            np.testing.assert_allclose(news[name], begun[name] + value, atol=1e-6)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("trainer", [SGD, "plain(lr=0.05, epochs=1, batch=2, weight_decay=0.1)"])
def test_personal_adapters_are_in_a_group_what_they_are_alone(
    camps: Callable[..., Camp], adapter: str, trainer: str
) -> None:
    camp = camps("ditto(lam=0.7)", adapter, trainer)
    moment = second_round(camp)
    together = train(camp, moment, list(SIZES), WIDE)
    assert together.passes == 2 * passes_of(camp.watched.fitted.steps, 16)  # shared, then personal
    alone = train_alone(camp, moment)
    for client in SIZES:
        assert apart(together.updates[client], alone.updates[client]) < EXACT
        one, other = (t.played[client].memory.versions[1] for t in (together, alone))
        kept = select(one, "personal")
        own = camp.tables.of(client).shapes
        assert {k: v.shape for k, v in kept.items()} == {
            k: own[k] for k in sorted(camp.tables.trained)
        }
        for name, value in kept.items():
            assert value.base is None  # a view would keep the whole group's arrays
            np.testing.assert_allclose(value, select(other, "personal")[name], atol=1e-6)


def test_a_client_of_lower_rank_is_pulled_in_what_it_has(camps: Callable[..., Camp]) -> None:
    camp = camps("ditto(lam=0.7)", MIXED)
    together = train(camp, second_round(camp), list(SIZES), WIDE)
    job = camp.watched.job
    order = sorted(SIZES, key=lambda c: -camp.watched.budget(SIZES[c])[0])
    for name, value in camp.watched.fitted.params.items():
        for k, client in enumerate(order):
            out = value[k].clone()
            out[tuple(map(slice, camp.tables.of(client).shapes[name]))] = 0
            assert not out.any()
            assert (name in job.masks) == ("lora_" in name)
    for client, rank in (("anna", 2), ("carl", 1)):
        narrow = camps("ditto(lam=0.7)", f"r={rank}, alpha={8 * rank / 4!r}")
        narrow.initial = narrowed(camp.initial, narrow.tables.shapes)
        moment = second_round(narrow)
        # only the second round of its own: the federations differ, so the start is taken over
        state = second_round(camp).state
        moment = Moment(
            replace(state, params=narrowed(state.params, narrow.tables.shapes)),
            {client: second_round(camp).memories[client]},
        )
        found = train(narrow, moment, [client]).updates[client]
        expected = narrowed(together.updates[client], narrow.tables.shapes)
        assert apart(found, expected) < EXACT


def test_ranks_that_rest_in_a_round_rest_in_personal_adapters_too(
    camps: Callable[..., Camp],
) -> None:
    camp = camps("ditto(lam=0.7)", "r=4, alpha=8, ranks='1..4'")
    moment = second_round(camp)
    trained = train(camp, moment, list(SIZES), WIDE)
    first = camp.tables.of("anna", 1).shapes
    assert first != camp.tables.shapes
    for client in SIZES:
        begun = select(moment.memories[client].versions[0], "personal")
        after = select(trained.played[client].memory.versions[1], "personal")
        shared = _widened(camp, sent_to(camp, moment, client))
        seed = derive_seed(camp.plan.seed, 1, client, "personal")
        moved = sgd(camp, client, _widened(camp, narrowed(begun, first)), shared, seed, 0.7)
        assert apart(trained.updates[client], moved) < EXACT
        for name, value in begun.items():
            np.testing.assert_allclose(after[name] - value, moved[name], atol=1e-6)
            resting = np.ones(value.shape, bool)
            resting[tuple(map(slice, first[name]))] = False
            assert np.array_equal(after[name][resting], value[resting])


@pytest.mark.parametrize("adapter", ["r=3", "r=3, train='B/A'", "r=3, train='B'"])
def test_with_lam_0_it_is_local_training_and_federation_has_no_part_in_it(
    camps: Callable[..., Camp], adapter: str
) -> None:
    camp = camps("ditto(lam=0)", adapter)
    moment = second_round(camp)
    shaken = Moment(
        replace(
            moment.state, params={k: v + np.float32(1) for k, v in moment.state.params.items()}
        ),
        moment.memories,
    )
    found, other = (train(camp, m, list(SIZES), WIDE) for m in (moment, shaken))
    for client in SIZES:
        begun = select(moment.memories[client].versions[0], "personal")
        seed = derive_seed(camp.plan.seed, 1, client, "personal")
        assert apart(found.updates[client], sgd(camp, client, begun, {}, seed, 0.0)) < EXACT
        own = [select(t.played[client].memory.versions[1], "personal") for t in (found, other)]
        assert same(*own)


def test_before_its_first_round_a_client_has_the_adapter_of_round_0(
    camps: Callable[..., Camp],
) -> None:
    camp = camps("ditto", MIXED)
    moment = second_round(camp)
    asked = moment.asked(camp, ["anna"])
    asked[0] = replace(asked[0], message=first_round(camp).asked(camp, ["anna"])[0].message)
    got = [receive(camp.plan, camp, replace(a, memory=Memory()), training=False) for a in asked]
    (own,) = for_evaluation(camp.plan, camp, ["anna"], got, ALONE)
    assert same(own, camp.tables.of("anna").part(camp.initial))


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("spec", ["tuned", "tuned(steps=3, lr=0.1)"])
def test_tuning_starts_from_what_was_sent_and_keeps_nothing(
    camps: Callable[..., Camp], adapter: str, spec: str
) -> None:
    camp = camps(spec, adapter)
    moment = second_round(camp)
    assert not any("personal" in k for m in moment.memories.values() for k in _names(m))
    asked = moment.asked(camp, list(SIZES))
    got = [receive(camp.plan, camp, a, training=False) for a in asked]
    together = for_evaluation(camp.plan, camp, list(SIZES), got, WIDE)
    for k, client in enumerate(SIZES):
        (alone,) = for_evaluation(camp.plan, camp, [client], got[k : k + 1], ALONE)
        assert alone.keys() == together[k].keys() == camp.tables.shapes.keys()
        for name, value in alone.items():
            np.testing.assert_allclose(value, together[k][name], atol=1e-6)
            moved = name in camp.tables.trained
            assert moved != np.array_equal(value, got[k].tensors[name])
        if spec == "tuned" and "ranks" not in adapter:
            seed = derive_seed(camp.plan.seed, 1, client, "personal")
            expected = sgd(camp, client, got[k].tensors, {}, seed, 0.0)
            for name, step in expected.items():
                np.testing.assert_allclose(alone[name], got[k].tensors[name] + step, atol=1e-6)
    assert after_round(camp.plan, camp, list(SIZES), got, ALONE, lambda _: None) == 5 * [{}]


def _names(memory: Memory) -> list[str]:
    return [name for tensors in memory.versions.values() for name in tensors]


@pytest.mark.parametrize("personal", ["ditto(lam=0.7)", "tuned(steps=3, lr=0.1)"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_both_are_evaluated_on_the_held_out_records(
    camps: Callable[..., Camp], personal: str, adapter: str
) -> None:
    camp = camps(personal, adapter)
    moment = second_round(camp)
    asked, held = moment.asked(camp, list(SIZES)), [camp.held(c) for c in SIZES]
    plain = replace(camp.plan, personal=build("personal", "none"))
    shared = group_evaluation(plain, camp, asked, held)
    for grouping in (ALONE, WIDE):
        found = group_evaluation(camp.plan, camp, asked, held, grouping)
        for k, client in enumerate(SIZES):
            main = {n: v for n, v in found[k].items() if not n.startswith("personal/")}
            assert main == pytest.approx(shared[k], rel=1e-6)
            got = receive(camp.plan, camp, asked[k], training=False)
            own = for_evaluation(camp.plan, camp, [client], [got], ALONE)
            whole = _widened(camp, own[0])
            (expected,) = camp.learner.evaluate([whole], [held[k]])
            for name, value in expected.items():
                assert found[k][f"personal/{name}"] == pytest.approx(value, rel=1e-5)
            assert found[k]["personal/loss"] != found[k]["loss"]


def _widened(camp: Camp, own: Tensors) -> Tensors:
    """Return the adapter with zeros where a client of lower rank has nothing."""
    wide = {k: np.zeros(s, np.float32) for k, s in camp.tables.shapes.items()}
    for name, value in own.items():
        wide[name][tuple(map(slice, value.shape))] = value
    return wide


def player_of(camp: Any, width: int) -> Player:
    return Player(camp, InProcess(), Grouping(width), camp.warnings.append)


def test_tuning_that_does_not_fit_halves_the_group(camps: Callable[..., Camp]) -> None:
    camp = camps("tuned")
    moment = second_round(camp)
    requests = list(messages(camp.plan, camp.tables, moment.state, "run", list(SIZES)))
    expected = dict(player_of(camp, 1).evaluate(requests))
    camp.spy.most = 2
    found = dict(player_of(camp, 4).evaluate(requests))
    told = camp.warnings
    assert told == ["a group does not fit into memory; going on with group=2"]
    for client, metrics in expected.items():
        assert found[client] == pytest.approx(metrics, rel=1e-5)


@pytest.mark.parametrize("personal", ["ditto", "tuned"])
def test_those_who_hold_adapters_of_their_own_are_evaluated_window_by_window(
    camps: Callable[..., Camp], personal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = list[int]()

    def watched(plan: Any, site: Any, asked: Any, held: Any, grouping: Any) -> Any:
        sizes.append(len(asked))
        return [{}] * len(asked)

    camp = camps(personal)
    monkeypatch.setattr("fedpeft.engine._player._WAITING", 0)
    monkeypatch.setattr(
        "fedpeft.engine._player.group_evaluation",
        watched,
    )
    requests = list(messages(camp.plan, camp.tables, first_round(camp).state, "run", list(SIZES)))
    for width, expected in ((2, [2, 2, 1]), (1, [1] * 5)):
        sizes.clear()
        list(player_of(camp, width).evaluate(requests))
        assert sizes == expected


# --- what is reported ----------------------------------------------------------------------------


def _answers(plan: Plan, **personal: float) -> list[tuple[str, Metrics | Exception]]:
    main = dict.fromkeys(plan.task.measures, 0.5)
    own = {f"personal/{k}": 0.25 for k in main}
    return [
        ("b", {**main, **own}),
        ("a", {**main, **own, **{f"personal/{k}": v for k, v in personal.items()}}),
        ("c", RuntimeError("no room")),
        ("d", main),
    ]


def test_the_ledger_has_both_and_says_who_has_none() -> None:
    plan = quadratic_plan(personal="ditto")
    found = reported(plan, _answers(plan, loss=0.75))
    main = dict.fromkeys(plan.task.measures, 0.5)
    assert found["per_client"] == {"a": main, "b": main}
    assert list(found["per_client"]) == ["a", "b"]
    assert found["clients/loss"] == 0.5
    assert found["personal/loss"] == 0.5
    assert found["personal/loss_worst_decile"] == 0.75
    assert found["personal_per_client"]["b"] == dict.fromkeys(plan.task.measures, 0.25)
    assert sorted(found["not_evaluated"]) == ["c", "d"]
    diverged = reported(plan, _answers(plan, loss=math.nan))
    assert list(diverged["per_client"]) == ["a", "b"]
    assert list(diverged["personal_per_client"]) == ["b"]
    assert diverged["personal/loss"] == 0.25
    assert "personal adapter are not finite" in diverged["not_evaluated"]["a"]
    plain = reported(quadratic_plan(), _answers(plan))
    assert not any("personal" in name for name in plain)
    assert list(plain["per_client"]) == ["d"]
    assert sorted(plain["not_evaluated"]) == ["a", "b", "c"]


def test_a_personal_adapter_that_diverges_harms_nobody_else(bert: Path) -> None:
    lines: dict[str, Any] = {"holdout": 0.2, "trainer": "plain(optimizer='sgd', lr=0.1, steps=4)"}
    expected = simulate(support_plan(bert, **lines))
    found = simulate(support_plan(bert, personal="tuned(lr=1e30, steps=4)", **lines))
    assert same(found.tensors, expected.tensors)
    line = found.history[-1]
    assert line["clients/loss"] == expected.history[-1]["clients/loss"]
    assert line["personal_per_client"] == {}
    assert set(line["not_evaluated"]) == set(line["per_client"])


# --- whole runs ----------------------------------------------------------------------------------

RUNS: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "scaffold, local head": {k: LINES[k] for k in ("adapter", "trainer", "correction")},
    "mixed ranks": {"adapter": "lora(r=4, alpha=8, ranks='2,3,4')", "aggregator": "flexlora"},
    "by turns": {"adapter": "lora(r=4, train='B/A')", "uplink": "half", "downlink": "half"},
    "core": {"adapter": "core(r=2, heads=2, scales='trained')"},
    "sent once": {"adapter": "core(r=2, init='svd')"},
    "ranks that rest": {"adapter": "lora(r=4, ranks='1..4')"},
    "whole model": {"adapter": "full", "trainer": "plain(optimizer='sgd', lr=0.1, steps=2)"},
}


@pytest.mark.parametrize("name", RUNS)
def test_nothing_of_the_federation_changes_by_a_bit(bert: Path, name: str) -> None:
    lines = {**RUNS[name], "rounds": 3, "cohort": "uniform(size=3)", "holdout": 0.2}
    expected = simulate(support_plan(bert, **lines))
    for personal in ("ditto(lam=0.5)", "tuned(steps=2)"):
        found = simulate(support_plan(bert, personal=personal, **lines))
        assert same(found.tensors, expected.tensors)
        for line, other in zip(untimed(found.history), untimed(expected.history), strict=True):
            assert {k: v for k, v in line.items() if "personal" not in k} == other
            assert line["personal_per_client"].keys() == line["per_client"].keys()
            assert line["personal/loss"] != line["clients/loss"]
        assert found.table["up_bytes"] == expected.table["up_bytes"]


def test_a_client_that_was_never_asked_is_scored_with_its_start(bert: Path) -> None:
    lines: dict[str, Any] = {"holdout": 0.2, "rounds": 1, "personal": "ditto(lam=0)"}
    found = simulate(support_plan(bert, cohort="uniform(size=2)", **lines)).history[0]
    idle = simulate(support_plan(bert, cohort="poisson(rate=0.000001)", **lines)).history[0]
    assert idle["personal_per_client"] == idle["per_client"]
    for client, metrics in found["personal_per_client"].items():
        assert (metrics == idle["per_client"][client]) == (client not in found["replied"])


@pytest.mark.parametrize("personal", ["ditto", "tuned(steps=3)"])
def test_engines_agree_bit_for_bit_and_groups_by_rounding(bert: Path, personal: str) -> None:
    plan = support_plan(bert, personal=personal, adapter="lora(r=4, head='local')", holdout=0.2)
    alone = simulate(plan)
    for workers in (1, 2):
        found = simulate(plan, engine=f"processes(workers={workers}, threads=1)")
        assert untimed(found.history) == untimed(alone.history)
    for engine in ("inline(group=4)", "processes(workers=2, threads=1, group=2)"):
        line, other = simulate(plan, engine=engine).history[-1], alone.history[-1]
        assert line["personal/loss"] == pytest.approx(other["personal/loss"], abs=1e-4)


@pytest.mark.parametrize("other", [{"optimizer": "sgd(lr=0.1)"}, {"aggregator": "fedex"}])
def test_with_lam_0_only_what_the_client_does_counts(bert: Path, other: dict[str, Any]) -> None:
    lines: dict[str, Any] = {"personal": "ditto(lam=0.0)", "holdout": 0.2, "rounds": 3}
    one, two = (simulate(support_plan(bert, **lines, **more)).history for more in ({}, other))
    assert [a["personal_per_client"] for a in one] == [b["personal_per_client"] for b in two]
    assert one[-1]["per_client"] != two[-1]["per_client"]


def test_a_large_lam_keeps_the_personal_adapter_at_the_shared_one(bert: Path) -> None:
    lines: dict[str, Any] = {
        "trainer": "plain(optimizer='sgd', lr=0.01, steps=20, batch=4)",
        "holdout": 0.2,
    }

    def gap(lam: float) -> float:
        line = simulate(support_plan(bert, personal=f"ditto(lam={lam})", **lines)).history[-1]
        return abs(float(line["personal/loss"]) - float(line["clients/loss"]))

    assert gap(50.0) < 0.5 * gap(0.0)


# --- killed, resumed, deployed -------------------------------------------------------------------

PERSONAL: dict[str, Any] = {"personal": "ditto(lam=0.5)", "keep_best": "none", "compare": ""}


@pytest.mark.parametrize("fault", ["memory.renamed:5", "checkpoint.half:2", "memory.begun:8"])
def test_killed_and_resumed_is_the_same(runs: Runs, tmp_path: Path, fault: str) -> None:
    whole = Whole(tmp_path / "whole", runs(tmp_path / "whole", **PERSONAL))
    assert (whole.ended.signal, whole.ended.error) == (0, "")
    kept = [read_tensor_file(path, "")[0] for path in (tmp_path / "whole" / "memory").iterdir()]
    assert all(any("/personal/" in name for name in tensors) for tensors in kept)
    killed(runs, tmp_path / "run", fault, **PERSONAL)
    check_same(tmp_path / "run", whole, runs(tmp_path / "run", resume=True, **PERSONAL))


def test_a_run_killed_before_its_last_evaluation_tunes_again(runs: Runs, tmp_path: Path) -> None:
    lines = {**PERSONAL, "personal": "tuned(steps=2)"}
    whole = Whole(tmp_path / "whole", runs(tmp_path / "whole", **lines))
    ended = runs(tmp_path / "run", fault="checkpoint.begun:3", **lines)
    assert ended.signal == signal.SIGKILL
    check_same(tmp_path / "run", whole, runs(tmp_path / "run", resume=True, **lines))


def test_what_a_client_keeps_never_leaves_it(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDPEFT_HOME", str(tmp_path / "home"))
    plan = support_plan(bert, personal="ditto", holdout=0.2)
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out")), nodes=2)
    serve(grid)
    expected = simulate(support_plan(bert, holdout=0.2)).table
    _, _, table = result_of(tmp_path / "out")
    for name in ("up_bytes", "down_bytes", "eval_bytes"):
        assert table[name] == expected[name]
    kept = list((tmp_path / "home" / "clients").glob("*/*.safetensors"))
    assert len(kept) == plan.clients


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ({"holdout": 0}, r"personal: ditto is evaluated on .* set holdout above 0"),
        ({"evaluate": "test"}, r"personal: ditto is evaluated on .* have evaluate name clients"),
        ({"evaluate": ""}, "personal: ditto is evaluated"),
        ({"keep_best": "personal/loss"}, r"keep_best: 'personal/loss' is of adapters that stay"),
        ({"adapter": "lora(train='B', send='both')"}, r"personal: ditto does not fit adapter: "),
        (
            {"adapter": "lora(fresh='client')", "aggregator": "stack"},
            "personal: ditto does not fit aggregator: part of what clients share goes into",
        ),
        ({"personal": "ditto(lam=-1)"}, "personal: ditto: lam=-1 must be at least 0"),
        ({"personal": "dito"}, "personal: there is no personal method 'dito'; did you mean 'dit"),
        ({"personal": "tuned(steps=0)"}, "personal: tuned: steps=0 must be at least 1"),
    ],
)
def test_plans_that_make_no_sense_are_refused(lines: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        quadratic_plan(**{"personal": "ditto", **lines})


@pytest.mark.parametrize("personal", ["tuned", "ditto(lam=0)"])
@pytest.mark.parametrize(
    "lines",
    [
        {"adapter": "lora(r=2, train='B', send='both')", "aggregator": "fedsvd"},
        {"adapter": "lora(r=2, fresh='client')", "aggregator": "stack"},
        {"adapter": "lora(r=2)", "aggregator": "fedex"},
        {"adapter": "lora(r=2, train='B', send='both')", "aggregator": "fedask(width=4)"},
    ],
)
def test_what_only_a_pull_refuses_the_others_take(
    bert: Path, personal: str, lines: dict[str, Any]
) -> None:
    expected = simulate(support_plan(bert, holdout=0.2, **lines))
    found = simulate(support_plan(bert, personal=personal, holdout=0.2, **lines))
    assert same(found.tensors, expected.tensors)
    line = found.history[-1]
    assert line["clients/loss"] == expected.history[-1]["clients/loss"]
    assert line["personal/loss"] != line["clients/loss"]


def test_clients_without_held_out_records_are_refused_before_the_model_loads(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("fedpeft.site.load_base", never)
    with pytest.raises(PlanError, match="personal: no client has held-out records"):
        simulate(support_plan(bert, personal="tuned", partition="iid", clients=120))


def test_the_digest_of_plans_without_is_what_it_was() -> None:
    assert "personal" in _ADDED
    plan, other = quadratic_plan(), quadratic_plan(personal="ditto")
    assert plan.lines()["personal"] == "none"
    assert "personal" not in plan.identity()
    assert other.identity() == {**plan.identity(), "personal": "ditto(lam=0.1)"}
    assert plan.digest() != other.digest()
    old = {k: v for k, v in plan.lines().items() if k != "personal"}
    assert Plan.from_lines(old) == plan


# --- what is told --------------------------------------------------------------------------------


def test_the_preview_counts_work_and_memory(bert: Path) -> None:
    lines: dict[str, Any] = {"trainer": "plain(epochs=1, batch=4)", "holdout": 0.2}
    plain, ditto, tuned = (
        preview(support_plan(bert, personal=p, **lines))
        for p in ("none", "ditto", "tuned(steps=5)")
    )
    local = plain["local"]
    assert plain["personal"] == {"when": "never"}
    assert ditto["personal"] == {
        "when": "rounds",
        **{k: local[k] for k in ("steps_least", "steps_most")},
    }
    assert tuned["personal"] == {"when": "evaluation", "steps_least": 5, "steps_most": 5}
    assert ditto["local"] == tuned["local"] == local
    assert ditto["bytes"] == tuned["bytes"] == plain["bytes"]
    trained = 4 * plain["parameters"]["trained"]
    kept = [found["memory"]["personal_bytes"] for found in (plain, ditto, tuned)]
    assert kept == [0, trained, 0]
    more = ditto["memory"]["client_state_bytes"] - plain["memory"]["client_state_bytes"]
    assert more == 2 * trained
    least, most = local["steps_least"], local["steps_most"]
    assert f"per round, and {least} to {most} for a personal one, clients" in as_text(ditto)
    assert "kept by a client" in as_text(ditto)
    assert "and 5 to 5 for a personal one before each evaluation" in as_text(tuned)
    assert "personal one" not in as_text(plain)
    assert "kept by" not in as_text(plain)


def test_ledger_table_board_and_terminal_show_both(bert: Path, tmp_path: Path) -> None:
    events = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    plan = support_plan(bert, personal="ditto", holdout=0.2)
    result = simulate(plan, out=tmp_path / "run")
    last = result.history[-1]
    assert result.table["last"]["personal/loss"] == last["personal/loss"]
    board = events.EventAccumulator(str(tmp_path / "run")).Reload()
    (_, event) = board.Scalars("personal/loss")
    assert event.value == pytest.approx(last["personal/loss"])
    console = Console(width=200, record=True, file=io.StringIO())
    show_result(console, result)
    text = console.export_text()
    for name, whose in (("clients", ""), ("personal", ", personal adapters")):
        accuracy = f"accuracy {last[f'{name}/accuracy']:.4f}"
        assert f"held-out records of the clients{whose}: {accuracy}" in text
