"""What a client keeps between rounds (control variates, a private head); it never leaves it.

What a round wrote counts only once a later broadcast shows that the reply arrived. So a memory
holds the version of the latest round and the last one known to be acknowledged; and the one
acknowledged before that, for a server that goes back to its last checkpoint but one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from fedpeft.errors import RunError
from fedpeft.tensor_file import read_tensor_file, write_tensor_file
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

    def after(self, acknowledged: int, round: int, tensors: Tensors) -> Memory:
        """Return the memory once ``round`` has written ``tensors``."""
        kept = sorted(version for version in self.versions if version <= acknowledged)[-2:]
        return Memory({**{version: self.versions[version] for version in kept}, round: tensors})


class MemoryStore(Protocol):
    """Where the memories of the clients of one process are."""

    def load(self, client: str) -> Memory:
        """Return a client's memory; an empty one where there is none."""
        ...

    def save(self, client: str, memory: Memory) -> None:
        """Keep it."""
        ...


class InProcess:
    """Memories that end with the process."""

    def __init__(self) -> None:
        self._held: dict[str, Memory] = {}

    def load(self, client: str) -> Memory:
        """Return a client's memory."""
        return self._held.get(client, Memory())

    def save(self, client: str, memory: Memory) -> None:
        """Keep it."""
        self._held[client] = memory


class OnDisk:
    """One file per client, replaced atomically."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, client: str) -> Memory:
        """Return a client's memory. Raises ``RunError`` where its file is damaged."""
        path = self._path(client)
        if not path.exists():
            return Memory()
        remedy = "restore the client's memory or start a new run"
        held, note = read_tensor_file(path, remedy)
        return Memory({int(version): select(held, version) for version in note["versions"]})

    def save(self, client: str, memory: Memory) -> None:
        """Keep it; an empty memory needs no file."""
        flat: dict[str, NDArray[Any]] = {}
        for version, tensors in memory.versions.items():
            flat |= prefixed(str(version), tensors)
        if memory.versions:
            note = {"versions": [str(version) for version in memory.versions]}
            write_tensor_file(self._path(client), flat, note, "memory")

    def _path(self, client: str) -> Path:
        plain = re.sub(r"[^A-Za-z0-9._-]", "_", client)[:60]
        digest = hashlib.blake2b(client.encode(), digest_size=6).hexdigest()
        return self._folder / f"{plain}-{digest}.safetensors"
