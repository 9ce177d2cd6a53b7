"""What the federation is compared with: clients alone, in groups as one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedpeft.baselines import Rows, compare
from fedpeft.driver import simulate
from fedpeft.engine._player import Player
from fedpeft.evaluation import EACH_ALONE, summarise
from fedpeft.grouping import Grouping
from fedpeft.memory import InProcess
from fedpeft.rng import derive_seed
from fedpeft.stacking import stack, unstack
from fedpeft.types import Job, Metrics, Tensors
from fedpeft.watching import Quiet
from tests.architectures import checkpoint, fresh_base
from tests.camp import CLASSES, CLASSIFY, SIZES, Camp, apart, camp_of, passes_of, records_of
from tests.tiny import support_plan

SEEN = 6
"""Records that each client sees: with batches of two 3 to 6 steps."""
TRAINERS = [
    "plain(optimizer='sgd', lr=0.5, epochs=1, batch=2)",
    "plain(lr=0.05, epochs=1, batch=2, clip=0.1, schedule='linear')",
]


class Field:
    """Clients of a tiny model in double precision, with a test set; notes what is evaluated."""

    def __init__(self, camp: Camp) -> None:
        self.camp, self.plan = camp, replace(camp.plan, compare="alone")
        self.learner, self.tables, self.attached = self, camp.tables, camp.spy
        self.device = camp.learner.device
        self.grads, self.collate = camp.learner.grads, camp.learner.collate
        self.initial = {k: v.astype(np.float64) for k, v in camp.initial.items()}
        self.federation = SimpleNamespace(train={c: range(n) for c, n in SIZES.items()})
        self.evaluated: list[Tensors] = []
        self.widths: list[int] = []
        self.each: Mapping[str, Metrics] = {}
        self._test = records_of("bert", 9, 77)

    def train(self, client: str) -> Any:
        return self.camp.records[client]

    def held(self, client: str) -> Any:
        """The first client has held nothing out."""
        place = list(SIZES).index(client)
        return records_of("bert", 4, place) if place else []

    def test(self) -> Any:
        return self._test

    def evaluate(self, tensors: Any, examples: Any, width: int = 1) -> Sequence[Metrics]:
        if examples[0] is self._test:
            self.evaluated += tensors
        self.widths.append(width)
        found: Sequence[Metrics] = self.camp.learner.evaluate(tensors, examples, width)
        return found

    def alone(
        self, grouping: Grouping, warn: Callable[[str], None] = lambda _: None
    ) -> tuple[Metrics, list[tuple[int, int]]]:
        """Return the row of the table and what was told on the way."""
        told: list[tuple[int, int]] = []
        site: Any = self
        engine: Any = Player(site, InProcess(), grouping, warn)
        self.evaluated.clear()
        self.camp.spy.clients.clear()
        history, done = [{"seen": SEEN * len(SIZES)}], {"federated": dict[str, float]()}

        def tell(name: str, seen: int, total: int) -> None:
            told.append((seen, total))

        found = compare(self.plan, site, engine, history, {}, done, None, tell)
        self.each = found[EACH_ALONE]
        return found["alone"], told


def _one_by_one(site: Field) -> tuple[Metrics, list[Tensors]]:
    """Train each client by itself, without anything that knows of groups."""
    roles, trained, scores = site.tables.roles(0), list[Tensors](), dict[str, Metrics]()
    for client in SIZES:
        stacked = stack([site.initial], site.device)
        fit = site.plan.trainer.seeing(SEEN).fit(
            Job(
                learner=site.camp.learner,
                params={k: v for k, v in stacked.items() if k in roles.train},
                fixed={k: v for k, v in stacked.items() if k not in roles.train},
                examples=[site.train(client)],
                seeds=[derive_seed(site.plan.seed, "alone", client)],
            )
        )
        trained.append({**site.initial, **unstack(fit.params)[0]})
        (scores[client],) = site.camp.learner.evaluate([trained[-1]], [site.test()])
    return summarise(scores), trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Path:
    return checkpoint("bert", tmp_path_factory.mktemp("baselines") / "bert", bert)


@pytest.fixture(params=TRAINERS, ids=["sgd", "adamw"])
def site(request: pytest.FixtureRequest, folder: Path) -> Iterator[Field]:
    base = fresh_base(folder, CLASSIFY, CLASSES)
    camp = camp_of(base, "bert", request.param, adapter="r=3, alpha=6, dropout=0.3")
    yield Field(camp)
    camp.spy.detach()


def _steps(site: Field) -> list[int]:
    trainer = site.plan.trainer.seeing(SEEN)
    return sorted((trainer.budget(n)[0] for n in SIZES.values()), reverse=True)


def test_clients_in_turn_do_what_they_did_before_there_were_groups(site: Field) -> None:
    expected, trained = _one_by_one(site)
    found, told = site.alone(Grouping())
    assert found == expected
    assert set(site.camp.spy.clients) == {1}
    for tensors, own in zip(site.evaluated, trained, strict=True):
        assert all(np.array_equal(tensors[name], value) for name, value in own.items())
    assert told[-1] == (SEEN * len(SIZES), SEEN * len(SIZES))
    assert [done for done, _ in told] == sorted(done for done, _ in told)


@pytest.mark.parametrize("width", [2, 3, 16])
def test_clients_in_groups_do_what_they_do_alone(site: Field, width: int) -> None:
    expected, trained = _one_by_one(site)
    found, told = site.alone(Grouping(width))
    steps, clients = _steps(site), site.camp.spy.clients
    assert len(set(steps)) > 1
    if width == 16:
        assert clients[: steps[0]] == passes_of(steps, width)
    assert max(clients) == min(width, len(SIZES))
    assert set(site.widths) == {width}
    for tensors, own in zip(site.evaluated, trained, strict=True):
        update, alone = ({k: t[k] - site.initial[k] for k in own} for t in (tensors, own))
        assert apart(update, alone) <= 1e-9
    assert found == pytest.approx(expected, rel=1e-9)
    assert list(site.each) == sorted(list(SIZES)[1:])
    for client, tensors in zip(SIZES, trained, strict=True):
        if held := site.held(client):
            (metrics,) = site.camp.learner.evaluate([tensors], [held])
            assert site.each[client] == pytest.approx(metrics, rel=1e-9)
    assert told[-1] == (SEEN * len(SIZES), SEEN * len(SIZES))
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_windows_are_bounded(site: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedpeft.engine._player._WAITING", 0)
    expected, _ = _one_by_one(site)
    fit, sizes = type(site.plan.trainer.seeing(SEEN)).fit, list[int]()

    def watched(self: Any, job: Job) -> Any:
        sizes.append(len(job.examples))
        return fit(self, job)

    monkeypatch.setattr(type(site.plan.trainer.seeing(SEEN)), "fit", watched)
    found, _ = site.alone(Grouping(2))
    assert sizes == [2, 2, 1]
    assert found == pytest.approx(expected, rel=1e-9)


def test_a_group_that_does_not_fit_is_halved(site: Field) -> None:
    expected, _ = _one_by_one(site)
    site.camp.spy.most, told = 2, list[str]()
    found, progress = site.alone(Grouping(4), told.append)
    assert told == ["a group does not fit into memory; going on with group=2"]
    assert found == pytest.approx(expected, rel=1e-9)
    assert progress[-1] == (SEEN * len(SIZES), SEEN * len(SIZES))


# --- whole runs ---------------------------------------------------------------------------------


class Stopped(Quiet):
    """Interrupts a comparison; counts what it was told."""

    def __init__(self, name: str = "") -> None:
        self._name, self.told = name, list[str]()

    def compare(self, name: str, done: int, total: int) -> None:
        self.told.append(name)
        if name == self._name:
            raise KeyboardInterrupt


@pytest.mark.parametrize("engine", ["inline(group=4)", "processes(workers=1, threads=1, group=4)"])
def test_a_run_compares_in_the_groups_of_its_engine(
    bert: Path, tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedpeft.trainers.plain import Plain

    jobs, fit = list[int](), Plain.fit

    def watched(self: Plain, job: Job) -> Any:
        if self.records:  # only a comparison counts in records
            jobs.append(len(job.examples))
        return fit(self, job)

    monkeypatch.setattr(Plain, "fit", watched)
    plan = support_plan(bert, compare="base,alone,central", rounds=1)
    one_by_one = simulate(plan).table["rows"]
    assert jobs == [1, 1, 1, 1, 1]
    jobs.clear()
    with pytest.raises(KeyboardInterrupt):
        simulate(plan, out=tmp_path / "run", engine=engine, watch=Stopped("central"))
    watch = Stopped()
    found = simulate(plan, out=tmp_path / "run", engine=engine, watch=watch, resume=True)
    assert set(found.table[EACH_ALONE]) == set(found.history[-1]["per_client"])
    assert set(watch.told) == {"central"}  # the others are kept
    assert jobs == [4, 1, 1]
    rows: Rows = found.table["rows"]
    assert list(rows) == list(one_by_one)
    for name, metrics in rows.items():
        assert metrics == pytest.approx(one_by_one[name], rel=1e-4, abs=1e-6)
