"""What a server counts, and what it refuses by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedpeft.admission import admit
from fedpeft.errors import PlanError, WireError, printable
from fedpeft.plan import Plan
from fedpeft.tables import Tables
from fedpeft.types import Packet, Roles, Weights
from fedpeft.wire import Message, pack

LINES = {
    "model": "tiny-novels",
    "task": "causal_lm",
    "data": "embedded(name='support')",
    "trainer": "plain(steps=2, batch=4)",
    "rounds": 3,
    "clients": 2,
}
TOLD = {"run": "r", "round": 1, "steps": 2, "seen": 8, "lr_sum": 0.1, "loss": 0.5}
SHAPES = {"m.lora_A.weight": (2, 3), "m.lora_B.weight": (4, 2)}


def message(delta: Any = None, **told: Any) -> Message:
    tensors = {k: np.ones(s, np.float32) for k, s in SHAPES.items()} if delta is None else delta
    header = {k: v for k, v in {**TOLD, **told}.items() if v is not None}
    return pack(Packet({"adapter": tensors}, header), {"adapter": SHAPES})


def admitted(reply: Any, client: str = "a") -> Any:
    plan = Plan.from_lines(LINES)
    weights = Weights({"a": 2.0}, 4.0)
    return admit(plan, Tables(plan, SHAPES), ("r", 1), client, reply, {"a": 20, "b": 9}, weights)


def test_a_good_reply_is_an_update() -> None:
    for form in (message(), bytes(message())):
        update = admitted(form)
        assert (update.client, update.weight, update.lr_sum) == ("a", 2.0, 0.1)
        assert update.metrics == {"loss": 0.5, "seen": 8.0, "steps": 2.0}
        assert np.array_equal(update.delta["m.lora_A.weight"], np.ones((2, 3)))


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"run": "other"}, "belongs to run other, round 1"),
        ({"round": 0}, "belongs to run r, round 0"),
        ({"steps": 3}, "reports 3 steps, the plan allows 1 to 2"),
        ({"steps": 0}, "reports 0 steps"),
        ({"seen": 10**15}, "reports 1000000000000000 seen, the plan allows 1 to 8"),
        ({"seen": 8.0}, "reports 8.0 seen"),
        ({"lr_sum": 0.0}, "reports 0.0 as its lr_sum"),
        ({"lr_sum": 1e300}, "as its lr_sum"),
        ({"loss": -1.0}, "reports -1.0 as its loss"),
        ({"loss": 1e308}, "as its loss"),
        ({"loss": None}, "loss is not finite"),
        ({"steps": "2"}, "reports '2' steps"),
    ],
)
def test_what_a_client_says_of_its_work_is_checked(told: dict[str, Any], reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        admitted(message(**told))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, 1e20])
def test_values_no_honest_client_sends(value: float) -> None:
    delta = {k: np.ones(s, np.float32) for k, s in SHAPES.items()}
    delta["m.lora_B.weight"][1, 1] = value
    with pytest.raises(WireError, match="not finite, or absurdly large"):
        admitted(message(delta))


def test_other_clients_and_other_content() -> None:
    with pytest.raises(WireError, match="was not asked"):
        admitted(message(), client="b")
    with pytest.raises(WireError, match=r"missing|names or shapes"):
        admitted(message({"m.lora_A.weight": np.ones((2, 3), np.float32)}))
    with pytest.raises(WireError, match=r"expects|names or shapes"):
        admitted(message({k: np.ones(s[::-1], np.float32) for k, s in SHAPES.items()}))
    with pytest.raises(WireError, match="float64"):
        admitted(message({k: np.ones(s) for k, s in SHAPES.items()}))


def test_reasons_can_be_shown() -> None:
    assert printable("bad \x1b[31m\x07 [/x]\n") == "bad ?[31m? [/x]?"
    assert len(printable("x" * 1000)) == 300


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        ({"train": "a", "down": "a", "up": "a", "local": "a"}, "cannot both travel and stay local"),
        ({"train": "", "down": "a", "up": "a"}, "does not train"),
        ({"train": "a", "down": "", "up": "a"}, "never down"),
    ],
)
def test_roles_that_contradict_each_other(roles: dict[str, str], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        Roles(**{name: frozenset(names) for name, names in roles.items()})
