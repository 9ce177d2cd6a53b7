"""Sweeps whose runs are made on an engine's workers: what comes back, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedpeft.driver import plan_digest
from fedpeft.engine.ray import Ray
from fedpeft.errors import PlanError, RunError
from fedpeft.sweep import command
from fedpeft.sweep.cluster import Cluster
from fedpeft.sweep.outcomes import Outcome
from fedpeft.sweep.place import Place
from fedpeft.sweep.running import run_sweep
from fedpeft.sweep.sweep_file import read_sweep
from fedpeft.sweep.workers import Where
from tests.test_sweep import run, statuses, write
from tests.tiny import support_lines


class Hosts:
    """Workers that do their calls in this process, the last one that was given first."""

    size = 2

    def __init__(self, before: Callable[[int], Any] = lambda _: None) -> None:
        self.waiting: list[tuple[int, Callable[[], Any]]] = []
        self.before, self.calls, self.busiest = before, 0, 0

    def call(self, number: int, work: Callable[..., Any], *arguments: Any) -> None:
        assert number not in dict(self.waiting)
        self.waiting.append((number, lambda: work(*arguments)))
        self.busiest = max(self.busiest, len(self.waiting))

    def ended(self, seconds: float) -> list[tuple[int, Any]]:
        number, work = self.waiting.pop()
        self.calls += 1
        return [(number, self.before(self.calls) or work())]


def on(hosts: Hosts, path: Path, out: Path, heard: list[Any] | None = None) -> list[Outcome]:
    tell = (lambda *round: heard.append(round)) if heard is not None else (lambda *_: None)
    players = Cluster(hosts, Where(), tell)
    return run_sweep(read_sweep(path), out, players, plan_digest, lambda *_: None)


def test_runs_on_workers_are_those_of_one_process(bert: Path, tmp_path: Path) -> None:
    axes = {"uplink": ["raw", "half"], "cohort": ["everyone", "uniform(size=99)"]}
    path = write(tmp_path, plan=support_lines(bert, rounds=2), axes=axes)
    hosts, heard = Hosts(), list[Any]()
    found = on(hosts, path, tmp_path / "there", heard)
    expected = run(path, tmp_path / "here")
    assert statuses(found) == statuses(expected) == ["done", "failed"] * 2
    assert [o.problem for o in found] == [o.problem for o in expected]
    for one in (o.run for o in found if o.status == "done"):
        files = [tmp_path / each / one / "adapter/adapter_model.safetensors" for each in
                 ("there", "here")]  # fmt: skip
        assert files[0].read_bytes() == files[1].read_bytes()
    assert hosts.busiest == 2
    assert not list((tmp_path / "there").glob(".shared-*"))
    assert statuses(on(hosts, path, tmp_path / "there")) == ["kept", "failed"] * 2


def test_it_is_told_how_far_a_run_has_come(bert: Path, tmp_path: Path) -> None:
    path, out = write(tmp_path, plan=support_lines(bert, rounds=3), seeds=[0]), tmp_path / "out"
    folder = out / first(path)

    class Slow(Hosts):
        """Two rounds are written before the run ends; then it begins anew."""

        def ended(self, seconds: float) -> list[tuple[int, Any]]:
            if folder.exists():
                shutil.rmtree(folder)
                return super().ended(seconds)
            folder.mkdir()
            (folder / "rounds.jsonl").write_text("{}\n{}\n{")
            return []

    heard = list[Any]()
    assert statuses(on(Slow(), path, out, heard)) == ["done"]
    assert heard == [(0, 2, 3)]


def first(path: Path) -> str:
    """Return the folder of a sweep's first run."""
    plan = read_sweep(path)[0].plan
    assert plan
    return plan_digest(plan)[:16]


def test_a_worker_that_dies_costs_its_run_alone(bert: Path, tmp_path: Path) -> None:
    path = write(tmp_path, plan=support_lines(bert, rounds=1), seeds=[0, 1, 2])
    dead = Hosts(lambda calls: RunError("its worker died: gone") if calls == 1 else None)
    found = on(dead, path, tmp_path / "out")
    assert sorted(statuses(found)) == ["done", "done", "failed"]
    assert [o.problem for o in found if o.problem] == ["its worker died: gone"]
    assert sorted(statuses(on(Hosts(), path, tmp_path / "out"))) == ["done", "kept", "kept"]


def test_a_machine_without_the_folder_ends_the_sweep(bert: Path, tmp_path: Path) -> None:
    path, out = write(tmp_path, plan=support_lines(bert, rounds=1), seeds=[0, 1]), tmp_path / "out"

    def away(_: int) -> None:
        for mark in out.glob(".shared-*"):
            mark.rmdir()

    with pytest.raises(RunError, match=r"workers at .* do not have this folder; give --out on"):
        on(Hosts(away), path, out)
    assert not list(out.glob("*/rounds.jsonl"))


class Farm(Ray):
    """A cluster of this process."""

    @contextmanager
    def hosts(self, plans: Any) -> Iterator[Any]:
        assert [plan.rounds for plan in plans] == [1]
        yield Hosts()


def test_the_command_makes_runs_on_an_engine_that_takes_them(bert: Path, tmp_path: Path) -> None:
    path = write(tmp_path, plan=support_lines(bert, rounds=1), seeds=[0])
    place = Place("ray(group=4)", Farm(group=4))
    assert command.sweep(path, tmp_path / "out", place)
    made = json.loads((tmp_path / "out" / first(path) / "versions.json").read_text())
    assert made["group"] == 4


def test_workers_of_both_kinds_are_refused(bert: Path, tmp_path: Path) -> None:
    path = write(tmp_path, plan=support_lines(bert, rounds=1), seeds=[0])
    with pytest.raises(PlanError, match=r"--workers 2: the engine says .* workers=2 in --engine"):
        command.sweep(path, tmp_path / "out", Place("ray", Ray(), workers=2))
    with pytest.raises(PlanError, match="trains on CPUs, not on --device cuda"):
        command.sweep(path, tmp_path / "out", Place("ray", Ray(), device="cuda"))
