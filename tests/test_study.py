"""``simulations/_study``: what is kept of a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft import simulate
from fedpeft.federation import Federation, deal
from fedpeft.preflight import check
from fedpeft.spec import build
from fedpeft.types import Splits
from simulations._study import command, runs, summary
from simulations._study import store as stores
from simulations._study.clock import Clock
from tests.tiny import support_plan
from tests.waiting import HANGS


def test_held_out_records_are_pooled_over_clients() -> None:
    splits = Splits(train=[{}] * 10, test=[], fingerprint="")
    held = {"a": np.arange(1), "b": np.arange(1, 4)}
    federation = Federation(splits, (), {"a": np.arange(4, 6), "b": np.arange(6, 10)}, held)
    per_client = {"a": {"accuracy": 1.0, "loss": 2.0}, "b": {"accuracy": 1 / 3, "loss": 0.4}}
    last = {"round": 3, "test/accuracy": 0.5, "per_client": per_client, "up_bytes": 7}
    found = runs.metrics(last, federation)
    assert found == {"held/accuracy": 0.5, "held/loss": 0.8, "test/accuracy": 0.5}


def test_the_majority_of_a_client_is_what_it_trains_on(bert: Path) -> None:
    plan = support_plan(bert)
    dealt = deal(plan)
    labels = [str(label) for label in plan.task.labels(dealt.splits.train) or []]
    right = sum(
        labels[i] == max(sorted(own := [labels[j] for j in dealt.train[c]]), key=own.count)
        for c in dealt.held
        for i in dealt.held[c]
    )
    total = sum(map(len, dealt.held.values()))
    found = runs.majority(plan, dealt)
    tests = [str(label) for label in plan.task.labels(dealt.splits.test or []) or []]
    assert found["test"] == round(max(map(tests.count, tests)) / len(tests), 6)
    assert found["held"] == pytest.approx(right / total, abs=0.11)  # ties may go either way


def test_the_clock_changes_nothing(bert: Path) -> None:
    plan = support_plan(bert, rounds=3)
    clock = Clock(build("engine", "inline(group=2)"))
    timed = simulate(plan, engine=clock, watch=clock)
    plain = simulate(plan, engine="inline(group=2)")
    for name, value in plain.tensors.items():
        np.testing.assert_array_equal(timed.tensors[name], value)
    seconds = sum(line["seconds"] for line in timed.history)
    assert 0 < (clock.per_round() or 0) < seconds


def test_texts_have_no_accuracy() -> None:
    splits = Splits(train=[{}] * 4, test=[], fingerprint="")
    rows = {"a": np.arange(1), "b": np.arange(1, 4)}
    per_client = {"a": {"loss": 2.0, "perplexity": 7.4}, "b": {"loss": 0.4, "perplexity": 1.5}}
    last = {"clients/perplexity": 4.4, "per_client": per_client}
    found = runs.metrics(last, Federation(splits, (), rows, rows))
    assert found == {"held/loss": 0.8, "clients/perplexity": 4.4}


def test_what_is_kept_of_a_run(bert: Path) -> None:
    plan = support_plan(bert, rounds=2, cohort="everyone")
    found = runs.play(plan, 0.01, 2)
    values = sum(int(np.prod(shape)) for shape in check(plan).shapes.values())
    clients = len(deal(plan).train)
    assert found["float32_bytes"] == 4 * values * clients * 2
    assert found["float32_bytes"] < found["up_bytes"] < found["float32_bytes"] + 2000 * clients * 2
    assert (found["rounds"], found["seed"], found["lr"], found["refused"]) == (
        2,
        plan.seed,
        0.01,
        0,
    )
    assert 0 <= found["metrics"]["held/accuracy"] <= 1
    assert {"held", "test"} == {*found["majority"]}


def test_spreads() -> None:
    assert summary.spread([]) == ""
    assert summary.spread([1.25]) == "1.2"
    assert summary.spread([1.0, 2.0, 3.0], 2) == "2.00 ± 1.00"


# --- what is kept, and the command ---------------------------------------------------------------


@dataclass(frozen=True)
class Counted:
    """A piece without a plan."""

    name: str = "one"
    lacks: str = ""
    rates: tuple[float, ...] = (1.0, 2.0)
    seeds: tuple[int, ...] = (0, 1)
    stage: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        return {"rounds": 3}

    @property
    def chooser(self) -> Counted:
        return self


def counted(given: Mapping[str, Any], lr: float, seed: int) -> stores.Run:
    return {"lr": lr, "seed": seed, "metrics": {"held/accuracy": lr, "held/loss": 1.0}}


def study(folder: Path) -> command.Study[bool]:
    return command.Study(
        name="counted",
        results=folder,
        sizes=(False, True),
        pieces=lambda _: [Counted()],
        quick=("one",),
        play=counted,
        report=lambda *_: "a table",
        told=("held/accuracy",),
    )


def test_the_command_says_what_was_run_and_where_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(study(tmp_path), []) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "one lr=1 seed=0: held/accuracy 1.0000"
    assert len(said) == 4, "two rates and one more seed, and where they are"
    assert said[-1] == f"runs and report: {tmp_path}"
    assert command.main(study(tmp_path), []) == 0
    assert capsys.readouterr().out.splitlines() == said[-1:], "nothing is repeated"


def test_a_run_that_was_made_twice_is_kept_once(tmp_path: Path) -> None:
    store = stores.Store(tmp_path)
    for value in (0.25, 0.5):
        store.keep(Counted(), {**counted({}, 1.0, 0), "told": value})
    assert [run["told"] for run in store.runs(Counted())] == [0.5]


def test_a_rate_that_not_all_have_tried_chooses_nothing(tmp_path: Path) -> None:
    store = stores.Store(tmp_path)
    for lr in (1.0, 9.0, 2.0):
        assert store.rate(Counted()) is None
        store.keep(Counted(), counted({}, lr, 0))
    assert store.rate(Counted()) == 2.0
    assert [run["lr"] for run in store.scored(Counted())] == [2.0]


@pytest.mark.parametrize("text", ["", '{"runs": [', "[]", '{"runs": 1, "settings": {}}', "{}"])
def test_a_damaged_file_of_results_is_named(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.json").write_text(text)
    assert command.main(study(tmp_path), ["--list"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path / 'one.json'}: is no results file, or a damaged one")


def test_jobs_are_one_or_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(study(tmp_path), ["--jobs", "0"])
    assert stopped.value.code == 2
    assert "argument --jobs: 0 is less than one" in capsys.readouterr().err


def test_the_processes_of_a_command_that_is_killed_end_too(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n"
        "from simulations._study.command import follow\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPoolExecutor(1, get_context('spawn'), follow)\n"
        "    print(pool.submit(os.getppid).result() == os.getpid(), flush=True)\n"
        "    pool.submit(time.sleep, 100_000)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    line = [sys.executable, str(program)]
    # it returns when the last process that holds the pipe has ended
    done = subprocess.run(line, capture_output=True, text=True, env=env, timeout=HANGS, check=False)
    assert (done.stdout, done.returncode) == ("True\n", -signal.SIGKILL)
