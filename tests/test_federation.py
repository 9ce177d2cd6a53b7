"""Who holds which records: compact, dealt once, and without rows where they are not needed."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import PlanError, RunError
from fedpeft.federation import Dealt, Federation, deal
from fedpeft.types import Splits
from tests.tiny import support_plan

names = st.text(max_size=3)


@given(st.dictionaries(names, st.lists(st.integers(0, 99), max_size=4), max_size=8))
def test_dealt_is_a_mapping_of_arrays(drawn: dict[str, list[int]]) -> None:
    places = {name: i for i, name in enumerate(drawn)}
    parts = [np.array(rows, np.int64) for rows in drawn.values()]
    for dealt in (Dealt(places, parts), pickle.loads(pickle.dumps(Dealt(places, parts)))):
        assert list(dealt) == list(drawn)
        assert len(dealt) == len(drawn)
        assert {name: rows.tolist() for name, rows in dealt.items()} == drawn
        assert all(rows.dtype == np.int64 for rows in dealt.values())
        with pytest.raises(KeyError):
            _ = dealt["none of them"]


def test_training_and_held_out_records_are_those_that_were_dealt(bert: Path) -> None:
    plan = support_plan(bert, partition="iid", holdout=0.2)
    federation = deal(plan)
    assert list(federation.train) == list(federation.held) == list(federation.population)
    rows = [*federation.train.values(), *federation.held.values()]
    assert sorted(np.concatenate(rows)) == list(range(len(federation.splits.train)))
    for client, count in federation.population.items():
        assert count == len(federation.train[client]) == 24
        assert len(federation.held[client]) == 6
        assert (np.diff(federation.train[client]) > 0).all()
    assert federation.population is federation.population


def test_rows_are_let_go(bert: Path) -> None:
    whole = deal(support_plan(bert))
    federation = whole.without_rows()
    assert federation.population == whole.population
    assert federation.splits.fingerprint == whole.splits.fingerprint
    assert whole.splits.test is not None
    assert federation.splits.test is not None
    assert len(federation.splits.train) == len(whole.splits.train)
    assert len(federation.splits.test) == len(whole.splits.test)
    for client in whole.train:
        np.testing.assert_array_equal(federation.train[client], whole.train[client])
    with pytest.raises(RunError, match="let go once they were tokenised; deal the plan again"):
        _ = federation.splits.train[0]
    with pytest.raises(RunError, match="let go"):
        list(federation.splits.train)
    assert federation.without_rows().splits == federation.splits


def test_ten_thousand_clients_are_a_few_bytes_each() -> None:
    clients, each = 10_000, 8
    places = {f"client-{i:05d}": i for i in range(clients)}
    rows = np.arange(clients * each).reshape(clients, each)
    train, held = Dealt(places, rows[:, 1:]), Dealt(places, rows[:, :1])
    text = [{"text": "a long text " * 50}] * (clients * each)
    federation = Federation(Splits(text, None, "f" * 64), ("a", "b"), train, held)
    told = pickle.dumps(federation.without_rows())
    assert len(told) < clients * (8 * each + 40)
    assert pickle.loads(told).splits.test is None
    assert pickle.loads(told).held["client-09999"].tolist() == [79_992]


def test_records_that_lie_elsewhere_are_not_dealt(tmp_path: Path) -> None:
    plan = support_plan(tmp_path / "bert", data="sites(names='a,b')", partition=None, clients=None)
    with pytest.raises(PlanError, match=r"lie at its sites.*by_field") as caught:
        deal(plan)
    assert "data='jsonl(train=...)'" in str(caught.value)
