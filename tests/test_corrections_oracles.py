"""Every correction against its algorithm written out in float64, on quadratics with noise.

Several rounds, a few of several clients, in groups and one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from fedpeft.data._batching import stream
from fedpeft.errors import PlanError
from fedpeft.rng import derive, derive_seed
from simulations.quadratics.bowls import F64, Bowls, bowls
from simulations.quadratics.rounds import after, plan, play, tail

CLIENTS, WIDTH, RECORDS, STEPS, LR, ROUNDS = 5, 3, 6, 4, 0.05, 7


@dataclass(frozen=True)
class World:
    """A federation and who takes part in each round; ``x`` starts at zero."""

    made: Bowls
    cohorts: Sequence[Sequence[int]]

    def batches(self, round: int, i: int) -> list[int]:
        """Return which record each step takes: the data's order is no part of an algorithm."""
        seed = derive_seed(0, round, self.made.clients[i], "train")
        order = stream([1] * RECORDS, 1, derive(seed, "order"), STEPS)
        return [int(chosen[0]) for chosen in order]

    def gradient(self, i: int, w: F64, record: int) -> F64:
        found: F64 = self.made.curves[i] @ (w - self.made.places[i, record])
        return found

    def mean_gradient(self, i: int, w: F64) -> F64:
        found: F64 = np.mean([self.gradient(i, w, r) for r in range(RECORDS)], axis=0)
        return found


@pytest.fixture(scope="module")
def world() -> World:
    rng = np.random.default_rng(3)
    made = bowls(clients=CLIENTS, width=WIDTH, noise=1.0, records=RECORDS, seed=4)
    sizes = [3, 2, 3, 1, 2, 3, 5]
    return World(made, [sorted(rng.choice(CLIENTS, n, replace=False).tolist()) for n in sizes])


Rule = Callable[[World], list[F64]]
ZERO = np.zeros(WIDTH)


def fedavg_m(world: World, beta: float = 0.3) -> list[F64]:
    x, g, found = ZERO, ZERO, []
    for r, cohort in enumerate(world.cohorts):
        ends = []
        for i in cohort:
            y = x
            for s in world.batches(r, i):
                y = y - LR * (beta * world.gradient(i, y, s) + (1 - beta) * g)
            ends.append(y)
        g = np.mean([(x - y) / (LR * STEPS) for y in ends], axis=0)
        x = np.mean(ends, axis=0)
        found.append(x)
    return found


def fedcm(world: World, alpha: float = 0.3, server_lr: float = 0.5) -> list[F64]:
    """FedCM by its own paper: momentum on the way down, a server step of ``lr K server_lr``."""
    x, momentum, found = ZERO, ZERO, []
    for r, cohort in enumerate(world.cohorts):
        moved = []
        for i in cohort:
            y = x
            for s in world.batches(r, i):
                y = y - LR * (alpha * world.gradient(i, y, s) + (1 - alpha) * momentum)
            moved.append(y - x)
        momentum = -sum(moved, ZERO) / (LR * STEPS * len(cohort))
        x = x - server_lr * LR * STEPS * momentum
        found.append(x)
    return found


def fedavg_m_vr(world: World, beta: float = 0.3) -> list[F64]:
    x, before, g, found = ZERO, ZERO, ZERO, []
    for r, cohort in enumerate(world.cohorts):
        ends = []
        for i in cohort:
            y = x
            for s in world.batches(r, i):
                d = world.gradient(i, y, s)
                if r > 0:
                    d = d + (1 - beta) * (g - world.gradient(i, before, s))
                y = y - LR * d
            ends.append(y)
        g = np.mean([(x - y) / (LR * STEPS) for y in ends], axis=0)
        before, x = x, np.mean(ends, axis=0)
        found.append(x)
    return found


def scaffold_i(world: World) -> list[F64]:
    x, c, own, found = ZERO, ZERO, np.zeros((CLIENTS, WIDTH)), []
    for r, cohort in enumerate(world.cohorts):
        ends, new = [], own.copy()
        for i in cohort:
            y = x
            for s in world.batches(r, i):
                y = y - LR * (world.gradient(i, y, s) - own[i] + c)
            ends.append(y)
            new[i] = world.mean_gradient(i, x)
        c = c + (new - own).sum(0) / CLIENTS
        own, x = new, np.mean(ends, axis=0)
        found.append(x)
    return found


def scaffold_m(world: World, beta: float = 0.3) -> list[F64]:
    x, c, g, own, found = ZERO, ZERO, ZERO, np.zeros((CLIENTS, WIDTH)), []
    for r, cohort in enumerate(world.cohorts):
        ends, new = [], own.copy()
        for i in cohort:
            y, path = x, list[F64]()
            for s in world.batches(r, i):
                path.append(world.gradient(i, y, s))
                y = y - LR * (beta * (path[-1] - own[i] + c) + (1 - beta) * g)
            ends.append(y)
            new[i] = np.mean(path, axis=0)
        c = c + (new - own).sum(0) / CLIENTS
        g = np.mean([(x - y) / (LR * STEPS) for y in ends], axis=0)
        own, x = new, np.mean(ends, axis=0)
        found.append(x)
    return found


def scaffold_m_vr(world: World, beta: float = 0.3) -> list[F64]:
    x, before, c, g, own = ZERO, ZERO, ZERO, ZERO, np.zeros((CLIENTS, WIDTH))
    found = []
    for r, cohort in enumerate(world.cohorts):
        ends, new = [], own.copy()
        for i in cohort:
            y, path = x, list[F64]()
            for s in world.batches(r, i):
                path.append(world.gradient(i, y, s))
                d = path[-1]
                if r > 0:
                    d = d - beta * (own[i] - c) + (1 - beta) * (g - world.gradient(i, before, s))
                y = y - LR * d
            ends.append(y)
            new[i] = np.mean(path, axis=0)
        c = c + (new - own).sum(0) / CLIENTS
        g = np.mean([(x - y) / (LR * STEPS) for y in ends], axis=0)
        own, before, x = new, x, np.mean(ends, axis=0)
        found.append(x)
    return found


def feddyn(world: World, alpha: float = 0.5) -> list[F64]:
    x, h, slopes, found = ZERO, ZERO, np.zeros((CLIENTS, WIDTH)), []
    for r, cohort in enumerate(world.cohorts):
        ends = []
        for i in cohort:
            y = x
            for s in world.batches(r, i):
                y = y - LR * (world.gradient(i, y, s) - slopes[i] + alpha * (y - x))
            slopes[i] = slopes[i] - alpha * (y - x)
            ends.append(y)
        h = h - alpha / CLIENTS * sum((y - x for y in ends), ZERO)
        x = np.mean(ends, axis=0) - h / alpha
        found.append(x)
    return found


def fedamd(world: World, p: float = 0.4, every: int | None = None) -> list[F64]:
    x, held, found = ZERO, np.zeros((CLIENTS, WIDTH)), []
    for r, cohort in enumerate(world.cohorts):
        g, ends, new = held.mean(0), [], held.copy()
        for i in cohort:
            coin = derive(0, r, world.made.clients[i], "anchor").random() < p
            if r == 0 or (r % every == 0 if every else coin):
                new[i] = world.mean_gradient(i, x)
                continue
            y, old, u = x, x, g
            for s in world.batches(r, i):
                u = u - world.gradient(i, old, s) + world.gradient(i, y, s)
                old, y = y, y - LR * u
            ends.append(y)
        held = new
        x = np.mean(ends, axis=0) if ends else x
        found.append(x)
    return found


def admm(
    world: World, rho: float = 0.7, robust: bool = False, away: int = 0, lost: int = -1
) -> list[F64]:
    """Clients train in every round they miss, when they miss it; nobody gets replies to ``lost``.

    With a dual that was never used nothing of a lost round is left, whoever trained in it.
    """
    x, z, sent, found = ZERO, np.zeros((CLIENTS, WIDTH)), np.zeros((CLIENTS, WIDTH)), []
    last, asked = dict[int, F64](), dict[int, int]()

    def trained(r: int, i: int, at: F64) -> F64:
        w = at
        for s in world.batches(r, i):
            w = w - LR * (world.gradient(i, w, s) + z[i] + rho * (w - at))
        z[i] = -world.mean_gradient(i, w) if robust else z[i] + rho * (w - at)
        return w

    for r, cohort in enumerate(world.cohorts):
        for i in range(CLIENTS):
            if i in cohort and r != lost:
                last[i], asked[i] = x, r
                sent[i] = trained(r, i, x) + z[i] / rho
            elif i in last and r - asked[i] <= away:
                trained(r, i, last[i])
        x = sent.mean(0)
        found.append(x)
    return found


POPULATION = {"weighting": "uniform(denominator='population')"}
RULES: Mapping[str, tuple[Rule, Mapping[str, Any]]] = {
    "fedavg_m(beta=0.3)": (fedavg_m, {}),
    "fedavg_m_vr(beta=0.3)": (fedavg_m_vr, {}),
    "scaffold_i": (scaffold_i, {}),
    "scaffold_m(beta=0.3)": (scaffold_m, {}),
    "scaffold_m_vr(beta=0.3)": (scaffold_m_vr, {}),
    "feddyn(alpha=0.5)": (feddyn, {}),
    "fedamd(p=0.4)": (fedamd, {}),
    "fedamd(every=3)": (lambda world: fedamd(world, every=3), {}),
    "admm(rho=0.7)": (admm, POPULATION),
    "admm_robust(rho=0.7)": (lambda world: admm(world, robust=True), POPULATION),
    "admm_robust(rho=0.7, while_away=1)": (
        lambda world: admm(world, robust=True, away=1),
        POPULATION,
    ),
    "admm_robust(rho=0.7, while_away=9)": (
        lambda world: admm(world, robust=True, away=9),
        POPULATION,
    ),
}


def _played(world: World, correction: str, *, apart: bool = False, **lines: Any) -> list[F64]:
    trainer = f"plain(optimizer='sgd', lr={LR}, steps={STEPS}, batch=1)"
    given = plan(ROUNDS, correction=correction, trainer=trainer, **lines)
    clients = world.made.clients
    states = play(given, world.made, lambda r: [clients[i] for i in world.cohorts[r]], apart=apart)
    return [after(state) for state in states]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("correction", RULES)
def test_it_is_the_algorithm_written_out(world: World, correction: str, apart: bool) -> None:
    rule, lines = RULES[correction]
    expected, found = rule(world), _played(world, correction, apart=apart, **lines)
    assert len(found) == len(expected) == ROUNDS
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)
    plain = _played(world, "none", **lines)
    assert np.abs(plain[-1] - found[-1]).max() > 1e-2  # its terms matter


def test_the_preset_of_fedcm_is_its_algorithm(world: World) -> None:
    trainer = f"plain(optimizer='sgd', lr={LR}, steps={STEPS}, batch=1)"
    given = plan(ROUNDS, preset="fedcm(alpha=0.3, server_lr=0.5)", trainer=trainer)
    names = world.made.clients
    states = play(given, world.made, lambda r: [names[i] for i in world.cohorts[r]])
    for state, wanted in zip(states, fedcm(world), strict=True):
        np.testing.assert_allclose(after(state), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("correction", RULES)
def test_with_a_lossy_uplink_control_follows_what_arrived(world: World, correction: str) -> None:
    """Both sides go on from the same: rounding stays rounding, and does not add up."""
    rule, lines = RULES[correction]
    found = _played(world, correction, uplink="half", **lines)
    np.testing.assert_allclose(found[-1], rule(world)[-1], atol=0.02)


def test_what_is_momentum_with_beta_one_is_the_method_without(world: World) -> None:
    for one, other in (("fedavg_m", "none"), ("scaffold_m", "scaffold")):
        left, right = _played(world, f"{one}(beta=1.0)"), _played(world, other)
        np.testing.assert_allclose(left[-1], right[-1], rtol=1e-5, atol=1e-6)


def test_both_forms_of_admm_agree_where_local_problems_are_solved() -> None:
    made = bowls(clients=4, width=3, seed=6)
    trainer = "plain(optimizer='sgd', lr=0.15, steps=120, batch=1)"
    found = [
        [after(s) for s in play(plan(6, correction=c, trainer=trainer, **POPULATION), made)]
        for c in ("admm(rho=1.0)", "admm_robust(rho=1.0)")
    ]
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)
    x, z = np.zeros(3), np.zeros((4, 3))
    for got in found[0]:
        sent = []
        for i in range(4):
            curve = made.curves[i] + np.eye(3)
            w = np.linalg.solve(curve, made.curves[i] @ made.optima[i] - z[i] + x)
            z[i] = z[i] + (w - x)
            sent.append(w + z[i])
        x = np.mean(sent, axis=0)
        np.testing.assert_allclose(got, x, atol=1e-4)


DRIFT = {
    "cohort": "uniform(size=3)",
    "trainer": "plain(optimizer='sgd', lr=0.04, steps=4, batch=1)",
}
"""Local steps that take plain averaging away from the optimum."""


def test_without_a_correction_it_rests_elsewhere() -> None:
    assert tail(plan(60, **DRIFT), bowls(clients=8, width=3, seed=5))["slope"] > 0.1


@pytest.mark.parametrize(
    ("correction", "rounds"),
    [
        *(("scaffold_i", 120), ("scaffold_m(beta=0.5)", 120), ("scaffold_m_vr(beta=0.5)", 120)),
        *(("feddyn(alpha=1.0)", 220), ("fedamd(p=0.5)", 300), ("fedamd(every=2)", 100)),
    ],
)
def test_it_rests_at_the_optimum_under_partial_participation(correction: str, rounds: int) -> None:
    made = bowls(clients=8, width=3, seed=5)
    assert tail(plan(rounds, correction=correction, **DRIFT), made, 0.1)["slope"] < 1e-3


@pytest.mark.parametrize("correction", ["admm(rho=1.0)", "admm_robust(rho=1.0)"])
def test_admm_rests_at_the_optimum_under_partial_participation(correction: str) -> None:
    made = bowls(clients=8, width=3, seed=5)
    given = plan(200, correction=correction, **DRIFT, **POPULATION)
    assert tail(given, made, 0.1)["slope"] < 1e-3


@pytest.mark.parametrize("optimizer", ["sgd(momentum=0.9)", "adam(lr=0.1)"])
def test_where_nobody_moved_the_server_rests(world: World, optimizer: str) -> None:
    """In rounds of anchors alone, and where nobody is there, momentum does not carry it on."""
    lines = {"correction": "fedamd(every=3)", "optimizer": optimizer}
    given = plan(6, trainer=f"plain(optimizer='sgd', lr={LR}, steps=2, batch=1)", **lines)
    clients = world.made.clients
    states = [*play(given, world.made, lambda r: [] if r == 2 else clients)]
    x = [after(state) for state in states]
    for at in (2, 3):  # nobody, then anchors alone
        np.testing.assert_array_equal(x[at], x[1])
        for name, slot in states[1].slots.items():
            np.testing.assert_array_equal(states[at].slots[name], slot)
    for one, other in ((0, 1), (3, 4), (4, 5)):
        assert np.abs(x[other] - x[one]).max() > 1e-4
    assert states[1].slots


def test_what_they_need_is_said() -> None:
    for correction in ("fedavg_m", "fedavg_m_vr", "scaffold_m", "scaffold_m_vr"):
        with pytest.raises(PlanError, match=rf"{correction} reads the mean gradient off the upd"):
            plan(1, correction=correction, trainer="plain")
    for correction in ("admm", "admm_robust"):
        with pytest.raises(PlanError, match=r"say weighting: uniform\(denominator='population'"):
            plan(1, correction=correction)
        for optimizer in ("sgd(momentum=0.8)", "sgd(lr=0.5)", "adam"):
            with pytest.raises(PlanError, match="as it is: say optimizer: sgd"):
                plan(1, correction=correction, optimizer=optimizer, **POPULATION)
    with pytest.raises(PlanError, match="p draws anchors, every has all be ones at times"):
        plan(1, correction="fedamd(p=0.9, every=3)")
    with pytest.raises(PlanError, match="use the codec without feedback"):
        plan(1, correction="fedamd", uplink="feedback(topk)")
