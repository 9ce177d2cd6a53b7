"""Searches: ranges instead of lists, rebuilt from results alone, whoever finishes first."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedpeft.durable import locked
from fedpeft.errors import FedPeftError, PlanError, RunError, TrainError
from fedpeft.plan import Plan
from fedpeft.sweep import command
from fedpeft.sweep.outcomes import Outcome
from fedpeft.sweep.place import Place
from fedpeft.sweep.running import Here, Job, Played, Sweep, played
from fedpeft.sweep.search_file import SearchFile, read_search
from fedpeft.sweep.searching import Failures, best_of, run_search
from fedpeft.types import Range, Trial
from tests.tiny import support_lines

OPTUNA = "optuna(trials=10, maximize='test/accuracy', batch=3, startup=4)"
LR = {"low": 1.0e-4, "high": 1.0e-1, "log": True}


def written(folder: Path, **content: Any) -> Path:
    path = folder / "search.yaml"
    plan = {"model": "m", "task": "classify", "data": "embedded(name='support')", "rounds": 2}
    path.write_text(yaml.safe_dump({"plan": plan, **content}, sort_keys=False))
    return path


def read(folder: Path, **content: Any) -> SearchFile:
    found = read_search(written(folder, **content))
    assert found is not None
    return found


def digest(plan: Plan) -> str:
    return hashlib.sha256(repr(sorted(plan.lines().items())).encode()).hexdigest()


def toy(plan: Plan, folder: Path) -> Mapping[str, Any]:
    """Stand for a run: the best lr is 0.01, the best rank 6; seeds differ a little."""
    lr, r = plan.trainer.lr, plan.adapter.r  # type: ignore[attr-defined]
    score = 1 - (math.log10(lr) + 2) ** 2 / 4 - abs(r - 6) / 20 + plan.seed / 1000
    folder.mkdir(parents=True, exist_ok=True)
    table = {"last": {"test/accuracy": score, "test/loss": 1 - score}, "seconds": 1.0}
    (folder / "result.json").write_text(json.dumps(table))
    return table


TOY = {
    "axes": {
        "trainer.lr": LR,
        "adapter.r": {"low": 2, "high": 16, "step": 2},
        "uplink": ["raw", "half", "int8"],
    },
    "seeds": [0, 1],
}


def searched(
    file: SearchFile,
    out: Path,
    run: Callable[[Plan, Path], Mapping[str, Any]] = toy,
    players: Any = None,
) -> tuple[list[Trial], list[Outcome]]:
    with locked(out, "sweep"):
        players = players or Here(run)
        sweep = Sweep(out, players, digest, lambda *_: None, Failures(out))
        return run_search(file, sweep), sweep.outcomes


# --- the file -----------------------------------------------------------------------------------


def test_ranges_and_choices_are_axes(tmp_path: Path) -> None:
    axes = {**TOY["axes"], "method": {"a": {"adapter": "lora(r=2)"}, "b": {"cohort": "everyone"}}}  # type: ignore[dict-item]
    zipped = [{"rounds": [1, 2], "clients": [3, 4]}]
    file = read(tmp_path, search=OPTUNA, axes=axes, zip=zipped, seeds=[5, 6])
    assert file.space == {
        "trainer.lr": Range(1e-4, 1e-1, log=True),
        "adapter.r": Range(2, 16, whole=True, step=2),
        "uplink": 3,
        "method": 2,
        "rounds+clients": 2,
    }
    point = {"trainer.lr": 0.02, "adapter.r": 4, "uplink": 1, "method": 0, "rounds+clients": 1}
    first, second = file.cells(7, point)
    assert first.values == {
        "trial": 7, "trainer.lr": 0.02, "adapter.r": 4, "uplink": "half", "method": "a",
        "rounds": 2, "clients": 4, "seed": 5,
    }  # fmt: skip
    assert first.plan is not None
    assert second.plan is not None
    assert (first.plan.trainer.lr, first.plan.adapter.r) == (0.02, 4)  # type: ignore[attr-defined]
    assert (first.plan.rounds, first.plan.clients) == (2, 4)
    assert (first.plan.seed, second.plan.seed) == (5, 6)


def test_a_field_is_set_in_what_the_line_has(tmp_path: Path) -> None:
    plan = {
        **yaml.safe_load(written(tmp_path).read_text())["plan"],
        "uplink": "feedback(topk(density=0.5) | int8)",
        "preset": "fedprox(mu=0.25)",
    }
    axes = {"uplink.density": [0.1], "correction.mu": {"low": 0.5, "high": 1.0}}
    search = "random(minimize='test/loss')"
    file = read(tmp_path, plan=plan, search=search, axes=axes)
    (cell,) = file.cells(0, {"uplink.density": 0, "correction.mu": 0.75})
    assert cell.plan is not None
    assert cell.plan.lines()["uplink"].startswith("feedback(topk(density=0.1")
    assert "mu=0.75" in cell.plan.lines()["correction"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"search": "optna(maximize='a')"}, "there is no search method 'optna'.*'optuna'"),
        ({"search": "optuna(trials=3)"}, "give maximize or minimize"),
        ({"search": "random(maximize='a', minimize='b')"}, "give maximize or minimize"),
        ({"axes": {}}, "nothing to search"),
        ({"axes": {"trainr.lr": LR}}, "'trainr.lr' names no plan line.*'trainer'"),
        ({"axes": {"rounds.x": LR}}, "rounds has no fields"),
        ({"axes": {"rounds": {"low": 5}}}, "rounds: high=None must be a number"),
        ({"axes": {"rounds": {"low": 5, "high": 5}}}, "low=5 must be below high=5"),
        ({"axes": {"rounds": {"low": 5, "hi": 6}}}, "unknown 'hi'.*'high'"),
        ({"axes": {"rounds": {"low": 0, "high": 6, "log": True}}}, "low=0 must be above 0"),
        ({"axes": {"rounds": {"low": 1, "high": 6, "log": True, "step": 1}}}, "log or step"),
        ({"axes": {"rounds": {"low": 1, "high": 6, "step": 9}}}, "step=9 must be above 0"),
        ({"axes": {"rounds": {"low": 1, "high": 6, "log": "yes"}}}, "log='yes' must be true"),
        ({"axes": {"rounds": [1, 2]}, "exclude": [{"rounds": 1}]}, "exclude: is for combinations"),
        ({"axes": {"seed": [1, 2]}}, "mean over seeds"),
        ({"axes": {"trial": {"a": {"rounds": 1}}}}, "axes: trial: is the name"),
        ({"axes": {"rounds": {"low": 1, "high": 6}}, "zip": [{"rounds": [1]}]}, "two axes say"),
        (
            {"search": "random(maximize='tst/accuracy')", "axes": {"rounds": [1]}, "sed": 1},
            "unknown line 'sed'",
        ),
        (
            {"search": "random(maximize='test/acuracy')", "axes": {"rounds": [1]}},
            "the task has no metric 'acuracy'.*accuracy",
        ),
        (
            {"search": "random(maximize='clients/accuracy')", "axes": {"evaluate": ["test"]}},
            "evaluate has test",
        ),
    ],
)
def test_searches_that_make_no_sense(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    given = {"search": OPTUNA, "axes": {"rounds": {"low": 1, "high": 6}}, **content}
    with pytest.raises(PlanError, match=message):
        read(tmp_path, **given)


def test_a_range_without_a_search_is_refused(tmp_path: Path, capfd: Any) -> None:
    path = written(tmp_path, axes={"trainer.lr": LR})
    assert read_search(path) is None
    with pytest.raises(PlanError, match=r"trainer\.lr: a range is for a search"):
        command.sweep(path, tmp_path / "out", Place("inline", None))


# --- the loop -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "search",
    [OPTUNA, "optuna(trials=7, maximize='test/accuracy', sampler='gp', startup=3)",
     "random(trials=10, maximize='test/accuracy')"],
)  # fmt: skip
def test_a_search_is_rebuilt_from_results_wherever_it_stopped(search: str, tmp_path: Path) -> None:
    file = read(tmp_path, search=search, **TOY)
    whole, outcomes = searched(file, tmp_path / "whole")
    assert len(whole) == file.search.trials
    expected = [(o.cell.values, o.run) for o in outcomes]
    stops = range(1, 2 * file.search.trials, 4)
    for stop in stops:
        out, made = tmp_path / f"stopped {stop}", list[str]()

        def run(plan: Plan, folder: Path, made: list[str] = made, at: int = stop) -> Any:
            if len(made) == at:
                made.append("")
                raise KeyboardInterrupt
            made.append(folder.name)
            return toy(plan, folder)

        with pytest.raises(KeyboardInterrupt):
            searched(file, out, run)
        trials, found = searched(file, out, run)
        assert trials == whole
        assert [(o.cell.values, o.run) for o in found] == expected
        assert len(made) - 1 == len({o.run for o in found})  # no run is made twice


def test_whoever_finishes_first_changes_nothing(tmp_path: Path) -> None:
    class Backwards:
        def play(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Played]]:
            for job in reversed(jobs):
                yield job, played(toy, job)

    file = read(tmp_path, search=OPTUNA, **TOY)
    one, _ = searched(file, tmp_path / "one")
    assert searched(file, tmp_path / "other", players=Backwards())[0] == one


def test_the_mean_over_seeds_counts_and_more_trials_go_on(tmp_path: Path) -> None:
    file = read(tmp_path, search=OPTUNA, **TOY)
    trials, outcomes = searched(file, tmp_path / "out")
    scores = [o.table["last"]["test/accuracy"] for o in outcomes[:2]]
    assert trials[0].value == pytest.approx(sum(scores) / 2, abs=1e-15)
    best = best_of(file, trials, outcomes)
    assert best is not None
    assert best.score == max(trial.value or -9 for trial in trials)
    assert len(best.runs) == len(best.scores) == 2
    assert f"best: trial {best.trial}, trainer.lr=" in best.told(file)
    more = read(tmp_path, search="random(trials=3, maximize='test/accuracy')", **TOY)
    few, _ = searched(more, tmp_path / "random")
    again = read(tmp_path, search="random(trials=6, maximize='test/accuracy')", **TOY)
    many, found = searched(again, tmp_path / "random")
    assert many[:3] == few
    assert [o.status for o in found] == ["kept"] * 6 + ["done"] * 6
    rows = list(csv.DictReader((tmp_path / "random" / "sweep.csv").read_text().splitlines()))
    assert [row["trial"] for row in rows] == [str(n // 2) for n in range(12)]


def test_what_is_to_be_small_is_made_small(tmp_path: Path) -> None:
    file = read(tmp_path, search=OPTUNA.replace("maximize='test/accuracy'", "minimize='test/loss'"),
                **TOY)  # fmt: skip
    trials, outcomes = searched(file, tmp_path / "out")
    best = best_of(file, trials, outcomes)
    assert best is not None
    assert best.score == min(trial.value for trial in trials if trial.value is not None)


def test_optuna_finds_more_than_chance(tmp_path: Path) -> None:
    found = {}
    for name in ("optuna", "random"):
        search = f"{name}(trials=40, maximize='test/accuracy')"
        trials, _ = searched(read(tmp_path, search=search, **TOY), tmp_path / name)
        found[name] = max(trial.value or -9 for trial in trials)
    assert found["optuna"] > found["random"]


def test_refused_plans_cost_nothing_and_are_told(tmp_path: Path) -> None:
    axes = {**TOY["axes"], "uplink": ["raw", "hlf"]}  # type: ignore[dict-item]
    file = read(tmp_path, search=OPTUNA, axes=axes)
    made = list[Path]()

    def run(plan: Plan, folder: Path) -> Mapping[str, Any]:
        made.append(folder)
        return toy(plan, folder)

    trials, outcomes = searched(file, tmp_path / "out", run)
    refused = [trial for trial in trials if trial.value is None]
    assert 0 < len(refused) < len(trials)
    assert all("did you mean 'half'" in trial.problem for trial in refused)
    assert len(made) == len(trials) - len(refused)
    assert not (tmp_path / "out" / "failed.jsonl").exists()
    assert sum(o.status == "failed" for o in outcomes) == len(refused)
    study = file.search._study(file.space, trials)  # type: ignore[attr-defined]
    told = [trial for trial in study.trials if trial.state.name == "FAIL"]
    assert [trial.user_attrs["problem"] for trial in told] == [t.problem for t in refused]


def test_what_has_failed_stays_failed(tmp_path: Path) -> None:
    file, out = read(tmp_path, search=OPTUNA, **TOY), tmp_path / "out"
    calls = list[float]()

    def diverging(plan: Plan, folder: Path) -> Mapping[str, Any]:
        lr = plan.trainer.lr  # type: ignore[attr-defined]
        calls.append(lr)
        if lr > 0.02:
            raise TrainError("training diverged")
        return toy(plan, folder)

    first, _ = searched(file, out, diverging)
    assert any(trial.problem == "training diverged" for trial in first)
    done = len(calls)
    assert searched(file, out, diverging)[0] == first
    assert searched(file, out)[0] == first  # it would succeed now, and what followed would differ
    assert len(calls) == done


def test_a_full_disk_ends_the_search_which_goes_on_there(tmp_path: Path) -> None:
    file, out = read(tmp_path, search=OPTUNA, **TOY), tmp_path / "out"
    whole, _ = searched(file, tmp_path / "whole")
    calls = list[Path]()

    def full(plan: Plan, folder: Path) -> Mapping[str, Any]:
        calls.append(folder)
        if len(calls) == 9:
            raise RunError(f"{folder}: cannot be written (No space left on device)")
        return toy(plan, folder)

    with pytest.raises(RunError, match=r"No space left.*the search goes on there"):
        searched(file, out, full)
    assert searched(file, out, full)[0] == whole
    assert not (out / "failed.jsonl").exists()


def test_results_without_the_goal_end_the_search_at_once(tmp_path: Path) -> None:
    search = "random(trials=9, batch=2, maximize='rows/federated')"
    file = read(tmp_path, search=search, **TOY)
    calls = list[Path]()

    def run(plan: Plan, folder: Path) -> Mapping[str, Any]:
        calls.append(folder)
        return toy(plan, folder)

    with pytest.raises(PlanError, match=r"has no 'rows/federated'.*what is finished is kept"):
        searched(file, tmp_path / "out", run)
    assert len(calls) == 4


def test_equal_points_are_one_run(tmp_path: Path) -> None:
    axes = {"uplink": ["raw", "half"], "trainer.lr": [0.01], "adapter.r": [6]}
    file = read(tmp_path, search="random(trials=12, maximize='test/accuracy')", axes=axes)
    _, outcomes = searched(file, tmp_path / "out")
    assert len({o.run for o in outcomes}) == 2
    assert sorted(o.status for o in outcomes) == ["done"] * 2 + ["kept"] * 10


def test_damaged_failures_are_named(tmp_path: Path) -> None:
    (tmp_path / "failed.jsonl").write_text('{"run": "a"}\n')
    with pytest.raises(RunError, match=r"failed.jsonl:1: names no run and problem"):
        Failures(tmp_path)


def test_without_optuna_there_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    path = written(tmp_path, search=OPTUNA, axes={"trainer.lr": LR})
    with pytest.raises(FedPeftError, match=r"pip install 'fedpeft\[search\]'.*random"):
        command.sweep(path, tmp_path / "out", Place("inline", None))
    assert not (tmp_path / "out").exists()


# --- the command --------------------------------------------------------------------------------


def small(bert: Path, folder: Path, search: str) -> Path:
    lines = support_lines(bert, rounds=2, evaluate="test")
    axes = {"trainer.lr": LR, "uplink": ["raw", "half", "hlf"]}
    path = folder / "search.yaml"
    content = {"plan": lines, "search": search, "axes": axes, "seeds": [0, 1]}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def rows(out: Path) -> list[dict[str, str]]:
    found = list(csv.DictReader((out / "sweep.csv").read_text().splitlines()))
    return [{k: v for k, v in row.items() if k not in ("status", "seconds")} for row in found]


@pytest.mark.slow
def test_several_workers_search_the_same(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = "optuna(trials=5, batch=2, startup=2, maximize='test/accuracy', seed=3)"
    path = small(bert, tmp_path, search)
    for workers in (1, 2):
        place = Place("inline", "inline", threads=1, workers=workers)
        assert command.sweep(path, tmp_path / str(workers), place)
    assert rows(tmp_path / "1") == rows(tmp_path / "2")
    said = capsys.readouterr().out
    assert "5 trials of 2 seeds, 10 runs at most, 2 trials at a time" in said
    assert "refused: trial=1" in said
    assert "best: trial " in said
    kept = json.loads((tmp_path / "1" / "tuning.json").read_text())
    assert kept["costs"] == []
    assert {"trial", "values", "scores", "runs"} == kept["best"].keys()


@pytest.mark.slow
def test_a_search_that_is_killed_at_any_moment_goes_on(bert: Path, tmp_path: Path) -> None:
    path = small(bert, tmp_path, "optuna(trials=5, batch=2, startup=2, maximize='test/accuracy')")
    place = Place("inline", "inline", threads=1)
    assert command.sweep(path, tmp_path / "whole", place)
    out = tmp_path / "killed"
    line = [sys.executable, "-m", "fedpeft", "sweep", str(path), "--out", str(out)]
    line += ["--threads", "1", "--workers", "2"]
    kills = 0
    for patience in (0.5, 0.0, 1.0, 0.3, 0.1, 2.0, 600.0, 600.0):
        before = _progress(out)
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None and (patience > 60 or _progress(out) == before):
            time.sleep(0.02)
        time.sleep(0 if patience > 60 else patience)
        if process.poll() is None:
            kills += 1
        process.send_signal(signal.SIGKILL)
        _, said = process.communicate()
        if process.returncode == 0:
            break
    assert process.returncode == 0, said.decode()[-2000:]
    assert kills > 1
    assert rows(out) == rows(tmp_path / "whole")


def _progress(out: Path) -> int:
    return sum(1 for path in out.rglob("*.json*") for _ in path.read_bytes().splitlines())
