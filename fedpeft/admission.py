"""What the server asks of a reply before it counts: nothing in it is taken on trust."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedpeft.client_rounds import WITHHELD
from fedpeft.errors import WireError
from fedpeft.phases import check_answer
from fedpeft.plan import Plan
from fedpeft.tables import Tables, limit
from fedpeft.tensors import is_within, shapes_of
from fedpeft.types import Population, Tensors, Update, Weights
from fedpeft.wire import Message, unpack

_LARGEST = 1e15
"""No honest update, loss or sum of rates is larger."""


def admit(
    plan: Plan,
    tables: Tables,
    of: tuple[str, int],
    client: str,
    reply: Message | bytes,
    population: Population,
    weights: Weights,
) -> Update:
    """Decode a reply to the broadcast ``of`` (run, round). Raises ``WireError`` with the reason."""
    if client not in weights.of:
        raise WireError("reply from a client that was not asked")
    own = tables.of(client, of[1])
    expected = own.up(of[1])
    try:
        packet = unpack(reply, own.uplink.expected(expected), limit(expected))
    except WireError as error:
        raise WireError(f"{error}{_less(tables, own)}") from None
    told = packet.header
    if (told.get("run"), told.get("round")) != of:
        raise WireError(f"reply belongs to run {told.get('run')}, round {told.get('round')}")
    anchor, records = plan.correction.anchor(client, of[1], plan.seed), population[client]
    most = (1, records) if anchor else plan.trainer.budget(records)
    untold = plan.privacy.hides or told.get(WITHHELD) == 1
    metrics, lr_sum = _report(told, *most, untold=untold)
    if (inside := told.get("inside", 1)) not in (0, 1):
        raise WireError(f"reply reports {inside!r} where 1 says that its update was not clipped")
    delta = own.uplink.decode(packet.sections, expected["adapter"])
    extras = packet.sections.get("control", {})
    if shapes_of(delta) != expected["adapter"] or shapes_of(extras) != expected.get("control", {}):
        raise WireError("update has other names or shapes than the plan's adapter")
    if any(value.dtype != np.float32 for value in extras.values()):
        raise WireError("control variates are not float32")
    _check_size(delta, extras)
    answer = packet.sections.get("answer", {})
    check_answer(answer, expected.get("answer", {}))
    return Update(
        client,
        delta,
        weights.of[client],
        lr_sum,
        extras,
        metrics,
        answer=answer,
        sizes=packet.sizes,
        anchor=anchor,
        inside=bool(inside),
    )


def _less(tables: Tables, own: Tables) -> str:
    """Say what a client has by the plan where not all have the same: another rank was meant."""
    less = next((k for k, shape in tables.shapes.items() if own.shapes[k] != shape), None)
    if less is None:
        return "; by the plan this client has the whole adapter" if tables.mixed else ""
    return f"; by the plan this client has {own.shapes[less]} of {tables.shapes[less]} in {less}"


def _report(told: Any, steps: int, seen: int, *, untold: bool) -> tuple[dict[str, float], float]:
    """Check what the client says of its work against what the plan lets it do.

    One that hides its records, or whose site lets no measures leave, does not tell its loss.
    """
    if "loss" not in told and not untold:
        raise WireError("its loss is not finite: training diverged; lower lr")
    for name, most in (("steps", steps), ("seen", seen)):
        value = told.get(name)
        if type(value) is not int or not 0 < value <= most:
            raise WireError(f"reply reports {value!r} {name}, the plan allows 1 to {most}")
    least = {"lr_sum": 1 / _LARGEST, **({} if untold else {"loss": 0.0})}
    for name, low in least.items():
        value = told.get(name)
        if not isinstance(value, int | float) or not low <= value <= _LARGEST:
            raise WireError(f"reply reports {value!r} as its {name}")
    kept = ("seen", "steps") if untold else ("loss", "seen", "steps")
    return {k: float(told[k]) for k in kept}, float(told["lr_sum"])


def _check_size(delta: Tensors, extras: Tensors) -> None:
    if not (is_within(delta, _LARGEST) and is_within(extras, _LARGEST)):
        raise WireError("update is not finite, or absurdly large: training diverged; lower lr")
