"""A worker in an actor of Ray: what it is sent and what it returns, without Ray itself."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from fedpeft.engine._dispatch import requests_of
from fedpeft.errors import PlanError, RunError
from fedpeft.ledger import InProcessLedgers, Ledgers
from fedpeft.memory import Memory, MemoryStore
from fedpeft.plan import PARTS, Plan
from fedpeft.types import Tensors
from fedpeft.wire import Body

if TYPE_CHECKING:
    from fedpeft.engine._parcel import Bytes, Parcel
    from fedpeft.engine._worker import Frame, Worker

Versions: TypeAlias = Mapping[int, Tensors]
Returned: TypeAlias = tuple[list[tuple[str, bytes | None]], dict[str, Versions]]
"""Frames as JSON and bytes, and what clients remember now."""


@dataclass(frozen=True, slots=True)
class Code:
    """Where actors find the modules of a plan's own parts: folders, else the sources themselves."""

    paths: list[str]
    sources: dict[str, str]

    def install(self) -> None:
        """Make the modules importable in this process."""
        sys.path += [p for p in self.paths if p not in sys.path and os.path.isdir(p)]
        for name, source in self.sources.items():
            with contextlib.suppress(ImportError, ValueError):
                if name in sys.modules or importlib.util.find_spec(name):
                    continue
            parent = name.rpartition(".")[0]
            while parent:
                package = sys.modules.setdefault(parent, types.ModuleType(parent))
                package.__path__ = getattr(package, "__path__", [])
                parent = parent.rpartition(".")[0]
            module = sys.modules[name] = types.ModuleType(name)
            exec(compile(source, f"<{name}>", "exec"), vars(module))


class Actor:
    """A worker that is built in its own process and called from another."""

    def __init__(self, code: Code, parcel: Parcel, contents: list[Bytes], device: str) -> None:
        self._code, self._parcel, self._contents, self._device = code, parcel, contents, device
        self._memories = _Carried()
        self._worker: Worker | None = None

    def begin(self) -> Returned:
        """Build the worker."""
        from fedpeft.engine._worker import Worker, broken, ready

        try:
            self._code.install()
            setup = self._parcel.open(self._contents)
            self._worker = Worker(setup, self._memories, self._device)
        except Exception as error:
            return _plain([broken(error)]), {}
        return _plain([ready()]), {}

    def play(self, told: dict[str, Any], body: Bytes, memories: Mapping[str, Versions]) -> Returned:
        """Play a window; return its frames and what its clients remember now."""
        if self._worker is None:
            raise RunError("has not begun")
        self._memories.held = {client: Memory(versions) for client, versions in memories.items()}
        self._memories.saved = {}
        requests = requests_of(told, Body([], [body.data]))
        frames = _plain(self._worker.play(told["what"], requests, told["width"]))
        return frames, {client: m.versions for client, m in self._memories.saved.items()}


@dataclass
class _Carried(MemoryStore):
    """The memories that came with a window, and those that go back; ledgers stay where they are."""

    ledgers: Ledgers = field(default_factory=InProcessLedgers)
    held: dict[str, Memory] = field(default_factory=dict)
    saved: dict[str, Memory] = field(default_factory=dict)

    def load(self, client: str) -> Memory:
        return self.held.get(client, Memory())

    def save(self, client: str, memory: Memory) -> None:
        self.saved[client] = memory

    def settle(self, clients: Iterable[str]) -> None:
        pass


def _plain(frames: Iterable[Frame]) -> list[tuple[str, bytes | None]]:
    return [
        (json.dumps(told), None if body is None else b"".join(body.pieces)) for told, body in frames
    ]


def sources(plan: Plan) -> dict[str, str]:
    """Return the source of each module outside the package that a part of the plan is from.

    Raises ``PlanError`` for a part from the script that runs, which no other process can import.
    """
    found: dict[str, str] = {}
    waiting = [getattr(plan, line) for line in PARTS]
    while waiting:
        part = waiting.pop()
        waiting += getattr(part, "stages", ())
        name = type(part).__module__
        path = getattr(sys.modules.get(name), "__file__", None)
        if not name.startswith(("fedpeft.", "builtins")) and path:
            if name == "__main__":
                raise PlanError(
                    f"engine: ray cannot import {type(part).__name__} from the script that runs; "
                    "put it into a module of its own"
                )
            with open(path, encoding="utf-8") as file:
                found[name] = file.read()
    return found
