"""Text classification: one text, or a pair of texts, and one label."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from fedpeft.data._formats import label_of, text_of
from fedpeft.errors import DataError, SpecError
from fedpeft.spec import bounded, method, nearest
from fedpeft.tasks._tokens import allowance, padded, too_long
from fedpeft.types import Example, Metrics, Row

if TYPE_CHECKING:
    import torch

_PAIR = "text_pair"
_WHOLE = re.compile(r"-?[0-9]+")


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

    offers: ClassVar[Mapping[str, str]] = {"labels": "every record has one"}

    def check(self) -> None:
        """Refuse explicit classes that are fewer than two or not distinct."""
        names = self._names()
        if names is not None and (len(names) < 2 or len(set(names)) < len(names)):
            raise SpecError(f"classify: names={self.names!r} must be two or more different classes")

    measures: ClassVar[Sequence[str]] = ("loss", "accuracy", "f1")

    @property
    def head(self) -> Literal["sequence-classification"]:
        """The ``transformers`` auto class to load."""
        return "sequence-classification"

    def labels(self, rows: Sequence[Row]) -> Sequence[str]:
        """Return each row's label as text. Raises ``DataError`` naming row and column."""
        return [label_of(row, number, self.label) for number, row in enumerate(rows, 1)]

    def classes(self, rows: Sequence[Row]) -> Sequence[str]:
        """Return ``names``, or the labels of ``rows``: by number if all are whole, else by letter.

        Raises ``DataError`` for a label outside ``names``, and for fewer than two classes.
        """
        labels, names = self.labels(rows), self._names()
        if names is not None:
            _indices(labels, names)
            return names
        found = sorted(set(labels))
        if len(found) < 2:
            raise DataError(
                f"column {self.label!r} holds {len(found)} different labels "
                f"({', '.join(found) or 'there are no rows'}) and classifying takes two; "
                "set label= to another column, or names= to list the classes"
            )
        whole = all(_WHOLE.fullmatch(name) for name in found)
        return sorted(found, key=int) if whole else found

    def encode(
        self, rows: Sequence[Row], tokenizer: Any, limit: int, classes: Sequence[str]
    ) -> Sequence[Example]:
        """Tokenise with special tokens: ``input_ids`` [T] and ``labels`` [], int64.

        Pairs also get ``token_type_ids`` [T] where the tokenizer makes them. Raises ``DataError``
        for a missing column, a label not in ``classes``, and a record that is too long or empty.
        """
        cap = allowance(self.max_length, limit)
        targets = _indices(self.labels(rows), classes)
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
        import torch

        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return torch.nn.functional.cross_entropy(exact, labels, reduction="none")

    def tally(self, logits: torch.Tensor, labels: torch.Tensor) -> Metrics:
        """Return sums over the batch, and ``true/c``, ``guessed/c``, ``hit/c`` for each class c."""
        import torch

        width, guesses = logits.shape[1], logits.argmax(dim=1)
        counts = {"true": labels, "guessed": guesses, "hit": labels[guesses == labels]}
        sums = {
            "loss": float(self.losses(logits, labels).double().sum()),
            "count": float(len(labels)),
            "correct": float((guesses == labels).sum()),
        }
        for name, chosen in counts.items():
            each = torch.bincount(chosen, minlength=width).tolist()
            sums |= {f"{name}/{c}": float(n) for c, n in enumerate(each)}
        return sums

    def metrics(self, tally: Metrics) -> Metrics:
        """Return ``loss`` in nats per record, ``accuracy``, and ``f1``.

        ``f1`` is the mean over the classes that occur or were guessed (macro average). Raises
        ``DataError`` where nothing was tallied.
        """
        count = tally.get("count", 0.0)
        if not count:
            raise DataError("there is no record to evaluate; give data with a test split")
        scores = []
        for name in (n for n in tally if n.startswith("true/")):
            c = name.removeprefix("true/")
            if both := tally[name] + tally[f"guessed/{c}"]:
                scores.append(2 * tally[f"hit/{c}"] / both)
        return {
            "loss": tally["loss"] / count,
            "accuracy": tally["correct"] / count,
            "f1": sum(scores) / len(scores),
        }

    def _names(self) -> tuple[str, ...] | None:
        if self.names is None:
            return None
        listed = self.names.split(",") if isinstance(self.names, str) else self.names
        return tuple(str(name).strip() for name in listed)

    def _columns(self, rows: Sequence[Row]) -> list[list[str]]:
        columns = [self.text]
        if self.pair or (self.pair is None and any(r.get(_PAIR) is not None for r in rows)):
            columns.append(self.pair or _PAIR)
        return [[text_of(row, n, c) for n, row in enumerate(rows, 1)] for c in columns]


def _indices(labels: Sequence[str], classes: Sequence[str]) -> list[int]:
    """Return each label's place in ``classes``. Raises ``DataError`` naming row and label."""
    places = {name: place for place, name in enumerate(classes)}
    for number, label in enumerate(labels, 1):
        if label not in places:
            raise DataError(
                f"row {number}: label {label!r} is not a known class{nearest(label, classes)}"
            )
    return [places[label] for label in labels]
