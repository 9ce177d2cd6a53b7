"""``privacy: record``: the steps of a client, what it spends, what it says, what is refused."""

from __future__ import annotations

import errno
import importlib
import json
import math
import shutil
import signal
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from typer.testing import CliRunner

from fedpeft import Plan, durable, hiding, simulate, spending
from fedpeft.cli import app
from fedpeft.client_rounds import Asked, client_round, group_round
from fedpeft.durable import MOMENTS
from fedpeft.engine._player import Player
from fedpeft.engine.inline import Inline
from fedpeft.engine.processes import Processes
from fedpeft.errors import (
    BudgetError,
    DataError,
    FedPeftError,
    ModelError,
    PlanError,
    RunError,
    SpecError,
    TrainError,
)
from fedpeft.federation import deal
from fedpeft.grouping import Grouping
from fedpeft.ledger import InProcessLedgers, Ledger, OnDiskLedgers, Release, charge, spent
from fedpeft.memory import InProcess, Memory
from fedpeft.per_example import clipped_sums
from fedpeft.preflight import check
from fedpeft.preview import as_text, preview
from fedpeft.privacy import _accountant
from fedpeft.privacy._stepping import Stepping, calibrated, coins
from fedpeft.rng import derive
from fedpeft.site import Site
from fedpeft.spec import build, describe
from fedpeft.spending import Purse
from fedpeft.stacking import stack
from fedpeft.tasks.classify import Classify
from fedpeft.types import Example, Job, Tensors
from fedpeft.wire import peek
from tests.killing import Runs
from tests.tiny import support_plan

SEEDED = "record(noise_multiplier=0.7, clip=0.3, simulate_noise=true)"
SECRET = "record(noise_multiplier=0.7, clip=0.3)"
BY_LABEL = "record(noise_multiplier=0.7, clip=0.3, unit='label', simulate_noise=true)"
SGD = "plain(optimizer='sgd', lr=0.2, steps=3, batch=5)"


def private(model: Path, **lines: Any) -> Plan:
    usual = {"privacy": SEEDED, "weighting": "uniform", "trainer": SGD, "evaluate": "test"}
    return support_plan(model, **usual | lines)


def stepping(units: int = 40, rate: float = 0.25, **fields: Any) -> Stepping:
    usual = {"steps": 6, "rounds": 2, "clip": 0.5, "noise": 0.8, "delta": 1e-5}
    return Stepping(units=units, rate=rate, **{**usual, **fields})


def alone(units: int) -> list[Any]:
    return [*np.arange(units).reshape(-1, 1)]


@pytest.fixture(scope="module")
def site(bert: Path) -> Iterator[Site]:
    plan = private(bert)
    made = Site(plan, deal(plan))
    yield made
    made.close()


# --- steps beside an oracle ---------------------------------------------------------------------


def by_hand(site: Site, start: Tensors, records: Sequence[Example], hidden: Any, lr: float) -> Any:
    """DP-SGD with one backward pass for each record, in float64 but for the gradients."""
    held = {k: v.astype(np.float64) for k, v in start.items()}
    trains = site.tables.roles(0).train
    for step, batch in enumerate(hidden.batches):
        sums = {k: np.zeros(held[k].shape) for k in trains}
        for unit in range(batch.owners.max(initial=-1) + 1):
            rows = batch.rows[batch.owners == unit]
            each = []
            for row in rows:
                now = stack(
                    [{k: v.astype(np.float32) for k, v in held.items()}], torch.device("cpu")
                )
                params = {k: v for k, v in now.items() if k in trains}
                fixed = {k: v for k, v in now.items() if k not in trains}
                one = site.learner.collate([records[row]], [1.0])
                found, _ = site.learner.grads(params, fixed, one)
                each.append({k: v[0].double().numpy() for k, v in found.items()})
            mean = {k: np.mean([g[k] for g in each], axis=0) for k in trains}
            length = math.sqrt(sum(float((v**2).sum()) for v in mean.values()))
            for k in trains:
                sums[k] += mean[k] * min(1.0, hidden.clip / length)
        ordered = {k: sums[k] for k in start if k in trains}
        for k, value in hidden.noised(step, ordered).items():
            held[k] = held[k] - lr * value
    return held


@pytest.mark.parametrize("unit", [None, "label"])
@pytest.mark.parametrize("width", [1, 3])
def test_a_round_is_dp_sgd(bert: Path, site: Site, unit: str | None, width: int) -> None:
    plan = private(bert, privacy=BY_LABEL if unit else SEEDED)
    federation = deal(plan)
    names = list(federation.train)[:3]
    start = dict(site.initial)
    rng = derive(0, "start")
    start = {k: (v + 0.05 * rng.standard_normal(v.shape)).astype("f4") for k, v in start.items()}
    stacked = stack([start] * len(names), torch.device("cpu"))
    trains = site.tables.roles(0).train
    all_members = [federation.members(name) for name in names]
    hidden = [
        step.hidden(bytes([k] * 32), members)
        for k, members in enumerate(all_members)
        if (step := hiding.stepping_of(plan, len(members))) is not None
    ]
    job = Job(
        learner=site.learner,
        params={k: v for k, v in stacked.items() if k in trains},
        fixed={k: v for k, v in stacked.items() if k not in trains},
        examples=[site.train(name) for name in names],
        seeds=[0] * len(names),
        grouping=Grouping(width),
        hidden=hidden,
    )
    fit = plan.trainer.fit(job)
    for k, name in enumerate(names):
        expected = by_hand(site, start, site.train(name), hidden[k], 0.2)
        for tensor, value in fit.params.items():
            np.testing.assert_allclose(value[k], expected[tensor], rtol=2e-4, atol=2e-5)
        moved = max(float(abs(v[k].numpy() - start[n]).max()) for n, v in fit.params.items())
        assert moved > 1e-2


def test_an_empty_batch_is_noise_alone(site: Site) -> None:
    step = stepping(units=20, rate=1e-9, steps=2)
    hidden = step.hidden(bytes(32), alone(20))
    assert [len(batch.rows) for batch in hidden.batches] == [0, 0]
    stacked = stack([site.initial], torch.device("cpu"))
    trains = site.tables.roles(0).train
    job = Job(
        learner=site.learner,
        params={k: v for k, v in stacked.items() if k in trains},
        fixed={k: v for k, v in stacked.items() if k not in trains},
        examples=[site.train("client-000")],
        seeds=[0],
        hidden=[hidden],
    )
    plan_trainer = build("trainers", "plain(optimizer='sgd', lr=1.0, steps=2, batch=4)")
    fit = plan_trainer.fit(job)
    assert (fit.steps, fit.seen) == ([2], [0])
    expected = {k: np.zeros(v.shape[1:]) for k, v in job.params.items()}
    for at in range(2):
        for k, value in hidden.noised(
            at, {k: np.zeros_like(v) for k, v in expected.items()}
        ).items():
            expected[k] -= value
    for k, value in fit.params.items():
        np.testing.assert_allclose(value[0] - job.params[k][0], expected[k], rtol=1e-3, atol=1e-3)


# --- batches and noise --------------------------------------------------------------------------


def test_each_unit_is_in_each_batch_by_a_coin_of_its_own() -> None:
    step = stepping(units=30, rate=0.2, steps=4000)
    counts = np.zeros(30)
    sizes = []
    for batch in step.hidden(b"k" * 32, alone(30)).batches:
        counts[batch.rows] += 1
        sizes.append(len(batch.rows))
        assert len(set(batch.rows.tolist())) == len(batch.rows)
    tail = stats.binomtest
    for count in counts:
        assert tail(int(count), 4000, 0.2).pvalue > 1e-6
    assert np.var(sizes) == pytest.approx(30 * 0.2 * 0.8, rel=0.1)  # fixed sizes have none


def test_the_records_of_a_unit_come_together_and_no_more_than_a_step_takes() -> None:
    members = [np.arange(10), np.arange(10, 12), np.arange(12, 13)]
    step = stepping(units=3, rate=0.5, steps=400, column="patient", per_unit=4)
    seen = set[int]()
    for batch in step.hidden(b"u" * 32, members).batches:
        chosen = [batch.rows[batch.owners == u] for u in range(batch.owners.max(initial=-1) + 1)]
        for rows in chosen:
            whole = next(m for m in members if rows[0] in m)
            assert set(rows) <= set(whole)
            assert len(rows) == min(4, len(whole))
        seen |= set(batch.rows.tolist())
    assert seen == set(range(13))


@pytest.mark.parametrize("clip", [1e-3, 0.5, 40.0])
def test_noise_has_the_declared_deviation_in_every_coordinate(clip: float) -> None:
    step = stepping(clip=clip, steps=1)
    each = np.array([
        hidden.noised(0, {"a": np.zeros((2, 3)), "b": np.zeros(4)})["a"].ravel()
        for n in range(600)
        for hidden in [step.hidden(n.to_bytes(32, "little"), alone(40))]
    ])  # fmt: skip
    deviation = step.noise_multiplier * clip / step.expected
    for column in each.T:
        total = float((column**2).sum()) / deviation**2
        assert 1e-6 < stats.chi2.cdf(total, 600) < 1 - 1e-6
        assert abs(column.mean()) < 5 * deviation / math.sqrt(600)
    correlation = np.corrcoef(each.T)
    assert abs(correlation - np.eye(6)).max() < 0.25


def test_every_step_and_key_has_its_own_noise_and_batches() -> None:
    step = stepping(units=200, rate=0.1)
    one, other = step.hidden(b"1" * 32, alone(200)), step.hidden(b"2" * 32, alone(200))
    zero = {"a": np.zeros(50)}
    found = [tuple(h.noised(s, zero)["a"]) for h in (one, other) for s in range(6)]
    assert len(set(found)) == 12
    batches = {tuple(b.rows) for h in (one, other) for b in h.batches}
    assert len(batches) == 12
    again = step.hidden(b"1" * 32, alone(200))
    np.testing.assert_array_equal(again.noised(3, zero)["a"], one.noised(3, zero)["a"])


@given(st.integers(0, 2**32), st.floats(1e-3, 10), st.integers(1, 4), st.booleans())
@settings(max_examples=25, deadline=None)
def test_no_unit_moves_a_sum_by_more_than_the_clip(
    site: Site, seed: int, scale: float, records: int, alone: bool
) -> None:
    """Neighbours: with all records of one unit, and without them, adversarial labels included."""
    rng = np.random.default_rng(seed)
    tensors = {
        k: (v + scale * rng.standard_normal(v.shape)).astype("f4") for k, v in site.initial.items()
    }
    params, clip = stack([tensors], torch.device("cpu")), 0.3
    others = [site.train("client-000")[i] for i in rng.integers(0, 20, 3)]
    own = [
        {**site.train("client-001")[i], "labels": np.asarray(rng.integers(0, 4))}
        for i in rng.integers(0, 20, records)
    ]
    owners = [0, 1, 2, *([3] * records if not alone else range(3, 3 + records))]
    moves = records if alone else 1
    with_ = site.learner.collate([*others, *own], [1.0] * (3 + records))
    without = site.learner.collate(others, [1.0] * 3)
    a = clipped_sums(site.learner, params, {}, with_, clip=clip, owners=owners).exact
    b = clipped_sums(site.learner, params, {}, without, clip=clip, owners=[0, 1, 2]).exact
    apart = math.sqrt(sum(float((a[k] - b[k]).square().sum()) for k in a))
    assert apart <= clip * moves * (1 + 1e-3)
    if scale > 1:
        assert a[next(iter(a))].isfinite().all()


# --- epsilon ------------------------------------------------------------------------------------


def test_epsilon_is_that_of_all_steps_of_all_rounds() -> None:
    step = stepping(units=100, rate=0.1, steps=64, rounds=8, noise=3.0, delta=1e-6)
    assert step.epsilon(8) == pytest.approx(3.770, abs=1e-3)  # 512 steps, dp-accounting's figure
    assert step.epsilon(0) == 0
    spent = [step.epsilon(n) for n in range(9)]
    assert spent == sorted(spent)
    assert (step.renyi(8) or 0) > step.epsilon(8)


def test_opacus_accounts_alike() -> None:
    opacus = importlib.import_module("opacus.accountants")
    step = stepping(units=1000, rate=0.01, steps=100, rounds=2, noise=1.0)
    prv, rdp = opacus.PRVAccountant(), opacus.RDPAccountant()
    for accountant in (prv, rdp):
        accountant.history = [(1.0, 0.01, 200)]
    assert step.epsilon(2) == pytest.approx(prv.get_epsilon(1e-5, eps_error=0.001), abs=5e-3)
    assert step.renyi(2) == pytest.approx(rdp.get_epsilon(1e-5), rel=0.05)


@pytest.mark.parametrize("units", [30, 31, 450, 4999])
def test_each_client_has_its_own_noise_for_the_same_epsilon(bert: Path, units: int) -> None:
    plan = private(bert, privacy="record(epsilon=3, delta=1e-5)", rounds=4)
    step = hiding.stepping_of(plan, units)
    assert step is not None
    assert step.rate == pytest.approx(5 / units)
    assert 2.7 < step.epsilon(4) <= 3.0 + 1e-9
    smaller = hiding.stepping_of(plan, units // 2)
    assert smaller is not None
    assert smaller.noise_multiplier > step.noise_multiplier


def test_fewer_rounds_need_less_noise_and_more_are_refused(bert: Path) -> None:
    of = "record(epsilon=3, clip=0.3{})"
    usual = hiding.stepping_of(private(bert, privacy=of.format(""), rounds=6), 60)
    fewer = hiding.stepping_of(private(bert, privacy=of.format(", rounds=2"), rounds=6), 60)
    assert usual is not None
    assert fewer is not None
    assert (usual.rounds, fewer.rounds) == (6, 2)
    assert fewer.noise_multiplier < usual.noise_multiplier
    plan = private(bert, privacy="record(noise_multiplier=1.0, clip=0.3, rounds=1)", rounds=2)
    with pytest.raises(TrainError, match="taken part in the 1 rounds that its promise is for"):
        simulate(plan)


def test_a_rate_is_rounded_up_for_calibration() -> None:
    assert calibrated(0.0501, 100, 3.0, 1e-5) == calibrated(0.0509, 100, 3.0, 1e-5)
    for rate in (0.0501, 0.999, 1.0, 0.05):
        noise = calibrated(rate, 100, 3.0, 1e-5)
        assert _accountant.epsilon(coins(rate), noise, 100, 1e-5) <= 3.0


def test_what_several_runs_spent_adds_up() -> None:
    def of(run: str, round: int, noise: float, data: str = "d") -> Release:
        return Release(data, run, round, "b", "record", 0.05, noise, 50)

    one = Ledger(b"k" * 32, [of("a", 0, 1.0)])
    assert one.epsilon("d", 1e-5) == pytest.approx(
        _accountant.epsilon(coins(0.05), 1.0, 50, 1e-5), rel=5e-3
    )
    two = Ledger(b"k" * 32, [of("a", 0, 1.0), of("b", 0, 1.0), of("b", 0, 1.0, "other")])
    assert two.epsilon("d", 1e-5) == pytest.approx(
        _accountant.epsilon(coins(0.05), 1.0, 100, 1e-5), rel=5e-3
    )
    mixed = Ledger(b"k" * 32, [of("a", 0, 1.0), of("b", 0, 2.0)])
    alone = [Ledger(b"k" * 32, [of("a", 0, noise)]).epsilon("d", 1e-5) for noise in (1.0, 2.0)]
    assert max(alone) < mixed.epsilon("d", 1e-5) < sum(alone)
    assert one.epsilon("none", 1e-5) == 0


# --- the ledger of a client ---------------------------------------------------------------------

FIRST = Release("data", "run", 0, "broadcast", "record", 0.1, 1.0, 10)


def test_a_round_played_again_is_the_same_release_and_another_broadcast_is_not(
    tmp_path: Path,
) -> None:
    ledgers = OnDiskLedgers(tmp_path)
    key = charge(ledgers, "c", FIRST, rounds=2)
    assert charge(OnDiskLedgers(tmp_path), "c", FIRST, rounds=2) == key
    assert len(ledgers.read("c").releases) == 1
    other = charge(ledgers, "c", replace(FIRST, broadcast="another"), rounds=2)
    assert other != key
    with pytest.raises(BudgetError, match="has taken part in the 2 rounds"):
        charge(ledgers, "c", replace(FIRST, round=1), rounds=2)
    assert len(ledgers.read("c").releases) == 2
    assert charge(ledgers, "c", FIRST, rounds=2) == key  # what was released may be sent again
    charge(ledgers, "c", replace(FIRST, run="next"), rounds=2)
    charge(ledgers, "d", FIRST, rounds=2)
    keys = {ledgers.read(client).key for client in "cd"}
    assert len(keys) == 2


class Full:
    """A disk that takes ``room`` more files of spending, and is full at one of its ``doings``."""

    def __init__(self, patch: pytest.MonkeyPatch, doing: str, room: int = 0) -> None:
        self.room, self._own = room, durable._write
        self._doing = doing
        patch.setattr(durable, "_write", self._write)

    def _write(self, path: Path, pieces: Any, kind: str, *how: Any) -> None:
        data = b"".join(pieces)
        self.room -= kind == "spending"
        if kind != "spending" or self.room >= 0:
            return self._own(path, [data], kind, *how)
        full = OSError(errno.ENOSPC, "No space left on device")
        if self._doing != "open":
            path.write_bytes(data[: len(data) // 2] if self._doing == "write" else data)
        raise full


@pytest.mark.parametrize("doing", ["open", "write", "fsync"])
def test_a_full_disk_lets_nothing_be_spent_that_is_not_written_down(
    tmp_path: Path, doing: str
) -> None:
    ledgers = OnDiskLedgers(tmp_path)
    key = charge(ledgers, "c", FIRST, rounds=9)
    (path,) = tmp_path.glob("*.json")
    before, more = path.read_bytes(), replace(FIRST, round=1)
    with pytest.MonkeyPatch.context() as patch:
        Full(patch, doing)
        for client in "cd":
            with pytest.raises(RunError, match=r"cannot be written \(No space left on device\)"):
                charge(ledgers, client, more, rounds=9)
        assert charge(ledgers, "c", FIRST, rounds=9) == key  # which has counted
    assert path.read_bytes() == before
    assert list(tmp_path.glob("*.json")) == [path]
    charge(ledgers, "c", more, rounds=9)
    assert [release.round for release in ledgers.read("c").releases] == [0, 1]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("room", [0, 1])
def test_who_finds_the_disk_full_does_not_train_and_has_spent_nothing(
    bert: Path, tmp_path: Path, room: int
) -> None:
    """Where that is everybody the run ends, and goes on later; each round counts once."""
    plan = private(bert, privacy=SECRET, rounds=2, cohort="everyone")
    out, names = tmp_path / "run", deal(plan).population
    with pytest.MonkeyPatch.context() as patch:
        Full(patch, "write", room=len(names) + room)
        if room:
            simulate(plan, out=out)
        else:
            with pytest.raises(FedPeftError, match=r"No space left on device.*--resume"):
                simulate(plan, out=out)
    ledgers = OnDiskLedgers(out / "memory/ledgers")
    made = sorted([r.round for r in ledger.releases] for _, ledger in ledgers.all())
    assert made == [[0]] * (len(names) - room) + [[0, 1]] * room
    assert len((out / "rounds.jsonl").read_text().splitlines()) == 1 + room
    if not room:
        simulate(plan, out=out, resume=True)
        assert {len(ledger.releases) for _, ledger in ledgers.all()} == {2}


def test_a_ledger_is_its_owner_s_alone_and_a_damaged_one_stops(tmp_path: Path) -> None:
    ledgers = OnDiskLedgers(tmp_path / "new")
    charge(ledgers, "../c", FIRST, rounds=1)
    (path,) = (tmp_path / "new").glob("*.json")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for broken in (
        b"",
        b"{",
        b"{}",
        b'{"key": "zz", "releases": []}',
        b'{"key": 3, "releases": 1}',
    ):
        path.write_bytes(broken)
        with pytest.raises(RunError, match=r"nobody knows what client \.\./c has spent"):
            charge(ledgers, "../c", FIRST, rounds=1)
        assert path.read_bytes() == broken


def test_what_was_spent_is_told_by_client_and_data_set(run: Path, tmp_path: Path) -> None:
    last = json.loads((run / "rounds.jsonl").read_text().splitlines()[-1])
    found = list(spent(run, 1e-5))
    assert found == list(spent(run / "memory/ledgers", 1e-5))
    assert {line["client"] for line in found} == {f"client-{n:03}" for n in range(len(found))}
    assert all((line["rounds"], line["runs"]) == (3, 1) for line in found)
    most = max(line["epsilon"] for line in found)
    assert most == pytest.approx(last["epsilon_record"], rel=5e-3)
    told = CliRunner().invoke(app, ["spent", str(run)])
    assert (
        f"client-000  epsilon {found[0]['epsilon']:.3f} at delta 1e-05 in 3 rounds" in told.stdout
    )
    assert len(told.stdout.splitlines()) == len(found)
    with pytest.raises(RunError, match="holds no ledgers; give a run folder"):
        list(spent(tmp_path, 1e-5))
    for delta in ("0", "1", "nan"):
        refused = CliRunner().invoke(app, ["spent", str(run), "--delta", delta])
        assert isinstance(refused.exception, RunError)


def test_files_that_are_no_ledgers_are_named_and_the_others_read(tmp_path: Path) -> None:
    ledgers = OnDiskLedgers(tmp_path)
    charge(ledgers, "c", FIRST, rounds=9)
    (mine,) = tmp_path.glob("*.json")
    found = list(spent(tmp_path, 1e-5))
    foreign = [tmp_path / "notes.json", tmp_path / "package.json"]
    foreign[0].write_text("{")
    foreign[1].write_text('{"name": "left-pad"}')
    warned: list[str] = []
    assert list(spent(tmp_path, 1e-5, warned.append)) == found
    assert warned == [f"{path}: no ledger, left out" for path in foreign]
    told = CliRunner().invoke(app, ["spent", str(tmp_path)])
    assert (told.exit_code, len(told.stdout.splitlines())) == (0, 1)
    assert told.stderr.splitlines() == [f"warning: {text}" for text in warned]
    whole = mine.read_bytes()
    copy = mine.rename(tmp_path / "copy.json")  # a ledger by any other name
    assert [line["client"] for line in spent(tmp_path, 1e-5)] == ["c"]
    for path, held in ((copy, whole[:-20]), (mine, b""), (mine, whole[:10]), (mine, b"{}")):
        path.write_bytes(held)
        with pytest.raises(RunError, match=f"{path.name}: damaged; restore it"):
            list(spent(tmp_path, 1e-5))
        path.unlink()
    with pytest.raises(RunError, match="holds no ledgers"):
        list(spent(tmp_path, 1e-5))


def test_a_site_stops_before_its_limit(tmp_path: Path) -> None:
    ledgers = OnDiskLedgers(tmp_path)
    release, limit = replace(FIRST, rate=0.02), (2.0, 1e-5)
    affordable = next(
        n for n in range(1, 1000) if _accountant.epsilon(coins(0.02), 1.0, 10 * (n + 1), 1e-5) > 2
    )
    for n in range(affordable):
        charge(ledgers, "c", replace(release, run=f"r{n}"), rounds=9, limit=limit)
    with pytest.raises(BudgetError, match=r"and its site allows 2\b"):
        charge(ledgers, "c", replace(release, run="more"), rounds=9, limit=limit)
    held = ledgers.read("c")
    assert len(held.releases) == affordable > 2
    assert held.epsilon("data", 1e-5) <= 2.0
    more = Ledger(held.key, [*held.releases, replace(release, run="more")])
    assert more.epsilon("data", 1e-5) > 2.0
    charge(ledgers, "c", replace(release, data="other records"), rounds=9, limit=(2.0, 1e-5))


def test_other_units_of_the_same_records_do_not_add_up(tmp_path: Path) -> None:
    ledgers, limit = OnDiskLedgers(tmp_path), (50.0, 1e-5)
    charge(ledgers, "c", FIRST, rounds=9, limit=limit)
    patients = replace(FIRST, unit="all records of a client of one patient", round=1)
    with pytest.raises(BudgetError, match="with another unit"):
        charge(ledgers, "c", patients, rounds=9, limit=limit)
    charge(ledgers, "c", patients, rounds=9)  # without a limit nobody has asked for the sum
    told = list(spent(tmp_path, 1e-5))
    assert [line["unit"] for line in told] == [patients.unit, "record"]
    assert told[0]["epsilon"] == told[1]["epsilon"] < ledgers.read("c").epsilon("data", 1e-5)


def test_a_site_with_a_limit_takes_no_plan_that_hides_nothing(bert: Path, site: Site) -> None:
    plan = private(bert, privacy="none")
    purse = Purse(InProcessLedgers(), (3.0, 1e-5))
    with pytest.raises(BudgetError, match="allows epsilon 3, and this plan hides no records"):
        spending.key_of(plan, site, "client-000", ("run", 0), [], purse)
    assert (
        spending.key_of(plan, site, "client-000", ("run", 0), [], Purse(InProcessLedgers())) == b""
    )


def test_without_a_ledger_nothing_is_spent(bert: Path, site: Site) -> None:
    with pytest.raises(BudgetError, match="has no ledger"):
        spending.key_of(private(bert, privacy=SECRET), site, "client-000", ("run", 0), [], None)


def test_one_client_out_of_budget_does_not_stop_the_others(bert: Path) -> None:
    plan = private(bert, privacy=SECRET)
    made = Site(plan, deal(plan))
    sent = list(simulated_messages(plan, made))
    ledgers = InProcessLedgers()
    poor = sent[1][0]
    ledgers.write(
        poor, Ledger(releases=[replace(FIRST, run="r"), replace(FIRST, run="r", round=1)])
    )
    asked = [Asked(c, m, Memory(), Purse(ledgers)) for c, m in sent]
    played = group_round(plan, made, asked, Grouping(2))
    assert [p.client for p in played] == [c for c, _ in sent]
    assert [isinstance(p.reply, BudgetError) for p in played] == [c == poor for c, _ in sent]
    made.close()


def simulated_messages(plan: Plan, site: Site) -> Iterator[tuple[str, Any]]:
    from fedpeft.broadcasts import messages
    from fedpeft.state import start

    state = start(plan, site.tables, site.initial)
    names = list(site.federation.population)[:3]
    yield from messages(
        plan, site.tables, state, "r", names, bodies={}, remote=False, training=True
    )


# --- what leaves a client -----------------------------------------------------------------------


def test_a_reply_says_nothing_that_follows_from_records(bert: Path) -> None:
    plan = private(
        bert, privacy=SECRET, trainer="plain(optimizer='sgd', lr=0.2, epochs=1, batch=7)"
    )
    made = Site(plan, deal(plan))
    for client, message in simulated_messages(plan, made):
        reply, _ = client_round(plan, made, client, message, Memory(), Purse(InProcessLedgers()))
        told = peek(reply)
        steps, seen = plan.trainer.budget(made.federation.population[client])
        assert {k: told[k] for k in ("steps", "seen")} == {"steps": steps, "seen": seen}
        assert set(told) <= {"v", "run", "round", "steps", "lr_sum", "seen", "sections", "loss"}
        assert "loss" not in told
    made.close()


@pytest.fixture(scope="module")
def run(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("record") / "run"
    simulate(private(bert, privacy=SECRET, rounds=3), out=path)
    return path


def test_ledger_and_card_say_what_was_spent_and_nothing_of_clients(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    for line in lines:
        assert set(line) == {"round", "epsilon_record", "test/loss", "test/accuracy", "test/f1"}
    spent = [line["epsilon_record"] for line in lines]
    assert spent == sorted(spent)
    card = (run / "adapter/README.md").read_text()
    assert f"epsilon {spent[-1]:.3f} at delta 1e-05, spent by a client that took part in 3" in card
    for words in ("the server, other clients and readers of the model", "one record of a client"):
        assert words in card
    assert "updates were not noised" not in card
    each = [json.loads(p.read_text()) for p in (run / "memory/ledgers").glob("*.json")]
    assert [len(ledger["releases"]) for ledger in each] == [3] * len(each)


def test_a_simulation_that_seeds_its_noise_is_repeatable_and_says_so(
    bert: Path, tmp_path: Path
) -> None:
    found = [simulate(private(bert), out=tmp_path / name) for name in ("a", "b")]
    for name, value in found[0].tensors.items():
        np.testing.assert_array_equal(value, found[1].tensors[name])
    assert "NOT private" in (tmp_path / "a/adapter/README.md").read_text()
    assert not (tmp_path / "a/memory/ledgers").exists()
    meant = [simulate(private(bert, privacy=SECRET)) for _ in range(2)]
    assert any((v != meant[1].tensors[k]).any() for k, v in meant[0].tensors.items())


def test_engines_agree_to_the_bit_and_groups_to_rounding(bert: Path) -> None:
    plan = private(bert, privacy=BY_LABEL)
    one = simulate(plan, engine=Inline())
    other = simulate(plan, engine=Processes(workers=2))
    grouped = simulate(plan, engine=Inline(group=3))
    for name, value in one.tensors.items():
        np.testing.assert_array_equal(value, other.tensors[name])
        np.testing.assert_allclose(value, grouped.tensors[name], rtol=1e-3, atol=1e-5)


# --- a redone round -----------------------------------------------------------------------------

PLAIN = {"keep_best": "none", "compare": "", "optimizer": "sgd", "adapter": "lora(r=2, alpha=4)"}


@pytest.fixture(scope="module")
def runs(bert: Path) -> Iterator[Runs]:
    with Runs(bert) as made:
        yield made


@pytest.mark.parametrize(
    "fault",
    [
        *(f"spending.{moment}:{1 + n}" for n, moment in enumerate(MOMENTS)),
        *("memory.half:4", "checkpoint.half:3"),
    ],
)
def test_a_secret_run_goes_on_after_a_kill_with_the_same_release(
    runs: Runs, tmp_path: Path, fault: str
) -> None:
    """Killed and taken up twice from one point: the same coins, so the same adapter."""
    lines: dict[str, Any] = {**PLAIN, "privacy": SECRET, "weighting": "uniform"}
    lines |= {"evaluate": "test", "rounds": 2}
    out = tmp_path / "run"
    assert runs(out, fault=fault, **lines).signal == signal.SIGKILL
    before = {
        p.name: json.loads(p.read_text())["releases"]
        for p in (out / "memory/ledgers").glob("*.json")
    }
    shutil.copytree(out, tmp_path / "copy")
    found = [runs(path, resume=True, **lines) for path in (out, tmp_path / "copy")]
    assert [ended.error for ended in found] == ["", ""]
    after = {
        p.name: json.loads(p.read_text())["releases"]
        for p in (out / "memory/ledgers").glob("*.json")
    }
    for name, releases in before.items():
        assert after[name][: len(releases)] == releases  # what was cut short is the same release
    if len(before) == len(after):  # all had drawn their keys
        assert found[0].tensors == found[1].tensors
    for releases in after.values():
        assert len({r["round"] for r in releases}) == len(releases) <= 2


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ({"weighting": "examples"}, "weight tells how many records it has.*use weighting: uniform"),
        ({"weighting": "fednova"}, "weight tells how many records it has"),
        ({"correction": "fedamd"}, "fedamd.* takes gradients of a client's records besides"),
        ({"correction": "scaffold_i"}, "scaffold_i takes gradients"),
        ({"correction": "scaffold_m_vr"}, "no noise covers these; use scaffold"),
        ({"correction": "admm_robust"}, "takes gradients of a client's records besides"),
        ({"aggregator": "regmean"}, "regmean.* has clients tell what their records look like"),
        ({"evaluate": "clients,test", "privacy": SECRET}, "what leaves clients, and metrics"),
        ({"compare": "alone", "privacy": SECRET}, "alone trains on the clients' records"),
        ({"keep_best": "clients/loss", "privacy": SECRET}, "must be a metric of test"),
        ({"privacy": "record"}, "give epsilon or noise_multiplier, one of the two"),
        ({"privacy": "record(epsilon=1, noise_multiplier=1)"}, "one of the two"),
        ({"privacy": "record(epsilon=1, per_unit=3)"}, "per_unit is about the records of a unit"),
        ({"privacy": "record(epsilon=1, unit='')"}, "names no column"),
        ({"privacy": "record(epsilon=1) | user(epsilon=1)"}, "in this order"),
        ({"privacy": "user(epsilon=1) | user(epsilon=1)"}, "one promise about clients and one"),
        ({"privacy": f"user(epsilon=1) | {SEEDED}"}, "say simulate_noise in both"),
        ({"privacy": "none | record(epsilon=1)"}, "one promise about clients and one"),
    ],
)
def test_what_would_break_the_promise_is_refused(
    bert: Path, lines: Mapping[str, str], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        private(bert, **lines)


@pytest.mark.parametrize(
    "lines",
    [
        {"correction": "scaffold", "weighting": "fedau"},
        {"correction": "feddyn", "optimizer": "adam"},
        {"trainer": "plain(lr=0.01, steps=2, batch=6, accumulate=3)"},
        {"trainer": "plain(optimizer='sgd', lr=0.1, momentum=0.9, epochs=1, clip=1.0)"},
        {"adapter": "lora(r=2, train='B')", "trainer": "plain(precondition=true, steps=2)"},
        {"adapter": "lora(r=4, ranks='1,4', head='local')"},
        {"adapter": "core(r=2)", "uplink": "topk(density=0.1) | int8"},
        {"schedule": "buffered(size=2)", "latency": "lognormal(median=1)"},
        {"personal": "ditto(lam=0.1)", "evaluate": "clients,test"},
        {"aggregator": "flexlora"},
        {"weighting": "mifa", "adapter": "lora(r=2, train='B')"},
    ],
)
def test_what_does_not_is_played(bert: Path, lines: Mapping[str, str]) -> None:
    result = simulate(private(bert, **lines))
    assert len(result.history) == 2
    assert all(np.isfinite(v).all() for v in result.tensors.values())


def test_both_promises_at_once(bert: Path, tmp_path: Path) -> None:
    spec = "user(noise_multiplier=1.0, clip=0.5) | record(noise_multiplier=1.0)"
    even = "uniform(denominator='expected')"
    plan = private(bert, privacy=spec, weighting=even, rounds=2)
    assert describe(plan.privacy) == "user(noise_multiplier=1.0) | record(noise_multiplier=1.0)"
    told = as_text(preview(plan))
    for words in ("epsilon of records", "privacy against", "hidden from"):
        assert words in told
    result = simulate(plan, out=tmp_path / "run")
    assert {"epsilon", "epsilon_record", "clip"} <= set(result.history[-1])
    card = (tmp_path / "run/adapter/README.md").read_text()
    assert "Privacy of records" in card
    assert "Unit of privacy" in card


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"patient": "a"}, {}], "row 2 has no column 'patient'"),
        ([{"patients": "a"}], "row 1 has no column 'patient'; did you mean 'patients'"),
        ([{"patient": ""}], "row 1 has no patient"),
        ([{"patient": None}], "row 1 has no patient"),
    ],
)
def test_a_record_of_nobody_is_refused(
    bert: Path, tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    path = tmp_path / "train.jsonl"
    whole = [{"text": f"t {i}", "label": "ab"[i % 2], **row} for i, row in enumerate(rows * 6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in whole))
    plan = private(
        bert, data=f"jsonl(train={str(path)!r})", privacy="record(epsilon=3, unit='patient')"
    )
    with pytest.raises(DataError, match=message):
        deal(plan)


def test_units_are_those_of_the_column(bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    rows = [{"text": f"t {i}", "label": "ab"[i % 2], "patient": i % 7} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = private(
        bert, data=f"jsonl(train={str(path)!r})", privacy="record(epsilon=3, unit='patient')",
        clients=2, partition="iid",
    )  # fmt: skip
    federation = deal(plan)
    for client, of in federation.train.items():
        members = federation.members(client)
        assert sorted(int(i) for m in members for i in m) == list(range(len(of)))
        for m in members:
            assert len({rows[of[i]]["patient"] for i in m}) == 1
        assert federation.counted[client] == len(members) <= 7
    assert federation.scattered == 7
    warned = check(plan).warnings
    assert any("7 units have records at several clients" in w for w in warned)
    told = as_text(preview(plan))
    assert "all records of a client of one patient" in told


class Mixed(Classify):
    """A task whose losses depend on the batch: clipping them record by record bounds nothing."""

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return losses that weigh more where they are larger than the others."""
        each = super().losses(logits, labels)
        return each * torch.softmax(each, 0) * len(each)


def test_losses_of_whole_batches_are_found_at_the_start(bert: Path) -> None:
    plan = replace(private(bert), task=Mixed())
    with pytest.raises(ModelError, match="depends on the others in its batch"):
        simulate(plan)


def test_warnings(bert: Path) -> None:
    def of(**lines: Any) -> str:
        plan = private(bert, **lines)
        return " ".join(check(plan).warnings)

    assert "NOT private" in of()
    assert "NOT private" not in of(privacy=SECRET)
    assert "delta=0.5 allows to publish" in of(privacy="record(noise_multiplier=1.0, delta=0.5)")
    batch = "plain(optimizer='sgd', lr=0.1, steps=1, batch=500)"
    assert "has all of them in every batch" in of(trainer=batch)


def test_the_preview_says_what_is_promised(bert: Path) -> None:
    many = "plain(optimizer='sgd', lr=0.2, steps=40, batch=20)"
    plan = private(bert, privacy="record(epsilon=9, clip=0.7)", rounds=4, trainer=many)
    found = preview(plan)["hiding"]
    assert found["epsilon"] <= 9.0 < found["epsilon_rdp"] * 1.2
    assert found["epsilon_per_round"] < found["epsilon"]
    told = as_text(preview(plan))
    for words in ("in 4 rounds by PLD", "hidden from", "clips of 0.7 in the mean gradient"):
        assert words in told
    assert "near chance" not in told
    assert "near chance" in as_text(preview(private(bert, privacy="record(noise_multiplier=99)")))


def test_the_noise_told_is_the_noise_there_is(bert: Path) -> None:
    plan = private(bert, privacy="record(noise_multiplier=0.8, clip=0.7)", rounds=2, clients=3)
    found, trained = preview(plan)["hiding"], preview(plan)["parameters"]["trained"]
    step = hiding.stepping_of(plan, min(deal(plan).population.values()))
    assert step is not None
    zero = {"all": np.zeros(trained)}
    means = [
        step.hidden(bytes([k]) * 32, alone(step.units)).noised(at, zero)["all"]
        for k in range(3 * 2)
        for at in range(step.steps)
    ]
    norms = [np.linalg.norm(mean) / 0.7 for mean in means]
    assert np.mean(norms) == pytest.approx(found["noise_norm"], rel=0.05)
    whole = np.linalg.norm(np.mean(means, axis=0)) / 0.7
    assert whole == pytest.approx(found["noise_norm_all"], rel=0.05)


def test_ledgers_are_found_by_the_player(bert: Path) -> None:
    """Memories of the process carry them: two rounds, each written once for each client."""
    plan = private(bert, privacy=SECRET)
    made, store = Site(plan, deal(plan)), InProcess()
    player = Player(made, store, Grouping(1), lambda _: None)
    sent = list(simulated_messages(plan, made))
    first = dict(player.exchange(sent))
    again = dict(player.exchange(sent))
    for client, reply in first.items():
        assert bytes(reply) == bytes(again[client])  # type: ignore[arg-type]
        assert len(store.ledgers.read(client).releases) == 1
    made.close()


def test_a_spec_error_names_the_field() -> None:
    with pytest.raises(SpecError, match="clip"):
        build("privacy", "record(epsilon=1, clip=0)")


@pytest.mark.parametrize("of", ["noise_multiplier=1.5", "epsilon=3.0"])
@pytest.mark.parametrize("work", ["epochs=1, batch=8", "steps=3, batch=8"])
def test_what_is_told_is_of_the_client_that_spends_most(bert: Path, of: str, work: str) -> None:
    plan = private(bert, privacy=f"record({of})", trainer=f"plain({work})", rounds=3)
    units = {f"c{n}": n for n in (3, 9, 17, 30, 41, 88, 120, 400)}
    each = {n: hiding.stepping_of(plan, n) for n in units.values()}
    ends = {n: step.epsilon(3) for n, step in each.items() if step is not None}
    told = hiding.spent(plan, units, 3)["epsilon_record"]
    assert told == pytest.approx(max(ends.values()), rel=0.01)
