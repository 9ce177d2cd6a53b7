"""Where records come from, who holds them and what is learned of them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fedpeft.types.basics import Example, Metrics, Rng, Row

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Splits:
    """What a data source yields. ``fingerprint`` is a digest of the content, not of the path."""

    train: Sequence[Row]
    test: Sequence[Row] | None
    fingerprint: str


@runtime_checkable
class Source(Protocol):
    """``data/``: where records come from."""

    def load(self) -> Splits:
        """Read the records. Raises ``DataError`` naming file, line and remedy."""
        ...


@runtime_checkable
class Filed(Protocol):
    """What a source has besides that reads files or folders."""

    @property
    def files(self) -> Sequence[str]:
        """The names of its fields that hold paths, perhaps several with commas between them."""
        ...


@runtime_checkable
class Hubbed(Protocol):
    """What a source has besides whose records lie on the Hugging Face Hub."""

    @property
    def hub_id(self) -> str | None:
        """The id of the data set; ``None`` where it is a folder after all."""
        ...


@runtime_checkable
class Pathed(Protocol):
    """What a method has besides with a field that may be a path, or something else."""

    @classmethod
    def paths(cls, given: Mapping[str, Any]) -> Sequence[str]:
        """Return those of the values ``given`` for its fields that would be read as paths."""
        ...


@runtime_checkable
class Carrying(Protocol):
    """What a method has besides that can hold the text of a file in place of its path."""

    def carried(self) -> Self:
        """Return it without the path: it means the same on a machine that has no such file."""
        ...


@runtime_checkable
class Scattered(Protocol):
    """What a source has besides whose training records lie at the clients, each with its own.

    What it loads has no training records; its fingerprint is that of the server's own test set.
    """

    def clients(self) -> Sequence[str]:
        """Return the names of the clients, sorted."""
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
