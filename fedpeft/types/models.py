"""Models as pure functions: all that trainers see of torch modules."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fedpeft.types.basics import Example, Metrics, Stacked, Tensors

if TYPE_CHECKING:
    import torch


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
