"""Factors turned before they are sent: the algebra, a second implementation, and whole rounds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft import lowrank, simulate
from fedpeft.adapters._align import aligned, rotation, softened
from fedpeft.adapters.lora import Lora
from fedpeft.broadcasts import broadcast, header
from fedpeft.client_rounds import client_round
from fedpeft.errors import PlanError, SpecError
from fedpeft.lowrank import Product
from fedpeft.memory import Memory
from fedpeft.plan import Plan
from fedpeft.spec import build, method
from fedpeft.state import ServerState, start
from fedpeft.tables import Tables
from fedpeft.types import Correction, Fit, Job, Local, Tensors
from fedpeft.wire import unpack
from tests.tiny import support_lines, support_plan

M, N, R = 20, 16, 4
FACTORS: tuple[Literal["A"], Literal["B"]] = ("A", "B")


def _named(b: Any, a: Any) -> Tensors:
    return lowrank.named("q", Product(b, a))


def _random(seed: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((M, R)), rng.standard_normal((R, N)) / np.sqrt(N)


def _turn(seed: int) -> Any:
    turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((R, R)))[0]
    turn[:, 0] *= np.sign(np.linalg.det(turn))
    return turn


def _polar(x: Any) -> Any:
    """Return the nearest orthogonal matrix by Newton's iteration (Higham 1986)."""
    for _ in range(200):
        x = (x + np.linalg.inv(x).T) / 2
    return x


def _dense(tensors: Tensors) -> Any:
    return lowrank.product(tensors, "q").dense()


def _apart(x: Any, y: Any) -> float:
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.sampled_from(FACTORS), st.floats(0, 1)
)
def test_the_product_stays(own: int, sent: int, to: Literal["A", "B"], strength: float) -> None:
    trained = _named(*_random(own))
    found = aligned(trained, _named(*_random(sent)), to, strength)
    assert _apart(_dense(found), _dense(trained)) < 1e-6
    for name, value in found.items():
        assert value.dtype == np.float32
        assert np.linalg.norm(value) == pytest.approx(np.linalg.norm(trained[name]), rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_rotation_is_the_best_of_determinant_one(seed: int) -> None:
    """Against the polar factor, which may reflect, and against other rotations."""
    (b, _), (reference, _) = _random(seed), _random(seed + 1)
    overlap = b.T @ reference
    found = rotation(overlap)
    assert np.allclose(found @ found.T, np.eye(R), atol=1e-12)
    assert np.linalg.det(found) == pytest.approx(1.0)
    best = _polar(overlap)
    if np.linalg.det(best) > 0:
        assert np.allclose(found, best, atol=1e-8)
    near = np.linalg.norm(b @ found - reference)
    assert near >= np.linalg.norm(b @ best - reference) - 1e-9
    for other in range(20):
        assert near <= np.linalg.norm(b @ _turn(other) - reference) + 1e-9


def test_a_reflection_is_made_a_rotation() -> None:
    overlap = np.diag([3.0, 2.0, -1.0])
    assert np.allclose(rotation(overlap), np.eye(3))  # the flip goes where it costs least
    overlap = np.diag([-1.0, -2.0])
    assert np.allclose(rotation(overlap), -np.eye(2))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 0.99))
def test_softening_is_a_polar_factor_between_nothing_and_the_whole(
    seed: int, strength: float
) -> None:
    turn = _turn(seed)
    blend = (1 - strength) * np.eye(R) + strength * turn
    if np.linalg.svd(blend, compute_uv=False)[-1] > 1e-6:
        assert np.allclose(softened(turn, strength), _polar(blend), atol=1e-8)
    assert np.allclose(softened(turn, 1.0), turn)
    assert np.allclose(softened(turn, 0.0), np.eye(R))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(FACTORS))
def test_what_was_only_turned_comes_back(seed: int, to: Literal["A", "B"]) -> None:
    b, a = _random(seed)
    turn = _turn(seed + 1)
    found = aligned(_named(b @ turn, turn.T @ a), _named(b, a), to, 1.0)
    for name, value in _named(b, a).items():
        np.testing.assert_allclose(found[name], value, atol=2e-6)


@pytest.mark.parametrize("to", FACTORS)
def test_averaging_turned_clients_errs_less_the_more_they_align(to: Literal["A", "B"]) -> None:
    """Clients that are nearly one, but for a rotation: factors cancel out, aligned ones do not."""
    errors = [_error(_clients(8, strength, to)) for strength in (0.0, 0.5, 0.75, 1.0)]
    assert errors[0] > 0.5
    assert all(later < earlier for earlier, later in pairwise(errors))
    assert errors[-1] < 0.01


def _clients(count: int, strength: float, to: Literal["A", "B"]) -> list[Tensors]:
    b, a = _random(0)
    found = []
    for k in range(count):
        rng, turn = np.random.default_rng(100 + k), _turn(k)
        own_b = b + 0.05 * rng.standard_normal(b.shape)
        own_a = a + 0.05 * rng.standard_normal(a.shape) / np.sqrt(N)
        trained = _named(own_b @ turn, turn.T @ own_a)
        found.append(aligned(trained, _named(b, a), to, strength) if strength else trained)
    return found


def _error(clients: Sequence[Tensors]) -> float:
    """Return how far the product of mean factors is from the mean product."""
    products = [lowrank.product(tensors, "q") for tensors in clients]
    mean = Product(
        np.mean([p.b for p in products], axis=0), np.mean([p.a for p in products], axis=0)
    )
    return _apart(mean.dense(), np.mean([p.dense() for p in products], axis=0))


# --- the adapter --------------------------------------------------------------------------------


def test_odd_rounds_turn_to_a_and_even_ones_to_b() -> None:
    adapter, trained, sent = Lora(r=R, align=1.0), _named(*_random(1)), _named(*_random(2))
    for round in range(4):
        found = adapter.after_fit(trained, sent, round)
        expected = aligned(trained, sent, "A" if round % 2 else "B", 1.0)
        assert all(np.array_equal(found[k], expected[k]) for k in trained)


def test_without_strength_or_reference_nothing_turns() -> None:
    trained, sent = _named(*_random(1)), _named(*_random(2))
    assert Lora(r=R).after_fit(trained, sent, 1) is trained
    b, a = _random(2)
    nothing = _named(np.zeros_like(b), a)
    adapter = Lora(r=R, align=0.5)
    for given_, received, round in (
        (trained, nothing, 0),  # B is zero before the first round
        (nothing, _named(b, a), 2),
        (_named(b, np.zeros_like(a)), _named(b, a), 1),
        (_named(b * np.nan, a), _named(b, a), 0),
    ):
        found = adapter.after_fit(given_, received, round)
        assert all(np.array_equal(found[k], given_[k], equal_nan=True) for k in given_)


def test_a_head_is_left_alone() -> None:
    head = np.ones((3, 2), np.float32)
    trained = {**_named(*_random(1)), "head.weight": head}
    found = Lora(r=R, align=1.0).after_fit(trained, _named(*_random(2)), 1)
    assert found["head.weight"] is head


@pytest.mark.parametrize("fields", ["train='B'", "train='A'", "train='B/A'", "local='B'"])
def test_both_factors_must_train_and_travel(fields: str) -> None:
    with pytest.raises(SpecError, match=r"align=0\.5 turns both factors.*set train='A,B' and"):
        build("adapters", f"lora(align=0.5, {fields})")


def test_scaffold_is_refused(bert: Path) -> None:
    lines = support_lines(
        bert, trainer="plain(optimizer='sgd')", adapter="lora(align=0.5)", correction="scaffold"
    )
    with pytest.raises(PlanError, match=r"scaffold does not fit adapter: .*set align=0"):
        Plan.from_lines(lines)


# --- in a round ---------------------------------------------------------------------------------


@method
class Watch(Correction):
    """Remembers the update that it is shown."""

    remembers: ClassVar[bool] = True

    def client_update(self, local: Local) -> tuple[Tensors, Tensors]:
        """Keep the delta."""
        return {}, dict(local.delta)


class Turned:
    """A trainer that turns what it was given and trains nothing."""

    def fit(self, job: Job) -> Fit:
        """Return the factors turned by one and the same rotation."""
        import torch

        turn = torch.from_numpy(_turn(3)).float()
        params = {
            k: turn.T @ v if "lora_A" in k else v @ turn if "lora_B" in k else v.clone()
            for k, v in job.params.items()
        }
        return Fit(params, [1], [1.0], [1], [1.0])

    def budget(self, records: int) -> tuple[int, int]:
        """One step."""
        return 1, 1

    def seeing(self, records: int) -> Turned:
        """The same."""
        return self


class _Site:
    """A client with one record and no model."""

    def __init__(self, tables: Tables, initial: Tensors) -> None:
        import torch

        self.tables, self.initial = tables, initial
        self.learner: Any = type("Learner", (), {"device": torch.device("cpu")})

    def train(self, client: str) -> list[Any]:
        """One record."""
        return [{}]


def _plan(adapter: str, uplink: str) -> Plan:
    plan = Plan.from_lines(
        {
            "model": "tiny-novels",
            "task": "classify",
            "data": "embedded(name='support')",
            "adapter": adapter,
            "uplink": uplink,
            "rounds": 4,
        }
    )
    object.__setattr__(plan, "trainer", Turned())
    object.__setattr__(plan, "correction", Watch())
    return plan


@pytest.mark.parametrize("uplink", ["raw", "half"])
@pytest.mark.parametrize("round", [1, 2])
def test_the_update_is_of_turned_factors_and_so_is_what_corrections_see(
    uplink: str, round: int
) -> None:
    plan, initial = _plan(f"lora(r={R}, align=1.0)", uplink), _named(*_random(5))
    tables = Tables(plan, {k: v.shape for k, v in initial.items()})
    site = _Site(tables, initial)
    begun = start(plan, tables, initial)
    state = ServerState(begun.params, begun.slots, begun.control, {}, round)
    message = broadcast(plan, tables, state).seal(header(state, "run", "c"))
    reply, memory = client_round(plan, site, "c", message, Memory())
    arrays = unpack(reply, tables.up(round), 10**6).sections["adapter"]
    sent = plan.uplink.decode(arrays, tables.up(round)["adapter"])
    kept = memory.at(round, "c")
    for name, value in sent.items():
        assert np.abs(value).max() < 1e-5  # turned back to where it was
        assert np.array_equal(kept[f"correction/{name}"], value)
    loose, _ = client_round(_plan(f"lora(r={R})", uplink), site, "c", message, Memory())
    arrays = unpack(loose, tables.up(round), 10**6).sections["adapter"]
    assert max(np.abs(v.astype(float)).max() for v in arrays.values()) > 0.1


def test_a_run_differs_from_the_one_without_after_its_first_round_only(bert: Path) -> None:
    work = "plain(optimizer='sgd', lr=0.5, steps=4, batch=8)"
    runs = {
        (rounds, align): simulate(
            support_plan(bert, adapter=f"lora(r=4, align={align})", trainer=work, rounds=rounds)
        ).tensors
        for rounds in (1, 2)
        for align in (0.0, 1.0)
    }
    same = [
        all(np.array_equal(runs[n, 0.0][k], runs[n, 1.0][k]) for k in runs[n, 0.0]) for n in (1, 2)
    ]
    assert same == [True, False]
