"""Every plan, sweep and benchmark in ``simulations/``: checked fast, run in the slow tier."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpeft import Plan, simulate
from fedpeft.preview import preview
from fedpeft.sweep.sweep_file import read_sweep
from tests.waiting import HANGS

ROOT = Path(__file__).parents[1]
PLANS = sorted((ROOT / "simulations").glob("*.yaml"))
SWEEPS = [p for p in sorted((ROOT / "simulations" / "sweeps").glob("*.yaml")) if p.stem != "base"]
BENCHMARKS = sorted(p.stem for p in (ROOT / "simulations" / "benchmarks").glob("[!_]*.py"))
RUNS = {"bytes": 36, "clients": 36, "heterogeneity": 54, "privacy_frontier": 48, "small": 8}
SMALL: dict[str, dict[str, object]] = {
    "ag_news": {"cohort": "uniform(size=2)", "rounds": 1, "evaluate": "clients"},
    "newsgroups20": {"cohort": "uniform(size=2)", "rounds": 1, "eval_every": 1},
    "dolly": {"trainer": "plain(lr=1e-3, steps=1, batch=2)", "rounds": 1},
    "shakespeare": {"cohort": "uniform(size=2)", "rounds": 1},
    "sst2": {"trainer": "plain(lr=1e-3, steps=1, batch=2)", "rounds": 1, "compare": "none"},
    "quickstart": {"clients": 3, "rounds": 1, "evaluate": "clients"},
}


@pytest.mark.parametrize("path", PLANS, ids=lambda p: p.stem)
def test_plans_pass_the_preflight(path: Path, shared: Callable[[str], Path]) -> None:
    shared("cls/sst2.dev.jsonl.gz")
    found = preview(Plan.from_yaml(path))
    assert found["parameters"]["trained"] > 10_000
    assert found["bytes"]["exact"]
    assert found["warnings"] == []


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_every_cell_of_a_sweep_passes_the_preflight(
    path: Path, shared: Callable[[str], Path]
) -> None:
    shared("cls/sst2.dev.jsonl.gz")
    cells = read_sweep(path)
    assert len(cells) == RUNS[path.stem]
    assert not [cell.problem for cell in cells if cell.plan is None]
    plans = [cell.plan for cell in cells if cell.plan is not None and cell.plan.seed == 0]
    assert plans
    for plan in plans:
        assert preview(plan)["bytes"]["up_total"] > 0, plan.lines()


@pytest.mark.slow
@pytest.mark.parametrize("path", PLANS, ids=lambda p: p.stem)
def test_plans_run(path: Path, tmp_path: Path, shared: Callable[[str], Path]) -> None:
    shared("cls/sst2.dev.jsonl.gz")
    plan = Plan.from_yaml(path, SMALL[path.stem])
    result = simulate(plan, out=tmp_path / "run")
    assert len(result.history) == plan.rounds
    assert "refused" not in result.history[0]
    assert all(k in result.table["last"] for k in ("clients/loss",))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "memory"])
def test_benchmarks_report(name: str) -> None:
    rows_of(name)


@pytest.mark.slow
@pytest.mark.alone
def test_a_second_worker_takes_little_memory() -> None:
    rows = {row["workers"]: row for row in rows_of("memory")}
    assert rows[2]["pss_mb"] < 1.3 * rows[1]["pss_mb"]


def rows_of(name: str) -> list[dict[str, Any]]:
    """Run a benchmark as a user does, as quickly as it can; return what it says."""
    command = [sys.executable, "-m", f"simulations.benchmarks.{name}", "--json", "--quick"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=HANGS
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert found["benchmark"] == name
    assert found["machine"]["cores"] >= 1
    rows: list[dict[str, Any]] = found["rows"]
    assert len(rows) >= 2
    return rows
