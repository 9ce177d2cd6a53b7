"""The entropy coder: bytes to fewer bytes, by asymmetric numeral systems (arXiv 1311.2540).

::

    coded    largest symbol u8 | model u8 | [frequencies, u16 each] | words u32 of the coder's stack

Model 0 holds the frequencies of the symbols from 0 to the largest. Any other model holds none: its
symbols are coded in blocks with the frequencies of those before them. It is the number of classes
that runs of 128 symbols are sorted into: an update has parts that are denser than others, and each
class has frequencies of its own. All numbers are little-endian; the first symbol is on top of the
stack. The coder itself is ``constriction``'s. ``docs/wire.md`` has the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import constriction
import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import WireError

Symbols: TypeAlias = NDArray[np.uint8]
_Counts: TypeAlias = NDArray[np.integer[Any]]

_AnsCoder, _Categorical = constriction.stream.stack.AnsCoder, constriction.stream.model.Categorical
_SENT, _ONE, _SEVERAL, _MOST = 0, 1, 4, 16
_FEWEST = 8
"""Symbols that are worth the two bytes of a model at all."""
_FIRST_BLOCK, _LARGEST_BLOCK = 32, 2048
_LARGEST_SUM = 1 << 15
"""Frequencies are halved above it, so that a model follows a stream whose statistics change."""
_RUN, _FEWEST_RUNS = 128, 32
_LOOKED_AT, _ROUNDS = 1024, 8
"""Runs that the classes are found from, and how often they are looked at."""


@dataclass(frozen=True, eq=False)
class _Part:
    """Symbols from 0 to ``size`` - 1 that are coded together, block by block."""

    symbols: Symbols
    size: int

    @cached_property
    def states(self) -> _Counts:
        """The frequencies before each block, and after the last."""
        state: _Counts = np.zeros(self.size, np.int32)
        found = [state]
        for counts in self.counts:
            state = _after(state, counts)
            found.append(state)
        return np.array(found, np.int32)

    @property
    def bits(self) -> float:
        """What it costs where each block is coded with the frequencies before it."""
        weights = 2 * self.states[:-1] + 1
        sums = np.dot(self.counts.sum(axis=1), np.log2(weights.sum(axis=1)))
        logs = np.log2(weights, dtype=np.float32)
        logs *= self.counts
        return float(sums - logs.sum(dtype=np.float64))

    @cached_property
    def counts(self) -> _Counts:
        """How often each symbol occurs in each block."""
        blocks = _blocks(len(self.symbols))
        found = [np.bincount(self.symbols[a:b], minlength=self.size) for a, b in blocks]
        return np.array(found, np.int32).reshape(-1, self.size)


def encode(symbols: Symbols) -> bytes | None:
    """Return the shortest coding, or ``None`` where none is shorter than ``symbols``.

    Holds up to six times as many bytes as there are symbols.
    """
    if len(symbols) < _FEWEST:
        return None
    whole = _Part(symbols, int(symbols.max()) + 1)
    total = whole.counts.sum(axis=0, dtype=np.int64)
    sent = _to_u16(total)
    found = [(_bits(total, sent) + 16 * whole.size, _SENT, [whole]), (whole.bits, _ONE, [whole])]
    if parts := _sorted(whole, _SEVERAL):
        found.append((sum(part.bits for part in parts), _SEVERAL, parts))
    cost, model, parts = min(found, key=lambda each: each[:2])
    if cost + 8 * _FEWEST >= 8 * len(symbols):
        return None
    coder, head = _AnsCoder(), b""
    if model == _SENT:
        head, fixed = sent.astype("<u2").tobytes(), _model(sent)
        for start, end in reversed([*_blocks(len(symbols))]):
            coder.encode_reverse(symbols[start:end].astype(np.int32), fixed)
    else:
        for part in reversed(parts):
            _push(coder, part)
    words: NDArray[np.uint32] = coder.get_compressed()
    coded = bytes([whole.size - 1, model]) + head + words.astype("<u4").tobytes()
    return coded if len(coded) < len(symbols) else None


def decode(data: bytes | memoryview, count: int) -> Symbols:
    """Return ``count`` symbols, in memory of three times as many bytes. Raises ``WireError``."""
    data = memoryview(data)
    if len(data) < 2 or data[1] > _MOST:
        raise WireError("coded symbols have no known model")
    size, model, at = data[0] + 1, data[1], 2
    fixed = None
    if model == _SENT:
        at += 2 * size
        sent = np.frombuffer(data[2:at] if len(data) >= at else b"", "<u2")
        if len(sent) != size or not sent.any():
            raise WireError("coded symbols lack their frequencies")
        fixed = _model(sent)
    if (len(data) - at) % 4:
        raise WireError("coded symbols are cut off")
    words = np.frombuffer(data[at:], "<u4").astype(np.uint32)
    try:
        coder = _AnsCoder(words)
        if fixed is None:
            found = _popped(coder, count, size, model)
        else:
            found = np.empty(count, np.uint8)
            for start, end in _blocks(count):
                found[start:end] = coder.decode(fixed, end - start)
        empty = bool(coder.is_empty())
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the coder's panics are no Exception
        raise WireError(f"coded symbols cannot be read ({type(error).__name__})") from None
    if not empty:
        raise WireError("coded symbols go on after the last one")
    return found


def _popped(coder: Any, count: int, size: int, classes: int) -> Symbols:
    """Take symbols off the stack: the class of each whole run, then class by class."""
    if classes == _ONE:
        return _pop(coder, count, size)
    runs = count // _RUN
    labels = _pop(coder, runs, classes)
    found = np.empty(count, np.uint8)
    whole, rest = found[: runs * _RUN].reshape(runs, _RUN), found[runs * _RUN :]
    for label in range(classes):
        of = labels == label
        in_runs = _RUN * int(of.sum())
        part = _pop(coder, in_runs + (0 if label else len(rest)), size)
        whole[of] = part[:in_runs].reshape(-1, _RUN)
        if not label:
            rest[:] = part[in_runs:]
    return found


def _sorted(part: _Part, classes: int) -> list[_Part]:
    """Return what :func:`_popped` takes off; nothing where there are too few runs to gain."""
    symbols, runs = part.symbols, len(part.symbols) // _RUN
    if runs < _FEWEST_RUNS:
        return []
    whole, rest = symbols[: runs * _RUN].reshape(runs, _RUN), symbols[runs * _RUN :]
    labels = _labels(whole, part.size, classes)
    found = [whole[labels == label].reshape(-1) for label in range(classes)]
    found[0] = np.concatenate([found[0], rest])
    return [_Part(labels, classes), *(_Part(of, part.size) for of in found)]


def _labels(runs: Symbols, size: int, classes: int) -> Symbols:
    """Sort runs into classes of like frequencies: k-means with the cost in bits as the distance."""
    looked_at = runs[:: -(-len(runs) // _LOOKED_AT)]
    seen = _run_counts(looked_at, size).astype(np.float32)
    usual = int(seen.sum(axis=0).argmax())
    labels = np.empty(len(seen), np.intp)
    labels[np.argsort(seen[:, usual], kind="stable")] = np.arange(len(seen)) * classes // len(seen)
    for _ in range(_ROUNDS):
        of = labels == np.arange(classes)[:, None]
        weights = of.astype(np.float32) @ seen + np.float32(0.5)
        costs = -np.log2(weights / weights.sum(axis=1, keepdims=True)).T
        rare = -np.log2((of.sum(axis=1) + np.float32(0.5)) / len(seen))
        labels = (seen @ costs + rare).argmin(axis=1)
    found = np.empty(len(runs), np.uint8)
    for start in range(0, len(runs), _LOOKED_AT):
        some = _run_counts(runs[start : start + _LOOKED_AT], size).astype(np.float32)
        found[start : start + _LOOKED_AT] = (some @ costs + rare).argmin(axis=1)
    return found


def _run_counts(runs: Symbols, size: int) -> _Counts:
    at = runs + (size * np.arange(len(runs)))[:, None]
    return np.bincount(at.reshape(-1), minlength=size * len(runs)).reshape(-1, size)


def _push(coder: Any, part: _Part) -> None:
    blocks = [*_blocks(len(part.symbols))]
    for (start, end), state in zip(reversed(blocks), part.states[-2::-1], strict=True):
        coder.encode_reverse(part.symbols[start:end].astype(np.int32), _model(2 * state + 1))


def _pop(coder: Any, count: int, size: int) -> Symbols:
    found = np.empty(count, np.uint8)
    state: _Counts = np.zeros(size, np.int64)
    for start, end in _blocks(count):
        block = coder.decode(_model(2 * state + 1), end - start)
        found[start:end] = block
        state = _after(state, np.bincount(block, minlength=size))
    return found


def _blocks(count: int) -> Iterator[tuple[int, int]]:
    start, size = 0, _FIRST_BLOCK
    while start < count:
        end = min(count, start + size)
        yield start, end
        start, size = end, min(2 * size, _LARGEST_BLOCK)


def _after(state: _Counts, block: _Counts) -> _Counts:
    state = state + block
    return state >> 1 if state.sum() > _LARGEST_SUM else state


def _to_u16(counts: _Counts) -> _Counts:
    """Scale frequencies to 16 bits; what occurs keeps at least 1."""
    most = int(counts.max())
    scaled = counts if most < 1 << 16 else counts * ((1 << 16) - 1) // most
    return np.maximum(scaled, np.sign(counts))


def _bits(counts: _Counts, weights: _Counts) -> float:
    """Return what symbols of these ``counts`` cost under a model of these ``weights``."""
    there = counts > 0
    shares = weights[there] / weights.sum()
    return float(-(counts[there] * np.log2(shares)).sum())


def _model(weights: Sequence[int] | NDArray[np.integer[Any]]) -> Any:
    """Return the coder's model; it gives what has no weight the least it can.

    Whole weights have exact sums in float64, so the model is the same on every machine.
    """
    values = np.asarray(weights, np.float64)
    if len(values) == 1:  # the coder wants two symbols at least
        values = np.array([values[0], 0.0])
    return _Categorical(values, perfect=False)
