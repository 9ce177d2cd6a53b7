"""LoRA-FA at the server: against dense arithmetic, against clients, and after noise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedpeft.adapters import _precondition
from fedpeft.aggregators.lora_fa import LoraFa
from fedpeft.errors import PlanError
from fedpeft.releases import released
from fedpeft.state import start
from fedpeft.tables import Tables
from fedpeft.types import Sent, Update, Weights
from tests.quadratic import quadratic_plan

F64 = NDArray[np.float64]
A, B, HEAD = "m.lora_A.weight", "m.lora_B.weight", "classifier.weight"
SCALE, RATE = 2.0, 0.1


def drawn(seed: int) -> tuple[F64, list[F64], Sent, Weights]:
    """Return A, the clients' gradients of the whole weight, what was sent and the weights."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(3, 7)) * np.array([[1.0], [5.0], [0.2]])  # rows of different lengths
    a[1] += a[0]  # and not orthogonal
    gradients = [rng.normal(size=(5, 7)) for _ in range(4)]
    moving = {B: np.zeros((5, 3), np.float32), HEAD: np.zeros((2, 4), np.float32)}
    of = {f"c{i}": float(i + 1) for i in range(4)}
    return a, gradients, Sent(moving, {A: a.astype(np.float32)}), Weights(of, 12.0)


def updates(a: F64, gradients: list[F64], weights: Weights) -> list[Update]:
    """Return one step of SGD on B each; their heads move by their number."""
    return [
        Update(
            f"c{i}",
            {
                B: (-RATE * SCALE * gradient @ a.T).astype(np.float32),
                HEAD: np.full((2, 4), i, np.float32),
            },
            weights.of[f"c{i}"],
            RATE,
        )
        for i, gradient in enumerate(gradients)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_the_product_moves_along_the_projected_gradient(seed: int) -> None:
    a, gradients, sent, weights = drawn(seed)
    step = LoraFa().reduce(updates(a, gradients, weights), sent, weights)
    mean = sum(w * g for w, g in zip(weights.of.values(), gradients, strict=True)) / 12.0
    rows = np.linalg.qr(a.T)[0]
    expected = -RATE * SCALE * mean @ rows @ rows.T
    assert step.delta[B] @ a == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert step.delta[HEAD] == pytest.approx(np.full((2, 4), (2 + 6 + 12) / 12.0))
    assert {name: value.dtype for name, value in step.delta.items()} == dict.fromkeys(
        (B, HEAD), np.dtype("f4")
    )


def test_of_sgd_it_is_what_clients_would_do_but_for_the_scale() -> None:
    a, gradients, sent, weights = drawn(7)
    matrix = _precondition.through({A: torch.tensor(a)[None]}, SCALE)[B][0].numpy()
    own = [
        replace(update, delta={**update.delta, B: update.delta[B] @ matrix})
        for update in updates(a, gradients, weights)
    ]
    clients = sum(u.weight * u.delta[B].astype(float) for u in own) / weights.denominator
    server = LoraFa().reduce(updates(a, gradients, weights), sent, weights)
    assert server.delta[B] / SCALE**2 == pytest.approx(clients, rel=1e-3, abs=1e-5)


def test_nobody_moves_nothing() -> None:
    _, _, sent, weights = drawn(0)
    step = LoraFa().reduce([], sent, weights)
    assert not any(value.any() for value in step.delta.values())


PRIVATE: dict[str, Any] = {
    "adapter": "lora(r=3, train='B', send='both')",
    "privacy": "user(noise_multiplier=1.0, clip=0.5, simulate_noise=true)",
    "weighting": "uniform(denominator='expected')",
    "cohort": "poisson(rate=0.5)",
}


def test_signal_and_noise_are_multiplied_alike() -> None:
    """It is handed the noised sum, and its step is a linear function of that."""
    plan = quadratic_plan(**PRIVATE, aggregator="lora_fa")
    tables = Tables(plan, {A: (3, 7), B: (5, 3)})
    a, gradients, sent, weights = drawn(3)
    population = dict.fromkeys(weights.of, 1)
    initial = {A: a.astype(np.float32), B: np.zeros((5, 3), np.float32)}
    state = start(plan, tables, initial)
    given = [replace(u, delta={B: u.delta[B]}) for u in updates(a, gradients, weights)]
    found = released(plan, tables, state, population, given, sent)
    assert found is not None
    alone, _ = found
    moved = (
        LoraFa().reduce([alone], Sent({B: initial[B]}, {A: initial[A]}), Weights({}, 2.0)).delta[B]
    )
    expected = alone.delta[B] / 2.0 @ np.linalg.inv(a @ a.T)
    assert moved == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("lora(r=3, train='B')", "has to know A at the server"),
        ("lora(r=3)", "A must be fixed and common to all clients"),
        ("lora(r=3, train='B/A')", "A must be fixed and common to all clients"),
        ("lora(r=3, train='B', send='both', ranks='1..3')", "mixes all ranks of A"),
        ("full", "A must be fixed"),
    ],
)
def test_other_adapters_are_refused(adapter: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        quadratic_plan(aggregator="lora_fa", adapter=adapter)
