"""Runs side by side, read from what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedpeft.compare import columns, table
from fedpeft.driver import simulate
from fedpeft.errors import RunError
from fedpeft.past_run import PastRun, read_run, read_runs
from tests.tiny import support_plan


@pytest.fixture(scope="module")
def runs(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of one plan and one of another, in a folder."""
    folder = tmp_path_factory.mktemp("runs")
    each: dict[str, dict[str, Any]] = {"a": {"seed": 0}, "b": {"seed": 1}, "c": {"uplink": "half"}}
    for name, lines in each.items():
        plan = support_plan(bert, rounds=2, evaluate="test", **lines)
        simulate(plan, out=folder / name)
    return folder


def past(**changed: Any) -> PastRun:
    given: dict[str, Any] = {
        "path": Path("x"),
        "lines": {"rounds": 4, "seed": 0, "uplink": "raw"},
        "rounds": 4,
        "finished": True,
        "metrics": {"test/accuracy": 0.5, "test/loss": 1.0},
        "up_bytes": 2_500_000,
        "down_bytes": 1_000_000,
        "seconds": 10.0,
        "spent": {},
    }
    return PastRun(**{**given, **changed})


def test_a_run_is_read_as_it_was(runs: Path) -> None:
    found, told = read_run(runs / "a"), json.loads((runs / "a" / "result.json").read_text())
    assert found.finished
    assert found.rounds == 2
    assert found.metrics == told["last"]
    assert (found.up_bytes, found.down_bytes) == (told["up_bytes"], told["down_bytes"])
    assert found.seconds == pytest.approx(told["seconds"], abs=0.1)
    assert found.lines["uplink"] == "raw"


def test_one_that_is_under_way_has_what_it_has_so_far(runs: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    half.mkdir()
    for name in ("run.json", "plan.yaml"):
        (half / name).write_bytes((runs / "a" / name).read_bytes())
    lines = (runs / "a" / "rounds.jsonl").read_text().splitlines(keepends=True)
    (half / "rounds.jsonl").write_text(lines[0] + lines[1][:20])
    found = read_run(half)
    assert not found.finished
    assert found.rounds == 1
    assert dict(table(columns([found])))["rounds"] == ["1 of 2 (not finished)"]


def test_seeds_of_a_plan_are_a_column(runs: Path) -> None:
    found = columns(read_runs([runs]))
    assert [column.name for column in found] == ["a (2 seeds)", "c"]
    rows = dict(table(found))
    assert rows["uplink"] == ["raw", "half"]
    assert "seed" not in rows
    assert "model" not in rows, "what is the same is not told"
    accuracy = [read_run(runs / name).metrics["test/accuracy"] * 100 for name in "abc"]
    mean, apart = (accuracy[0] + accuracy[1]) / 2, abs(accuracy[0] - accuracy[1]) / 2**0.5
    assert rows["test/accuracy"] == [f"{mean:.2f} % ± {apart:.2f}", f"{accuracy[2]:.2f} %"]
    assert rows["rounds"] == ["2", "2"]


def test_values_by_hand() -> None:
    found = columns(
        [
            past(),
            past(lines={"rounds": 4, "seed": 1, "uplink": "raw"}, metrics={"test/accuracy": 0.7}),
            past(lines={"rounds": 4, "seed": 0, "uplink": "half"}, spent={"epsilon of users": 3.0}),
        ]
    )
    assert dict(table(found)) == {
        "uplink": ["raw", "half"],
        "test/accuracy": ["60.00 % ± 14.14", "50.00 %"],
        "test/loss": ["1.0000", "1.0000"],
        "rounds": ["4", "4"],
        "MB up": ["2.50 ± 0.00", "2.50"],
        "MB down": ["1.00 ± 0.00", "1.00"],
        "epsilon of users": ["", "3.000"],
        "seconds": ["10.0 ± 0.0", "10.0"],
    }


def test_plans_that_cannot_be_read_here_are_told_as_they_are() -> None:
    lines = {"rounds": 1, "aggregator": "no_such_package.here:Sum()"}
    (column,) = columns([past(lines=lines)])
    assert column.line("aggregator") == "no_such_package.here:Sum()"


def test_what_is_no_run_is_refused(tmp_path: Path, runs: Path) -> None:
    with pytest.raises(RunError, match="no such folder"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(RunError, match="is no run folder, and holds none"):
        read_runs([tmp_path])
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in (runs / "a").glob("*.[jy]*"):
        (damaged / path.name).write_bytes(path.read_bytes())
    (damaged / "result.json").write_text("{")
    with pytest.raises(RunError, match=r"result\.json: is no final table"):
        read_runs([damaged])


def test_the_command_prints_columns(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fedpeft.cli import compare

    compare([runs / "a", runs / "c"])
    told = capsys.readouterr().out
    assert "uplink" in told
    assert "test/accuracy" in told
    assert len(told.splitlines()[0].split()) == 2
