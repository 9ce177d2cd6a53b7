"""Which clients share a pass: all of them once, never too many, as cheaply as any cut can be."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.grouping import WINDOW, Grouping

Clients = list[tuple[int, int]]
"""Records and longest record of each client."""
Costs = tuple[tuple[float, float], ...]

CLIENTS = st.lists(st.tuples(st.integers(1, 8), st.integers(1, 40)), min_size=1, max_size=30)
FEW = st.lists(st.tuples(st.integers(1, 8), st.integers(1, 40)), min_size=1, max_size=7)


@st.composite
def costs(draw: st.DrawFn) -> Costs:
    """Draw passes of growing size that take ever longer, perhaps in no proportion."""
    sizes = draw(st.lists(st.integers(1, 200), min_size=1, max_size=5, unique=True))
    seconds = draw(st.lists(st.floats(1e-3, 10.0), min_size=len(sizes), max_size=len(sizes)))
    return tuple(zip(map(float, sorted(sizes)), sorted(seconds), strict=True))


def _passes(grouping: Grouping, clients: Clients) -> list[list[int]]:
    return grouping.passes([rows for rows, _ in clients], [length for _, length in clients])


def _seconds(measured: Costs, clients: Clients, passes: Sequence[Sequence[int]]) -> float:
    """Add up what passes cost: every client's records are padded to the largest of its pass."""
    total = 0.0
    for members in passes:
        tall, wide = (max(clients[i][axis] for i in members) for axis in (0, 1))
        total += _one(measured, len(members) * tall * wide)
    return total


def _one(measured: Costs, tokens: float) -> float:
    """Read a cost off straight lines through what was measured; the last one goes on."""
    size, seconds = measured[-1]
    if tokens > size:
        before = measured[-2] if len(measured) > 1 else (0.0, 0.0)
        return seconds + (seconds - before[1]) / (size - before[0]) * (tokens - size)
    return float(np.interp(tokens, [s for s, _ in measured], [c for _, c in measured]))


def _in_order(clients: Clients) -> list[int]:
    return sorted(range(len(clients)), key=lambda i: (*clients[i], i))


def _every_cut(order: list[int], width: int) -> Iterator[list[list[int]]]:
    """Yield every way to cut the clients in this order into passes of at most ``width``."""
    if not order:
        yield []
    for first in range(1, min(width, len(order)) + 1):
        for rest in _every_cut(order[first:], width):
            yield [order[:first], *rest]


# --- what every grouping is ---------------------------------------------------------------------


@given(CLIENTS, st.integers(1, 20), st.none() | costs())
def test_every_client_is_in_one_pass_and_keeps_its_place(
    clients: Clients, width: int, measured: Costs | None
) -> None:
    passes = _passes(Grouping(width, measured or ()), clients)
    assert sorted(itertools.chain(*passes)) == list(range(len(clients)))
    assert all(1 <= len(members) <= width for members in passes)
    assert all(members == sorted(members) for members in passes)


@given(CLIENTS, st.integers(1, 20))
def test_without_costs_there_are_as_few_passes_as_can_be(clients: Clients, width: int) -> None:
    passes = _passes(Grouping(width), clients)
    assert len(passes) == -(-len(clients) // width)
    assert sum(len(members) < width for members in passes) <= 1


@given(CLIENTS, st.integers(1, 20), st.none() | costs(), st.randoms(use_true_random=False))
def test_the_order_of_the_clients_does_not_matter(
    clients: Clients, width: int, measured: Costs | None, random: Random
) -> None:
    grouping, shuffled = Grouping(width, measured or ()), list(clients)
    random.shuffle(shuffled)

    def shapes(of: Clients) -> list[list[tuple[int, int]]]:
        return sorted(sorted(of[i] for i in members) for members in _passes(grouping, of))

    if len(clients) > width or measured:
        assert shapes(clients) == shapes(shuffled)


def test_nobody_is_asked() -> None:
    assert list(itertools.chain(*Grouping(4).passes([], []))) == []
    assert list(itertools.chain(*Grouping(4, ((8.0, 1.0),)).passes([], []))) == []


# --- with measured costs ------------------------------------------------------------------------


@given(FEW, st.integers(1, 8), costs())
def test_no_other_cut_is_cheaper(clients: Clients, width: int, measured: Costs) -> None:
    found = _seconds(measured, clients, _passes(Grouping(width, measured), clients))
    cuts = _every_cut(_in_order(clients), width)
    assert found == pytest.approx(min(_seconds(measured, clients, cut) for cut in cuts), rel=1e-9)


@given(CLIENTS, st.integers(1, 20), costs())
def test_it_is_never_dearer_than_clients_in_turn_or_even_parts(
    clients: Clients, width: int, measured: Costs
) -> None:
    order, most = _in_order(clients), 1 + 1e-9
    found = _seconds(measured, clients, _passes(Grouping(width, measured), clients))
    assert found <= most * _seconds(measured, clients, [[i] for i in order])
    for size in range(1, width + 1):
        even = [order[at : at + size] for at in range(0, len(order), size)]
        assert found <= most * _seconds(measured, clients, even)


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (((10.0, 1.0), (40.0, 1.0), (80.0, 2.0)), [[0, 2, 3], [1]]),  # a pass costs by itself
        (
            ((5.0, 0.5), (10.0, 1.0), (20.0, 1.5), (40.0, 4.0)),
            [[0], [1], [2, 3]],
        ),  # so does padding
        (((10.0, 1.0), (20.0, 9.0)), [[0], [1], [2], [3]]),  # sharing costs
    ],
)
def test_costs_decide(measured: Costs, expected: list[list[int]]) -> None:
    clients = [(1, 5), (2, 40), (1, 10), (1, 10)]
    assert sorted(_passes(Grouping(3, measured), clients)) == expected


# --- width and window ---------------------------------------------------------------------------


def test_partners_are_of_like_size() -> None:
    clients = [(2, 9), (1, 4), (2, 3), (1, 30), (2, 8), (1, 5)]
    assert _passes(Grouping(2), clients) == [[1, 5], [2, 3], [0, 4]]
    assert _passes(Grouping(6), clients) == [[0, 1, 2, 3, 4, 5]]
    assert _passes(Grouping(1), clients) == [[1], [5], [3], [2], [4], [0]]


@given(st.integers(1, 300), costs())
def test_halving_ends_with_every_client_alone(width: int, measured: Costs) -> None:
    grouping, halvings = Grouping(width, measured), 0
    while grouping.width > 1:
        smaller = grouping.halved()
        assert smaller == Grouping(grouping.width // 2, measured)
        grouping, halvings = smaller, halvings + 1
    assert halvings == width.bit_length() - 1
    assert grouping.halved().width == 1


@given(st.integers(1, 300), st.integers(0, 10**9), st.integers(0, 10**12))
def test_the_window_holds_a_pass_and_stays_within_memory(
    width: int, client_bytes: int, memory: int
) -> None:
    window = Grouping(width).window(client_bytes, memory)
    if width == 1:
        assert window == 1  # nobody has to wait for partners
        return
    assert width <= window <= WINDOW * width
    assert window == width or window * client_bytes <= memory
    if memory >= WINDOW * width * max(client_bytes, 1):
        assert window == WINDOW * width
