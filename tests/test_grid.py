"""Grids: content-addressed, resumable, and one failure does not cost the others."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedpeft.driver import plan_digest, simulate
from fedpeft.errors import FedPeftError, PlanError
from fedpeft.grid import Outcome, read_grid, run_grid
from tests.tiny import support_lines


def write(folder: Path, **content: Any) -> Path:
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def run(path: Path, out: Path) -> list[Outcome]:
    return run_grid(
        read_grid(path),
        out,
        lambda plan, folder: simulate(plan, out=folder, resume=True).table,
        plan_digest,
        lambda i, outcome: None,
    )


def test_finished_runs_are_kept_and_failures_do_not_stop(bert: Path, tmp_path: Path) -> None:
    lines = support_lines(bert, rounds=1, evaluate="test")
    axes = {"uplink": ["raw", "half"], "cohort": ["everyone", "uniform(size=99)"]}
    path, out = write(tmp_path, plan=lines, axes=axes, seeds=[0, 1]), tmp_path / "out"
    first = run(path, out)
    assert [o.status for o in first] == ["done"] * 2 + ["failed"] * 2 + ["done"] * 2 + [
        "failed"
    ] * 2
    assert "size=99" in first[2].problem
    before = {p: p.stat().st_mtime_ns for p in out.rglob("adapter_model.safetensors")}
    assert len(before) == 4
    second = run(path, out)
    assert [o.status for o in second] == [s.replace("done", "kept") for s in statuses(first)]
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("adapter_model.safetensors")}
    rows = list(csv.DictReader((out / "grid.csv").read_text().splitlines()))
    assert [(r["uplink"], r["cohort"], r["seed"]) for r in rows[:2]] == [
        ("raw", "everyone", "0"),
        ("raw", "everyone", "1"),
    ]
    assert float(rows[0]["test/accuracy"]) >= 0
    assert int(rows[4]["up_bytes"]) < 0.7 * int(rows[0]["up_bytes"])
    assert "size=99" in rows[2]["problem"]


def statuses(outcomes: list[Outcome]) -> list[str]:
    return [o.status for o in outcomes]


def test_an_interrupted_grid_goes_on(bert: Path, tmp_path: Path) -> None:
    path = write(tmp_path, plan=support_lines(bert, rounds=1), seeds=[0, 1, 2])
    calls = []

    def stop_at_second(plan: Any, folder: Path) -> Any:
        calls.append(folder)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return simulate(plan, out=folder, resume=True).table

    with pytest.raises(KeyboardInterrupt):
        run_grid(read_grid(path), tmp_path / "out", stop_at_second, plan_digest, lambda i, o: None)
    assert statuses(run(path, tmp_path / "out")) == ["kept", "done", "done"]


def test_a_defect_in_one_run_is_shown(bert: Path, tmp_path: Path) -> None:
    path = write(tmp_path, plan=support_lines(bert, rounds=1), seeds=[0])

    def broken(plan: Any, folder: Path) -> Any:
        raise ZeroDivisionError("division by zero")

    found = run_grid(read_grid(path), tmp_path, broken, plan_digest, lambda i, o: None)
    assert found[0].problem == "ZeroDivisionError: division by zero"


def test_a_grid_beside_its_plan(tmp_path: Path, bert: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(support_lines(bert)))
    cells = read_grid(write(tmp_path, plan="base.yaml", axes={"rounds": [1, 2]}))
    assert [cell.plan.rounds for cell in cells if cell.plan] == [1, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"axes": {"uplink": ["raw"]}}, "plan: give a plan file"),
        ({"plan": {}, "axes": {"uplnk": ["raw"]}}, "'uplnk' names no plan line.*'uplink'"),
        ({"plan": {}, "axes": {"uplink": "raw"}}, "axes: write each as"),
        ({"plan": {}, "seeds": 3}, "seeds: write a list"),
        ({"plan": {}, "seed": [0]}, "unknown line 'seed'; did you mean 'seeds'"),
        ({"plan": {}, "seeds": [0], "axes": {"seed": [1]}}, "not both"),
        ({"plan": "missing.yaml"}, "missing.yaml: no such file"),
    ],
)
def test_grids_that_make_no_sense(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        read_grid(write(tmp_path, **content))


def test_a_cell_that_is_no_plan_is_a_failed_outcome(bert: Path, tmp_path: Path) -> None:
    path = write(tmp_path, plan=support_lines(bert), axes={"optimizer": ["adm"]})
    found = run(path, tmp_path / "out")
    assert found[0].status == "failed"
    assert "did you mean 'adam'" in found[0].problem
    assert isinstance(PlanError("x"), FedPeftError)
