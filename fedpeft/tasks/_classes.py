"""What tasks share that give a record one of several classes: labels, their places, scores."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedpeft.data._formats import label_of
from fedpeft.errors import DataError, SpecError
from fedpeft.spec import nearest
from fedpeft.types import Metrics, Row

if TYPE_CHECKING:
    import torch

Names = tuple[str, ...] | list[str] | str | None
"""A list of classes, or text with commas."""

_WHOLE = re.compile(r"-?[0-9]+")


def listed(given: Names) -> tuple[str, ...] | None:
    """Return the classes that a field lists; ``None`` where it lists none."""
    if given is None:
        return None
    names = given.split(",") if isinstance(given, str) else given
    return tuple(str(name).strip() for name in names)


def check_names(task: str, given: Names) -> None:
    """Raise ``SpecError`` for classes that are fewer than two or not distinct."""
    names = listed(given)
    if names is not None and (len(names) < 2 or len(set(names)) < len(names)):
        raise SpecError(f"{task}: names={given!r} must be two or more different classes")


def labels_of(rows: Sequence[Row], column: str) -> Sequence[str]:
    """Return each row's label as text. Raises ``DataError`` naming row and column."""
    return [label_of(row, number, column) for number, row in enumerate(rows, 1)]


def classes_of(labels: Sequence[str], given: Names, column: str) -> Sequence[str]:
    """Return ``given`` classes, or those of ``labels``: by number if all are whole, else by letter.

    Raises ``DataError`` for a label outside the ``given``, and for fewer than two classes.
    """
    names = listed(given)
    if names is not None:
        places(labels, names)
        return names
    found = sorted(set(labels))
    if len(found) < 2:
        raise DataError(
            f"column {column!r} holds {len(found)} different labels "
            f"({', '.join(found) or 'there are no rows'}) and classifying takes two; "
            "set label= to another column, or names= to list the classes"
        )
    whole = all(_WHOLE.fullmatch(name) for name in found)
    return sorted(found, key=int) if whole else found


def places(labels: Sequence[str], classes: Sequence[str]) -> list[int]:
    """Return each label's place in ``classes``. Raises ``DataError`` naming row and label."""
    known = {name: place for place, name in enumerate(classes)}
    for number, label in enumerate(labels, 1):
        if label not in known:
            raise DataError(
                f"row {number}: label {label!r} is not a known class{nearest(label, classes)}"
            )
    return [known[label] for label in labels]


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy [b], in nats, of ``logits`` [b, C]; at least float32."""
    import torch

    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(exact, labels, reduction="none")


def tally(logits: torch.Tensor, labels: torch.Tensor) -> Metrics:
    """Return sums over the batch, and ``true/c``, ``guessed/c``, ``hit/c`` for each class c."""
    import torch

    width, guesses = logits.shape[1], logits.argmax(dim=1)
    counts = {"true": labels, "guessed": guesses, "hit": labels[guesses == labels]}
    sums = {
        "loss": float(cross_entropy(logits, labels).double().sum()),
        "count": float(len(labels)),
        "correct": float((guesses == labels).sum()),
    }
    for name, chosen in counts.items():
        each = torch.bincount(chosen, minlength=width).tolist()
        sums |= {f"{name}/{c}": float(n) for c, n in enumerate(each)}
    return sums


def scores(tally: Metrics) -> Metrics:
    """Return ``loss`` in nats per record, ``accuracy``, and ``f1``.

    ``f1`` is the mean over the classes that occur or were guessed (macro average). Raises
    ``DataError`` where nothing was tallied.
    """
    count = tally.get("count", 0.0)
    if not count:
        raise DataError("there is no record to evaluate; give data with a test split")
    each = []
    for name in (n for n in tally if n.startswith("true/")):
        c = name.removeprefix("true/")
        if both := tally[name] + tally[f"guessed/{c}"]:
            each.append(2 * tally[f"hit/{c}"] / both)
    return {
        "loss": tally["loss"] / count,
        "accuracy": tally["correct"] / count,
        "f1": sum(each) / len(each),
    }
