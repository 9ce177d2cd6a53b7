"""What a client keeps between rounds (control variates, a private head); it never leaves it.

What a round wrote counts only once a later broadcast shows that the reply arrived. So a memory
holds the version of the latest round and the last one known to be acknowledged; and the one
acknowledged before that, for a server that goes back to its last checkpoint but one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from fedpeft.durable import file_name, settle, write_pending
from fedpeft.errors import DamagedError, RunError
from fedpeft.ledger import InProcessLedgers, Ledgers, OnDiskLedgers
from fedpeft.tensor_file import read_tensor_file, tensor_bytes
from fedpeft.tensors import prefixed, select
from fedpeft.types import Tensors

NEVER = -1
"""The acknowledgement a client gets before any of its replies was used."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Versions by the round that wrote them: at most three."""

    versions: Mapping[int, Tensors] = field(default_factory=dict)

    def at(self, acknowledged: int, client: str) -> Tensors:
        """Return what holds if the server last used the reply of round ``acknowledged``.

        Raises ``RunError`` where this memory is lost or belongs to another history of the run.
        """
        if acknowledged == NEVER:
            return {}
        if acknowledged not in self.versions:
            raise RunError(
                f"client {client}: the server knows round {acknowledged}, its memory holds "
                f"{sorted(self.versions)}; restore the client's memory or start a new run"
            )
        return self.versions[acknowledged]

    def after(self, acknowledged: int, round: int, tensors: Tensors, once: str = "") -> Memory:
        """Return the memory once ``round`` has written ``tensors``.

        What lies under ``once/`` is of use in that round alone, and is not kept of older ones.
        """
        kept = sorted(version for version in self.versions if version <= acknowledged)[-2:]
        older: dict[int, Tensors] = {}
        for version in kept:
            held = self.versions[version]
            older[version] = {k: v for k, v in held.items() if k.partition("/")[0] != once}
        return Memory({**older, round: tensors})


class MemoryStore(Protocol):
    """Where the memories of the clients of one process are; ``ledgers``: what they have spent."""

    ledgers: Ledgers

    def load(self, client: str) -> Memory:
        """Return a client's memory; an empty one where there is none."""
        ...

    def save(self, client: str, memory: Memory) -> None:
        """Keep it."""
        ...

    def settle(self, clients: Iterable[str]) -> None:
        """Make what was saved for ``clients``, by any process, outlive a power cut."""
        ...


def earlier(store: MemoryStore, client: str, round: int) -> dict[int, Tensors]:
    """Return what came before ``round``: later versions are of a course that was given up."""
    held = store.load(client).versions
    return {version: tensors for version, tensors in held.items() if version < round}


class InProcess:
    """Memories that end with the process."""

    def __init__(self) -> None:
        self._held: dict[str, Memory] = {}
        self.ledgers: Ledgers = InProcessLedgers()

    def load(self, client: str) -> Memory:
        """Return a client's memory."""
        return self._held.get(client, Memory())

    def save(self, client: str, memory: Memory) -> None:
        """Keep it."""
        self._held[client] = memory

    def settle(self, clients: Iterable[str]) -> None:
        """Do nothing."""


class OnDisk:
    """One file per client, replaced atomically.

    What is saved outlives its process at once. It outlives a power cut, too, unless ``deferred``:
    then only once it is settled, all clients of a round together, which takes a fraction of the
    time. Until then it lies in a second file, so that the settled one stays whole; whoever
    acknowledges a round settles it first.
    """

    def __init__(self, folder: Path, *, deferred: bool = False) -> None:
        self.folder, self.deferred = folder, deferred
        self.ledgers: Ledgers = OnDiskLedgers(folder / "ledgers")

    def load(self, client: str) -> Memory:
        """Return a client's memory. Raises ``RunError`` where its file is damaged."""
        settled, pending = self._paths(client)
        remedy = "restore the client's memory or start a new run"
        held, note = None, dict[str, Any]()
        if pending.exists():
            try:
                held, note = read_tensor_file(pending, remedy)
            except DamagedError:  # by a power cut: nobody has relied on it, nor ever must
                pending.unlink(missing_ok=True)
        if held is None and settled.exists():
            held, note = read_tensor_file(settled, remedy)
        if held is None:
            return Memory()
        return Memory({int(version): select(held, version) for version in note["versions"]})

    def save(self, client: str, memory: Memory) -> None:
        """Keep it; an empty memory needs no file. Raises ``RunError`` where the disk is full."""
        flat: dict[str, NDArray[Any]] = {}
        for version, tensors in memory.versions.items():
            flat |= prefixed(str(version), tensors)
        if not memory.versions:
            return
        note = {"versions": [str(version) for version in memory.versions]}
        _, pending = self._paths(client)
        write_pending(pending, tensor_bytes(flat, note), "memory")
        if not self.deferred:
            self.settle([client])

    def settle(self, clients: Iterable[str]) -> None:
        """Make what was saved for ``clients``, by any process, outlive a power cut.

        Raises ``RunError`` where the disk fails.
        """
        paths = (self._paths(client) for client in clients)
        settle({pending: settled for settled, pending in paths if pending.exists()}, "memory")

    def _paths(self, client: str) -> tuple[Path, Path]:
        name = file_name(client)
        return self.folder / f"{name}.safetensors", self.folder / f"{name}.pending"
