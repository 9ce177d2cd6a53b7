"""Aggregators that edit the base, against dense algebra in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft import lowrank
from fedpeft.aggregators.fedex import Fedex
from fedpeft.aggregators.frlora import Frlora
from fedpeft.aggregators.stack import Stack
from fedpeft.folds import Fold
from fedpeft.tensors import padded
from fedpeft.types import Sent, Shapes, Step, Tensors, Update, Weights

MODULES: Mapping[str, tuple[int, int]] = {"k": (12, 40), "q": (40, 40), "wide": (50, 36)}
"""Module to (out, in); of different shapes, as under grouped-query attention."""
RANK = 3
SHAPES: Shapes = {
    name: shape
    for module, (m, n) in MODULES.items()
    for name, shape in zip(lowrank.factors(module), [(RANK, n), (m, RANK)], strict=True)
}
METHODS = (Stack(), Fedex(), Frlora())


@dataclass(frozen=True)
class Round:
    """What was sent, and what came back of it."""

    sent: Sent
    updates: Sequence[Update]
    weights: Weights

    def step(self, method: Any) -> Step:
        """Return what an aggregator makes of it, or of a part of the replies."""
        found: Step = method.reduce(iter(self.updates), self.sent, self.weights)
        return found

    def parts(self, module: str) -> list[tuple[float, Any, Any]]:
        """Return share, ``B`` and ``A`` in float64 of each client that replied."""
        found = []
        for update in self.updates:
            own = update.sent or self.sent
            a, b = (_trained(own.moving[k], update.delta[k]) for k in lowrank.factors(module))
            found.append((update.weight / self.weights.denominator, b, a))
        return found

    def stacked(self, module: str) -> Any:
        """Return the sum of the products [m, n]; who did not reply adds nothing."""
        return sum((p * b @ a for p, b, a in self.parts(module)), np.zeros(MODULES[module]))

    def means(self, module: str) -> tuple[Any, Any]:
        """Return the mean factors, a client that did not reply as it was sent."""
        parts = self.parts(module)
        begun = self.updates[-1].sent or self.sent if self.updates else self.sent
        a, b = (begun.moving[k].astype(float) for k in lowrank.factors(module))
        left = 1 - sum(p for p, *_ in parts)
        b_mean = sum((p * x for p, x, _ in parts), left * b)
        return b_mean, sum((p * x for p, _, x in parts), left * a)


def _trained(received: Any, delta: Any) -> Any:
    """Return what a client trained, which was float32."""
    return (received + delta[tuple(map(slice, received.shape))]).astype(float)


def continued(seed: int, clients: int, missing: float = 0.0, spread: float = 0.3) -> Round:
    """Return a round whose clients go on with the same factors, and a head."""
    rng = np.random.default_rng(seed)
    held = {k: rng.standard_normal(s).astype(np.float32) for k, s in SHAPES.items()}
    held["head"] = rng.standard_normal((2, 5)).astype(np.float32)
    updates = [
        Update(
            f"c{i}",
            {
                k: (spread * rng.standard_normal(v.shape)).astype(np.float32)
                for k, v in held.items()
            },
            float(rng.integers(1, 5)),
            1.0,
        )
        for i in range(clients)
    ]
    weight = sum(u.weight for u in updates) + missing
    return Round(Sent(held), updates, Weights({u.client: u.weight for u in updates}, weight))


def restarted(seed: int, ranks: Sequence[int], missing: float = 0.0, common: bool = False) -> Round:
    """Return a round whose clients began anew with factors of these ranks, ``B`` zero."""
    rng = np.random.default_rng(seed)
    head = {"head": rng.standard_normal((2, 5)).astype(np.float32)}
    updates, begun = list[Update](), dict[str, np.ndarray]()
    for i, rank in enumerate(ranks):
        if not (begun and common):
            begun = {k: np.zeros((s[0], rank), np.float32) for k, s in SHAPES.items()}
            begun |= {
                k: rng.standard_normal((rank, s[1])).astype(np.float32)
                for k, s in SHAPES.items()
                if "lora_A" in k
            }
        delta = {
            k: (0.1 * rng.standard_normal(v.shape)).astype(np.float32)
            for k, v in {**head, **begun}.items()
        }
        (whole,) = padded([delta], {**SHAPES, "head": (2, 5)})
        own = Sent({**head, **begun})
        updates.append(Update(f"c{i}", whole, float(rng.integers(1, 5)), 1.0, sent=own))
    weight = sum(u.weight for u in updates) + missing
    return Round(Sent(head), updates, Weights({}, weight or 1.0))


def round_for(method: Any, seed: int, clients: int, missing: float = 0.0) -> Round:
    if isinstance(method, Fedex):
        return continued(seed, clients, missing)
    return restarted(seed, [RANK] * clients, missing, common=isinstance(method, Frlora))


def dense(fold: Tensors, module: str) -> Any:
    if lowrank.folded_names(module)[0] not in fold:
        return np.zeros(MODULES[module])
    value = lowrank.fold_of(fold, module)
    return value.a if lowrank.is_matrix(value) else value.dense()


def appended(step: Step) -> Fold:
    """Return the fold of one step."""
    taken = {name: value.copy() for name, value in step.fold.items()}
    return Fold.empty(SHAPES).plus(taken, 1, {0})


def apart(x: Any, y: Any) -> float:
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def best(matrix: Any, rank: int) -> Any:
    u, s, vt = np.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


SEEDS = st.integers(0, 2**32 - 1)
MISSING = st.sampled_from([0.0, 2.5])


# --- what is added is what is claimed ---------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.lists(st.integers(1, RANK), min_size=1, max_size=5), MISSING)
def test_the_stack_is_the_sum_of_the_products(seed: int, ranks: list[int], missing: float) -> None:
    played = restarted(seed, ranks, missing)
    step = played.step(Stack())
    fold = appended(step)
    for at, module in enumerate(fold.modules):
        assert apart(dense(step.fold, module), played.stacked(module)) < 1e-14
        assert apart(dense(fold.tensors, module), played.stacked(module)) < 1e-6
        m, n = MODULES[module]
        if sum(ranks) * (m + n) < m * n:
            assert fold.ranks[1][at] == sum(ranks)
        else:
            assert fold.ranks[1][at] == 0
            assert fold.tensors[f"{module}.fold_A"].shape == (m, n)


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(1, 5), st.sampled_from([0.3, 0.9, 0.999]))
def test_the_energy_decides_the_rank(seed: int, clients: int, energy: float) -> None:
    played = restarted(seed, [RANK] * clients)
    fold = played.step(Stack(energy=energy)).fold
    for module in MODULES:
        whole = played.stacked(module)
        values = np.linalg.svd(whole, compute_uv=False)
        share = np.cumsum(values**2) / np.sum(values**2)
        rank = int(np.argmax(share >= energy)) + 1
        assert lowrank.fold_of(fold, module).rank == rank
        assert apart(dense(fold, module), best(whole, rank)) < 1e-6
        lost = apart(dense(fold, module), whole) ** 2
        assert lost <= 1 - energy + 1e-6
        without = apart(best(whole, rank - 1), whole) ** 2
        assert without > 1 - energy - 1e-12


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(2, 5), MISSING)
def test_fedex_adds_what_the_mean_factors_lack(seed: int, clients: int, missing: float) -> None:
    played = continued(seed, clients, missing)
    step = played.step(Fedex())
    fold = appended(step)
    for at, module in enumerate(fold.modules):
        b, a = played.means(module)
        left = 1 - sum(p for p, *_ in played.parts(module))
        target = played.stacked(module) + left * _product(played.sent.moving, module)
        assert apart(dense(step.fold, module), target - b @ a) < 1e-12
        moved = {k: played.sent.moving[k] + step.delta[k] for k in lowrank.factors(module)}
        assert apart(dense(fold.tensors, module) + _product(moved, module), target) < 1e-6
        others = clients - 1 + (missing > 0)
        rank = min(others * RANK, *MODULES[module])
        m, n = MODULES[module]
        if rank * (m + n) < m * n:
            assert fold.ranks[1][at] == rank  # and not that of all clients: K r
        values = np.linalg.svd(target - b @ a, compute_uv=False)
        assert np.sum(values > 1e-10 * values[0]) == rank


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(2, 4), st.integers(1, 2 * RANK), MISSING)
def test_a_cut_residual_is_the_best_of_its_rank(
    seed: int, clients: int, rank: int, missing: float
) -> None:
    played = continued(seed, clients, missing)
    whole, cut = played.step(Fedex()), played.step(Fedex(rank=rank))
    for module in MODULES:
        expected = best(dense(whole.fold, module), rank)
        assert apart(dense(cut.fold, module), expected) < 1e-12
        assert lowrank.fold_of(cut.fold, module).rank <= max(
            rank, (clients - 1 + (missing > 0)) * RANK
        )
    assert all(np.array_equal(whole.delta[k], cut.delta[k]) for k in whole.delta)
    assert all(rank >= at for at in appended(cut).ranks[1])


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 5), MISSING)
def test_frlora_adds_the_product_of_the_means(seed: int, clients: int, missing: float) -> None:
    played = restarted(seed, [RANK] * clients, missing, common=True)
    step = played.step(Frlora())
    fold = appended(step)
    for module in MODULES:
        b, a = played.means(module)
        assert apart(dense(step.fold, module), b @ a) < 1e-6  # sums deltas, not what was trained
        assert apart(dense(fold.tensors, module), b @ a) < 1e-6
    assert set(fold.ranks[1]) == {RANK}


def _product(tensors: Tensors, module: str) -> Any:
    return lowrank.product(tensors, module).dense()


# --- what holds for all -----------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_the_head_is_averaged(method: Any) -> None:
    played = round_for(method, 0, 4, missing=1.0)
    found = played.step(method).delta["head"]
    shares = [u.weight / played.weights.denominator for u in played.updates]
    expected = sum(p * u.delta["head"] for p, u in zip(shares, played.updates, strict=True))
    assert found.dtype == np.float32
    assert np.allclose(found, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_one_client_gives_its_own_product_back(method: Any) -> None:
    played = round_for(method, 1, 1)
    step = played.step(method)
    for module in MODULES:
        total = dense(step.fold, module)
        if isinstance(method, Fedex):
            assert not total.size or not total.any()
            moved = {k: played.sent.moving[k] + step.delta[k] for k in lowrank.factors(module)}
            total = total + _product(moved, module)
        assert apart(total, played.stacked(module)) < 1e-6
    if isinstance(method, Fedex):
        assert appended(step).ranks[1] == [0] * len(MODULES)


def test_most_of_one_clients_energy_is_less_than_its_product() -> None:
    played = restarted(1, [RANK])
    fold = played.step(Stack(energy=0.5)).fold
    assert all(lowrank.fold_of(fold, module).rank < RANK for module in MODULES)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_the_order_of_clients_does_not_matter(method: Any) -> None:
    played = round_for(method, 2, 4, missing=1.0)
    turned = Round(played.sent, played.updates[::-1], played.weights)
    forward, backward = played.step(method), turned.step(method)
    assert forward.delta.keys() == backward.delta.keys()
    for name, value in forward.delta.items():
        assert np.allclose(backward.delta[name], value, rtol=0, atol=1e-6)
    one, other = appended(forward), appended(backward)
    assert one.ranks == other.ranks
    for module in MODULES:
        assert apart(dense(backward.fold, module), dense(forward.fold, module)) < 1e-13
    for name, value in one.tensors.items():  # decomposed, so nobody's place shows
        assert np.allclose(other.tensors[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", [*METHODS, Stack(energy=0.9), Fedex(rank=1)], ids=repr)
def test_no_reply_adds_nothing(method: Any) -> None:
    played = round_for(method, 3, 0, missing=4.0)
    step = played.step(method)
    assert all(not value.any() for value in step.delta.values())
    assert appended(step).ranks[1] == [0] * len(MODULES)


@pytest.mark.parametrize("method", [*METHODS, Stack(energy=0.9), Fedex(rank=1)], ids=repr)
def test_products_that_are_zero_add_no_rank(method: Any) -> None:
    """All ``B`` are zero after training too, and updates as well."""
    played = round_for(method, 4, 3)
    silent = [
        Update(
            u.client, {k: np.zeros_like(v) for k, v in u.delta.items()}, u.weight, 1.0, sent=u.sent
        )
        for u in played.updates
    ]
    step = Round(played.sent, silent, played.weights).step(method)
    assert appended(step).ranks[1] == [0] * len(MODULES)
    for value in [*step.delta.values(), *step.fold.values()]:
        assert np.isfinite(value).all()


def test_clients_that_learned_nothing_take_no_rank() -> None:
    played = restarted(5, [RANK] * 12)
    idle = [
        Update(
            u.client, {k: np.zeros_like(v) for k, v in u.delta.items()}, u.weight, 1.0, sent=u.sent
        )
        for u in played.updates[1:]
    ]
    mixed = Round(played.sent, [played.updates[0], *idle], played.weights)
    fold = appended(mixed.step(Stack()))
    assert set(fold.ranks[1]) == {RANK}
    assert apart(dense(fold.tensors, "q"), mixed.stacked("q")) < 1e-6


@pytest.mark.parametrize("clients", [3, 7, 10])
def test_clients_that_agree_leave_no_residual(clients: int) -> None:
    """Shares such as 1/3 do not add up to exactly 1; what rounding leaves is no edit."""
    played = continued(6, 1)
    (one,) = played.updates
    same = [Update(f"c{i}", one.delta, 1.0, 1.0) for i in range(clients)]
    step = Round(played.sent, same, Weights({}, float(clients))).step(Fedex())
    assert appended(step).ranks[1] == [0] * len(MODULES)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.floats(1e-6, 1e-3))
def test_a_small_residual_beside_large_factors_keeps_its_rank(seed: int, spread: float) -> None:
    played = continued(seed, 3, spread=spread)
    fold = appended(played.step(Fedex()))
    assert fold.ranks[1][1:] == [2 * RANK] * 2
    for module in MODULES:
        b, a = played.means(module)
        target = sum(p * (x - b) @ (y - a) for p, x, y in played.parts(module))
        assert apart(dense(fold.tensors, module), target) < 1e-5


@pytest.mark.parametrize("denominator", [0.5, 0.97, 1.4])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_shares_that_do_not_add_up_to_one(method: Any, denominator: float) -> None:
    """As under Poisson sampling: more replies than expected, or fewer."""
    played = round_for(method, 7, 3)
    weights = Weights({}, denominator * sum(u.weight for u in played.updates))
    played = Round(played.sent, played.updates, weights)
    step = played.step(method)
    for module in MODULES:
        (b, a), found = played.means(module), dense(step.fold, module)
        expected = played.stacked(module)
        if isinstance(method, Fedex):
            left = 1 - 1 / denominator
            expected = expected + left * _product(played.sent.moving, module) - b @ a
        elif isinstance(method, Frlora):
            expected = b @ a
        assert apart(found, expected) < (1e-6 if isinstance(method, Frlora) else 1e-12)


def test_the_growth_is_what_a_whole_cohort_adds() -> None:
    for method in (Stack(), Fedex(), Fedex(rank=2), Frlora()):
        fold = appended(round_for(method, 8, 3).step(method))
        assert fold.ranks[1][1] == method.growth([RANK] * 3), method
    assert Stack().growth([1, 2, 3]) == 6
    assert (
        Fedex().growth([4]) == Frlora().growth([]) == Stack().growth([]) == Fedex().growth([]) == 0
    )
