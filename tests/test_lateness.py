"""``simulations/lateness``: its plans, what is kept of runs, and what is said of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft.types import Crowd
from simulations._study import store as stores
from simulations._study.store import Run, Store
from simulations.lateness import __main__ as command
from simulations.lateness import _pieces, _report, _work
from simulations.lateness._data import RARE, Thinned
from simulations.lateness._pieces import METHODS, SETTINGS
from simulations.lateness._task import Finding

ROOT = Path(__file__).parents[1]
HEAD = SETTINGS[0]


def fake(given: Mapping[str, Any], lr: float, seed: int) -> Run:
    """A run whose macro F1 grows to its end, faster where rounds overlap."""
    overlaps = given["schedule"].startswith("buffered")
    end = 0.5 + 0.1 * overlaps + 0.01 * seed - 0.01 * abs(lr - 10.0)
    seconds = 3600.0 if overlaps else 7200.0
    curve = [[seconds * (i + 1), end * min(i + 1, 4) / 4, end, end / 2] for i in range(8)]
    stale = {"0": 6, "3": 2} if overlaps else {"0": 8}
    metrics = {"test/accuracy": end, "test/f1": end, "held/accuracy": end, "held/loss": 1.0}
    return {"lr": lr, "seed": seed, "metrics": metrics, "curve": curve, "staleness": stale}


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_every_method_is_a_plan_that_differs_in_lateness_alone(setting: _pieces.Setting) -> None:
    own = [piece for piece in _pieces.pieces() if piece.setting == setting]
    plans = {p.method: _pieces.plan_of(p.settings, 0.2, 3) for p in own}
    assert {*plans} == {*METHODS}
    one = plans["sync"].lines()
    for plan in plans.values():
        lines = plan.lines()
        assert {k for k in lines if lines[k] != one[k]} <= {"schedule", "cohort"}
        assert plan.latency.timed
    assert len({plan.digest() for plan in plans.values()}) == len(plans)
    assert "size=10, concurrency=20" in plans["fedbuff"].lines()["schedule"]


def test_the_control_differs_in_who_is_slow_alone() -> None:
    one, other = (dict(setting.lines) for setting in SETTINGS)
    rare = np.array([0.5, 0.4, 0.3, *[0.0] * 7])
    mix = np.stack([rare, 1 - rare], axis=1)
    assert {k for k in one if one[k] != other[k]} == {"latency"}
    plans = [_pieces.plan_of(p.settings, 1.0, 0) for p in _pieces.pieces() if p.method == "sync"]
    who = [plan.latency.speeds(Crowd([str(i) for i in range(10)], mix, 7)) for plan in plans]
    assert [sorted(speeds) for speeds in who] == [[1.0] * 7 + [10.0] * 3] * 2
    assert [*np.flatnonzero(who[0] > 1)] == [0, 1, 2] != [*np.flatnonzero(who[1] > 1)]


def test_pieces_have_their_own_names_and_can_be_keys() -> None:
    every = [*_pieces.pieces(), *_pieces.pieces(quick=True)]
    assert len(dict.fromkeys(every, 1)) == len(every)
    assert len({piece.name for piece in every}) == len(every) / 2


def test_committed_results_are_those_of_the_present_settings() -> None:
    store = Store(_pieces.RESULTS)
    for path in _pieces.RESULTS.glob("*.json"):
        runs = store.runs(stores.named(_pieces.pieces(), path.stem))
        assert len({(r["lr"], r["seed"]) for r in runs}) == len(runs) > 0


def test_a_label_is_made_rare_in_training_alone(shared: Callable[[str], Path]) -> None:
    shared("cls/ag_news.train.jsonl.gz")
    whole, thinned = Thinned(keep=1.0).load(), Thinned(keep=0.25).load()
    counts = [Counter(row["label"] for row in one.train) for one in (whole, thinned)]
    assert {k: n for k, n in counts[0].items() if k != RARE} == {
        k: n for k, n in counts[1].items() if k != RARE
    }
    assert counts[1][RARE] / counts[0][RARE] == pytest.approx(0.25, abs=0.02)
    assert thinned.test == whole.test
    assert thinned.train == Thinned(keep=0.25).load().train
    few = Thinned(keep=0.25, rows=50).load()
    assert (len(few.train), len(few.test or ())) == (50, 50)
    assert len({one.fingerprint for one in (whole, thinned, few)}) == 3


def test_recall_is_that_of_one_class() -> None:
    tally = {"loss": 4.0, "count": 8.0, "correct": 5.0}
    tally |= {"true/0": 4.0, "guessed/0": 5.0, "hit/0": 3.0, "true/1": 4.0, "guessed/1": 3.0}
    tally |= {"hit/1": 2.0, "true/2": 0.0, "guessed/2": 0.0, "hit/2": 0.0}
    found = {place: Finding(place=place).metrics(tally) for place in (0, 1, 2)}
    assert [each["recall"] for each in found.values()] == [0.75, 0.5, 0.0]
    assert {*found[0]} == {*Finding.measures}
    assert found[0]["accuracy"] == 5 / 8


def test_what_is_kept_is_the_clock_of_each_evaluation() -> None:
    measured = {"test/f1": 0.25, "test/accuracy": 0.5, "test/recall": 0.125}
    history = [
        {"clock": 10.0, "staleness": {"0": 2}, "replied": ["a", "b"]},
        {"clock": 30.0, **measured, "staleness": {"0": 1, "12": 1}},
        {"clock": 40.0, **measured, "test/f1": 0.5, "replied": ["a"]},
    ]
    found = _work.timed(history)
    assert found["curve"] == [[30.0, 0.25, 0.5, 0.125], [40.0, 0.5, 0.5, 0.125]]
    assert found["staleness"] == {"0": 4, "12": 1}


def test_figures_are_means_over_the_last_evaluations() -> None:
    run = {"curve": [[3600.0 * (i + 1), i / 10, i / 20, i / 40] for i in range(10)]}
    assert _report.ended(run) == pytest.approx((0.7, 0.35, 0.175))
    assert _report.ended(run, 6) == pytest.approx((0.3, 0.15, 0.075))
    assert _report.ended(run, 2.5) == pytest.approx((0.05, 0.025, 0.0125))
    assert _report.ended(run, 0.5) is None, "before the first evaluation"
    assert _report.ended(run, 10) is None, "the run was over"
    assert _report.reached(run, 0.45) == 6
    assert _report.reached(run, 0.95) is None


def test_the_table_says_when_the_target_is_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_work, "play", fake)
    wanted = [arg for name in ("head_sync", "head_fedbuff") for arg in ("--piece", name)]
    assert command.main([*wanted, "--results", str(tmp_path)]) == 0
    tables = _report.write(Store(tmp_path)).split("\n## ")[1:]
    assert [text.splitlines()[0] for text in tables] == [setting.title for setting in SETTINGS]
    rows = {row.split("`")[1]: row for row in tables[0].splitlines() if "| `" in row}
    assert len(rows) == len(METHODS)
    assert rows["sync"] == (
        "| `sync` | 10 | 52.0 ± 1.6 | 26.0 ± 0.8 | 52.0 ± 1.6 | 16.0 ± 0.0 | 44.2 ± 1.3 "
        "| 8.0 ± 0.0 (5 of 5) | 0.0, 0 |  |  | 5 |"
    )
    assert rows["fedbuff"] == (
        "| `fedbuff` | 10 | 62.0 ± 1.6 | 31.0 ± 0.8 | 62.0 ± 1.6 | 8.0 ± 0.0 |  "
        "| 4.0 ± 0.0 (5 of 5) | 0.8, 3 | +10.0 (+10.0 to +10.0) |  | 5 |"
    )
    assert "missing: not run" in rows["fedbuff_constant"]
    plot = (tmp_path / "curves.svg").read_bytes()
    assert command.main(["--report", "--results", str(tmp_path)]) == 0
    assert (tmp_path / "curves.svg").read_bytes() == plot


@pytest.mark.slow
def test_the_quick_look_runs(shared: Callable[[str], Path]) -> None:
    shared("cls/ag_news.train.jsonl.gz")
    line = [sys.executable, "-m", "simulations.lateness", "--quick"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=True, env=env)
    rows = [row for row in done.stdout.splitlines() if row.endswith("| 2 |")]
    assert [row.split("`")[1] for row in rows] == ["sync", "fedbuff"]
