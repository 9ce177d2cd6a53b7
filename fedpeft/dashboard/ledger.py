"""The ledger of a run, followed while another process writes it."""

from __future__ import annotations

import math
import os
import re
import uuid
from array import array
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from fedpeft.json_lines import whole_lines

RECENT = 40
"""Rounds of which is kept what became of each client."""
_PIECE = 1 << 20
_TAIL = 256
"""Bytes before the place where reading goes on: they tell a ledger that was written anew."""
_PROBLEMS = 20
_AGE = re.compile("[0-9]{1,9}")


@dataclass
class Standing:
    """What a ledger tells of one client: how many replies were used and were not, and why.

    ``recent`` has the last rounds in which it is named, and whether its reply was used.
    """

    used: int = 0
    refused: int = 0
    reason: str = ""
    up: int = 0
    down: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    recent: deque[tuple[int, bool]] = field(default_factory=lambda: deque(maxlen=RECENT))


class Ledger:
    """The rounds of one ``rounds.jsonl``, as columns of numbers; NaN where a round has none.

    ``poll`` reads what has come. A line that is not yet whole waits for its end. Where the file was
    replaced or cut, all is read again and ``epoch`` is another. Nothing is ever written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._forget()

    def _forget(self) -> None:
        self.epoch, self.length = uuid.uuid4().hex, 0
        self.columns: dict[str, array[float]] = {}
        self.clients: dict[str, Standing] = {}
        self.problems: list[str] = []
        self._at, self._lines, self._tail = 0, 0, b""
        self._seen: tuple[int, ...] = ()

    @property
    def written(self) -> float | None:
        """When the last round was over, in seconds since 1970, where the ledger tells of times."""
        return self._seen[-1] / 1e9 if self._seen and "seconds" in self.columns else None

    @property
    def rounds(self) -> int:
        """How many rounds are over, by the last line."""
        return int(self.columns["round"][-1]) + 1 if self.length else 0

    def last(self, name: str) -> float | None:
        """Return the newest value of a column; ``None`` where no round has one."""
        values = reversed(self.columns.get(name, ()))
        return next((value for value in values if not math.isnan(value)), None)

    def total(self, name: str) -> float:
        """Return the sum of a column."""
        return sum(value for value in self.columns.get(name, ()) if not math.isnan(value))

    def poll(self) -> None:
        """Read what has been written since."""
        try:
            found = os.stat(self._path)
            seen = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
            if seen == self._seen:
                return
            with self._path.open("rb") as file:
                if self._at and not self._goes_on(file):
                    self._forget()
                for piece in self._pieces(file):
                    self._take(piece)
            self._seen = seen
        except FileNotFoundError:
            if self._at:
                self._forget()
        except OSError as error:
            self._forget()
            self.problems = [f"{self._path.name}: cannot be read ({error.strerror or error})"]

    def _goes_on(self, file: BinaryIO) -> bool:
        """Tell whether the file still holds what was read of it."""
        file.seek(self._at - len(self._tail))
        return file.read(len(self._tail)) == self._tail

    def _pieces(self, file: BinaryIO) -> Iterator[bytes]:
        """Yield whole lines, about a megabyte at a time."""
        size = _PIECE
        while True:
            file.seek(self._at)
            data = file.read(size)
            end = data.rfind(b"\n") + 1
            if not end and len(data) < size:
                return
            if not end:
                size *= 2  # one line is longer than that
                continue
            self._at += end
            self._tail = data[max(0, end - _TAIL) : end]
            yield data[:end]

    def _take(self, piece: bytes) -> None:
        for line in whole_lines(piece):
            self._lines += 1
            if line is None:
                self._note("no JSON object; restore the line")
            elif number(line.get("round")) is None:
                self._note("names no round; restore the line")
            else:
                self._add(line)

    def _add(self, line: Mapping[str, Any]) -> None:
        if line["round"] != self.rounds:
            self._note(f"round {line['round']} where round {self.rounds} was expected")
        values = {k: v for k, told in line.items() if (v := number(told)) is not None}
        values |= _counted(line)
        for name in values.keys() - self.columns.keys():
            self.columns[name] = array("d", [math.nan] * self.length)
        for name, column in self.columns.items():
            column.append(values.get(name, math.nan))
        self.length += 1
        self._add_clients(int(values["round"]), line)

    def _add_clients(self, round: int, line: Mapping[str, Any]) -> None:
        for name in _strings(line.get("replied")):
            client = self._client(name)
            client.used += 1
            client.recent.append((round, True))
        for name, reason in _mapping(line.get("refused")).items():
            client = self._client(name)
            client.refused, client.reason = client.refused + 1, f"round {round + 1}: {reason}"
            client.recent.append((round, False))
        for name, sizes in _mapping(line.get("traffic")).items():
            client, sizes = self._client(name), _mapping(sizes)
            client.up += int(number(sizes.get("up_bytes")) or 0)
            client.down += int(number(sizes.get("down_bytes")) or 0)
        for name, metrics in _mapping(line.get("per_client")).items():
            told = _mapping(metrics).items()
            found = {k: v for k, value in told if (v := number(value)) is not None}
            self._client(name).metrics = found

    def _client(self, name: str) -> Standing:
        return self.clients.setdefault(name, Standing())

    def _note(self, text: str) -> None:
        if len(self.problems) < _PROBLEMS:
            self.problems.append(f"{self._path.name}:{self._lines}: {text}")


def number(value: Any) -> float | None:
    """Return a finite number; ``None`` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def _counted(line: Mapping[str, Any]) -> dict[str, float]:
    """Return lists and mappings as numbers: how many, how old. Nothing where a line has none."""
    found: dict[str, float] = {}
    if "replied" in line:  # a ledger that tells of no client has no zeros, either
        found["replied"] = len(_strings(line["replied"]))
        found["refused"] = len(_mapping(line.get("refused")))
    ages = _mapping(line.get("staleness"))
    counts = {int(age): number(ages[age]) or 0.0 for age in ages if _AGE.fullmatch(age)}
    if sum(counts.values()) > 0:
        found["staleness"] = sum(a * n for a, n in counts.items()) / sum(counts.values())
        found["staleness_most"] = max(counts)
    return found


def _strings(value: Any) -> list[str]:
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
