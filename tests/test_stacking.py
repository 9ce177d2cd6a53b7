"""Arrays of single clients and tensors of many: what is shared, what is copied, what comes back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.stacking import stack, taken, unstack
from fedpeft.types import Stacked, Tensors

CPU = torch.device("cpu")


def _clients(count: int) -> list[Tensors]:
    shared = np.arange(6, dtype=np.float32).reshape(2, 3)
    return [{"shared": shared, "own": np.full((2,), k, np.float32)} for k in range(count)]


def test_what_all_clients_share_is_not_copied() -> None:
    clients = _clients(3)
    found = stack(clients, CPU)
    assert {k: tuple(v.shape) for k, v in found.items()} == {"shared": (3, 2, 3), "own": (3, 2)}
    assert found["shared"].stride(0) == 0
    assert np.shares_memory(found["shared"].numpy(), clients[0]["shared"])
    assert found["own"].tolist() == [[0, 0], [1, 1], [2, 2]]
    assert not np.shares_memory(found["own"].numpy(), clients[0]["own"])


def test_equal_arrays_that_are_not_the_same_are_kept_apart() -> None:
    found = stack([{"x": np.zeros(2)}, {"x": np.zeros(2)}], CPU)["x"]
    assert found.stride(0) == 2
    assert found.dtype == torch.float64


def test_one_client_is_its_own_memory() -> None:
    clients = _clients(1)
    found = stack(clients, CPU)
    assert all(np.shares_memory(found[k].numpy(), clients[0][k]) for k in found)
    assert all(v.shape[0] == 1 for v in found.values())


def test_read_only_arrays_are_taken_without_a_warning() -> None:
    array = np.frombuffer(bytes(8), np.float32)
    assert stack([{"x": array}], CPU)["x"].tolist() == [[0.0, 0.0]]


@given(
    st.integers(1, 6).flatmap(
        lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), min_size=1))
    )
)
def test_clients_are_taken_by_number(drawn: tuple[int, set[int]]) -> None:
    count, members = drawn[0], sorted(drawn[1])
    stacked = stack(_clients(count), CPU)
    found = taken(stacked, members)
    assert found["own"][:, 0].tolist() == members
    assert tuple(found["shared"].shape) == (len(members), 2, 3)
    assert np.shares_memory(found["shared"].numpy(), stacked["shared"].numpy())
    if members == list(range(len(members))):
        assert found["own"].untyped_storage().data_ptr() == _storage(stacked)


def _storage(stacked: Stacked) -> int:
    return stacked["own"].untyped_storage().data_ptr()


@pytest.mark.parametrize("count", [1, 3])
def test_what_was_stacked_comes_back(count: int) -> None:
    clients = _clients(count)
    back = unstack(stack(clients, CPU))
    assert len(back) == count
    for before, after in zip(clients, back, strict=True):
        assert list(after) == list(before)
        assert all(np.array_equal(after[k], before[k]) for k in before)


def test_nothing_unstacks_to_nobody() -> None:
    assert unstack({}) == []
