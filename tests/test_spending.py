"""What clients spend as clients, written down at their own nodes: how much, when, up to where."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedpeft import Plan, simulate, spending
from fedpeft.cli import app
from fedpeft.durable import MOMENTS
from fedpeft.errors import BudgetError, RunError
from fedpeft.federation import deal
from fedpeft.ledger import CLIENT, InProcessLedgers, Ledger, OnDiskLedgers, Release, unpromised
from fedpeft.privacy._mechanism import Adaptive, Mechanism
from fedpeft.releases import mechanism_of
from fedpeft.site import Site
from fedpeft.spending import Purse
from fedpeft.types import Sampling
from tests.test_flower import FakeGrid, config_of, serve
from tests.test_privacy import exact_delta
from tests.tiny import support_plan

ROOT = Path(__file__).parents[1]
EVEN = "uniform(denominator='expected')"
USER = "user(noise_multiplier=1.0, clip=0.5)"
BOTH = f"{USER} | record(noise_multiplier=0.7, clip=0.3)"
SGD = "plain(optimizer='sgd', lr=0.2, steps=2, batch=5)"
AT = ("run", 0)


def guarded(model: Path, **lines: Any) -> Plan:
    usual = {"privacy": USER, "weighting": EVEN, "trainer": SGD, "evaluate": "test", "holdout": 0}
    return support_plan(model, **{"cohort": "poisson(rate=0.5)", **usual} | lines)


@pytest.fixture(scope="module")
def site(bert: Path) -> Iterator[Site]:
    plan = guarded(bert)
    made = Site(plan, deal(plan))
    yield made
    made.close()


def apart(**limits: Any) -> Purse:
    return Purse(InProcessLedgers(), is_apart=True, **limits)


def play(plan: Plan, site: Site, purse: Purse | None, at: tuple[str, int] = AT) -> bytes:
    return spending.key_of(plan, site, "client-000", at, [site.initial], purse)


def releases(purse: Purse) -> list[Release]:
    return [*purse.ledgers.read("client-000").releases]


# --- how much -----------------------------------------------------------------------------------


def of_clients(noises: list[float]) -> Ledger:
    told = (Release("d", "r", n, "b", CLIENT, 1.0, noise, 1) for n, noise in enumerate(noises))
    return Ledger(b"k" * 32, [*told])


@pytest.mark.parametrize("rounds", [1, 3, 40])
@pytest.mark.parametrize("noise", [0.8, 5.0])
def test_rounds_are_gaussians_one_after_the_other(rounds: int, noise: float) -> None:
    import dp_accounting as dp
    from dp_accounting.pld import PLDAccountant

    found = of_clients([noise] * rounds).epsilon("d", 1e-5, CLIENT)
    relation = dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    library = PLDAccountant(relation, value_discretization_interval=1e-3)
    library.compose(dp.GaussianDpEvent(noise), rounds)
    assert found == pytest.approx(library.get_epsilon(1e-5), rel=2e-3)
    whole = noise / math.sqrt(rounds)
    assert exact_delta(whole, found) <= 1e-5
    assert exact_delta(whole, found * (1 - 1e-3)) > 1e-5


def test_runs_with_other_noise_add_up() -> None:
    """Gaussians compose to one: the squares of their signals add up."""
    found = of_clients([1.0, 1.0, 2.0, 5.0]).epsilon("d", 1e-5, CLIENT)
    whole = 1 / math.sqrt(1 + 1 + 1 / 4 + 1 / 25)
    assert exact_delta(whole, found) <= 1e-5
    assert exact_delta(whole, found * (1 - 1e-3)) > 1e-5


@pytest.mark.parametrize(
    ("lines", "noise"),
    [
        ({}, 1.0),
        ({"cohort": "everyone"}, 1.0),
        ({"cohort": "poisson(rate=0.9, cap=2)"}, 1.0),
        ({"cohort": "uniform(size=2)"}, 2.0),
        ({"privacy": "user(noise_multiplier=1.0, quantile=0.5, bit_noise=0.6)"}, 1.0),
        ({"privacy": "user(epsilon=8)"}, None),
        ({"privacy": "user(epsilon=8)", "cohort": "poisson(rate=0.9, cap=2)"}, None),
    ],
)
def test_the_noise_is_the_plan_s_own(
    bert: Path, site: Site, lines: dict[str, str], noise: float | None
) -> None:
    """A client works it out; a cohort of a fixed size has noise for two.

    A run's epsilon is less by its coins; where one client may push out another it need not be.
    """
    plan, purse = guarded(bert, **lines), apart()
    assert play(plan, site, purse) == b""
    (made,) = releases(purse)
    mechanism = mechanism_of(plan, 4)
    assert mechanism is not None
    assert (made.unit, made.rate, made.steps) == (CLIENT, 1.0, 1)
    assert made.noise == (mechanism.noise_multiplier if noise is None else noise)
    if noise is None and "cohort" not in lines:
        whole = Ledger(b"k" * 32, [replace(made, round=n) for n in range(plan.rounds)])
        assert whole.epsilon(made.data, 1e-5, CLIENT) > mechanism.epsilon(plan.rounds)


@pytest.mark.parametrize("sampling", [Sampling("coins", 9, 0.5), Sampling("fixed", 9, 0.5, 4)])
def test_the_bit_s_and_the_sum_s_signal_make_the_noise(sampling: Sampling) -> None:
    """One client moves the sum by a clip and the count by a half; squares of signals add up."""
    mechanism = Mechanism(sampling, 0.5, 1.3, 1e-5, Adaptive(0.5, 0.2, 0.9))
    signals = 1 / mechanism.deviation, 0.5 / (mechanism.sensitivity * 0.9)
    assert 1 / math.hypot(*signals) == pytest.approx(mechanism.unamplified, rel=1e-12)


# --- when ---------------------------------------------------------------------------------------


def test_a_round_counts_once_however_often_it_is_asked(bert: Path, site: Site) -> None:
    plan, purse = guarded(bert, rounds=3), apart()
    for at in (AT, AT, ("run", 1), AT):
        play(plan, site, purse, at)
    assert [made.round for made in releases(purse)] == [0, 1]
    moved = [{k: v + 1 for k, v in site.initial.items()}]
    spending.key_of(plan, site, "client-000", AT, moved, purse)  # another release, of that number
    assert [made.round for made in releases(purse)] == [0, 1, 0]
    with pytest.raises(BudgetError, match="has taken part in the 3 rounds"):
        play(plan, site, purse, ("run", 2))
    play(plan, site, purse, ("another", 2))
    assert len(releases(purse)) == 4


@pytest.mark.parametrize(
    "privacy", ["none", "user(noise_multiplier=1.0, simulate_noise=true)"], ids=["none", "seeded"]
)
def test_what_promises_nothing_counts_nothing_and_is_known(
    bert: Path, site: Site, privacy: str
) -> None:
    """Once for a run at a machine of the client's own; a simulation's run says it itself."""
    purse, plan = apart(), guarded(bert, privacy=privacy)
    for at in (AT, ("run", 1), AT):
        assert play(plan, site, purse, at) == b""
    assert releases(purse) == [unpromised(site.fingerprint, "run")]
    simulated = Purse(InProcessLedgers())
    assert play(plan, site, simulated) == b""
    assert releases(simulated) == []


def test_a_simulation_leaves_it_to_the_run_s_ledger(bert: Path, tmp_path: Path) -> None:
    likely = "poisson(rate=0.9)"  # its coins are secret: that nobody is ever asked may happen
    simulate(guarded(bert, privacy=BOTH, cohort=likely, rounds=4), out=tmp_path / "run")
    held = OnDiskLedgers(tmp_path / "run/memory/ledgers").all()
    assert {made.unit for _, ledger in held for made in ledger.releases} == {"record"}


def test_both_promises_are_written_down_at_once(bert: Path, site: Site) -> None:
    """The key is the record's own, as where nothing else is written down."""
    plan, purse = guarded(bert, privacy=BOTH), apart()
    key = play(plan, site, purse)
    own, as_client = releases(purse)
    assert (own.unit, as_client.unit) == ("record", CLIENT)
    assert own.of == as_client.of
    alone = Purse(InProcessLedgers())
    alone.ledgers.write("client-000", Ledger(purse.ledgers.read("client-000").key))
    assert play(plan, site, alone) == key
    assert releases(alone) == [own]


# --- up to where --------------------------------------------------------------------------------


def test_a_client_stops_before_its_site_s_limit(bert: Path, site: Site) -> None:
    plan = guarded(bert, rounds=9)
    each = [of_clients([1.0] * n).epsilon("d", 1e-5, CLIENT) for n in range(5)]
    purse = apart(client_limit=((each[3] + each[4]) / 2, 1e-5))
    for n in range(3):
        play(plan, site, purse, (f"run {n}", 0))
    with pytest.raises(BudgetError, match=rf"epsilon {each[4]:.3f} at delta 1e-05 as a client"):
        play(plan, site, purse, ("one more", 0))
    assert len(releases(purse)) == 3
    play(plan, site, purse, ("run 2", 0))  # what was released may be sent again


@pytest.mark.parametrize("privacy", ["record(noise_multiplier=1.0)", "none"])
def test_a_limit_on_clients_takes_no_plan_that_hides_none(
    bert: Path, site: Site, privacy: str
) -> None:
    purse = apart(client_limit=(8.0, 1e-5))
    with pytest.raises(BudgetError, match=r"allows epsilon 8 of a client.*user\(epsilon"):
        play(guarded(bert, privacy=privacy), site, purse)
    seeded = guarded(bert, privacy="user(noise_multiplier=1.0, simulate_noise=true)")
    with pytest.raises(BudgetError, match="without simulate_noise=true"):
        play(seeded, site, purse)


def test_a_limit_on_records_takes_no_plan_that_tells_the_server_all(bert: Path, site: Site) -> None:
    with pytest.raises(BudgetError, match="allows epsilon 8, and this plan hides no records"):
        play(guarded(bert), site, apart(limit=(8.0, 1e-5)))


def test_with_both_limits_each_counts_its_own(bert: Path, site: Site) -> None:
    plan, free = guarded(bert, privacy=BOTH), apart()
    play(plan, site, free)
    ledger = free.ledgers.read("client-000")
    (own, as_client), delta = ledger.releases, 1e-5
    spent = {u: ledger.epsilon(own.data, delta, u) for u in (own.unit, CLIENT)}
    enough = {u: (epsilon * 1.01, delta) for u, epsilon in spent.items()}
    purse = apart(limit=enough[own.unit], client_limit=enough[CLIENT])
    play(plan, site, purse)
    assert releases(purse) == [own, as_client]
    for limits, what in (
        ({"limit": (spent[own.unit] * 0.99, delta), "client_limit": enough[CLIENT]}, "of these"),
        ({"limit": enough[own.unit], "client_limit": (spent[CLIENT] * 0.99, delta)}, "as a client"),
    ):
        purse = apart(**limits)
        with pytest.raises(BudgetError, match=what):
            play(plan, site, purse)
        assert releases(purse) == []  # all of a round, or nothing


@pytest.mark.parametrize(
    ("before", "limit", "unit"),
    [
        (USER, {"limit": (90.0, 1e-5)}, CLIENT),
        ("record(noise_multiplier=0.7)", {"client_limit": (90.0, 1e-5)}, "record"),
    ],
)
def test_rounds_that_hid_something_else_leave_a_limit_without_a_meaning(
    bert: Path, site: Site, before: str, limit: dict[str, Any], unit: str
) -> None:
    free = apart()
    play(guarded(bert, privacy=before), site, free, ("before", 0))
    bound = Purse(free.ledgers, is_apart=True, **limit)
    with pytest.raises(BudgetError, match=rf"with another unit \({unit}\)"):
        play(guarded(bert, privacy=BOTH), site, bound)


# --- at nodes -----------------------------------------------------------------------------------

KILLED = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from fedpeft.broadcasts import messages
from fedpeft.client_rounds import client_round
from fedpeft.durable import MOMENTS
from fedpeft.federation import deal
from fedpeft.ledger import OnDiskLedgers
from fedpeft.memory import Memory
from fedpeft.site import Site
from fedpeft.spending import Purse
from fedpeft.state import start
from tests.test_spending import BOTH, guarded

plan = guarded(Path(sys.argv[1]), privacy=BOTH)
site = Site(plan, deal(plan))
state = start(plan, site.tables, site.initial)
client, message = next(messages(plan, site.tables, state, "r", ["client-000"], bodies={},
                                remote=True, training=True))

def play(folder):
    purse = Purse(OnDiskLedgers(folder), is_apart=True)
    return bytes(client_round(plan, site, client, message, Memory(), purse)[0])

for moment in MOMENTS:
    folder = Path(sys.argv[2]) / moment
    child = os.fork()
    if not child:
        os.environ["FEDPEFT_FAULT"] = f"spending.{moment}"
        play(folder)
        os._exit(0)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = sum(len(ledger.releases) for _, ledger in OnDiskLedgers(folder).all())
    replies = play(folder), play(folder)
    (held,) = [ledger for _, ledger in OnDiskLedgers(folder).all()]
    units = [release.unit for release in held.releases]
    print(moment, ended, left, replies[0] == replies[1], *units)
"""


@pytest.mark.slow
def test_a_kill_leaves_all_of_a_round_s_spending_or_nothing(bert: Path, tmp_path: Path) -> None:
    """What is cut short counts once when it is played again, with the same noise."""
    asked = [sys.executable, "-c", KILLED, str(bert), str(tmp_path)]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    told = [line.split() for line in done.stdout.splitlines()]
    assert [moment for moment, *_ in told] == [*MOMENTS]
    for moment, ended, left, same, *units in told:
        assert ended == str(-signal.SIGKILL)
        assert left == ("2" if moment in ("renamed", "settled") else "0")
        assert (same, units) == ("True", ["record", CLIENT])


@pytest.mark.usefixtures("apart")
def test_a_node_counts_the_rounds_it_is_asked_in_over_all_runs(bert: Path, tmp_path: Path) -> None:
    """Two runs: the second stops some where their sites' limit is, and goes on without them."""
    plan = guarded(bert, rounds=3, cohort="everyone", clients=2)
    limit = sum(of_clients([1.0] * n).epsilon("d", 1e-5, CLIENT) for n in (4, 5)) / 2
    for run in (7, 8):
        grid = FakeGrid(config_of(plan, out=str(tmp_path / f"out-{run}")), nodes=2)
        grid.allowed = {"max-client-epsilon": limit}
        serve(grid)
        done = (tmp_path / f"out-{run}/rounds.jsonl").read_text().splitlines()
        assert [set(json.loads(line)) for line in done] == [set(json.loads(done[0]))] * 3
    (folder,) = (tmp_path / "home").rglob("ledgers")
    ledgers = dict(OnDiskLedgers(folder).all())
    assert [len(ledger.releases) for ledger in ledgers.values()] == [4, 4]
    told = CliRunner().invoke(app, ["spent", str(folder)]).stdout.splitlines()
    whole = of_clients([1.0] * 4).epsilon("d", 1e-5, CLIENT)
    assert len(told) == 2
    for line in told:
        assert f"epsilon {whole:.3f} at delta 1e-05 in 4 rounds of 2 runs; hidden: client" in line
        assert "from readers of released models, where the server adds the noise" in line


@pytest.mark.usefixtures("apart")
def test_who_is_not_asked_has_spent_nothing(bert: Path, tmp_path: Path) -> None:
    plan = guarded(bert, rounds=4)
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out")), nodes=4)
    serve(grid)
    asked = [m for m in grid.sent if m.metadata.message_type == "train"]
    ledgers = dict(OnDiskLedgers(tmp_path / "home/ledgers").all()) if asked else {}
    assert sum(len(ledger.releases) for ledger in ledgers.values()) == len(asked)


@pytest.mark.usefixtures("apart")
def test_a_node_s_limit_on_clients_is_read_as_it_is_meant(bert: Path, tmp_path: Path) -> None:
    plan = guarded(bert, privacy="none", weighting="uniform", clients=2)
    for epsilon, message in (
        (0, "max-client-epsilon=0 is no number above 0"),
        (8, "allows epsilon 8 of a client, and this plan hides no clients"),
    ):
        grid = FakeGrid(config_of(plan, out=str(tmp_path / str(epsilon))), nodes=2)
        grid.allowed = {"max-client-epsilon": epsilon}
        with pytest.raises(RunError, match=message):
            serve(grid)
