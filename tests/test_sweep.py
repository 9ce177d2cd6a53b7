"""Sweeps: content-addressed, resumable, and one failure does not cost the others."""

from __future__ import annotations

import csv
import io
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from fedpeft.driver import plan_digest, simulate
from fedpeft.errors import FedPeftError, PlanError, RunError
from fedpeft.plan import Plan
from fedpeft.sweep import command
from fedpeft.sweep.forecast import as_text, forecast
from fedpeft.sweep.outcomes import Outcome
from fedpeft.sweep.place import Place
from fedpeft.sweep.readings import Readings
from fedpeft.sweep.running import Here, run_sweep
from fedpeft.sweep.screen import SweepScreen
from fedpeft.sweep.sweep_file import Cell, read_sweep
from fedpeft.sweep.workers import Where, Workers
from tests.tiny import support_lines


def write(folder: Path, **content: Any) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def simulated(plan: Plan, folder: Path) -> Mapping[str, Any]:
    return simulate(plan, out=folder, resume=True).table


def run(path: Path, out: Path, play: Any = simulated) -> list[Outcome]:
    return run_sweep(read_sweep(path), out, Here(play), plan_digest, lambda i, outcome: None)


def statuses(outcomes: list[Outcome]) -> list[str]:
    return [o.status for o in outcomes]


def values(cells: list[Cell], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(cell.values[name] for name in names) for cell in cells]


# --- the file -----------------------------------------------------------------------------------


def test_a_sweep_beside_its_plan(tmp_path: Path, bert: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(support_lines(bert)))
    cells = read_sweep(write(tmp_path, plan="base.yaml", axes={"rounds": [1, 2]}))
    assert [cell.plan.rounds for cell in cells if cell.plan] == [1, 2]


def test_a_name_stands_for_several_lines(tmp_path: Path, bert: Path) -> None:
    groups = {
        "both": {"adapter": "lora(r=2)"},
        "frozen": {"adapter": "lora(r=2, train='B')", "aggregator": "mean"},
    }
    axes = {"method": groups, "rounds": [1, 2]}
    cells = read_sweep(write(tmp_path, plan=support_lines(bert), axes=axes))
    expected = [("both", 1), ("both", 2), ("frozen", 1), ("frozen", 2)]
    assert values(cells, "method", "rounds") == expected
    assert [str(cell.lines["adapter"]) for cell in cells[::2]] == [
        "lora(r=2)",
        "lora(r=2, train='B')",
    ]


def test_zipped_lines_go_together(tmp_path: Path, bert: Path) -> None:
    zipped = [{"uplink": ["raw", "half"], "downlink": ["raw", "half"]}]
    cells = read_sweep(write(tmp_path, plan=support_lines(bert), zip=zipped, seeds=[0, 1]))
    expected = [("raw", "raw", 0), ("raw", "raw", 1), ("half", "half", 0), ("half", "half", 1)]
    assert values(cells, "uplink", "downlink", "seed") == expected


def test_what_is_excluded_is_left_out(tmp_path: Path, bert: Path) -> None:
    axes = {"uplink": ["raw", "half"], "rounds": [1, 2, 3]}
    exclude = [{"uplink": "half", "rounds": [1, 3]}]
    cells = read_sweep(write(tmp_path, plan=support_lines(bert), axes=axes, exclude=exclude))
    expected = [("raw", 1), ("raw", 2), ("raw", 3), ("half", 2)]
    assert values(cells, "uplink", "rounds") == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"axes": {"uplink": ["raw"]}}, "plan: give a plan file"),
        ({"plan": {}, "axes": {"uplnk": ["raw"]}}, "'uplnk' names no plan line.*'uplink'"),
        ({"plan": {}, "axes": {"uplink": "raw"}}, "axes: uplink: write each as"),
        ({"plan": {}, "axes": ["uplink"]}, "axes: write each as"),
        ({"plan": {}, "axes": {"uplink": []}}, "axes: uplink: write each as"),
        ({"plan": {}, "axes": {"uplink": {"a": {"rounds": 1}}}}, "uplink: is a plan line"),
        ({"plan": {}, "axes": {"m": {"a": {"ronds": 1}}}}, "axes: m: a: 'ronds' names no.*rounds"),
        ({"plan": {}, "axes": {"m": {"a": "raw"}}}, "axes: m: a: write plan lines"),
        ({"plan": {}, "zip": {"uplink": ["raw"]}}, "zip: write a list"),
        ({"plan": {}, "zip": [{"uplink": "raw"}]}, "zip: write each as"),
        ({"plan": {}, "zip": [{"uplnk": ["raw"]}]}, "zip: 'uplnk' names no plan line"),
        (
            {"plan": {}, "zip": [{"uplink": ["raw"], "rounds": [1, 2]}]},
            "as many values each; uplink has 1, rounds has 2",
        ),
        (
            {"plan": {}, "axes": {"rounds": [1]}, "zip": [{"rounds": [1], "clients": [2]}]},
            "two axes say what 'rounds' is",
        ),
        ({"plan": {}, "axes": {"rounds": [1]}, "exclude": [{"rnds": 1}]}, "'rnds' is no axis.*rou"),
        ({"plan": {}, "axes": {"rounds": [1]}, "exclude": [{"rounds": 2}]}, "leaves nothing out"),
        ({"plan": {}, "exclude": {"rounds": 2}}, "exclude: write a list"),
        ({"plan": {}, "exclude": [2]}, "exclude: write each as"),
        ({"plan": {}, "seeds": 3}, "seeds: write a list"),
        ({"plan": {}, "seed": [0]}, "unknown line 'seed'; did you mean 'seeds'"),
        ({"plan": {}, "seeds": [0], "axes": {"seed": [1]}}, "not both"),
        ({"plan": "missing.yaml"}, "missing.yaml: no such file"),
    ],
)
def test_sweeps_that_make_no_sense(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        read_sweep(write(tmp_path, **content))


# --- runs ---------------------------------------------------------------------------------------


def test_private_runs_are_kept_though_they_tell_of_no_seconds(bert: Path, tmp_path: Path) -> None:
    lines = support_lines(bert, rounds=1, evaluate="test", holdout=0.0) | {
        "privacy": "user(noise_multiplier=1.0)",
        "cohort": "poisson(rate=0.5)",
        "weighting": "uniform(denominator='expected')",
    }
    path, out = write(tmp_path, plan=lines, seeds=[0]), tmp_path / "out"
    assert statuses(run(path, out)) == ["done"]
    assert statuses(run(path, out)) == ["kept"]
    (found,) = forecast(read_sweep(path), lambda cell: next(out.glob("*/")), lambda _: {})
    assert (found.finished, found.problem, found.seconds) == (1, "", None)


def test_finished_runs_are_kept_and_failures_do_not_stop(bert: Path, tmp_path: Path) -> None:
    lines = support_lines(bert, rounds=1, evaluate="test")
    axes = {"uplink": ["raw", "half"], "cohort": ["everyone", "uniform(size=99)"]}
    path, out = write(tmp_path, plan=lines, axes=axes, seeds=[0, 1]), tmp_path / "out"
    first = run(path, out)
    assert statuses(first) == ["done"] * 2 + ["failed"] * 2 + ["done"] * 2 + ["failed"] * 2
    assert "size=99" in first[2].problem
    before = {p: p.stat().st_mtime_ns for p in out.rglob("adapter_model.safetensors")}
    assert len(before) == 4
    second = run(path, out)
    assert statuses(second) == [s.replace("done", "kept") for s in statuses(first)]
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("adapter_model.safetensors")}
    rows = list(csv.DictReader((out / "sweep.csv").read_text().splitlines()))
    assert [(r["uplink"], r["cohort"], r["seed"]) for r in rows[:2]] == [
        ("raw", "everyone", "0"),
        ("raw", "everyone", "1"),
    ]
    assert float(rows[0]["test/accuracy"]) >= 0
    assert int(rows[4]["up_bytes"]) < 0.7 * int(rows[0]["up_bytes"])
    assert "size=99" in rows[2]["problem"]


def test_an_interrupted_sweep_goes_on(bert: Path, tmp_path: Path) -> None:
    path = write(tmp_path, plan=support_lines(bert, rounds=1), seeds=[0, 1, 2])
    calls = []

    def stop_at_second(plan: Any, folder: Path) -> Any:
        calls.append(folder)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return simulated(plan, folder)

    with pytest.raises(KeyboardInterrupt):
        run(path, tmp_path / "out", stop_at_second)
    assert statuses(run(path, tmp_path / "out")) == ["kept", "done", "done"]


def test_a_file_that_has_changed_keeps_what_is_the_same(bert: Path, tmp_path: Path) -> None:
    lines, out = support_lines(bert, rounds=1), tmp_path / "out"
    run(write(tmp_path, plan=lines, axes={"uplink": ["raw"]}), out)
    found = run(write(tmp_path, plan=lines, axes={"uplink": ["half", "raw"]}), out)
    assert statuses(found) == ["done", "kept"]


def test_a_defect_in_one_run_is_shown(bert: Path, tmp_path: Path) -> None:
    path = write(tmp_path, plan=support_lines(bert, rounds=1), seeds=[0])

    def broken(plan: Any, folder: Path) -> Any:
        raise ZeroDivisionError("division by zero")

    found = run(path, tmp_path, broken)
    assert found[0].problem == "ZeroDivisionError: division by zero"


def test_a_cell_that_is_no_plan_is_a_failed_outcome(bert: Path, tmp_path: Path) -> None:
    path = write(tmp_path, plan=support_lines(bert), axes={"optimizer": ["adm"]})
    found = run(path, tmp_path / "out")
    assert found[0].status == "failed"
    assert "did you mean 'adam'" in found[0].problem
    assert isinstance(PlanError("x"), FedPeftError)


def test_two_sweeps_in_one_folder_are_refused(bert: Path, tmp_path: Path) -> None:
    path, out = write(tmp_path, plan=support_lines(bert, rounds=1)), tmp_path / "out"

    def again(plan: Any, folder: Path) -> Any:
        with pytest.raises(RunError, match="sweep"):
            run(path, out)
        return {}

    assert statuses(run(path, out, again)) == ["done"]


# --- several processes --------------------------------------------------------------------------


def test_several_processes_make_the_same_runs(bert: Path, tmp_path: Path) -> None:
    axes = {"uplink": ["raw", "half"], "cohort": ["everyone", "uniform(size=99)"]}
    lines = support_lines(bert, rounds=2, evaluate="test")
    path = write(tmp_path, plan=lines, axes=axes, seeds=[0, 1])
    alone = run(path, tmp_path / "alone")
    heard = list[tuple[int, int, int]]()
    told = list[int]()
    with Workers(2, Where(threads=1), lambda *round: heard.append(round)) as workers:
        together = run_sweep(
            read_sweep(path),
            tmp_path / "together",
            workers,
            plan_digest,
            lambda number, _: told.append(number),
        )
    assert statuses(together) == statuses(alone)
    assert [o.problem for o in together] == [o.problem for o in alone]
    assert sorted(told) == list(range(8))
    assert {rounds for _, _, rounds in heard} == {2}
    assert {(number, done) for number, done, _ in heard} >= {(0, 0), (0, 1), (0, 2)}
    for one, other in zip(alone, together, strict=True):
        assert one.run == other.run
        if one.run and one.status == "done":
            adapters = [tmp_path / each / one.run / "adapter" for each in ("alone", "together")]
            bits = [(a / "adapter_model.safetensors").read_bytes() for a in adapters]
            assert bits[0] == bits[1]


def test_a_process_that_dies_costs_its_run_alone(bert: Path, tmp_path: Path) -> None:
    path = write(tmp_path, plan=support_lines(bert, rounds=2), seeds=[0, 1, 2])
    killed = list[int]()
    with Workers(1, Where(threads=1)) as workers:

        def kill(number: int, done: int, rounds: int) -> None:
            if number == 1 and not killed:
                (process,) = workers.pids
                killed.append(process)
                os.kill(process, signal.SIGKILL)

        workers.tell = kill
        found = run_sweep(read_sweep(path), tmp_path / "out", workers, plan_digest, lambda *_: None)
    assert statuses(found) == ["done", "failed", "done"]
    assert "was killed (signal 9)" in found[1].problem
    assert statuses(run(path, tmp_path / "out")) == ["kept", "done", "kept"]


# --- what is said before ------------------------------------------------------------------------


def test_what_it_costs_and_what_is_refused_is_said_before(bert: Path, tmp_path: Path) -> None:
    from fedpeft.preview import preview

    lines = support_lines(bert, rounds=1, cohort="poisson(rate=0.5)")
    lines["weighting"] = "uniform(denominator='expected')"
    promises = ["none", "user(epsilon=3.0, clip=0.5, simulate_noise=true)"]
    axes = {"privacy": promises, "uplink": ["raw", "half", "hlf"]}
    path, out = write(tmp_path, plan=lines, axes=axes, seeds=[0, 1]), tmp_path / "out"
    cells, names = read_sweep(path), Readings()
    run_sweep(cells[:1], out, Here(simulated), names.of, lambda *_: None)
    found = forecast(cells, lambda cell: out / names.folder(cell), preview)
    assert [line.runs for line in found] == [2] * 6
    assert [line.left for line in found] == [1, 2, 0, 2, 2, 0]
    assert cells[0].plan is not None
    told = preview(cells[0].plan)["bytes"]
    assert found[0].bytes == told["down_total"] + told["up_total"] + told["evaluation_total"]
    assert found[0].seconds is not None
    assert {line.seconds for line in found if not line.problem} == {found[0].seconds}
    said = "\n".join(as_text(found, 2))
    assert "12 runs, 1 finished, 7 to be made, 4 refused" in said
    assert "refused: privacy=none, uplink=hlf and 1 more: uplink: " in said
    assert "epsilon of users, for a run: 3\n" in said
    assert "2 of 4 combinations promise nothing" in said
    assert f"bytes: {sum(line.left * line.bytes for line in found) / 1e6:,.1f} MB" in said


def test_results_of_another_version_are_named(bert: Path, tmp_path: Path) -> None:
    path, out = write(tmp_path, plan=support_lines(bert, rounds=1)), tmp_path / "out"
    cells, names = read_sweep(path), Readings()
    folder = out / names.folder(cells[0])
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("[1]")
    (line,) = forecast(cells, lambda cell: out / names.folder(cell), lambda plan: {})
    assert "no final table of this version" in line.problem


# --- the command --------------------------------------------------------------------------------


def test_workers_and_an_engine_of_processes_exclude_each_other(bert: Path, tmp_path: Path) -> None:
    path = write(tmp_path, plan=support_lines(bert, rounds=1))
    with pytest.raises(PlanError, match="--workers 2: each runs a whole plan by itself"):
        command.sweep(path, tmp_path / "out", Place("processes", None, workers=2))
    assert not (tmp_path / "out").exists()


def test_a_check_runs_nothing(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, plan=support_lines(bert, rounds=1), axes={"uplink": ["raw", "hlf"]})
    place = Place("inline", None)
    assert not command.sweep(path, tmp_path / "out", place, check=True)
    assert "2 runs, 0 finished, 1 to be made, 1 refused" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


# --- the screen ---------------------------------------------------------------------------------


def test_a_terminal_shows_what_runs_and_what_is_left() -> None:
    names = ["raw", "raw", "raw", "half"]
    cells = [Cell({"uplink": u, "seed": seed}, {}, None) for seed, u in enumerate(names)]
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    with SweepScreen(cells, console) as screen:
        screen.say(["4 runs"])
        screen.outcome(0, Outcome(cells[0], "done", "x", {"last": {"test/accuracy": 0.5}}))
        screen.outcome(1, Outcome(cells[1], "failed", "", {}, "it broke"))
        screen.rounds(2, 3, 10)
        paper = io.StringIO()
        Console(file=paper, width=120).print(screen.shown())
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert "4 runs\n" in told
    assert "1/4 done   uplink=raw, seed=0: test/accuracy 0.5000" in told
    assert "2/4 failed uplink=raw, seed=1: it broke" in told
    first, second = paper.getvalue().splitlines()
    assert first.rstrip().endswith("1 done, 1 failed, 2 to go, about 0:00 left")
    assert second.startswith("uplink=raw, seed=2")
    assert "round 3/10" in second


def test_elsewhere_there_are_lines_alone(capsys: pytest.CaptureFixture[str]) -> None:
    cells = [Cell({"seed": 0}, {}, None)]
    with SweepScreen(cells) as screen:
        screen.rounds(0, 1, 2)
        screen.outcome(0, Outcome(cells[0], "kept", "x", {"last": {"test/loss": 1.0}}))
    assert capsys.readouterr().out == "1/1 kept   seed=0: test/loss 1.0000\n"


def test_the_screen_tells_runs_by_what_differs() -> None:
    cells = [Cell({"uplink": "raw", "clients": 4, "seed": s}, {}, None, "no plan") for s in (0, 1)]
    for shown, line in (
        (cells, "1/2 failed seed=0: no plan"),
        (cells[:1], "clients=4, seed=0: no"),
    ):
        stream = io.StringIO()
        screen = SweepScreen([*shown], Console(file=stream, soft_wrap=True))
        screen.outcome(0, Outcome(cells[0], "failed", "run", problem="no plan"))
        assert line in stream.getvalue()
