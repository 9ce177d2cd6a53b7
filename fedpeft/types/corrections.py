"""What pulls local steps together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, runtime_checkable

from fedpeft.types.aggregation import Update
from fedpeft.types.basics import Shapes, Stacked, Tensors


@dataclass(frozen=True, slots=True)
class Local:
    """What a correction may use when a client has finished.

    ``moved`` is trained - received. ``delta`` is what is sent; once it has been encoded, it is what
    the server will decode, so control state follows what the server received. ``constants`` are as
    the last of ``steps`` left them. ``gradient`` is the mean over the client's records, of what
    travels up: empty but for corrections that ask for it. ``initial`` is the adapter before round
    0, known to all sides. ``anchor`` says that the client took no step, see
    :meth:`Correction.anchor`.
    """

    received: Tensors
    delta: Tensors
    extras: Tensors
    memory: Tensors
    lr_sum: float
    steps: int = 1
    constants: Tensors = field(default_factory=dict)
    gradient: Tensors = field(default_factory=dict)
    initial: Tensors = field(default_factory=dict)
    moved: Tensors = field(default_factory=dict)
    anchor: bool = False


@runtime_checkable
class Correction(Protocol):
    """``corrections/``: what pulls local steps together. It never passes through the aggregator.

    Every method has a default that does nothing; a correction overrides what it needs, and says
    with ``remembers`` whether :meth:`client_update` returns memory. ``gradient`` says where each
    client works out the mean gradient over all its records: where it ``received``, where it
    ``trained``, or never. In the first ``while_away`` rounds after one whose reply was used, a
    client that has no part in them trains all the same, see :meth:`away_update`.
    """

    remembers: ClassVar[bool] = False
    gradient: ClassVar[Literal["never", "received", "trained"]] = "never"
    while_away: int = 0

    def server_init(self, params: Tensors) -> Tensors:
        """Return the server's control state before round 0."""
        return {}

    def broadcast(self, control: Tensors) -> Tensors:
        """Return the part of the control state that travels down."""
        return {}

    def anchor(self, client: str, round: int, seed: int) -> bool:
        """Tell whether ``client``, if asked in ``round``, takes no step.

        Its update is minus the mean gradient where it received, its ``lr_sum`` 1, and it has no
        part in the aggregate. All sides know, since ``seed`` is the plan's.
        """
        return False

    def start(self, received: Tensors, extras: Tensors, memory: Tensors) -> Tensors:
        """Return this client's constants for :meth:`adjust`, named ``<constant>/<tensor>``."""
        return {}

    def elsewhere(self, params: Stacked, constants: Stacked) -> Stacked:
        """Return other values of ``params``: each step also takes the gradient of its batch there.

        The dropout masks are the same. Nothing where one gradient is enough.
        """
        return {}

    def adjust(
        self, gradient: Stacked, params: Stacked, constants: Stacked, there: Stacked
    ) -> tuple[Stacked, Stacked]:
        """Return the gradient to follow, and the constants of the next step.

        Element-wise in the client dimension; nothing is changed in place. ``there`` is the gradient
        :meth:`elsewhere`. Constants that stay are given back as they came.
        """
        return gradient, constants

    def outgoing(self, local: Local) -> Tensors:
        """Return what is sent as the update, with the names and shapes of ``local.moved``."""
        return local.moved

    def client_update(self, local: Local) -> tuple[Tensors, Tensors]:
        """Return (extras that travel up, new memory)."""
        return {}, {}

    def away_update(self, local: Local) -> Tensors:
        """Return the memory after a round that the client trained in while it was away.

        It began with what it last received; nothing is sent.
        """
        return local.memory

    def extras_up(self, shapes: Shapes) -> Shapes:
        """Return the names and shapes of the extras that travel up."""
        return {}

    def server_update(
        self, control: Tensors, before: Tensors, update: Update, population: int
    ) -> Tensors:
        """Fold one update into ``control``; ``before`` is the control state that was sent."""
        return control

    def server_finish(
        self, control: Tensors, sent: Tensors, params: Tensors, replied: int
    ) -> tuple[Tensors, Tensors]:
        """Return the control state after a round, and the adapter.

        ``sent`` is the adapter as the clients decoded it, ``params`` as the server's step left it;
        ``replied`` is how many updates were folded in.
        """
        return control, params
