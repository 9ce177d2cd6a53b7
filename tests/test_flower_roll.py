"""Who may say that it plays whom, where the server has a roster of sites."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from fedpeft.errors import RunError
from fedpeft.flower.messages import Hello
from fedpeft.flower.roll import Roll

SITES = {7: "a", 8: "b"}


def roll(*clients: str, roster: Mapping[int, str]) -> Roll:
    return Roll(dict.fromkeys(clients, 5), "1", "p", roster=lambda: roster)


def hello(*clients: str) -> Hello:
    return Hello(list(clients), [5] * len(clients), 0, "1", "p")


def test_a_site_plays_itself() -> None:
    found = roll("a", "b", roster=SITES)
    found.welcome(hello("a"), 7, [7, 8])
    found.welcome(hello("b"), 8, [7, 8])
    assert found.nodes == {"a": 7, "b": 8}


@pytest.mark.parametrize(
    ("clients", "node", "reason"),
    [
        (["b"], 7, "says that it plays 'b', and is site a by its key"),
        (["a", "b"], 7, "says that it plays 'b', and is site a by its key"),
        (["a"], 9, "says that it plays 'a', and is no site of the roster by its key"),
        (["c"], 7, "says that it plays 'c', and is site a by its key"),
    ],
)
def test_nobody_plays_another_site(clients: list[str], node: int, reason: str) -> None:
    found = roll("a", "b", "c", roster=SITES)
    with pytest.raises(RunError, match=reason):
        found.welcome(hello(*clients), node, [node])
    assert not found.nodes


def test_a_plan_whose_clients_are_no_sites_deals_them_as_before() -> None:
    found = roll("0", "1", roster=SITES)
    found.welcome(hello("0", "1"), 7, [7])
    assert found.nodes == {"0": 7, "1": 7}


def test_a_site_that_came_later_is_known() -> None:
    known: dict[int, str] = {7: "a"}
    found = roll("a", "b", roster=known)
    with pytest.raises(RunError, match="no site of the roster"):
        found.welcome(hello("b"), 8, [7, 8])
    known[8] = "b"
    found.welcome(hello("b"), 8, [7, 8])
    assert found.nodes == {"b": 8}
