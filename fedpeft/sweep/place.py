"""Where the runs of a sweep are made: here, in several processes, or on an engine's workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpeft.engine._base import Hosting
from fedpeft.errors import PlanError
from fedpeft.plan import Plan
from fedpeft.spec import describe
from fedpeft.sweep.cluster import Cluster
from fedpeft.sweep.running import Here, Players
from fedpeft.sweep.workers import Where, Workers


@dataclass(frozen=True, slots=True)
class Place:
    """The spec of an engine and what it builds, a device, threads and workers."""

    spec: str
    engine: Any
    device: str = "cpu"
    threads: int | None = None
    workers: int = 1

    @property
    def at_once(self) -> int:
        """How many runs are made at a time, as far as is known before they begin."""
        return self.engine.workers or 1 if isinstance(self.engine, Hosting) else self.workers

    @contextmanager
    def players(
        self, plans: Sequence[Plan], tell: Callable[[int, int, int], None]
    ) -> Iterator[Players]:
        """Start what runs these plans, and others like them; end it with the context.

        Raises ``PlanError`` where there is no such place, ``RunError`` where it does not answer.
        """
        if isinstance(self.engine, Hosting):
            self.engine.check_device(self.device)
            engine, device = self.engine.within()
            with self.engine.hosts(plans) as hosts:
                yield Cluster(hosts, Where(describe(engine), device), tell)
        elif self.workers > 1:
            with Workers(self.workers, Where(self.spec, self.device, self.threads), tell) as found:
                yield found
        else:
            yield Here(self._run)

    def check(self) -> None:
        """Raise ``PlanError`` for workers beside an engine that has its own."""
        if self.workers > 1 and isinstance(self.engine, Hosting):
            raise PlanError(
                f"--workers {self.workers}: the engine says how many runs are made at a time; "
                f"write workers={self.workers} in --engine {self.spec}"
            )
        if self.workers > 1 and not self.spec.startswith("inline"):
            raise PlanError(
                f"--workers {self.workers}: each runs a whole plan by itself; leave out --engine "
                f"{self.spec}, or --workers"
            )

    def _run(self, plan: Plan, out: Path) -> Mapping[str, Any]:
        from fedpeft.driver import simulate

        return simulate(plan, out=out, resume=True, device=self.device, engine=self.engine).table
