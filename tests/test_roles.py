"""LoRA's roles: which factor trains, travels and stays, round by round, through a real run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft import Plan, simulate
from fedpeft.adapters.lora import Lora
from fedpeft.driver import Result
from fedpeft.errors import PlanError, SpecError
from fedpeft.types import Shapes
from tests.tiny import support_lines, support_plan

SHAPES: Shapes = {
    "q.lora_A.weight": (2, 8),
    "q.lora_B.weight": (6, 2),
    "classifier.weight": (3, 6),
}
A, B, HEAD = SHAPES
TURNS = "lora(r=2, targets='intermediate.dense', train='B/A')"


def _run(bert: Path, out: Path, **lines: Any) -> Result:
    return simulate(support_plan(bert, **lines), out=out)


def test_alternating_factors_start_with_b() -> None:
    lora = Lora(r=2, train="B/A")
    even, odd = lora.roles(SHAPES, 0), lora.roles(SHAPES, 1)
    assert even.train == even.up == {B, HEAD}
    assert odd.train == odd.up == {A, HEAD}
    assert even.down == odd.down == {*SHAPES}
    assert lora.roles(SHAPES, 2) == even


def test_a_factor_that_stays() -> None:
    roles = Lora(r=2, local="B", head="local").roles(SHAPES, 0)
    assert roles.train == {*SHAPES}
    assert roles.up == roles.down == {A}
    assert roles.local == {B, HEAD}


def test_a_resting_factor_is_sent_where_the_server_replaces_it() -> None:
    roles = Lora(r=2, train="B", send="both", head="frozen").roles(SHAPES, 0)
    assert roles.train == roles.up == {B}
    assert roles.down == {A, B}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"local": "B", "train": "B"}, "both must train"),
        ({"local": "A", "train": "B/A"}, "both must train"),
        ({"local": "A", "send": "both"}, "be sent to all"),
    ],
)
def test_roles_that_contradict_each_other(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        Lora(r=2, **fields)


def test_only_the_active_factor_moves(bert: Path) -> None:
    plan = support_plan(bert, adapter=TURNS, rounds=2)
    before = simulate(support_plan(bert, adapter=TURNS, rounds=1))
    after = simulate(plan)
    moved = {
        k: not np.array_equal(before.tensors[k], v) for k, v in after.tensors.items() if "lora" in k
    }
    assert all(moved[k] for k in moved if "lora_A" in k)
    assert not any(moved[k] for k in moved if "lora_B" in k)
    first, second = (line["up_bytes"] for line in after.history)
    assert first != second  # A and B differ in size


def test_a_comparison_trains_both_factors(bert: Path, tmp_path: Path) -> None:
    """Also the one that rests in round 0."""
    both = _run(bert, tmp_path / "both", adapter="lora(r=2)", compare="central", seed=3)
    turns = _run(
        bert, tmp_path / "turns", adapter="lora(r=2, train='B/A')", compare="central", seed=3
    )
    assert both.table["rows"]["central"] == turns.table["rows"]["central"]


def test_clients_keep_their_own_factor(bert: Path, tmp_path: Path) -> None:
    result = _run(
        bert, tmp_path / "own", adapter="lora(r=2, local='B')", rounds=2, cohort="everyone"
    )
    assert not any(v.any() for k, v in result.tensors.items() if "lora_B" in k)
    again = _run(bert, tmp_path / "again", adapter="lora(r=2)", rounds=2, cohort="everyone")
    assert result.table["up_bytes"] < again.table["up_bytes"]
    assert result.history[1]["loss"] < result.history[0]["loss"]


@pytest.mark.parametrize(
    ("aggregator", "adapter", "optimizer", "told"),
    [
        ("flexlora", "lora(train='B')", "sgd", "clients must be sent both"),
        ("flexlora", "full", "sgd", "clients must be sent both"),
        ("flexlora", "lora", "adam", "made anew in each round"),
        ("lora_fair", "lora", "sgd(momentum=0.9)", "made anew in each round"),
        ("fedsvd", "lora", "sgd", "a factor common to all clients"),
        ("fedsvd", "lora(train='B')", "sgd", "clients must be sent both"),
    ],
)
def test_parts_that_do_not_fit(
    aggregator: str, adapter: str, optimizer: str, told: str, bert: Path
) -> None:
    with pytest.raises(PlanError, match=told):
        support_plan(bert, aggregator=aggregator, adapter=adapter, optimizer=optimizer)


@pytest.mark.parametrize("preset", ["flexlora", "lora_fair", "fedsvd", "rolora", "fedsa_lora"])
def test_presets_train_and_their_adapter_can_be_used(
    preset: str, bert: Path, tmp_path: Path
) -> None:
    lines = support_lines(
        bert, preset=f"{preset}(r=2)", trainer="plain(lr=3e-2, steps=8, batch=8)", rounds=3
    )
    found = Plan.from_lines({k: v for k, v in lines.items() if k != "adapter"})
    result = simulate(found, out=tmp_path / "run")
    losses = [line["loss"] for line in result.history]
    assert losses[-1] < losses[0]
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
