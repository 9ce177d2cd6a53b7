"""One block of memory that processes of a machine share: written by one, mapped by the others."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from multiprocessing import reduction
from typing import Any

import numpy as np

from fedpeft.engine._parcel import Bytes, Parcel, bytes_of, pack, tensor_of
from fedpeft.errors import RunError

_ALIGN = 64
"""Where arrays start: as torch aligns them, so that no kernel takes another path."""


@dataclass(frozen=True, slots=True)
class Map:
    """Where each array lies in the block."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    total: int

    @classmethod
    def of(cls, sizes: Sequence[int]) -> Map:
        """Lay arrays of ``sizes`` out one after the other."""
        ends = list(accumulate((-(-size // _ALIGN) * _ALIGN for size in sizes), initial=0))
        return cls(tuple(ends[:-1]), tuple(sizes), max(ends[-1], mmap.PAGESIZE))

    def views(self, memory: mmap.mmap) -> list[Bytes]:
        """Return the arrays."""
        whole = np.frombuffer(memory, np.uint8)
        return [whole[at : at + size] for at, size in zip(self.starts, self.sizes, strict=True)]

    def open(self, descriptor: int) -> list[Bytes]:
        """Map the block; what this process writes stays its own. The descriptor is closed."""
        try:
            return self.views(mmap.mmap(descriptor, self.total, access=mmap.ACCESS_COPY))
        finally:
            os.close(descriptor)


class Block:
    """The block of an object; close it once all processes that shall map it have started."""

    def __init__(self, found: object) -> None:
        parcel, tensors, arrays = pack(found)
        self.parcel: Parcel = parcel
        sizes = [t.numel() * t.element_size() for t in tensors] + [a.nbytes for a in arrays]
        self.map = Map.of(sizes)
        self.descriptor = _memory(self.map.total)
        views = self.map.views(mmap.mmap(self.descriptor, self.map.total))
        for tensor, view in zip(tensors, views, strict=False):
            view[:] = bytes_of(tensor)
            if tensor.device.type == "cpu":  # its own copy goes: one is enough
                tensor.data = tensor_of(view, tensor.dtype, tensor.shape)
        for array, view in zip(arrays, views[len(tensors) :], strict=True):
            view[:] = array

    def handed_on(self) -> _Descriptor:
        """Return the descriptor as an argument of a process that starts."""
        return _Descriptor(self.descriptor)

    def close(self) -> None:
        """Let go of the block; what is mapped stays."""
        os.close(self.descriptor)


class _Descriptor:
    """A file descriptor that arrives as one of the process that is started with it."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> tuple[Any, ...]:
        duplicate: Any = reduction.DupFd
        return _arrived, (duplicate(self._number),)


def _arrived(duplicate: Any) -> int:
    return int(duplicate.detach())


def _memory(size: int) -> int:
    """Return a descriptor of memory without a name, whatever the size of /dev/shm."""
    try:
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("fedpeft")
        else:
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        os.ftruncate(descriptor, size)
        with contextlib.suppress(AttributeError):
            os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f"engine: no {size / 1e9:.1f} GB of memory to share ({reason})") from None
    return descriptor
