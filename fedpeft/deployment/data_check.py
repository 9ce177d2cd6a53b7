"""What a site's own records are, looked at before it says that it is ready. Needs no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from fedpeft.data import _files
from fedpeft.data._formats import Kind, detect, label_of, messages, sample
from fedpeft.deployment.client_file import ClientFile
from fedpeft.errors import DataError, FedPeftError
from fedpeft.federation import held_count
from fedpeft.types import Row

_TEXT, _IMAGE, _LABEL = "text", "image", "label"
"""The columns that tasks read where a plan names no others."""
_DECODED = 1000
"""Images that are decoded; of more, as many evenly spread ones."""

Read: TypeAlias = Callable[[Row, int], int]


@dataclass(frozen=True, slots=True)
class DataReport:
    """What a site has, without any of its records.

    ``form`` is how its records are read where a plan names no columns: ``text``, ``completion``,
    ``instruct``, ``chat`` or ``image``; nothing where a plan has to name them. ``labels`` has how
    many records each label has. ``longest`` is in characters. ``notes`` say what a plan may stumble
    over.
    """

    records: int
    columns: tuple[str, ...]
    form: str
    labels: Mapping[str, int]
    longest: int
    notes: tuple[str, ...]

    def held_out(self, share: float) -> int:
        """Return how many records a plan with this ``holdout`` evaluates on."""
        return held_count(self.records, share)

    def lines(self, share: float = 0.1) -> Iterator[str]:
        """Yield the report as text; ``share`` is that of a plan that says nothing."""
        form = self.form or f"the columns {', '.join(self.columns)}"
        longest = f", the longest of {self.longest} characters" if self.longest else ""
        yield f"records: {self.records} ({form}{longest})"
        if self.labels:
            most = sorted(self.labels.items(), key=lambda each: (-each[1], each[0]))
            shown = ", ".join(f"{label} {count}" for label, count in most[:10])
            more = f" and {len(most) - 10} more" if len(most) > 10 else ""
            yield f"labels: {shown}{more}"
        held = self.held_out(share)
        yield f"held out at holdout={share:g}: {held}, trained on: {self.records - held}"
        yield from (f"note: {note}" for note in self.notes)


@dataclass(slots=True)
class _Found:
    """What was seen so far, file by file."""

    records: int = 0
    columns: tuple[str, ...] = ()
    form: str | None = None
    labels: Counter[str] = field(default_factory=Counter)
    labelled: int = 0
    longest: int = 0
    empty: int = 0


def check_data(client: ClientFile) -> DataReport:
    """Read all records of a site and see that tasks can use them.

    Raises ``DataError`` naming file, row and remedy where a file cannot be read, a record lacks
    what the first one has, a text is none, an image cannot be decoded, or a label is missing.
    """
    if client.data is None:
        raise DataError(f"{client.path}: data: this site names no records of its own")
    found = _Found()
    try:
        for name, source in _files.each(client.data):
            rows = source.load().train
            try:
                _look(rows, found)
            except FedPeftError as error:
                where = name or "train"
                raise type(error)(f"{where}: {error}") from error
    except FedPeftError as error:
        raise DataError(f"{client.path}: data: {error}") from error
    if not found.records:
        raise DataError(f"{client.path}: data: holds no records; name a file that has some")
    form = found.form or ""
    notes = tuple(_notes(found, client.limits.tasks))
    columns, labels = found.columns, dict(sorted(found.labels.items()))
    return DataReport(found.records, columns, form, labels, found.longest, notes)


def _look(rows: Sequence[Row], found: _Found) -> None:
    if not rows:
        return
    first = rows[0]
    form, read = _reader(first)
    if found.form not in (None, form):
        raise DataError(
            f"row 1 reads as {form or 'nothing known'} and the files before it as "
            f"{found.form or 'nothing known'}; give all files the same columns"
        )
    found.form = form
    found.columns = tuple(dict.fromkeys([*found.columns, *map(str, first)]))
    labelled = _LABEL in first or found.labelled > 0
    decoded = range(0, len(rows), max(1, len(rows) // _DECODED)) if form == _IMAGE else ()
    for number, row in enumerate(rows, 1):
        if form != _IMAGE or number - 1 in decoded:
            length = read(row, number)
            found.longest = max(found.longest, length)
            found.empty += length == 0 and form not in ("", _IMAGE)
        if labelled:
            found.labels[label_of(row, number, _LABEL)] += 1
    if labelled and found.labelled < found.records:
        raise DataError(
            f"row 1 has a column {_LABEL!r}, and the files before it have none; "
            "give all files the same columns"
        )
    found.records += len(rows)
    found.labelled += len(rows) if labelled else 0


def _reader(first: Row) -> tuple[str, Read]:
    """Return how records are read, and what reads one and returns its length in characters."""
    if _IMAGE in first:
        return _IMAGE, _image
    try:
        kind: Kind = detect(first, _TEXT)
    except DataError:
        return "", lambda row, number: 0
    if kind == "chat":
        return kind, lambda row, n: sum(len(turn["content"]) for turn in messages(row, n))

    def read(row: Row, number: int) -> int:
        found = sample(row, number, kind, _TEXT)
        return len(found.prompt) + len(found.completion) if found.completion.strip() else 0

    return kind, read


def _image(row: Row, number: int) -> int:
    from fedpeft.data._formats import cell
    from fedpeft.data._images import picture

    picture(cell(row, number, _IMAGE), number, _IMAGE)
    return 0


def _notes(found: _Found, tasks: Sequence[str] | None) -> Iterator[str]:
    if not found.form:
        yield (
            f"no column is called as tasks read them; a plan has to name one of "
            f"{', '.join(found.columns)} in its task"
        )
    if found.empty:
        yield f"{found.empty} records have no text to learn; language modelling refuses them"
    if tasks and not found.labels and all(task.startswith("classify") for task in tasks):
        yield f"no column {_LABEL!r}; a plan has to say in its task where labels are"
    if len(found.labels) == 1:
        yield "all records have the same label; a plan has to list the classes in its task"
    if found.records == 1:
        yield "one record alone: none can be held out, so nothing is evaluated here"
