"""What the plans of a sweep have in common is read once, and says the same as by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedpeft.driver import plan_digest
from fedpeft.errors import DataError
from fedpeft.plan import Plan
from fedpeft.preflight import check_texts
from fedpeft.preview import preview
from fedpeft.sweep.readings import Readings
from tests.tiny import support_plan


def test_data_and_texts_are_read_once(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [support_plan(bert, seed=seed, rounds=1 + seed) for seed in range(3)]
    expected = [(plan_digest(plan), preview(plan)) for plan in plans]
    calls = list[str]()
    source, check = type(plans[0].data), check_texts
    load = source.load

    def loaded(self: Any) -> Any:
        calls.append("load")
        return load(self)

    def checked(*given: Any) -> None:
        calls.append("texts")
        check(*given)

    monkeypatch.setattr(source, "load", loaded)
    monkeypatch.setattr("fedpeft.sweep.readings.check_texts", checked)
    readings = Readings()
    assert [(readings.of(plan), readings.preview(plan)) for plan in plans] == expected
    assert calls == ["load", "texts"]
    readings.close()
    assert readings.of(plans[0]) == expected[0][0]
    assert readings.preview(plans[0]) == expected[0][1]
    assert calls == ["load", "texts", "load"]


def test_texts_that_do_not_fit_are_refused_in_each_plan(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[str]()

    def checked(plan: Plan, *_: Any) -> None:
        calls.append(str(plan.lines()["task"]))
        if len(calls) == 1:
            raise DataError("data: train: row 1 is too long")

    monkeypatch.setattr("fedpeft.sweep.readings.check_texts", checked)
    readings = Readings()
    for seed in range(2):
        with pytest.raises(DataError, match="row 1 is too long"):
            readings.preview(support_plan(bert, seed=seed))
        readings.preview(support_plan(bert, seed=seed, task="classify(max_length=9)"))
    assert len(calls) == 2
