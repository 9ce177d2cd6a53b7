"""A process that plays clients for another: what it is given, and what it answers."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from fedpeft.engine._player import Player, Request
from fedpeft.errors import FedPeftError, PlanError
from fedpeft.federation import Federation
from fedpeft.grouping import Grouping
from fedpeft.memory import MemoryStore
from fedpeft.models._attention import suit_attention
from fedpeft.plan import Plan
from fedpeft.site import Site, Texts
from fedpeft.tokens import Tokens
from fedpeft.types import Example, Tensors
from fedpeft.wire import Body

if TYPE_CHECKING:
    from fedpeft.models._base import Base

Frame: TypeAlias = tuple[dict[str, Any], Body | None]
"""What a worker tells, as JSON, and the body of a reply where it is one."""

_OFTEN = 0.2
"""Seconds between two words about steps."""


@dataclass(frozen=True, slots=True)
class Setup:
    """All a worker needs to stand in for the process that started it."""

    lines: dict[str, Any]
    federation: Federation
    texts: Texts
    base: Base
    initial: Tensors
    grouping: Grouping
    threads: int

    @classmethod
    def of(cls, site: Site, grouping: Grouping, threads: int, *, far: bool = False) -> Setup:
        """Describe ``site``; for a worker that is ``far``, without any path of this machine."""
        texts = Texts(_held(site.texts.train), _held(site.texts.test)) if far else site.texts
        lines, federation = site.plan.lines(), site.federation
        return cls(lines, federation, texts, site.base, site.initial, grouping, threads)


class Worker:
    """Plays clients on a base that it shares with others.

    ``tell`` is given what the training steps see as they go; else the frames say it in the end.
    """

    def __init__(
        self,
        setup: Setup,
        memories: MemoryStore,
        device: str,
        tell: Callable[[Frame], None] | None = None,
    ) -> None:
        import torch

        torch.set_num_threads(setup.threads)
        base = replace(setup.base, model=setup.base.model.to(device))
        suit_attention(base.model, torch.device(device))
        plan = Plan.from_lines(setup.lines)
        self._warnings: list[str] = []
        warn = self._warnings.append
        self._site = Site(plan, setup.federation, device, setup.texts, base=base, warn=warn)
        self._site.initial = setup.initial
        self._tell, self._seen, self._told_at = tell, 0, 0.0
        self._player = Player(self._site, memories, setup.grouping, warn, self._step)

    def play(self, what: str, requests: Sequence[Request], width: int) -> Iterator[Frame]:
        """Have clients ``train`` or ``evaluate``, at most ``width`` of them in a pass.

        The last frame says that the worker is ready for more.
        """
        self._player.grouping = replace(self._player.grouping, width=width)
        try:
            yield from self._evaluated(requests) if what == "evaluate" else self._trained(requests)
        except Exception as error:
            yield broken(error)
        if self._seen:
            yield self._counted()
        yield ready(self._player.grouping.width, self._warnings)
        self._warnings.clear()

    def _step(self, records: int) -> None:
        self._seen += records
        if self._tell and time.monotonic() - self._told_at > _OFTEN:
            self._told_at = time.monotonic()
            self._tell(self._counted())

    def _counted(self) -> Frame:
        records, self._seen = self._seen, 0
        return {"kind": "seen", "records": records}, None

    def _trained(self, requests: Sequence[Request]) -> Iterator[Frame]:
        for client, reply in self._player.exchange(requests):
            if isinstance(reply, FedPeftError):
                yield {"kind": "failed", "client": client, **_told(reply)}, None
            else:
                told = {"kind": "reply", "client": client, "head": reply.head.decode()}
                yield told, reply.body

    def _evaluated(self, requests: Sequence[Request]) -> Iterator[Frame]:
        for client, metrics in self._player.evaluate(requests):
            numbers = {name: float(value) for name, value in metrics.items()}
            yield {"kind": "metrics", "client": client, "metrics": numbers}, None


def ready(width: int | None = None, warnings: Sequence[str] = ()) -> Frame:
    """Say that a worker waits for a window."""
    return {"kind": "ready", "width": width, "warnings": list(warnings)}, None


def broken(error: Exception) -> Frame:
    """Say what ended a window, and where."""
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, FedPeftError):
        return {"kind": "broken", **_told(error), "trace": trace}, None
    last = (traceback.extract_tb(error.__traceback__) or [None])[-1]
    place = f" ({Path(last.filename).name}:{last.lineno}, in {last.name})" if last else ""
    reason = " ".join(str(error).split())
    text = f"a worker failed: {type(error).__name__}{': ' if reason else ''}{reason}{place}"
    return {"kind": "broken", "error": "RunError", "problems": [text], "trace": trace}, None


def end_with_parent() -> None:
    """Have this process end with the one that started it, however that ends.

    Nobody else would see to it: a worker is the child of the server that forks workers.
    """
    from multiprocessing import parent_process
    from multiprocessing.connection import wait

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = parent_process()
    if parent is None:
        return

    def watch(sentinel: int) -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=[parent.sentinel], daemon=True).start()


def cores() -> int:
    """Return how many processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _told(error: FedPeftError) -> dict[str, Any]:
    problems = error.problems if isinstance(error, PlanError) else (str(error),)
    return {"error": type(error).__name__, "problems": list(problems)}


def _held(texts: Sequence[Example]) -> Sequence[Example]:
    """Return tokens that are sent as arrays, not as a file of the cache."""
    return Tokens(texts.columns, len(texts)) if isinstance(texts, Tokens) else texts
