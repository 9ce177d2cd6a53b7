"""Clients in actors of a Ray cluster (Moritz et al. 2018, arXiv 1712.05889): GPUs and machines.

Base and tokenised texts lie in the object store, once per node, and a client's memory moves with
its task, so that machines need to share no folder. A sweep has whole runs made there instead.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import Any

import numpy as np

from fedpeft.engine._actor import Actor, Code, Returned, Versions, sources
from fedpeft.engine._base import Engine, Hosts, Stage
from fedpeft.engine._cluster import first_line, imported, join
from fedpeft.engine._dispatch import Broken, Died, Dispatch, Event, Ready, Window, event_of
from fedpeft.engine._grouped import Grouped
from fedpeft.engine._ray_hosts import Host, RayHosts
from fedpeft.engine.inline import Inline
from fedpeft.errors import PlanError, RunError
from fedpeft.memory import Memory
from fedpeft.plan import Plan
from fedpeft.spec import bounded, method
from fedpeft.types import Tensors
from fedpeft.wire import Body

_PATIENCE = 60.0
"""Seconds after which the user is told that no worker has a place yet."""


@method
class Ray(Grouped):
    """Actors with ``num_cpus`` and ``num_gpus`` each; see :class:`Grouped` for the other fields.

    ``address`` (``"auto"`` or ``host:port``) joins a cluster; without one, a Ray of this machine
    alone is started, and ended with the run. By default there are as many ``workers`` as the
    cluster holds, each with the command line's ``--threads`` of torch, else ``num_cpus``
    ``threads``.
    """

    num_cpus: float = bounded(default=1, above=0)
    num_gpus: float = bounded(default=0, low=0)
    address: str | None = None
    workers: int | None = bounded(default=None, low=1)
    threads: int | None = bounded(default=None, low=1)

    def made_with(self) -> dict[str, int | str]:
        """Return what decides the last bits of a run beside its plan."""
        return {**super().made_with(), "threads": self._threads}

    def check_device(self, device: str) -> None:
        """Raise ``PlanError`` where clients would train, or be measured, on another kind."""
        gpu = device.startswith("cuda")
        if gpu and not self.num_gpus:
            raise PlanError(
                f"engine: ray(num_gpus=0) trains on CPUs, not on --device {device}; give num_gpus, "
                "or leave --device out"
            )
        if self.group == "auto" and self.num_gpus and not gpu:
            raise PlanError(
                "engine: ray(group='auto') is measured by this process, which has no GPU; give "
                "group a number, or run with --device cuda"
            )

    @contextmanager
    def start(self, stage: Stage) -> Iterator[Engine]:
        """Join or start Ray; leave or end it with the context.

        Raises ``PlanError`` for more than the cluster has, ``RunError`` where none answers.
        """
        from fedpeft.engine._parcel import bytes_of, pack
        from fedpeft.engine._player import Player
        from fedpeft.engine._worker import Setup

        if stage.site.plan.privacy.hides and stage.site.plan.privacy.secret:
            raise PlanError(
                "ray: clients write down what they spend of their privacy on the machine that has "
                "the run folder; use --engine processes, or say simulate_noise=true"
            )
        with ExitStack() as stack:
            ray, size = self._joined(stack)
            grouping, keep = self.grouping(stage), partial(self.keep, stage)
            player = Player(stage.site, stage.memories, grouping, stage.warn, keep=keep)
            setup = Setup.of(stage.site, player.grouping, self._threads, far=True)
            parcel, tensors, arrays = pack(setup)
            contents = ray.put([*map(bytes_of, tensors), *arrays])
            code = Code([os.getcwd(), *sys.path], sources(stage.site.plan))
            made, place = self._made(ray, Actor), self._device
            crew = _Crew(ray, lambda: made.remote(code, parcel, contents, place), stage, size)
            stack.enter_context(closing(crew))
            yield Dispatch(stage, player, crew)

    @contextmanager
    def hosts(self, plans: Iterable[Plan]) -> Iterator[Hosts]:
        """Join or start Ray for whole runs, one at a time on each worker; see ``_base.Hosting``.

        Raises ``PlanError`` for more than the cluster has, ``RunError`` where none answers.
        """
        with ExitStack() as stack:
            ray, size = self._joined(stack)
            found = {name: text for plan in plans for name, text in sources(plan).items()}
            code, made = Code([os.getcwd(), *sys.path], found), self._made(ray, Host)
            hosts = RayHosts(ray, lambda: made.remote(code, os.getcwd(), self._threads), size)
            yield stack.enter_context(closing(hosts))

    def within(self) -> tuple[Inline, str]:
        """Return the engine of a run on a worker, and the device; see ``_base.Hosting``."""
        engine = Inline(group=self.group, memory=self.memory, checkpointing=self.checkpointing)
        return engine, self._device

    @property
    def _device(self) -> str:
        return "cuda" if self.num_gpus else "cpu"

    @property
    def _threads(self) -> int:
        return self.threads or max(1, int(self.num_cpus))

    def _joined(self, stack: ExitStack) -> tuple[Any, int]:
        """Return Ray, joined until the end of the stack, and how many workers to start."""
        ray = imported()
        if not ray.is_initialized():
            stack.callback(ray.shutdown)
            join(ray, self.address)
        return ray, self._fitting([node["Resources"] for node in ray.nodes() if node["Alive"]])

    def _made(self, ray: Any, actor: type[Any]) -> Any:
        """Return what makes actors of a class, each on the resources of a worker."""
        return ray.remote(actor).options(
            num_cpus=self.num_cpus, num_gpus=self.num_gpus, scheduling_strategy="SPREAD"
        )

    def _fitting(self, nodes: list[Mapping[str, float]]) -> int:
        """Return how many workers to start on these nodes."""
        for name, key, asked in (
            ("num_cpus", "CPU", self.num_cpus),
            ("num_gpus", "GPU", self.num_gpus),
        ):
            most = max((node.get(key, 0.0) for node in nodes), default=0.0)
            if asked > most:
                has = f"the largest has {most:g}" if most else "none has any"
                raise PlanError(
                    f"engine: ray({name}={asked:g}) asks for more {key}s than a node has; {has}"
                )
        room = sum(
            min(
                int(node.get("CPU", 0.0) / self.num_cpus),
                int(node.get("GPU", 0.0) / self.num_gpus) if self.num_gpus else sys.maxsize,
            )
            for node in nodes
        )
        if (self.workers or 1) > room:
            raise PlanError(
                f"engine: ray(workers={self.workers}) do not fit the cluster, which has room for "
                f"{room} of num_cpus={self.num_cpus:g}, num_gpus={self.num_gpus:g}"
            )
        return self.workers or room


class _Crew:
    """See ``_dispatch.Crew``; every task of an actor is a window and returns all its frames."""

    def __init__(self, ray: Any, make: Any, stage: Stage, size: int) -> None:
        self._ray, self._make, self._stage, self.size = ray, make, stage, size
        self._actors: dict[int, Any] = {}
        self._tasks: dict[Any, int] = {}
        self._events: deque[tuple[int, Event]] = deque()
        self._body: tuple[Body | None, Any] = (None, None)
        self._begun = False
        for number in range(size):
            self.restart(number)

    def hand(self, number: int, window: Window, width: int) -> None:
        """Submit a window with the memories of its clients."""
        if self._body[0] is not window.body:
            joined = np.frombuffer(b"".join(window.body.pieces), np.uint8)
            self._body = window.body, self._ray.put(joined)
        memories = {}
        if self._stage.site.tables.stores:
            memories = {c: self._stage.memories.load(c).versions for c, _ in window.requests}
        play = self._actors[number].play
        self._tasks[play.remote(window.told(width), self._body[1], memories)] = number

    def next(self) -> tuple[int, Event]:
        """Return what the next task to end has told, one thing after the other."""
        while not self._events:
            ended, _ = self._ray.wait(list(self._tasks), timeout=_PATIENCE)
            if ended:
                self._take(self._tasks.pop(ended[0]), ended[0])
            elif not self._begun:
                self._stage.warn("no worker could start yet: the cluster is busy, or starts nodes")
        return self._events.popleft()

    def restart(self, number: int) -> None:
        """Start an actor, in the place of a dead one if there was one."""
        self._kill(number)
        self._actors[number] = self._make()
        self._tasks[self._actors[number].begin.remote()] = number

    def close(self) -> None:
        """End the actors."""
        for number in list(self._actors):
            self._kill(number)

    def _kill(self, number: int) -> None:
        if number in self._actors:
            with contextlib.suppress(Exception):  # it is gone already
                self._ray.kill(self._actors.pop(number))

    def _take(self, number: int, task: Any) -> None:
        errors = self._ray.exceptions
        try:
            returned: Returned = self._ray.get(task)
        except errors.RayTaskError as error:
            reason = str(error).strip().splitlines()[-1]
            broken = Broken(RunError(f"a worker failed: {reason}"))
            self._events += [(number, broken), (number, Ready(None, ()))]
            return
        except errors.RayError as error:
            self._events.append((number, Died(first_line(error))))
            return
        self._begun, (frames, memories) = True, returned
        for client, versions in memories.items():
            self._stage.memories.save(client, Memory(_copied(versions)))
        self._events += [(number, event_of(json.loads(told), body)) for told, body in frames]


def _copied(versions: Versions) -> dict[int, Tensors]:
    """Return memory of this process's own: what came lies in the object store as long as used."""
    return {
        version: {name: value.copy() for name, value in tensors.items()}
        for version, tensors in versions.items()
    }
