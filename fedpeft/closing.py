"""The last message of a run: its result, to each site, bit for bit as the server exports it.

It takes no codec of the plan: ``keep_best`` may have chosen an earlier round, and a downlink that
loses would make another adapter of it. The header says of which run and plan it is, after how many
``rounds``, and which of the site's replies was used last (``ack``), as in every broadcast.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from fedpeft import folds
from fedpeft.client_rounds import Client
from fedpeft.errors import WireError
from fedpeft.memory import NEVER
from fedpeft.plan import Plan
from fedpeft.tables import limit
from fedpeft.tensors import is_float32, shapes_of
from fedpeft.types import Scalar, Shapes, Tensors
from fedpeft.wire import Message, body, unpack

_NAME = re.compile(r"[A-Za-z0-9._-]{0,100}")


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a ``run``, which its server calls ``name``, after so many ``rounds``.

    ``adapter`` and ``edits``, those of the base, are all that is exported. ``acks`` are the last
    rounds in which clients' replies were used; who is not there has none.
    """

    run: str
    name: str
    plan: str
    rounds: int
    adapter: Tensors
    edits: Tensors
    acks: Mapping[str, int]

    @classmethod
    def of(
        cls, run: str, name: str, plan: Plan, rounds: int, exported: Tensors, shapes: Shapes
    ) -> Result:
        """Return a result without acks; ``shapes`` names what is the adapter of ``exported``."""
        adapter = {k: exported[k] for k in shapes}
        edits = {k: v for k, v in exported.items() if k not in shapes}
        return cls(run, name, plan.digest(), rounds, adapter, edits, {})

    @property
    def tensors(self) -> Tensors:
        """All that is exported."""
        return {**self.adapter, **self.edits}


def messages(result: Result, clients: Iterable[str]) -> Iterator[tuple[str, Message]]:
    """Yield what each client is sent."""
    sections: dict[str, Tensors] = {"result": result.adapter}
    if result.edits:
        edits = folds.Fold(result.edits)
        sections["fold"] = edits.since([0] * len(edits.modules))
    made = body(sections, _expected(shapes_of(result.adapter), bool(result.edits)))
    told: dict[str, Scalar] = {
        "run": result.run,
        "name": result.name,
        "plan": result.plan,
        "rounds": result.rounds,
    }
    for client in clients:
        yield client, made.seal({**told, "ack": result.acks.get(client, NEVER)})


def read(plan: Plan, site: Client, client: str, message: bytes) -> Result:
    """Return the result that a site was sent. Raises ``WireError`` for anything else."""
    tables = site.tables
    expected = _expected(tables.shapes, tables.folds)
    packet = unpack(message, expected, limit(expected))
    told, adapter = packet.header, packet.sections["result"]
    run, name, of = (told.get(key) for key in ("run", "name", "plan"))
    rounds, ack = told.get("rounds"), told.get("ack")
    if not isinstance(run, str) or not isinstance(name, str) or not _NAME.fullmatch(name):
        raise WireError("result is of no run")
    if of != plan.digest():
        raise WireError("result is of another plan than its run")
    if not isinstance(rounds, int) or not isinstance(ack, int):
        raise WireError("result does not say after how many rounds it is")
    if not 0 <= rounds <= plan.rounds or not NEVER <= ack < max(rounds, 1):
        raise WireError(f"result is after {rounds} rounds, the plan has {plan.rounds}")
    if shapes_of(adapter) != dict(tables.shapes) or not is_float32(adapter):
        raise WireError("result has other names or shapes than this plan's, or is not finite")
    edits = folds.assembled(packet.sections["fold"], {}, tables.shapes) if tables.folds else {}
    return Result(run, name, str(of), rounds, adapter, edits, {client: ack})


def _expected(shapes: Shapes, folding: bool) -> dict[str, Shapes]:
    return {"result": shapes, **({"fold": folds.longest(shapes)} if folding else {})}
