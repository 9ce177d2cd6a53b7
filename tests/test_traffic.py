"""What the ledger says of bytes with and without the head, and of the server's own time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedpeft import simulate
from fedpeft.traffic import Traffic
from tests.tiny import LABELS, support_plan, tiny_bert

HEAD = 4 * (32 + 1) * len(LABELS)
"""Bytes of the classifier of the tiny BERT: hidden size 32, a bias, float32."""


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("tiny") / "bert")


@pytest.mark.parametrize(
    ("lines", "up", "down"),
    [
        ({}, HEAD, HEAD),
        ({"uplink": "half"}, HEAD // 2, HEAD),
        ({"downlink": "half"}, HEAD, HEAD // 2),
        ({"adapter": "core(r=2)"}, HEAD, HEAD),
        ({"adapter": "lora(r=2, head='local')"}, 0, 0),
        ({"adapter": "lora(r=2, head='frozen')"}, 0, 0),
        ({"adapter": "lora(r=2, fresh='client')", "aggregator": "stack"}, HEAD, HEAD),
        ({"adapter": "lora(r=2)", "aggregator": "fedask"}, HEAD, HEAD),
    ],
    ids=lambda given: "-".join(given) if isinstance(given, dict) else str(given),
)
def test_the_head_is_counted_apart(bert: Path, lines: dict[str, str], up: int, down: int) -> None:
    plan = support_plan(bert, holdout=0, **lines)
    result = simulate(plan)
    for line in result.history:
        assert line["up_head_bytes"] == up * len(line["replied"])
        assert line["down_head_bytes"] == down * line["asked"]
        assert line["up_head_bytes"] < line["up_bytes"]
    for name in ("up_head_bytes", "down_head_bytes"):
        assert result.table[name] == sum(line[name] for line in result.history)


def test_the_server_s_seconds_leave_out_the_wait_for_clients(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedpeft.engine._player import Player

    exchange, pause = Player.exchange, 0.3

    def slow(self: Player, requests: Any) -> Iterator[Any]:
        for found in exchange(self, requests):
            time.sleep(pause)
            yield found

    monkeypatch.setattr(Player, "exchange", slow)
    result = simulate(support_plan(bert, holdout=0, rounds=1))
    (line,) = result.history
    assert line["seconds"] > pause * len(line["replied"])
    assert 0 <= line["server_seconds"] < line["seconds"] - pause * len(line["replied"]) + 0.01


def test_waiting_ends_with_the_answers() -> None:
    sent = Traffic()
    answers: list[Any] = [("c", b"x"), ("d", RuntimeError("gone"))]
    assert list(sent.waiting(iter(answers))) == answers
    assert sent.waited >= 0
