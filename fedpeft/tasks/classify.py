"""Text classification: one text, or a pair of texts, and one label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from fedpeft.data._formats import text_of
from fedpeft.errors import DataError
from fedpeft.spec import bounded, method
from fedpeft.tasks import _classes
from fedpeft.tasks._tokens import allowance, padded, too_long
from fedpeft.types import Example, Metrics, Row

if TYPE_CHECKING:
    import torch

_PAIR = "text_pair"


@method
class Classify:
    """Classification with cross entropy.

    ``text``, ``pair`` and ``label`` name columns. Where ``pair`` is not given, a column
    ``text_pair`` is the second text if there is one; ``pair=""`` leaves it alone. ``names`` lists
    the classes where the training rows may not show all of them: a list, or text with commas.
    ``max_length`` cuts longer records, in tokens; without it a record longer than the model's
    limit is an error.
    """

    text: str = "text"
    pair: str | None = None
    label: str = "label"
    names: tuple[str, ...] | list[str] | str | None = None
    max_length: int | None = bounded(default=None, low=1)

    offers: ClassVar[Mapping[str, str]] = {
        "labels": "every record has one",
        "cross-entropy": "a record's loss is that of its label",
    }

    def check(self) -> None:
        """Refuse explicit classes that are fewer than two or not distinct."""
        _classes.check_names("classify", self.names)

    measures: ClassVar[Sequence[str]] = ("loss", "accuracy", "f1")

    @property
    def head(self) -> Literal["sequence-classification"]:
        """The ``transformers`` auto class to load."""
        return "sequence-classification"

    def labels(self, rows: Sequence[Row]) -> Sequence[str]:
        """Return each row's label as text. Raises ``DataError`` naming row and column."""
        return _classes.labels_of(rows, self.label)

    def classes(self, rows: Sequence[Row]) -> Sequence[str]:
        """Return ``names``, or the labels of ``rows``: by number if all are whole, else by letter.

        Raises ``DataError`` for a label outside ``names``, and for fewer than two classes.
        """
        return _classes.classes_of(self.labels(rows), self.names, self.label)

    def encode(
        self, rows: Sequence[Row], tokenizer: Any, limit: int, classes: Sequence[str]
    ) -> Sequence[Example]:
        """Tokenise with special tokens: ``input_ids`` [T] and ``labels`` [], int64.

        Pairs also get ``token_type_ids`` [T] where the tokenizer makes them. Raises ``DataError``
        for a missing column, a label not in ``classes``, and a record that is too long or empty.
        """
        cap = allowance(self.max_length, limit)
        targets = _classes.places(self.labels(rows), classes)
        if not rows:
            return []
        texts = self._columns(rows)
        taken = tokenizer.num_special_tokens_to_add(pair=len(texts) > 1)
        if self.max_length is not None and cap <= taken:
            raise DataError(
                f"max_length={cap} leaves no room for text beside {taken} special tokens; "
                f"set max_length={taken + 1} or more"
            )
        cut = {} if self.max_length is None else {"truncation": True, "max_length": cap}
        made = tokenizer(*texts, return_attention_mask=False, verbose=False, **cut)
        kept = [k for k in ("input_ids", "token_type_ids")[: len(texts)] if k in made]
        for number, ids in enumerate(made["input_ids"], 1):
            if len(ids) > cap:
                raise too_long(number, len(ids), cap)
            if not ids:
                raise DataError(f"row {number} has no token; remove the row")
        return [
            {k: np.asarray(made[k][i], dtype=np.int64) for k in kept}
            | {"labels": np.asarray(target, dtype=np.int64)}
            for i, target in enumerate(targets)
        ]

    def collate(
        self, examples: Sequence[Example], pad: int
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Pad on the right: inputs and ``attention_mask`` [b, T], labels [b], all int64."""
        import torch

        ids = [example["input_ids"] for example in examples]
        inputs = {
            "input_ids": padded(ids, pad),
            "attention_mask": padded([np.ones_like(each) for each in ids], 0),
        }
        if examples and "token_type_ids" in examples[0]:
            inputs["token_type_ids"] = padded([e["token_type_ids"] for e in examples], 0)
        return inputs, torch.tensor([int(e["labels"]) for e in examples], dtype=torch.int64)

    def positions(self, labels: torch.Tensor) -> None:
        """Return ``None``: a record has one row of logits."""

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the cross entropy [b], in nats, of ``logits`` [b, C]; at least float32."""
        return _classes.cross_entropy(logits, labels)

    def tally(self, logits: torch.Tensor, labels: torch.Tensor) -> Metrics:
        """Return sums over the batch, and ``true/c``, ``guessed/c``, ``hit/c`` for each class c."""
        return _classes.tally(logits, labels)

    def metrics(self, tally: Metrics) -> Metrics:
        """Return ``loss`` in nats per record, ``accuracy``, and ``f1``.

        ``f1`` is the mean over the classes that occur or were guessed (macro average). Raises
        ``DataError`` where nothing was tallied.
        """
        return _classes.scores(tally)

    def _columns(self, rows: Sequence[Row]) -> list[list[str]]:
        columns = [self.text]
        if self.pair or (self.pair is None and any(r.get(_PAIR) is not None for r in rows)):
            columns.append(self.pair or _PAIR)
        return [[text_of(row, n, c) for n, row in enumerate(rows, 1)] for c in columns]
