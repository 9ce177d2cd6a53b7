"""What the plans of a sweep have in common is read once: data, texts, and so their addresses."""

from __future__ import annotations

from typing import Any

from fedpeft.errors import FedPeftError
from fedpeft.federation import Federation, deal
from fedpeft.plan import Plan
from fedpeft.preflight import check_texts
from fedpeft.preview import preview
from fedpeft.scattered import is_scattered
from fedpeft.sweep.sweep_file import Cell
from fedpeft.types import Splits


class Readings:
    """Addresses and costs of plans, of many of which data, model and task are the same."""

    def __init__(self) -> None:
        self._prints: dict[str, str] = {}
        self._texts: dict[tuple[str, ...], FedPeftError | None] = {}
        self._loaded: tuple[str, Splits] | None = None

    def of(self, plan: Plan) -> str:
        """Return a plan's address. Raises ``FedPeftError`` where its data cannot be dealt."""
        from fedpeft.driver import plan_digest

        return plan_digest(plan, self.data(plan))

    def data(self, plan: Plan) -> str:
        """Return the fingerprint of a plan's data. Raises ``FedPeftError``."""
        line = str(plan.lines()["data"])
        if line not in self._prints:
            self._prints[line] = self._dealt(plan).splits.fingerprint
        return self._prints[line]

    def folder(self, cell: Cell) -> str:
        """Return the name of a cell's folder; it has to have a plan."""
        return self.of(cell.plan)[:16] if cell.plan else ""

    def preview(self, plan: Plan) -> dict[str, Any]:
        """Return a plan's costs. Raises ``FedPeftError`` where it cannot run."""
        if is_scattered(plan):
            return preview(plan)
        return preview(plan, self._dealt(plan), self._read)

    def close(self) -> None:
        """Let the data go."""
        self._loaded = None

    def _dealt(self, plan: Plan) -> Federation:
        """Deal a plan's data, of which the last that were loaded are kept."""
        line = str(plan.lines()["data"])
        if self._loaded is None or self._loaded[0] != line:
            federation = deal(plan)
            self._loaded = line, federation.splits
            return federation
        return deal(plan, self._loaded[1])

    def _read(self, plan: Plan, federation: Federation, limit: int) -> None:
        """Have every text read that has not been; what is wrong is wrong of all such plans."""
        lines = plan.lines()
        key = tuple(str(lines[name]) for name in ("data", "task", "model"))
        if key not in self._texts:
            self._texts[key] = None
            try:
                check_texts(plan, federation, limit)
            except FedPeftError as error:
                self._texts[key] = error
        if (problem := self._texts[key]) is not None:
            raise problem
