"""What a person reads of a round in a line."""

from __future__ import annotations

import pytest

from fedpeft.terminal import note


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"loss": 0.5, "replied": ["a"], "reachable": 1, "seconds": 1.25}, "loss 0.5000  1.2 s"),
        (
            {"replied": [], "reachable": 0, "test/loss": 2.0, "seconds": 0.01},
            "no client was within reach  test/loss 2.0000  0.0 s",
        ),
        ({"replied": [], "reachable": 3, "seconds": 9.0}, "no reply was used  9.0 s"),
        ({"epsilon": 1.0, "test/accuracy": 0.5}, "test/accuracy 0.5000"),  # coins are secret
    ],
)
def test_a_round_without_replies_says_so(line: dict[str, object], told: str) -> None:
    assert note(line) == told
