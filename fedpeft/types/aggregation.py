"""From updates to the next model: how much each counts, and what is made of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fedpeft.types.basics import Metrics, Shapes, Tensors
from fedpeft.types.sampling import Drawn


@dataclass(frozen=True, slots=True)
class Weights:
    """How much each client of a cohort counts and what the sum is divided by.

    Both are known before the first reply, so that a missing reply counts as zero.
    """

    of: Mapping[str, float]
    denominator: float

    def scaled(self, factors: Mapping[str, float]) -> Weights:
        """Return these weights times ``factors``, 1 where there is none; the same denominator."""
        of = {client: weight * factors.get(client, 1.0) for client, weight in self.of.items()}
        return replace(self, of=of)


@dataclass(frozen=True, slots=True)
class Update:
    """What the server holds of one client: decoded, checked, ``delta = trained - received``.

    ``answer`` is what it says where the aggregator is :class:`Asking`; ``sizes`` are the bytes that
    each section of the update took. ``anchor`` says that it is of a client which took no step, see
    :meth:`Correction.anchor`: aggregators never meet one.
    ``inside`` is the client's word on whether its update's norm was within the clip.

    ``lr_sum`` adds up the learning rates of the local steps (steps x lr when constant). A client
    that has only the first entries of some tensors (mixed ranks) was ``sent`` those: it trained
    them and nothing else, so the rest of its ``delta`` is zero. What began anew counts as sent.
    """

    client: str
    delta: Tensors
    weight: float
    lr_sum: float
    extras: Tensors = field(default_factory=dict)
    metrics: Metrics = field(default_factory=dict)
    sent: Sent | None = None
    answer: Tensors = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    anchor: bool = False
    inside: bool = True


@dataclass(frozen=True, slots=True)
class Sent:
    """What the clients of a round were sent, as they decoded it.

    ``moving`` they train and answer with an update of; ``still`` only came down. ``seed`` belongs
    to this round of this run alone, for aggregators that draw. ``kept`` nobody was sent: it is what
    the aggregator's last step has kept.
    """

    moving: Tensors
    still: Tensors = field(default_factory=dict)
    seed: int = 0
    kept: Tensors = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Step:
    """What an aggregator makes of a cohort: one direction for the server optimizer.

    ``replaced`` are new values for tensors that were factorised anew: the old ones and the
    optimizer have no part in them, and ``delta`` does not name them. ``fold`` are products, named
    by ``lowrank.folded``, that are added to the frozen base for good; only an aggregator that is
    :class:`Folding` has any, and whoever adds them takes the arrays for its own. ``kept`` is what
    the aggregator finds in the next round's ``Sent``, float32 and of any names.
    """

    delta: Tensors
    replaced: Tensors = field(default_factory=dict)
    fold: dict[str, NDArray[Any]] = field(default_factory=dict)
    kept: Tensors = field(default_factory=dict)


@runtime_checkable
class Weighting(Protocol):
    """``weighting/``: how much each update counts and what the sum is divided by."""

    def weigh(self, drawn: Drawn) -> Weights:
        """Weigh a cohort."""
        ...


@runtime_checkable
class Learning(Protocol):
    """What a weighting has besides that learns from who replied, a few numbers of each client.

    All clients of the population are updated after each round; a client that joins begins as all
    did. The numbers of one that leaves rest until it comes back.
    """

    def begin(self) -> Mapping[str, float]:
        """Return what a client begins with."""
        ...

    def learn(self, scalars: Tensors, replied: NDArray[np.bool_]) -> Tensors:
        """Return the numbers [N], float64, of all clients after a round in which some replied."""
        ...


@runtime_checkable
class Recalling(Protocol):
    """What a weighting has besides that counts the last updates of clients that are away.

    Of each update counts what is new since its client's last one, and the mean of the last ones of
    all clients of the population is added to the sum. The server keeps them.
    """

    recalls: ClassVar[bool]


@runtime_checkable
class Bounded(Protocol):
    """What a weighting has besides whose weights have a limit that follows from the plan alone."""

    def most(self) -> float:
        """Return what no client's weight is ever above."""
        ...


@runtime_checkable
class Aggregator(Protocol):
    """``aggregators/``: many updates to one direction."""

    def reduce(self, updates: Iterable[Update], sent: Sent, weights: Weights) -> Step:
        """Consume the updates once, in client order; no update gives a zero step.

        The step's ``delta`` names what was ``sent.moving``, but for what it replaces.
        """
        ...


@runtime_checkable
class Asking(Protocol):
    """What an aggregator has besides that adds up functions of what clients trained.

    Some tensors do not travel up; instead each client answers, in one or more phases of the round,
    with what :meth:`answer` makes of them. The server looks at weighted sums of answers alone; no
    codec is applied to questions and answers. Who is missing in a phase answers as if it had not
    moved; where nobody answers, those tensors stay as they were.
    """

    def instead(self, shapes: Shapes) -> Collection[str]:
        """Return the tensors that do not travel up."""
        ...

    def phases(self, shapes: Shapes) -> Sequence[tuple[Shapes, Shapes]]:
        """Return the shapes of each phase's question and answer; the first has no question."""
        ...

    def answer(self, phase: int, trained: Tensors, given: Tensors, seed: int) -> Tensors:
        """Return a client's answer, float32.

        ``trained`` are the tensors of :meth:`instead` as they came out, or as they were sent for
        those who are missing. ``given`` is the phase's question; in the first phase the client's
        Gram matrices where the aggregator is :class:`Observing`, else nothing. ``seed`` belongs to
        this round and is known to all.
        """
        ...

    def ask(self, sums: Sequence[Tensors], sent: Sent) -> Tensors:
        """Return the question of phase ``len(sums)``, float32."""
        ...

    def settle(self, sums: Sequence[Tensors], sent: Sent) -> Tensors:
        """Return new values for the tensors that did not travel, from all sums, float64."""
        ...


@runtime_checkable
class Observing(Protocol):
    """What an aggregator that is :class:`Asking` has besides whose clients look at their inputs.

    After training, each runs its training records once more through the model with what it has
    trained, without gradients and dropout: see ``Learner.grams``.
    """

    def observed(self, records: int) -> int:
        """Return how many of a client's training ``records`` it looks at, at least one."""
        ...

    def presumed(self, answer: Tensors) -> Tensors:
        """Return the Gram matrices of those who are missing, from the others' mean first answer.

        ``answer`` is float64, and empty where nobody answered.
        """
        ...


@runtime_checkable
class Folding(Protocol):
    """What an aggregator has besides whose steps have a ``fold``."""

    def growth(self, ranks: Sequence[int]) -> int:
        """Return how many ranks a round adds at most, of clients with these ranks."""
        ...


@runtime_checkable
class ServerOptimizer(Protocol):
    """``optimizers/``: one direction to new global tensors."""

    def init(self, params: Tensors) -> Tensors:
        """Return the slots before round 0."""
        ...

    def step(self, params: Tensors, delta: Tensors, slots: Tensors) -> tuple[Tensors, Tensors]:
        """Return new tensors for the names of ``delta``, and new slots."""
        ...
