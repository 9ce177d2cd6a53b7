"""A client's training: what a trainer is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, runtime_checkable

from fedpeft.grouping import Grouping
from fedpeft.types.basics import Example, Stacked
from fedpeft.types.models import Learner

if TYPE_CHECKING:
    from fedpeft.privacy._stepping import Hidden


def _nowhere(params: Stacked, constants: Stacked) -> Stacked:
    """Ask for no second gradient."""
    return {}


def _as_it_is(
    gradient: Stacked, params: Stacked, constants: Stacked, there: Stacked
) -> tuple[Stacked, Stacked]:
    """Follow the gradient."""
    return gradient, constants


@dataclass(frozen=True, slots=True)
class Job:
    """All that a trainer may look at: K clients' parameters, data and randomness.

    ``params`` train and start as received, ``fixed`` do not train; both [K, ...] and only to be
    read: what they start from may be shared by all clients of the process. ``examples`` and
    ``seeds`` have one entry per client. Clients come in the order of falling ``Trainer.budget``, so
    that at any step those still training are the first n: ``elsewhere`` and ``adjust`` are those of
    :class:`Correction`, for the first n clients; ``constants`` [K, ...] are what it begins with.
    ``masks`` [K, ...] of zeros and ones says which entries of a parameter a client has, where not
    all (mixed ranks). ``precondition`` is the adapter's. ``grouping`` says which clients share a
    pass. ``progress`` is where in the whole run this job starts and ends, in [0, 1]; ``on_step`` is
    told the number of records of each step. Where single records are ``hidden``, there is for each
    client what its steps take and how their gradients are noised.
    """

    learner: Learner
    params: Stacked
    fixed: Stacked
    examples: Sequence[Sequence[Example]]
    seeds: Sequence[int]
    adjust: Callable[[Stacked, Stacked, Stacked, Stacked], tuple[Stacked, Stacked]] = _as_it_is
    elsewhere: Callable[[Stacked, Stacked], Stacked] = _nowhere
    constants: Stacked = field(default_factory=dict)
    masks: Stacked = field(default_factory=dict)
    precondition: Callable[[Stacked], Stacked] = lambda _: {}
    grouping: Grouping = field(default_factory=Grouping)
    progress: tuple[float, float] = (0.0, 1.0)
    on_step: Callable[[int], None] = lambda _: None
    hidden: Sequence[Hidden] = ()


@dataclass(frozen=True, slots=True)
class Fit:
    """All that a trainer returns; everything but tensors [K, ...] has one entry per client.

    ``lr_sums`` add up the learning rates of the steps, ``seen`` counts records, ``losses`` are
    means over the records seen, in nats. ``constants`` are the job's, as each client's last step
    left them.
    """

    params: Stacked
    steps: Sequence[int]
    lr_sums: Sequence[float]
    seen: Sequence[int]
    losses: Sequence[float]
    constants: Stacked = field(default_factory=dict)


@runtime_checkable
class Trainer(Protocol):
    """``trainers/``: the local optimizer and its loop."""

    def fit(self, job: Job) -> Fit:
        """Train K clients."""
        ...

    def budget(self, records: int) -> tuple[int, int]:
        """Return (optimizer steps, records seen) of one round for a client of ``records``."""
        ...

    def seeing(self, records: int) -> Trainer:
        """Return this trainer with as many steps as it takes to see ``records`` records."""
        ...

    def but(self, steps: int | None, lr: float | None) -> Trainer:
        """Return this trainer with ``steps`` optimizer steps at ``lr``; ``None`` keeps its own."""
        ...


@runtime_checkable
class Summing(Protocol):
    """What a trainer has besides whose update is a sum of gradients, as it offers in some plans."""

    def effort(self, records: int, progress: tuple[float, float]) -> float:
        """Return the sum of the gradients' coefficients: steps x lr for plain SGD.

        ``progress`` is the job's.
        """
        ...


@runtime_checkable
class Paced(Protocol):
    """What a trainer has besides whose learning rate may change over the run."""

    def pace(self, progress: tuple[float, float]) -> float:
        """Return the rate at the middle of a round as a share of the run's highest: above 0.

        1 where the rate stays. ``progress`` is the job's.
        """
        ...


@runtime_checkable
class Personal(Protocol):
    """``personal/``: an adapter of each client's own, beside the shared one. It never travels.

    ``when`` says when it trains: in the ``rounds`` that its client plays, going on from where the
    client's memory has it, or before each ``evaluation``, from what the client was sent.
    """

    when: ClassVar[Literal["never", "rounds", "evaluation"]] = "never"

    def trainer(self, trainer: Trainer) -> Trainer:
        """Return what trains it, given the plan's trainer."""
        return trainer

    def adjust(self, gradient: Stacked, params: Stacked, shared: Stacked) -> Stacked:
        """Return the gradient to follow; element-wise in the client dimension.

        ``shared`` is what the client was sent this round of what trains.
        """
        return gradient
