"""What both sides expect on the wire, derived from the plan alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fedpeft import folds, mirror
from fedpeft.coding import Coding
from fedpeft.errors import PlanError, WireError
from fedpeft.plan import Plan
from fedpeft.tensors import is_float32, narrowed, shapes_of, size
from fedpeft.types import (
    Asking,
    Compensating,
    Differing,
    Folding,
    Narrowing,
    Restarting,
    Roles,
    Shapes,
    Tensors,
)
from fedpeft.wire import Body, Message, unpack


@dataclass(frozen=True, slots=True)
class Broadcast:
    """What came down: the adapter's shared tensors, a correction's control state, missed edits.

    ``once`` is empty where the server takes it to be held. ``mirror`` is all that differences add
    up to, where they are what is sent.
    """

    adapter: Tensors
    control: Tensors
    fold: Tensors
    once: Tensors
    mirror: Tensors = field(default_factory=dict)


class Tables:
    """Names and shapes of every section of a round's packets, and what happens to each tensor.

    They are those of a client that has the whole adapter; :meth:`of` gives those of any other. What
    ``head`` names of it travels in a section of its own, which ``uplink`` and ``downlink`` know.
    """

    def __init__(self, plan: Plan, shapes: Shapes, head: Collection[str] = ()) -> None:
        self._plan, self.shapes, self.head = plan, shapes, frozenset(head)
        self.uplink, self.downlink = (Coding(c, self.head) for c in (plan.uplink, plan.downlink))
        self._narrowing = plan.adapter if isinstance(plan.adapter, Narrowing) else None
        self._of: tuple[int | None, dict[str, Tables]] = (None, {})
        self._narrow: dict[tuple[tuple[int, ...], ...], Tables] = {}
        self._part: tuple[Tensors | None, Tensors] = (None, {})
        self._down: tuple[int, dict[str, Shapes]] = (-1, {})
        self._up: tuple[int, dict[str, Shapes]] = (-1, {})
        self._last: tuple[Body | None, Broadcast] = (None, Broadcast({}, {}, {}, {}))

    def of(self, client: str, round: int | None = None) -> Tables:
        """Return the tables of what ``client`` has: these where it has everything.

        It may have less while it trains in a ``round``. Clients that have the same share them.
        Raises ``PlanError`` for a correction whose control state is that of the whole adapter.
        """
        if self._narrowing is None:
            return self
        if round != self._of[0]:
            self._of = round, {}
        if client not in self._of[1]:
            shapes = self._narrowing.narrow(self.shapes, client, self._plan.seed, round)
            if shapes is self.shapes:
                return self
            key = tuple(shapes.values())
            self._narrow[key] = self._narrow.get(key) or self._narrower(shapes)
            self._of[1][client] = self._narrow[key]
        return self._of[1][client]

    @property
    def mixed(self) -> bool:
        """Whether a client was met that has less than everything."""
        return bool(self._narrow)

    def part(self, tensors: Tensors) -> Tensors:
        """Return what these tables name of ``tensors``; the same arrays when asked again."""
        if self._part[0] is not tensors:
            self._part = tensors, narrowed(tensors, self.shapes)
        return self._part[1]

    def begin(self, client: str, round: int) -> Tensors:
        """Return the tensors that begin anew at ``client``, which has what these tables name."""
        adapter = self._plan.adapter
        if not isinstance(adapter, Restarting):
            return {}
        return adapter.begin(self.shapes, round, client, self._plan.seed)

    def roles(self, round: int) -> Roles:
        """What happens to each tensor in ``round``."""
        return self._plan.adapter.roles(self.shapes, round)

    @cached_property
    def trained(self) -> frozenset[str]:
        """What trains in some round."""
        rounds = range(self._plan.rounds)
        return frozenset[str]().union(*(self.roles(round).train for round in rounds))

    def down(self, round: int) -> dict[str, Shapes]:
        """What a broadcast of ``round`` holds."""
        if self._down[0] != round:
            self._down = round, self._new_down(round)
        return self._down[1]

    def up(self, round: int) -> dict[str, Shapes]:
        """What a reply of ``round`` holds."""
        if self._up[0] != round:
            up = self.roles(round).up
            if self.asking:
                up -= {*self.asking.instead(self.shapes)}
            shared = {k: s for k, s in self.shapes.items() if k in up}
            found = _sections(shared, self._plan.correction.extras_up(shared))
            _, answer = self.phases[0]
            self._up = round, found | ({"answer": answer} if answer else {})
        return self._up[1]

    @cached_property
    def phases(self) -> Sequence[tuple[Shapes, Shapes]]:
        """Questions and answers of each phase; one without either where nothing is asked."""
        return self.asking.phases(self.shapes) if self.asking else [({}, {})]

    @cached_property
    def asking(self) -> Asking | None:
        """The aggregator, where it asks for more than updates."""
        aggregator = self._plan.aggregator
        return aggregator if isinstance(aggregator, Asking) else None

    @cached_property
    def owing(self) -> Compensating | None:
        """The uplink, where clients owe what earlier updates lost."""
        uplink = self._plan.uplink
        return uplink if isinstance(uplink, Compensating) else None

    def _narrower(self, shapes: Shapes) -> Tables:
        if "control" in self.down(0) or "control" in self.up(0):
            raise PlanError(
                "correction: sends control state of every entry, and clients of mixed ranks have "
                "not the same entries; use correction: none"
            )
        return Tables(self._plan, shapes, self.head)

    def _new_down(self, round: int) -> dict[str, Shapes]:
        down = self.roles(round).down
        shared = {k: s for k, s in self.shapes.items() if k in down}
        zeros = {k: np.zeros(s, np.float32) for k, s in shared.items()}
        control = self._plan.correction.broadcast(self._plan.correction.server_init(zeros))
        found = _sections(shared, shapes_of(control))
        found |= {"fold": folds.longest(self.shapes)} if self.folds else {}
        return found | ({"once": self.once} if self.once else {})

    def decode(
        self, message: Message | bytes, round: int, held: tuple[int, Tensors] | None = None
    ) -> Broadcast:
        """Decode a broadcast of ``round``; clients of one process share the last one's arrays.

        ``held`` are the version, and its tensors, that differences are to, where such came. Raises
        ``WireError`` for anything else.
        """
        key = message.body if isinstance(message, Message) else None
        if key is None or key is not self._last[0]:
            expected = self.down(round)
            if self.differs:
                expected = {**expected, "adapter": self.down(0)["adapter"]}
            sections = unpack(message, self.downlink.expected(expected), limit(expected)).sections
            shared = self._shared(sections, round, expected["adapter"], held)
            control, fold, once = (sections.get(name, {}) for name in ("control", "fold", "once"))
            if once and (shapes_of(once) != self.once or not is_float32(once)):
                raise WireError("frozen factors are not those of this plan")
            its = {k: shared[k] for k in self.down(round)["adapter"]}
            whole = shared if self.differs else {}
            self._last = key, Broadcast(its, control, fold, once, whole)
        return self._last[1]

    def _shared(
        self,
        sections: Mapping[str, Tensors],
        round: int,
        shapes: Shapes,
        held: tuple[int, Tensors] | None,
    ) -> Tensors:
        """Return the adapter's tensors of a broadcast. Raises ``WireError``."""
        if not self.differs:
            return self.downlink.decode(sections, shapes)
        sent = {name: sections[name] for name in self.downlink.expected({"adapter": shapes})}
        if held is None:
            return mirror.whole(sent, shapes)
        version, tensors = held
        if shapes_of(tensors) != shapes:
            raise WireError("holds differences, and this client holds nothing to add them to")
        return mirror.followed(self.downlink, tensors, sent, range(version + 1, round + 1))

    @cached_property
    def differs(self) -> bool:
        """Whether clients are sent what has changed of the adapter."""
        return isinstance(self._plan.downlink, Differing)

    @cached_property
    def once(self) -> Shapes:
        """What never changes and is sent to each client once."""
        once = self.roles(0).once
        return {name: shape for name, shape in self.shapes.items() if name in once}

    @property
    def keeps(self) -> bool:
        """Whether clients on other machines have to remember what they were sent."""
        return self.folds or bool(self.once) or self.differs

    @cached_property
    def folds(self) -> bool:
        """Whether rounds edit the base."""
        return isinstance(self._plan.aggregator, Folding)

    @cached_property
    def remembers(self) -> bool:
        """Whether clients need what they kept in earlier rounds."""
        plan, own = self._plan, bool(self.roles(0).local or self.owing)
        return plan.correction.remembers or plan.personal.when == "rounds" or own

    @property
    def stores(self) -> bool:
        """Whether clients store what they made: for later rounds, or later phases of one."""
        return self.remembers or len(self.phases) > 1


def _sections(adapter: Shapes, control: Shapes) -> dict[str, Shapes]:
    return {"adapter": adapter, **({"control": control} if control else {})}


def limit(expected: Mapping[str, Shapes]) -> int:
    """Return the most bytes that a body with these sections may have, under any codec."""
    return 65_536 + 16 * sum(size(shapes.values()) for shapes in expected.values())
