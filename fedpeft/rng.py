"""Randomness is derived from names, never carried along.

The same names give the same stream on every machine, so the order in which clients run, the number
of processes and the engine change nothing.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def derive(seed: int, *names: int | str) -> np.random.Generator:
    """Return the generator that belongs to ``names`` under ``seed``.

    Names are hashed with their types and lengths, so ``("a", "bc")`` and ``("ab", "c")`` differ.
    """
    return np.random.Generator(np.random.PCG64(_digest(seed, *names)))


def derive_seed(seed: int, *names: int | str) -> int:
    """Return 63 bits for ``names``, for generators that take one integer (torch's)."""
    return _digest(seed, *names) & (2**63 - 1)


def counted(key: int, stream: int = 0) -> np.random.Philox:
    """Return a generator that counts, for a ``key`` and ``stream`` of 64 bits that were sent.

    Its raw words are specified (Philox4x64-10), so every machine and version draws the same.
    """
    return np.random.Philox(key=key, counter=stream << 192)


def keyed(key: bytes) -> np.random.Generator:
    """Return the generator of a secret ``key``: a counter under the first 128 bits of it."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))


def halves(words: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """Return the two halves of each raw word, the lower first, on every machine."""
    return words.astype("<u8", copy=False).view("<u4").astype(np.uint32, copy=False)


def _digest(*names: int | str) -> int:
    text = "\0".join(f"{type(n).__name__}:{len(str(n))}:{n}" for n in names)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def derived(key: bytes, purpose: str) -> bytes:
    """Return a key of its own for ``purpose``, from a secret ``key`` of 32 bytes."""
    return hashlib.shake_256(b"%d:%b%b" % (len(key), key, purpose.encode())).digest(32)
