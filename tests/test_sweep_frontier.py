"""The frontier of a sweep: against the definition, by brute force, and from run folders."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import yaml
from hypothesis import given

from fedpeft.past_run import read_runs
from fedpeft.sweep.frontier import frontier, pareto, points_of, usual_metric


def dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


_few = st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.0, math.inf])


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.tuples(*[_few] * n), max_size=30)))
def test_the_definition_by_brute_force(points: list[tuple[float, ...]]) -> None:
    expected = [i for i, p in enumerate(points) if not any(dominates(q, p) for q in points)]
    assert pareto(points) == expected


def test_what_is_no_number_is_left_out() -> None:
    assert pareto([(math.nan, 0.0), (1.0, 1.0), (2.0, 0.5)]) == [1, 2]


def run_folder(path: Path, lines: dict[str, Any], score: float, **line: Any) -> Path:
    path.mkdir(parents=True)
    (path / "run.json").write_text("{}")
    (path / "plan.yaml").write_text(yaml.safe_dump(lines))
    (path / "rounds.jsonl").write_text(json.dumps({"round": 0, **line}) + "\n")
    table = {"last": {"test/accuracy": score, "test/loss": 1 - score}, "seconds": 1.0}
    (path / "result.json").write_text(json.dumps(table))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    free = {"up_bytes": 2_000_000, "down_bytes": 1_000_000}
    cheap = {"up_bytes": 500_000, "down_bytes": 500_000}
    run_folder(tmp_path / "a0", {"m": "free", "seed": 0}, 0.9, **free)
    run_folder(tmp_path / "a1", {"m": "free", "seed": 1}, 0.8, **free)
    run_folder(tmp_path / "b0", {"m": "private", "seed": 0}, 0.7, epsilon=3.0, **free)
    run_folder(tmp_path / "b1", {"m": "private", "seed": 1}, 0.7, epsilon=3.5, **free)
    run_folder(tmp_path / "c0", {"m": "worse", "seed": 0}, 0.6, epsilon=4.0, **free)
    run_folder(tmp_path / "d0", {"m": "records", "seed": 0}, 0.5, epsilon_record=9.0, **free)
    run_folder(tmp_path / "e0", {"m": "cheap", "seed": 0}, 0.82, **cheap)
    run_folder(tmp_path / "f0", {"m": "cheap and worse", "seed": 0}, 0.81, **cheap)
    (run_folder(tmp_path / "g0", {"m": "unfinished", "seed": 0}, 1.0) / "result.json").unlink()
    return tmp_path


def test_runs_of_a_folder(folder: Path) -> None:
    runs = read_runs([folder])
    metric = usual_metric(runs)
    assert metric == "test/accuracy"
    points = list(points_of(runs, metric))
    assert len(points) == 6
    found = frontier(points, metric)
    assert {p.column.line("m") for p in found} == {"free", "cheap", "private", "records"}
    first = found[0]
    assert first.score == pytest.approx(0.85)
    private = next(p for p in found if p.column.line("m") == "private")
    assert private.spent == {"epsilon of users": 3.5}
    assert (private.deviation, private.megabytes) == (0.0, 3.0)


def test_a_loss_is_better_when_it_is_less(folder: Path) -> None:
    points = list(points_of(read_runs([folder]), "test/loss"))
    found = frontier(points, "test/loss")
    assert [p.column.line("m") for p in found][-2:] == ["private", "records"]
    assert found[0].score == pytest.approx(0.15)


def test_bytes_that_a_private_run_does_not_tell_make_it_no_cheaper(folder: Path) -> None:
    run_folder(folder / "p0", {"m": "secret", "seed": 0}, 0.55, epsilon=3.6)
    points = list(points_of(read_runs([folder]), "test/accuracy"))
    secret = next(p for p in points if p.column.line("m") == "secret")
    assert secret.megabytes is None
    assert secret not in frontier(points, "test/accuracy")
