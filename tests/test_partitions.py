"""The partitions: disjoint, exhaustive, never empty, deterministic, and skewed as they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedpeft.errors import DataError, SpecError
from fedpeft.partitions import _deal
from fedpeft.partitions.by_field import ByField
from fedpeft.partitions.dirichlet import Dirichlet
from fedpeft.partitions.iid import Iid
from fedpeft.partitions.quantity import Quantity
from fedpeft.partitions.shards import Shards
from fedpeft.rng import derive
from fedpeft.spec import build, describe
from fedpeft.types import Partition

Dealt = Mapping[str, NDArray[np.int64]]
COUNTED: list[Partition] = [
    *(Iid(), Shards(per_client=1), Quantity(alpha=0.1), Quantity(alpha=100)),
    *(Dirichlet(alpha=0.05), Dirichlet(alpha=100), Dirichlet(alpha=0.001)),
]


def _rows(count: int) -> list[dict[str, Any]]:
    return [{"text": str(i), "kind": i % 3} for i in range(count)]


def _lists(dealt: Dealt) -> dict[str, list[int]]:
    return {name: part.tolist() for name, part in dealt.items()}


def _skew(dealt: Dealt, labels: Sequence[int]) -> float:
    """Return the mean over clients of the share of the most frequent label."""
    kinds = np.asarray(labels)
    return float(np.mean([np.bincount(kinds[p]).max() / len(p) for p in dealt.values()]))


# --- what all share ------------------------------------------------------------------------------


@pytest.mark.parametrize("partition", COUNTED, ids=describe)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_row_goes_to_one_client_and_none_is_empty(
    partition: Partition, data: st.DataObject
) -> None:
    labels = data.draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=40))
    clients = data.draw(st.integers(1, len(labels)))
    seed = data.draw(st.integers(0, 99))
    dealt = partition.split(_rows(len(labels)), labels, clients, derive(seed, "split"))
    assert list(dealt) == _deal.names(clients)
    for part in dealt.values():
        assert part.dtype == np.int64
        assert part.size > 0
        assert (np.diff(part) > 0).all()
    assert sorted(np.concatenate(list(dealt.values())).tolist()) == list(range(len(labels)))
    again = partition.split(_rows(len(labels)), labels, clients, derive(seed, "split"))
    assert _lists(again) == _lists(dealt)


@pytest.mark.parametrize("partition", COUNTED, ids=describe)
def test_other_randomness_deals_otherwise(partition: Partition) -> None:
    labels = [i % 4 for i in range(200)]
    dealt = [partition.split(_rows(200), labels, 5, derive(seed)) for seed in (0, 1)]
    assert _lists(dealt[0]) != _lists(dealt[1])


@pytest.mark.parametrize("partition", [*COUNTED, ByField(field="kind")], ids=describe)
def test_the_order_of_columns_changes_nothing(partition: Partition) -> None:
    rows = _rows(30)
    turned = [dict(reversed(row.items())) for row in rows]
    labels = [row["kind"] for row in rows]
    clients = None if isinstance(partition, ByField) else 4
    first = partition.split(rows, labels, clients, derive(0))
    assert _lists(partition.split(turned, labels, clients, derive(0))) == _lists(first)


@pytest.mark.parametrize("partition", COUNTED, ids=describe)
def test_the_number_of_clients_must_be_given_and_fit(partition: Partition) -> None:
    rows, labels = _rows(3), ["a", "b", "b"]
    name = describe(partition).split("(")[0]
    with pytest.raises(DataError, match=f"{name}: how many clients\\? Say clients: N"):
        partition.split(rows, labels, None, derive(0))
    with pytest.raises(DataError, match=f"{name}: clients=0 must be at least 1"):
        partition.split(rows, labels, 0, derive(0))
    few = f"{name}: 3 records are too few for clients=4 with at least 1 each; say clients: 3"
    with pytest.raises(DataError, match=few):
        partition.split(rows, labels, 4, derive(0))
    with pytest.raises(DataError, match=r"0 records are too few .*; use more data"):
        partition.split([], [], 1, derive(0))


@pytest.mark.parametrize(
    ("clients", "first", "last"),
    [
        (2, "client-000", "client-001"),
        (1000, "client-000", "client-999"),
        (1001, "client-0000", "client-1000"),
    ],
)
def test_names_sort_as_their_numbers(clients: int, first: str, last: str) -> None:
    names = _deal.names(clients)
    assert (names[0], names[-1]) == (first, last)
    assert names == sorted(names)


def test_shares_are_whole_numbers_and_none_is_lost() -> None:
    assert _deal.apportion(10, np.array([0.5, 0.25, 0.25])).tolist() == [5, 3, 2]
    assert _deal.apportion(2, np.array([1.0, 1.0, 1.0])).tolist() == [1, 1, 0]
    assert _deal.apportion(0, np.array([1.0, 2.0])).tolist() == [0, 0]


@given(
    st.integers(0, 10**6),
    st.lists(st.floats(1e-12, 1.0), min_size=1, max_size=50),
)
def test_shares_add_up_and_are_within_one_of_exact(total: int, shares: list[float]) -> None:
    exact = total * np.array(shares) / np.sum(shares)
    sizes = _deal.apportion(total, np.array(shares))
    assert sizes.sum() == total
    assert np.abs(sizes - exact).max() < 1 + 1e-6


def test_classes_are_numbered_in_sorted_order_whatever_their_type() -> None:
    def number(*labels: Any) -> list[int]:
        return list(_deal.classes("x", _rows(len(labels)), labels, None))

    assert number(10, 9, 10) == [1, 0, 1]
    assert number("b", "a", 3) == [2, 1, 0]
    assert number(("a", None), ("a", 1)) == [1, 0]


# --- iid -----------------------------------------------------------------------------------------


def test_iid_parts_are_equal_to_one_record_and_shuffled() -> None:
    dealt = Iid().split(_rows(10), None, 3, derive(0))
    assert [len(part) for part in dealt.values()] == [4, 3, 3]
    assert _lists(dealt)["client-000"] != [0, 1, 2, 3]


# --- dirichlet -----------------------------------------------------------------------------------


def test_a_small_alpha_skews_labels_and_a_large_one_does_not() -> None:
    labels = [i % 10 for i in range(5_000)]
    skews = [
        np.mean([_skew(Dirichlet(alpha=a).split(_rows(5_000), labels, 10, derive(s)), labels)
                 for s in range(5)])
        for a in (0.05, 0.5, 1_000.0)
    ]  # fmt: skip
    assert skews[0] > 0.6
    assert skews[0] > skews[1] > skews[2]
    assert skews[2] < 0.12  # 0.1 would be iid


def test_the_share_of_a_class_follows_the_dirichlet() -> None:
    """A client's share of a class has mean 1/K and variance (K - 1) / (K^2 (K alpha + 1))."""
    labels, clients, alpha = [0] * 500 + [1] * 500, 4, 2.0
    shares = np.array(
        [
            [np.sum(p < 500) / 500 for p in dealt.values()]
            for s in range(300)
            for dealt in [Dirichlet(alpha=alpha).split(_rows(1_000), labels, clients, derive(s))]
        ]
    )
    expected = (clients - 1) / (clients**2 * (clients * alpha + 1))
    assert np.allclose(shares.mean(axis=0), 1 / clients, atol=0.03)
    assert np.allclose(shares.var(axis=0), expected, rtol=0.35)


def test_dirichlet_fills_small_clients_from_large_ones() -> None:
    labels = ["a"] * 97 + ["b"] * 3
    partition = Dirichlet(alpha=0.001, min_size=9)
    dealt = partition.split(_rows(100), labels, 11, derive(0))
    assert min(len(part) for part in dealt.values()) == 9
    assert sum(len(part) for part in dealt.values()) == 100
    with pytest.raises(DataError, match="100 records are too few for clients=12 with at least 9"):
        partition.split(_rows(100), labels, 12, derive(0))


def test_dirichlet_deals_by_a_column_where_field_says_so() -> None:
    rows = [{"kind": "even" if i % 2 == 0 else "odd"} for i in range(400)]
    labels = [i % 2 for i in range(400)]
    by_field = Dirichlet(alpha=0.1, field="kind").split(rows, None, 6, derive(3))
    assert _lists(by_field) == _lists(Dirichlet(alpha=0.1).split(rows, labels, 6, derive(3)))


# --- shards --------------------------------------------------------------------------------------


def test_shards_give_each_client_few_labels() -> None:
    labels = [i % 10 for i in range(200)]
    dealt = Shards().split(_rows(200), labels, 10, derive(0))
    assert all(len(part) == 20 for part in dealt.values())
    assert all(len({labels[i] for i in part}) <= 2 for part in dealt.values())
    one = Shards(per_client=1).split(_rows(200), labels, 10, derive(0))
    assert sorted(sorted({labels[i] for i in part}) for part in one.values()) == [
        [k] for k in range(10)
    ]


def test_shards_of_one_client_hold_everything_and_cannot_be_empty() -> None:
    dealt = Shards(per_client=3).split(_rows(3), ["b", "a", "b"], 1, derive(0))
    assert _lists(dealt) == {"client-000": [0, 1, 2]}
    expected = r"shards: 5 records cannot fill 6 shards \(clients=3, per_client=2\); lower one"
    with pytest.raises(DataError, match=expected):
        Shards().split(_rows(5), [0] * 5, 3, derive(0))


# --- quantity ------------------------------------------------------------------------------------


def test_quantity_skews_sizes_and_not_labels() -> None:
    labels = [i % 2 for i in range(4_000)]
    small = Quantity(alpha=0.1, min_size=20).split(_rows(4_000), labels, 10, derive(0))
    sizes = sorted(len(part) for part in small.values())
    assert sizes[0] >= 20
    assert sizes[-1] > 1_000
    biggest = max(small.values(), key=len)
    assert abs(np.mean([labels[i] for i in biggest]) - 0.5) < 0.05
    large = Quantity(alpha=1e6).split(_rows(4_000), labels, 10, derive(0))
    assert all(abs(len(part) - 400) < 20 for part in large.values())


# --- by_field ------------------------------------------------------------------------------------

AUTHORS = [{"client": name} for name in ["bo", "al", "cy", "bo", "al", "bo", 7, "7"]]


def test_by_field_names_clients_by_the_value() -> None:
    dealt = ByField().split(AUTHORS, None, None, derive(0))
    assert _lists(dealt) == {"7": [6, 7], "al": [1, 4], "bo": [0, 3, 5], "cy": [2]}
    assert list(dealt) == sorted(dealt)


def test_by_field_drops_small_clients_and_keeps_the_largest() -> None:
    def kept(**fields: Any) -> list[str]:
        return list(ByField(**fields).split(AUTHORS, None, None, derive(0)))

    assert kept(min_size=2) == ["7", "al", "bo"]
    assert kept(max_clients=2) == ["7", "bo"]
    assert kept(min_size=3, max_clients=2) == ["bo"]
    with pytest.raises(DataError, match=r"no client of column 'client' has min_size=4 .* has 3$"):
        kept(min_size=4)


def test_by_field_refuses_a_number_of_clients_and_nameless_ones() -> None:
    expected = "not clients=3; drop the clients line or use max_clients"
    with pytest.raises(DataError, match=expected):
        ByField().split(AUTHORS, None, 3, derive(0))
    with pytest.raises(DataError, match="row 2 has ' ' in column 'client'; a client needs a name"):
        ByField().split([{"client": "a"}, {"client": " "}], None, None, derive(0))
    with pytest.raises(DataError, match=r"no client .* the largest has 0"):
        ByField().split([], None, None, derive(0))


# --- columns, labels, fields ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "partition",
    [ByField(field="kind"), Dirichlet(field="kind"), Shards(field="kind")],
    ids=describe,
)
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"kinds": 1, "b": 2}, "row 2 has no column 'kind'; did you mean 'kinds'"),
        ({}, "row 2 has no column 'kind'; there is none"),
        ({"kind": None}, "row 2 has no value in column 'kind'; fill it in or drop the row"),
        ({"kind": ["x"]}, "row 2 holds a list in column 'kind'"),
    ],
)
def test_a_column_that_cannot_be_used_names_row_and_column(
    partition: Partition, row: dict[str, Any], message: str
) -> None:
    clients = None if isinstance(partition, ByField) else 1
    with pytest.raises(DataError, match=message):
        partition.split([{"kind": 1}, row], None, clients, derive(0))


@pytest.mark.parametrize("kind", [Dirichlet, Shards])
def test_labels_are_needed_unless_a_field_is_named(kind: type[Any]) -> None:
    reason = "deals records by label; say field=COLUMN to deal by another column"
    assert kind().needs == {"labels": reason}
    assert kind(field="kind").needs == {}
    with pytest.raises(DataError, match="the task has no labels; say field=COLUMN"):
        kind().split(_rows(4), None, 1, derive(0))
    with pytest.raises(DataError, match="3 labels for 4 records"):
        kind().split(_rows(4), [1, 2, 3], 1, derive(0))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dirichlet(alpha=0)", "dirichlet: alpha=0 must be at least 0.001"),
        ("dirichlet(alpha=1e400)", "dirichlet: alpha=inf must be at least 0.001 and at most 1e"),
        ("dirichlet(min_size=0)", "dirichlet: min_size=0 must be at least 1"),
        ("dirichlet(field='')", "dirichlet: field must name a column"),
        ("shards(per_client=0)", "shards: per_client=0 must be at least 1"),
        ("shards(field='')", "shards: field must name a column"),
        ("quantity(alpha=-1)", "quantity: alpha=-1 must be at least 0.001"),
        ("by_field(field='')", "by_field: field must name a column"),
        ("by_field(max_clients=0)", "by_field: max_clients=0 must be at least 1"),
        ("iid(alpha=1)", "iid has no field 'alpha'"),
    ],
)
def test_bad_fields_are_refused_at_construction(spec: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        build("partitions", spec)


@pytest.mark.parametrize(
    "spec",
    ["iid", "dirichlet(alpha=0.1, field='kind', min_size=10)", "shards(per_client=3)",
     "quantity(alpha=2.0)", "by_field(field='author', max_clients=100)", "dirichlet", "by_field"],
)  # fmt: skip
def test_specs_build_partitions_and_come_back(spec: str) -> None:
    partition = build("partitions", spec)
    assert isinstance(partition, Partition)
    assert describe(partition) == spec
