"""The phases of a round after its first: the server asks, clients answer with what they trained.

Only weighted sums of answers are looked at. A client that is missing in a phase counts as one that
did not move: its answer follows from what was sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import PlanError, WireError
from fedpeft.plan import Plan
from fedpeft.tables import limit
from fedpeft.tensors import is_within, shapes_of
from fedpeft.types import Asking, Observing, Scalar, Sent, Shapes, Tensors, Weights
from fedpeft.wire import Message, body, unpack

Reply: TypeAlias = "tuple[str, Message | bytes | Exception]"
Ask: TypeAlias = Callable[[Iterable[tuple[str, Message]]], Iterable[Reply]]
"""Brings questions to clients and their answers back, in the order asked."""

_LARGEST = 1e15
"""No honest answer is larger."""


@dataclass
class Sum:
    """A weighted sum of answers, float64, and the share of the clients in it."""

    total: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    share: float = 0.0

    def add(self, share: float, answer: Tensors) -> None:
        """Add a client's answer."""
        self.share += share
        for name, value in answer.items():
            self.total[name] = self.total.get(name, 0) + share * value.astype(np.float64)


@dataclass(frozen=True)
class Later:
    """What the server needs to ask on: ``asking`` is the plan's aggregator."""

    plan: Plan
    asking: Asking
    phases: Sequence[tuple[Shapes, Shapes]]
    told: Mapping[str, Scalar]
    weights: Weights
    sent: Sent

    def settled(
        self, first: Sum, clients: Iterable[str], ask: Ask, note: Callable[[str, int, str], None]
    ) -> Tensors:
        """Ask ``clients`` phase by phase; return new values of what did not travel.

        ``note`` is told of each reply's client and bytes, and why it could not be used or nothing.
        """
        sums, left = [self._whole(0, first, {})], list(clients)
        for phase, (expected, _) in enumerate(self.phases[1:], 1):
            question = self.asking.ask(sums, self.sent)
            if shapes_of(question) != expected:
                raise PlanError("aggregator: asks with other names or shapes than it says")
            found = Sum()
            packed = body({"question": question}, {"question": expected})
            header = {**self.told, "phase": phase}
            for client, reply in ask((client, packed.seal(header)) for client in left):
                try:
                    nbytes, answer = self._read(phase, reply)
                except WireError as error:
                    note(client, 0, str(error))
                    continue
                note(client, nbytes, "")
                found.add(self.weights.of[client] / self.weights.denominator, answer)
            sums.append(self._whole(phase, found, question))
        return self.asking.settle(sums, self.sent)

    def _whole(self, phase: int, found: Sum, given: Tensors) -> Tensors:
        """Return a sum in which those who are missing did not move, and saw what others saw."""
        held = {**self.sent.still, **self.sent.moving}
        if phase == 0 and isinstance(self.asking, Observing):
            given = self.asking.presumed({k: v / found.share for k, v in found.total.items()})
        still = self.asking.answer(phase, held, given, self.sent.seed)
        found.add(1 - found.share, still)
        return found.total

    def _read(self, phase: int, reply: Message | bytes | Exception) -> tuple[int, Tensors]:
        """Return a reply's bytes and its answer. Raises ``WireError``."""
        if isinstance(reply, Exception):
            raise WireError(str(reply))
        expected = {"answer": self.phases[phase][1]}
        packet = unpack(reply, expected, limit(expected))
        if any(packet.header.get(k) != self.told[k] for k in ("run", "round")):
            raise WireError("answer belongs to another round")
        if packet.header.get("phase") != phase:
            raise WireError(f"answers phase {packet.header.get('phase')}, asked was {phase}")
        answer = packet.sections["answer"]
        check_answer(answer, expected["answer"])
        return len(reply) if isinstance(reply, bytes) else reply.nbytes, answer


def check_answer(answer: Tensors, expected: Shapes) -> None:
    """Raise ``WireError`` for an answer that is not of these shapes, float32 and of honest size."""
    if shapes_of(answer) != expected or any(v.dtype != np.float32 for v in answer.values()):
        raise WireError("answer has other names, shapes or types than were asked for")
    if not is_within(answer, _LARGEST):
        raise WireError("answer is not finite, or absurdly large: training diverged; lower lr")


def nobody(_: Iterable[tuple[str, Message]]) -> Iterator[Reply]:
    """Bring no question to anybody."""
    raise PlanError("aggregator: asks clients again, and nobody brings them the question")
    yield
