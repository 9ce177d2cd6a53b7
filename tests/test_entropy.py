"""The entropy coder against a decoder in plain Python that knows ``docs/wire.md`` alone."""

from __future__ import annotations

import tracemalloc
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft import entropy
from fedpeft.entropy import Symbols, decode, encode
from fedpeft.errors import WireError

ONE = 1 << 24


class Stack:
    """The coder's stack: words of 32 bits, a state of 64, probabilities of 24."""

    def __init__(self, words: Sequence[int]) -> None:
        self.words, self.state = list(words), 0
        self._fill()
        self._fill()

    def _fill(self) -> None:
        if self.words and self.state < 1 << 32:
            self.state = self.state << 32 | self.words.pop()

    def pop(self, weights: Sequence[int]) -> int:
        weights = [*weights, 0] if len(weights) == 1 else weights
        starts, below = list[int](), 0
        for n, weight in enumerate(weights):
            starts.append(int(float(below) * ((ONE - len(weights)) / float(sum(weights)))) + n)
            below += weight
        at = self.state % ONE
        symbol = bisect_right(starts, at) - 1
        width = [*starts, ONE][symbol + 1] - starts[symbol]
        self.state = self.state // ONE * width + at - starts[symbol]
        self._fill()
        return symbol

    def adaptive(self, count: int, size: int) -> list[int]:
        found, seen, block = list[int](), [0] * size, 32
        while len(found) < count:
            now = [
                self.pop([2 * n + 1 for n in seen]) for _ in range(min(block, count - len(found)))
            ]
            for symbol in now:
                seen[symbol] += 1
            if sum(seen) > 32_768:
                seen = [n // 2 for n in seen]
            found += now
            block = min(2 * block, 2048)
        return found


def by_the_book(data: bytes, count: int) -> list[int]:
    size, classes, rest = data[0] + 1, data[1], data[2:]
    if classes == 0:
        sent = [int.from_bytes(rest[2 * i : 2 * i + 2], "little") for i in range(size)]
        rest = rest[2 * size :]
    assert len(rest) % 4 == 0
    words = [int.from_bytes(rest[i : i + 4], "little") for i in range(0, len(rest), 4)]
    stack = Stack(words)
    if classes == 0:
        found = [stack.pop(sent) for _ in range(count)]
    elif classes == 1:
        found = stack.adaptive(count, size)
    else:
        labels = stack.adaptive(count // 128, classes)
        found = [0] * count
        for label in range(classes):
            places = [
                128 * run + i for run, own in enumerate(labels) if own == label for i in range(128)
            ]
            places += range(128 * len(labels), count) if label == 0 else []
            for place, symbol in zip(places, stack.adaptive(len(places), size), strict=True):
                found[place] = symbol
    assert (stack.state, stack.words) == (0, [])
    return found


def entropy_of(symbols: Symbols) -> float:
    """Bits of all symbols, each at what its frequency makes of it."""
    counts = np.bincount(symbols)[np.unique(symbols)]
    return float(-(counts * np.log2(counts / len(symbols))).sum())


def drawn(shares: Sequence[float], count: int, seed: int = 0) -> Symbols:
    rng = np.random.default_rng(seed)
    return rng.choice(len(shares), count, p=np.array(shares) / sum(shares)).astype(np.uint8)


def uneven(count: int) -> Symbols:
    """Sparse symbols whose density changes every thousand."""
    rng = np.random.default_rng(1)
    density = np.repeat(rng.choice([0.01, 0.05, 0.4], -(-count // 1000)), 1000)[:count]
    return ((rng.random(count) < density) * rng.integers(1, 3, count)).astype(np.uint8)


CASES = {
    0: np.append(drawn([98, 1, 1], 60_000), np.uint8(2)),
    1: np.append(drawn([9, 1], 3000), np.uint8(1)),
    4: np.append(uneven(20_000), np.uint8(2)),
}


@pytest.mark.parametrize("model", CASES)
def test_another_decoder_reads_every_model(model: int) -> None:
    symbols = CASES[model]
    coded = encode(symbols)
    assert coded is not None
    assert coded[1] == model
    assert by_the_book(coded, len(symbols)) == symbols.tolist()
    assert np.array_equal(decode(coded, len(symbols)), symbols)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 256),
    st.integers(0, 6000),
    st.sampled_from((0.02, 0.3, 5.0)),
)
def test_what_is_coded_is_decoded(seed: int, size: int, count: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    symbols = rng.choice(size, count, p=rng.dirichlet([spread] * size)).astype(np.uint8)
    coded = encode(symbols)
    if coded is not None:
        assert len(coded) < count
        assert np.array_equal(decode(coded, count), symbols)
        if count < 1500:
            assert by_the_book(coded, count) == symbols.tolist()


@pytest.mark.parametrize(
    "symbols",
    [
        np.zeros(8, np.uint8),
        np.full(100_000, 255, np.uint8),
        np.array([0] * 200_000 + [255], np.uint8),
        np.repeat(np.arange(16, dtype=np.uint8), 400),
        np.tile(np.array([0, 255], np.uint8), 300),
        drawn([1], 4096 + 127),
        np.concatenate([np.zeros(1 << 17, np.uint8), drawn([1] * 256, 5000)]),
    ],
    ids=["few", "last", "rare", "sorted", "ends", "zeros", "change"],
)
def test_odd_frequencies(symbols: Symbols) -> None:
    coded = encode(symbols)
    if coded is None:
        assert len(symbols) == 8
        return
    assert len(coded) < len(symbols)
    assert np.array_equal(decode(coded, len(symbols)), symbols)


def test_a_symbol_beyond_sixteen_bits_of_frequency_is_scaled() -> None:
    symbols = drawn([1000, 1, 1], 200_000)
    sent = entropy._to_u16(np.bincount(symbols))
    assert sent.max() == 65_535
    assert sent.min() >= 1
    coded = encode(symbols)
    assert coded is not None
    assert np.array_equal(decode(coded, len(symbols)), symbols)


def test_what_cannot_be_shortened_is_not_coded() -> None:
    assert encode(np.zeros(0, np.uint8)) is None
    assert encode(drawn([1] * 256, 100_000)) is None
    assert encode(drawn([1] * 200, 300)) is None


@pytest.mark.parametrize(
    ("shares", "count", "most"),
    [
        ([0.95, 0.025, 0.025], 1_000_000, 1.001),
        ([0.5, 0.5], 1_000_000, 1.0001),
        ([*np.exp(-0.5 * (np.arange(-127, 128) / 45) ** 2)], 1_000_000, 1.002),
        ([*0.95 ** np.arange(256)], 50_000, 1.01),
        ([0.9, 0.05, 0.05], 2_000, 1.1),
    ],
    ids=["ternary", "signs", "levels", "gaps", "few"],
)
def test_the_code_is_as_long_as_the_entropy(shares: list[float], count: int, most: float) -> None:
    symbols = drawn(shares, count)
    coded = encode(symbols)
    signs = len(shares) == 2
    assert coded is not None
    assert 8 * len(coded) <= most * entropy_of(symbols)
    assert 8 * len(coded) >= (0.999 if signs else 0.99) * entropy_of(symbols)


def test_parts_of_other_densities_cost_less_than_the_entropy_of_the_whole() -> None:
    symbols = uneven(1_000_000)
    each = sum(entropy_of(symbols[i : i + 1000]) for i in range(0, len(symbols), 1000))
    coded = encode(symbols)
    assert coded is not None
    assert 8 * len(coded) < 0.82 * entropy_of(symbols)
    assert 8 * len(coded) < 1.05 * each


# --- what a sender may not say -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("coded", "why"),
    [
        (b"", "no known model"),
        (b"\x01", "no known model"),
        (b"\x01\x11", "no known model"),
        (b"\x01\xff" + b"\1" * 8, "no known model"),
        (b"\x01\x00\x01\x00", "lack their frequencies"),
        (b"\x01\x00" + bytes(4), "lack their frequencies"),
        (b"\xff\x00" + b"\1" * 511, "lack their frequencies"),
        (b"\x01\x01\x05\x00\x00", "cut off"),
        (b"\x01\x00\x01\x00\x01\x00\x05", "cut off"),
        (b"\x01\x01" + bytes(4), r"cannot be read \(ValueError\)"),
        (b"\x01\x01" + b"\1" * 400, "go on after the last"),
        (b"\x01\x04" + b"\1" * 4000, "go on after the last"),
    ],
)
def test_codings_that_are_nonsense(coded: bytes, why: str) -> None:
    with pytest.raises(WireError, match=why):
        decode(coded, 100)


@pytest.mark.parametrize("model", CASES)
def test_every_other_length_is_refused_or_other_symbols(model: int) -> None:
    symbols = CASES[model]
    coded = encode(symbols) or b""
    for length in range(0, len(coded), 4 if len(coded) < 1000 else 100):
        try:
            found = decode(coded[:length], len(symbols))
        except WireError:
            continue
        assert not np.array_equal(found, symbols)
    for count in (len(symbols) - 50, len(symbols) // 2, 0):
        with pytest.raises(WireError, match="go on after"):
            decode(coded, count)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=700), st.integers(0, 255), st.integers(0, 16), st.integers(0, 5000))
def test_noise_is_decoded_within_its_alphabet_or_refused(
    noise: bytes, largest: int, model: int, count: int
) -> None:
    try:
        found = decode(bytes([largest, model]) + noise, count)
    except WireError:
        return
    assert found.dtype == np.uint8
    assert found.shape == (count,)
    assert not count or found.max() <= largest


def test_a_panic_of_the_coder_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    def panics(words: object) -> object:
        raise PanicException("unreachable")

    monkeypatch.setattr(entropy, "_AnsCoder", panics)
    with pytest.raises(WireError, match=r"cannot be read \(PanicException\)"):
        decode(b"\1\1\1\1\1\1", 9)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, MemoryError])
def test_what_is_not_the_sender_s_doing_is_not_hidden(
    monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    def stops(words: object) -> object:
        raise stop

    monkeypatch.setattr(entropy, "_AnsCoder", stops)
    with pytest.raises(stop):
        decode(b"\1\1\1\1\1\1", 9)


@pytest.mark.parametrize("model", [1, 4, 16])
def test_two_bytes_that_claim_a_million_symbols_take_no_more(model: int) -> None:
    tracemalloc.start()
    try:
        found = decode(bytes([255, model]), 1_000_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not found.any()
    assert peak < 3_000_000


def test_memory_of_the_encoder() -> None:
    symbols = drawn([*np.exp(-0.5 * (np.arange(-127, 128) / 45) ** 2)], 1_000_000)
    tracemalloc.start()
    try:
        encode(symbols)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 7_000_000
