"""The entropy coder: bytes to fewer bytes, by asymmetric numeral systems (arXiv 1311.2540).

::

    coded    largest symbol u8 | model u8 | [frequencies, u16 each] | words u32 of the coder's stack

Model 0 holds the frequencies of the symbols from 0 to the largest. Model 1 holds none: blocks of
256, 512, ... 16,384 symbols are coded with the frequencies of those before them. All numbers are
little-endian; the first symbol is on top of the stack. The coder itself is ``constriction``'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import constriction
import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import WireError

Symbols: TypeAlias = NDArray[np.uint8]

_AnsCoder, _Categorical = constriction.stream.stack.AnsCoder, constriction.stream.model.Categorical
_SENT, _ADAPTIVE = 0, 1
_FIRST_BLOCK, _LARGEST_BLOCK = 256, 16_384
_LARGEST_SUM = 1 << 15
"""Frequencies are halved above it, so that a model follows a stream whose statistics change."""


def encode(symbols: Symbols) -> bytes | None:
    """Return the shorter of both codings, or ``None`` where neither is shorter than ``symbols``."""
    if len(symbols) < 8:
        return None
    counts = _block_counts(symbols)
    total = counts.sum(axis=0)
    largest = int(np.flatnonzero(total)[-1])
    counts, total = counts[:, : largest + 1], total[: largest + 1]
    sent = _to_u16(total)
    with_sent = _bits(total, sent) + 16 * len(sent)
    adaptive, cost = list[NDArray[np.int64]](), 0.0
    state = np.zeros(largest + 1, np.int64)
    for block in counts:
        adaptive.append(state)
        cost += _bits(block, 2 * state + 1)
        state = _after(state, block)
    if min(with_sent, cost) + 48 >= 8 * len(symbols):
        return None
    if with_sent <= cost:
        head, models = sent.astype("<u2").tobytes(), [_model(sent)] * len(counts)
    else:
        head, models = b"", [_model(2 * state + 1) for state in adaptive]
    coder = _AnsCoder()
    for (start, end), model in zip(
        reversed([*_blocks(len(symbols))]), reversed(models), strict=True
    ):
        coder.encode_reverse(symbols[start:end].astype(np.int32), model)
    kind = _SENT if head else _ADAPTIVE
    words: NDArray[np.uint32] = coder.get_compressed()
    coded = bytes([largest, kind]) + head + words.astype("<u4").tobytes()
    return coded if len(coded) < len(symbols) else None


def decode(data: bytes | memoryview, count: int) -> Symbols:
    """Return ``count`` symbols, in memory of five times as many bytes. Raises ``WireError``."""
    data = memoryview(data)
    if len(data) < 2 or data[1] not in (_SENT, _ADAPTIVE):
        raise WireError("coded symbols have no known model")
    largest, at = data[0], 2
    size = largest + 1
    fixed = None
    if data[1] == _SENT:
        at += 2 * size
        sent = np.frombuffer(data[2:at] if len(data) >= at else b"", "<u2")
        if len(sent) != size or not sent.any():
            raise WireError("coded symbols lack their frequencies")
        fixed = _model(sent)
    if (len(data) - at) % 4:
        raise WireError("coded symbols are cut off")
    try:
        found = _decoded(np.frombuffer(data[at:], "<u4").astype(np.uint32), count, size, fixed)
    except (KeyboardInterrupt, SystemExit, MemoryError, WireError):
        raise
    except BaseException as error:  # the coder's panics are no Exception
        raise WireError(f"coded symbols cannot be read ({type(error).__name__})") from None
    return found


def _decoded(words: NDArray[np.uint32], count: int, size: int, fixed: Any) -> Symbols:
    coder, found = _AnsCoder(words), np.empty(count, np.uint8)
    state = np.zeros(size, np.int64)
    for start, end in _blocks(count):
        model = fixed or _model(2 * state + 1)
        found[start:end] = coder.decode(model, end - start)
        if not fixed:
            state = _after(state, np.bincount(found[start:end], minlength=size))
    if not coder.is_empty():
        raise WireError("coded symbols go on after the last one")
    return found


def _blocks(count: int) -> Iterator[tuple[int, int]]:
    start, size = 0, _FIRST_BLOCK
    while start < count:
        end = min(count, start + size)
        yield start, end
        start, size = end, min(2 * size, _LARGEST_BLOCK)


def _block_counts(symbols: Symbols) -> NDArray[np.int64]:
    found = [np.bincount(symbols[a:b], minlength=256) for a, b in _blocks(len(symbols))]
    return np.array(found, np.int64)


def _after(state: NDArray[np.int64], block: NDArray[np.int64]) -> NDArray[np.int64]:
    state = state + block
    while state.sum() > _LARGEST_SUM:
        state = state >> 1
    return state


def _to_u16(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Scale frequencies to 16 bits; what occurs keeps at least 1."""
    most = int(counts.max())
    scaled = counts if most < 1 << 16 else counts * ((1 << 16) - 1) // most
    return np.maximum(scaled, np.sign(counts))


def _bits(counts: NDArray[np.int64], weights: NDArray[np.int64]) -> float:
    """Return what symbols of these ``counts`` cost under a model of these ``weights``."""
    there = counts > 0
    shares = weights[there] / weights.sum()
    return float(-(counts[there] * np.log2(shares)).sum()) if there.any() else 0.0


def _model(weights: Sequence[int] | NDArray[np.integer[Any]]) -> Any:
    """Return the coder's model; it gives what has no weight the least it can."""
    values = np.asarray(weights, np.float64)
    if len(values) == 1:  # the coder wants two symbols at least
        values = np.array([values[0], 0.0])
    return _Categorical(values / math.fsum(values), perfect=False)
