"""What a plan as a whole is told before anything runs, where no single line is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpeft.errors import PlanError
from fedpeft.preflight import check
from tests.tiny import support_plan

TIMED = {"latency": "lognormal"}


@pytest.mark.parametrize(
    ("schedule", "remedy"),
    [
        ("buffered(size=5)", r"buffered\(size=5\) waits .* than the 4 there are; lower size"),
        ("sync(minimum=5)", r"sync\(minimum=5\) waits .* than the 4 there are; lower minimum"),
    ],
)
def test_more_replies_than_there_are_clients_are_refused(
    bert: Path, schedule: str, remedy: str
) -> None:
    with pytest.raises(PlanError, match=remedy):
        check(support_plan(bert, schedule=schedule))
    check(support_plan(bert, schedule=schedule.replace("5", "4")))


@pytest.mark.parametrize("schedule", ["sync(deadline=5.0)", "sync(over=2.0)"])
def test_what_hurries_nobody_where_nothing_takes_time_is_warned_of(
    bert: Path, schedule: str
) -> None:
    lines = {"schedule": schedule, "cohort": "uniform(size=2)"}
    (warning,) = check(support_plan(bert, **lines)).warnings
    assert warning.endswith("say latency: lognormal")
    assert not check(support_plan(bert, **lines, **TIMED)).warnings
