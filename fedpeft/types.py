"""The vocabulary of fedpeft: the records that pass between its layers and one protocol per family.

A method is a frozen dataclass in ``fedpeft/<family>/<name>.py`` that satisfies the family's
protocol. What its fields are is its configuration; what it offers to and needs of other parts it
says with three optional mappings from a trait to a reason::

    offers  = {"labels": "every record has one"}           # what others may rely on
    needs   = {"plain-sgd": "divides the update by lr"}    # some other part must offer it
    refuses = {"reads-single-updates": "adds noise to sums"}   # no other part may offer it

``Plan`` compares them and knows no method by name. What needs single clients' updates in the clear
at the server, because their weighted sum is not enough, offers ``reads-single-updates``; what hides
or noises updates refuses it. Aggregators to which the sum is enough offer ``linear``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import PlanError
from fedpeft.grouping import Grouping

if TYPE_CHECKING:  # torch takes seconds to import; plans must not
    import torch

    from fedpeft.engine._base import Engine, Stage
    from fedpeft.models._base import Base
    from fedpeft.models._outline import Outline
    from fedpeft.privacy._mechanism import Mechanism
    from fedpeft.privacy._stepping import Hidden, Stepping

Tensors: TypeAlias = Mapping[str, NDArray[Any]]
"""Named arrays. Outside torch code nothing else is passed around."""
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""What a receiver expects before it reads a packet: names and shapes, in order."""
Stacked: TypeAlias = "dict[str, torch.Tensor]"
"""Parameters of K clients trained in one pass: every tensor has a leading dimension K."""
Metrics: TypeAlias = Mapping[str, float]
Row: TypeAlias = Mapping[str, Any]
"""One record as it came from its source: column name to value."""
Example: TypeAlias = Mapping[str, NDArray[Any]]
"""One encoded record: ``input_ids`` [T] int64, or ``pixel_values`` [C, H, W] uint8; ``labels`` ([T]
or scalar, int64), perhaps more."""
FEATURES = "features"
"""The field of an encoded record that is what a frozen base makes of it: see :class:`Probing`."""
Scalar: TypeAlias = int | float | str
Rng: TypeAlias = np.random.Generator
Population: TypeAlias = Mapping[str, int]
"""Every client that could be asked, with its number of training records."""
Presence: TypeAlias = Callable[[int], NDArray[np.bool_]]
"""Of each round, who can be reached [N]; a pure function of it."""

# --- records ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Splits:
    """What a data source yields. ``fingerprint`` is a digest of the content, not of the path."""

    train: Sequence[Row]
    test: Sequence[Row] | None
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Crowd:
    """The clients of a simulation, as far as their coming and going may depend on them.

    ``names`` are sorted. ``mix`` [N, C] has the share of each label among a client's training
    records; [N, 0] where the task has none. ``seed`` is the plan's.
    """

    names: Sequence[str]
    mix: NDArray[np.float64]
    seed: int


@dataclass(frozen=True, slots=True)
class Packet:
    """What goes on the wire in one direction: sections of arrays in wire dtypes, small header.

    ``sizes`` are the bytes that each section took, where it came over the wire.
    """

    sections: Mapping[str, Tensors]
    header: Mapping[str, Scalar] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Roles:
    """What happens to each adapter tensor in one round.

    ``train`` changes at the client; ``down`` and ``up`` travel; ``local`` trains but stays in the
    client's memory; ``fresh`` begins anew in every round, see :class:`Restarting`; ``once`` never
    changes, and comes down until a client is known to have it. A tensor in none of them is frozen
    and derived from the plan on every side.
    """

    train: frozenset[str]
    down: frozenset[str]
    up: frozenset[str]
    local: frozenset[str] = frozenset()
    fresh: frozenset[str] = frozenset()
    once: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        """Raise ``PlanError`` for roles that contradict each other."""
        if both := sorted(self.local & (self.up | self.down)):
            raise PlanError(f"adapter: {both[0]} cannot both travel and stay local")
        if idle := sorted((self.up | self.local) - self.train):
            raise PlanError(f"adapter: {idle[0]} does not train, so it has nothing to send or keep")
        if lost := sorted(self.up - self.down - self.fresh):
            raise PlanError(f"adapter: {lost[0]} goes up but never down")
        if moved := sorted(self.once & (self.train | self.down | self.fresh)):
            raise PlanError(f"adapter: {moved[0]} is sent once, so it must never change")
        if sent := sorted(self.fresh & (self.down | self.local)):
            raise PlanError(f"adapter: {sent[0]} begins anew, so nobody needs its last values")


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
class Drawn:
    """What is known of a cohort before anybody replies: all that a weighting may look at.

    ``population`` are all clients that could be asked, ``expected`` is the expected size of a
    cohort. Replies of a ``share`` of the cohort are waited for, whichever come: what is a mean over
    the cohort is divided by as much less. ``rates`` are the probabilities that a client takes part
    in a round, in a simulation that knows them. ``learned`` is what a :class:`Learning` weighting
    has learned of each client of the cohort, before this round. ``effort`` gives
    :meth:`Summing.effort` of a client's round.
    """

    cohort: Sequence[str]
    population: Population
    expected: float
    share: float = 1.0
    rates: Mapping[str, float] = field(default_factory=dict)
    learned: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    effort: Callable[[str], float] = lambda _: 1.0


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a cohort is drawn from ``population`` clients: all that an accountant looks at.

    ``all`` of them; each by a coin of its own with probability ``rate`` (``coins``), and of more
    than ``size`` so many, each set as likely; or ``size`` of them, each set as likely (``fixed``).
    """

    kind: Literal["all", "coins", "fixed"]
    population: int
    rate: float = 1.0
    size: int | None = None

    @property
    def expected(self) -> float:
        """The expected size of a cohort."""
        if self.kind == "fixed" and self.size is not None:
            return float(self.size)
        if self.size is None or self.size >= self.population:
            return self.rate * self.population
        from scipy.special import betainc

        beyond = np.arange(self.size)  # the chance of more than k heads, added up over k
        return float(betainc(beyond + 1, self.population - beyond, self.rate).sum())

    @property
    def told(self) -> str:
        """How it is drawn, in words."""
        if self.kind == "all":
            return f"all {self.population} clients in every round"
        if self.kind == "fixed":
            return f"{self.size} of {self.population} clients, without replacement"
        capped = "" if self.size is None else f", at most {self.size} of them"
        return f"each of {self.population} clients with probability {self.rate:g}{capped}"


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
class Flight:
    """A request under way: whom the server asked, with which version of the model, and when.

    ``since`` counts seconds from the run's begin, as all times of a schedule do.
    """

    client: str
    version: int
    since: float


@dataclass(frozen=True, slots=True)
class Standing:
    """How a round stands: all that a schedule may look at.

    ``version`` is the model's; the round ``began`` with it. ``flying`` are those the server waits
    for, ``taken`` those whose replies the round uses, ``lost`` whose it does not and why. Once it
    is ``opened`` it has ``asked`` these, and ``awaited`` is how many replies it is to use.
    """

    version: int
    began: float
    now: float
    flying: tuple[Flight, ...] = ()
    taken: tuple[Flight, ...] = ()
    lost: tuple[tuple[Flight, str], ...] = ()
    asked: tuple[str, ...] = ()
    awaited: int = 0
    opened: bool = False


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


@dataclass(frozen=True, slots=True)
class Batch:
    """Records of K clients, padded to the longest.

    ``inputs`` go to the model ([K * b, T], or images [K * b, C, H, W]); ``labels`` [K * b] or
    [K * b, T]; ``weights`` [K * b] says how much each record's loss counts in its client's
    objective; ``lengths`` [K * b] is how many positions of each row are its own, 0 where a row only
    fills up its client's share.
    """

    inputs: Mapping[str, torch.Tensor]
    labels: torch.Tensor
    weights: torch.Tensor
    lengths: Sequence[int]


@dataclass(frozen=True, slots=True)
class Dropout:
    """What decides an adapter's dropout masks: one of ``seeds`` per client, ``lengths`` per row.

    Masks are functions of the seed, the module and a client's own rows, so neither padding nor the
    other clients of a pass change them, and a pass that is computed again meets the same ones.
    """

    seeds: Sequence[int]
    lengths: Sequence[int]


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


@dataclass(frozen=True, slots=True)
class Stale:
    """An update that began ``staleness`` versions ago, and what is known of how it was made.

    ``then`` is what its client was sent of what moves, ``now`` what others are sent. The client
    took ``steps`` steps of plain SGD at the rate ``lr``, on average, with the ``correction``.
    ``kept`` is what was kept of this client the last time; ``seed`` belongs to this update alone,
    and ``device`` is where the server computes.
    """

    update: Update
    staleness: int
    then: Tensors
    now: Tensors
    steps: int
    lr: float
    correction: Correction
    kept: Tensors
    seed: int
    device: torch.device


# --- torch side --------------------------------------------------------------------------------


class Attached(Protocol):
    """A base model with adapter parameters taken from outside: a pure function of them."""

    @property
    def max_group(self) -> int | None:
        """Most clients in one pass: the adapter's ``max_group``."""
        ...

    def __call__(
        self,
        params: Mapping[str, torch.Tensor],
        inputs: Mapping[str, torch.Tensor],
        dropout: Dropout | None = None,
    ) -> torch.Tensor:
        """Return logits for ``inputs`` [K * b, ...] under ``params`` [K, ...].

        ``dropout`` decides the adapter's masks; ``None`` turns it off.
        """
        ...

    def observing(
        self, lengths: Sequence[int]
    ) -> AbstractContextManager[Mapping[str, tuple[torch.Tensor, torch.Tensor]]]:
        """Record what goes into each module's ``B`` in the calls within: ``z = A x``.

        Yields, by module, sums [K, r, r] of ``z z^T`` over the positions of each row that
        ``lengths`` says are its own, and how many these were [K]; float64. Raises ``PlanError``
        for an adapter without such factors.
        """
        ...

    def checkpoint(self) -> bool:
        """Keep no activations of the layers: compute them again in the backward pass.

        Takes less memory and about a third more time. False where it cannot be done.
        """
        ...

    def detach(self) -> None:
        """Give the base model back as it was."""
        ...


class Learner(Protocol):
    """Pure functions of stacked parameters: all that trainers and evaluation see of a model."""

    @property
    def device(self) -> torch.device:
        """Where parameters and batches live."""
        ...

    @property
    def max_group(self) -> int | None:
        """Most clients in one pass: the adapter's ``max_group``."""
        ...

    def grads(
        self,
        params: Stacked,
        fixed: Stacked,
        batch: Batch,
        seeds: Sequence[int] | None = None,
    ) -> tuple[Stacked, torch.Tensor]:
        """Return gradients [K, ...] of the weighted loss, and each record's loss [K * b].

        ``seeds``, one per client, decide the adapter's dropout masks; ``None`` turns it off.
        """
        ...

    def collate(self, records: Sequence[Example | None], weights: Sequence[float]) -> Batch:
        """Pad tokenised records into one batch, each with its weight.

        ``None`` fills up a row of the client whose record comes before it.
        """
        ...

    def evaluate(
        self, tensors: Sequence[Tensors], examples: Sequence[Sequence[Example]], width: int = 1
    ) -> Sequence[Metrics]:
        """Return the task's metrics, and ``loss`` in nats, of each client's tensors on its records.

        Up to ``width`` clients share a pass. Raises ``TrainError`` where one record does not fit
        into memory.
        """
        ...

    def grams(
        self, tensors: Sequence[Tensors], examples: Sequence[Sequence[Example]], width: int = 1
    ) -> Sequence[Tensors]:
        """Return the mean of ``z z^T`` [r, r] by module, float64, of each client on its records.

        ``z = A x`` is what goes into the module's ``B``; padding does not count. Arguments and
        errors as of :meth:`evaluate`.
        """
        ...

    def mean_gradients(
        self,
        tensors: Sequence[Tensors],
        names: Collection[str],
        examples: Sequence[Sequence[Example]],
        width: int = 1,
    ) -> Sequence[tuple[Tensors, float]]:
        """Return each client's mean gradient in ``names``, float32, and mean loss in nats.

        Both are over all its records, without dropout. Other arguments and errors as of
        :meth:`evaluate`; all clients' tensors have the same shapes.
        """
        ...


# --- families: fedpeft/<family>/<name>.py -------------------------------------------------------


@runtime_checkable
class Source(Protocol):
    """``data/``: where records come from."""

    def load(self) -> Splits:
        """Read the records. Raises ``DataError`` naming file, line and remedy."""
        ...


@runtime_checkable
class Partition(Protocol):
    """``partitions/``: how a simulation deals records to clients."""

    def split(
        self,
        rows: Sequence[Row],
        labels: Sequence[Hashable] | None,
        clients: int | None,
        rng: Rng,
    ) -> Mapping[str, NDArray[np.int64]]:
        """Return client name to sorted row numbers; disjoint, never empty.

        ``labels`` has one entry per row where the task has labels. ``clients`` is the plan's line.
        """
        ...


@runtime_checkable
class Task(Protocol):
    """``tasks/``: what is learned. ``head`` says which class of model; losses are per record."""

    @property
    def head(self) -> Literal["sequence-classification", "image-classification", "causal-lm"]:
        """The ``transformers`` auto class to load."""
        ...

    @property
    def measures(self) -> Sequence[str]:
        """The names of its metrics."""
        ...

    def labels(self, rows: Sequence[Row]) -> Sequence[Hashable] | None:
        """Return one label per row for partitions, or ``None`` where the task has none."""
        ...

    def classes(self, rows: Sequence[Row]) -> Sequence[str]:
        """Return the names of the output classes seen in the training rows; empty without."""
        ...

    def encode(
        self, rows: Sequence[Row], tokenizer: Any, limit: int, classes: Sequence[str]
    ) -> Sequence[Example]:
        """Tokenise; ``limit`` is the model's longest input. Raises ``DataError``.

        ``tokenizer`` is an image processor where the head takes images.
        """
        ...

    def collate(self, examples: Sequence[Example], pad: int) -> tuple[dict[str, Any], Any]:
        """Pad to the longest record of the batch; return model inputs and labels (tensors)."""
        ...

    def positions(self, labels: torch.Tensor) -> torch.Tensor | None:
        """Return where logits are read, bool [b, T]; ``None`` where all are."""
        ...

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return one loss per record [b] that does not depend on the other records.

        ``logits`` are all, or those [n, V] at :meth:`positions`.
        """
        ...

    def tally(self, logits: torch.Tensor, labels: torch.Tensor) -> Metrics:
        """Return sums over the batch, of the same ``logits``; they add up over batches."""
        ...

    def metrics(self, tally: Metrics) -> Metrics:
        """Turn sums into metrics."""
        ...


@runtime_checkable
class Adapter(Protocol):
    """``adapters/``: which tensors there are; which train, travel and stay in each round.

    ``max_group`` is how many clients may share a pass: ``None`` where only memory limits them.
    """

    max_group: ClassVar[int | None] = 1

    def shapes(self, outline: Outline) -> Shapes:
        """Return the adapter tensors for a model of this outline, without loading it."""
        ...

    def roles(self, shapes: Shapes, round: int) -> Roles:
        """Say what happens to each tensor in ``round``."""
        ...

    def initial(self, base: Base, shapes: Shapes, seed: int) -> Tensors:
        """Return the float32 tensors before round 0."""
        ...

    def attach(self, base: Base) -> Attached:
        """Tie the adapter to a loaded model."""
        ...

    def precondition(self, fixed: Stacked) -> Stacked:
        """Return matrices [K, d, d] that gradients [K, ..., d] may be multiplied by from the right.

        They go by the name of what trains, and follow from what does not, ``fixed`` [K, ...].
        """
        ...

    def after_fit(self, trained: Tensors, received: Tensors, round: int) -> Tensors:
        """Return what a client takes for trained, once it has; the update is the way there.

        ``received`` is the whole adapter as the client started with it.
        """
        ...

    def export(self, base: Base, tensors: Tensors, folder: Path) -> None:
        """Write the folder that other tools load."""
        ...

    def restore(self, folder: Path, shapes: Shapes) -> Tensors:
        """Read such a folder. Raises ``ModelError`` where it does not fit."""
        ...


@runtime_checkable
class Narrowing(Protocol):
    """What an adapter has besides whose clients may have less than all of it (mixed ranks)."""

    def narrow(self, shapes: Shapes, client: str, seed: int, round: int | None) -> Shapes:
        """Return what ``client`` has: of each tensor the first entries along every axis.

        The same object where it has everything. It may have less while it trains in a ``round``
        than when it uses the adapter (``None``). ``seed`` is the plan's.
        """
        ...

    def check_clients(self, names: Collection[str]) -> None:
        """Raise ``PlanError`` where the clients of a federation are not those it speaks of."""
        ...


@runtime_checkable
class Restarting(Protocol):
    """What an adapter has besides whose clients forget some tensors after each round."""

    def begin(self, shapes: Shapes, round: int, client: str, seed: int) -> Tensors:
        """Return what ``client`` begins ``round`` with, of its ``shapes``: on every side the same.

        Nothing where no tensor is fresh (``Roles.fresh``). ``seed`` is the plan's.
        """
        ...


@runtime_checkable
class Informed(Protocol):
    """What an adapter has besides whose start follows from gradients on public records.

    Only the server has the records; what follows from them is sent (``Roles.once``).
    """

    def informant(self) -> tuple[str, int] | None:
        """Return a data line and how many of its training records; ``None`` where none is asked."""
        ...

    def informed(self, initial: Tensors, gradients: Tensors) -> Tensors:
        """Return the tensors before round 0, beside those of :meth:`Adapter.initial`.

        ``gradients`` [out, in], float64, are those of the mean loss in the weights of the modules.
        """
        ...


@runtime_checkable
class Probing(Protocol):
    """What an adapter has besides that leaves the base as it is, up to its last layer.

    What goes in there, a record's features, is computed once. Its :class:`Attached` takes inputs of
    ``features`` [K * b, d] in place of records.
    """

    def features(self, base: Base, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the features of records [b, d], float32. Raises ``ModelError``."""
        ...


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


@runtime_checkable
class Privacy(Protocol):
    """``privacy/``: what is promised to whom, and what keeps the promise.

    Every method has a default that promises nothing. ``secret`` says that nothing which follows
    from single clients leaves the server but through the mechanism, and that its coins come from
    the operating system; else ``seed`` decides them.
    """

    @property
    def bound(self) -> float:
        """The norm that updates are clipped to in the first round; infinite where they are not."""
        return math.inf

    @property
    def secret(self) -> bool:
        """Whether coins are drawn from the operating system and the ledger tells of no client."""
        return False

    def mechanism(self, sampling: Sampling, rounds: int) -> Mechanism | None:
        """Return how the server releases the sum of a round; ``None`` where it is as it is.

        Raises ``PlanError`` where no noise keeps the promise with this ``sampling``.
        """
        return None

    @property
    def hides(self) -> bool:
        """Whether clients hide single records, or units of them, from everybody else."""
        return False

    @property
    def unit(self) -> str | None:
        """The column whose value says which records are one unit; ``None``: each by itself."""
        return None

    def stepping(self, units: int, work: tuple[int, int], rounds: int) -> Stepping | None:
        """Return how a client of so many ``units`` hides them; ``None`` where it does not.

        ``work`` are the steps of a round and the units seen in it (``Trainer.budget``), ``rounds``
        those of the plan. Its noise may still have to be worked out.
        """
        return None


@runtime_checkable
class Codec(Protocol):
    """``codecs/``: tensors to arrays in wire dtypes, perhaps lossy. Chains with ``|``.

    What it sends are values, floating-point arrays which the next codec of a chain encodes, and
    arrays of integers, which travel as they are: bytes (``uint8``) are symbols, which the wire
    codes at their entropy.
    """

    def encode(self, tensors: Tensors, rng: Rng) -> Tensors:
        """Return the arrays to send, of any names."""
        ...

    def decode(self, arrays: Tensors, shapes: Shapes) -> Tensors:
        """Return float32 tensors of these shapes. Raises ``WireError``."""
        ...

    def values(self, shapes: Shapes) -> Shapes:
        """Return names and shapes of the floating-point arrays among what it sends."""
        ...


@runtime_checkable
class Compensating(Protocol):
    """What a codec has besides whose sender adds to its input what was lost before.

    Clients remember it, so it is for the uplink alone.
    """

    def owed(self, lost: Tensors) -> Tensors:
        """Return what of ``lost``, input minus output, is added to the next input."""
        ...


@runtime_checkable
class Differing(Protocol):
    """What a codec has besides that is given what has changed at the sender, not what there is.

    Receivers add what they decode to what they hold, so it is for the downlink alone.
    """

    of_differences: ClassVar[bool]


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


@runtime_checkable
class Cohort(Protocol):
    """``cohorts/``: whom the server asks, of those whom it can reach."""

    def choose(self, names: Sequence[str], rng: Rng) -> Sequence[str]:
        """Return the clients of one round, in the order of ``names``; all where these are few."""
        ...

    def expected(self, population: float) -> float:
        """Return the expected size of a cohort where ``population`` clients can be reached.

        More than these where it asks for more than there are.
        """
        ...


@runtime_checkable
class Sampled(Protocol):
    """What a cohort has besides whose draws an accountant knows."""

    def sampling(self, population: int) -> Sampling:
        """Return how it draws from so many clients."""
        ...


@runtime_checkable
class Availability(Protocol):
    """``availability/``: who can be reached in each round of a simulation.

    Everything follows from the crowd and the round, so a run that is resumed, and every engine,
    meets the same clients.
    """

    @property
    def dropout(self) -> float:
        """How likely a client that is asked drops out before its reply."""
        ...

    def true_rates(self, crowd: Crowd) -> NDArray[np.float64]:
        """Return the share of rounds in which each client can be reached, in the long run [N].

        Raises ``DataError`` or ``PlanError`` where a file does not fit the crowd.
        """
        ...

    def presence(self, crowd: Crowd) -> Presence:
        """Return who can be reached in a round; quick where rounds are asked about in order."""
        ...

    def fingerprint(self) -> str:
        """Return a digest of the files that it reads; nothing where there are none."""
        ...


@runtime_checkable
class Latency(Protocol):
    """``latency/``: how long the clients of a simulation take, in seconds of its clock.

    One that is not ``timed`` takes none, and the clock says nothing.
    """

    timed: ClassVar[bool] = False

    def speeds(self, crowd: Crowd) -> NDArray[np.float64]:
        """Return what stays the same of each client in the whole run [N]."""
        return np.ones(len(crowd.names))

    def seconds(self, speed: float, rng: Rng) -> float:
        """Return how long a client of this ``speed`` takes from a request to its reply."""
        return 0.0


@runtime_checkable
class Schedule(Protocol):
    """``schedules/``: when the server asks, whose replies it uses and when it steps.

    The event machine (``events.py``) calls it; nothing here takes time or remembers. A method that
    does nothing else is synchronous: a round ends with its last reply. Of one that ``overlaps``
    rounds the next may wait for replies to requests of this one.
    """

    overlaps: ClassVar[bool] = False

    @property
    def least(self) -> int:
        """Fewer replies than this are not used."""
        return 1

    def ask(
        self,
        stands: Standing,
        free: Sequence[str],
        cohort: Callable[[Sequence[str]], Sequence[str]],
        rng: Rng,
    ) -> tuple[Sequence[str], int]:
        """Return whom to ask now, in the order of ``free``, and how many replies are awaited.

        ``free`` can be reached and are not at work on something that the server waits for;
        ``cohort`` is the plan's choice among them.
        """
        ...

    def weighed(self, stands: Standing, population: Sequence[str]) -> Sequence[str]:
        """Return, once the first are asked, all who may be among those whose replies are used."""
        return stands.asked

    def expected(self, cohort: float) -> float:
        """Return how many replies a round has on average, given the expected size of a cohort."""
        return cohort

    def asks(self, cohort: float) -> float:
        """Return how many clients a round asks on average, given the expected size of a cohort."""
        return self.expected(cohort)

    def until(self, stands: Standing) -> float:
        """Return when to look who is :meth:`late`."""
        return math.inf

    def late(self, stands: Standing, flight: Flight) -> str:
        """Return why a reply that has not come is waited for no longer; nothing where it is."""
        return ""

    def given_up(self, stands: Standing, flight: Flight) -> str:
        """Return why, once a round is over, nobody waits; nothing where the next one waits on."""
        return "no reply"

    def aged(self, update: Update, staleness: int, then: Tensors, now: Tensors) -> Update:
        """Return what counts of an update that began ``staleness`` versions ago.

        ``then`` is what its client was sent of what moves, ``now`` what others are sent.
        """
        return update


@runtime_checkable
class Converting(Protocol):
    """What a schedule has besides that works out what a stale update would be from now.

    It trains at the server, which keeps for it what it has found out about each client.
    """

    def converted(self, stale: Stale) -> tuple[Tensors | None, Tensors]:
        """Return the ``delta`` from now, and what to keep of the client, float32.

        Without one the update is :meth:`Schedule.aged`; with one it counts as if it were fresh.
        Where there is nothing to keep, what was kept stays.
        """
        ...

    def keeps(self, shapes: Shapes) -> Shapes:
        """Return what is kept of a client, where updates have these ``shapes``; all float32."""
        ...


@runtime_checkable
class Preset(Protocol):
    """``presets/``: a paper by its name."""

    def lines(self) -> Mapping[str, str]:
        """Return the plan lines it fills; explicit lines win."""
        ...


@runtime_checkable
class Simulation(Protocol):
    """``engine/``: where the clients of a simulation run. Part of no plan: it changes no result."""

    def made_with(self) -> Mapping[str, int | str]:
        """Return what decides the last bits of a run beside its plan, such as threads."""
        ...

    def check_device(self, device: str) -> None:
        """Raise ``PlanError`` for a device that its clients would not train on."""
        ...

    def start(self, stage: Stage) -> AbstractContextManager[Engine]:
        """Return the running engine; leaving its context stops what it has started."""
        ...
