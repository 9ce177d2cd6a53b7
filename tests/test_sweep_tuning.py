"""What choosing among private runs costs: against dp-accounting's accountants, and a formula."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import dp_accounting as dp
import pytest
import yaml
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy.stats import norm

from fedpeft.plan import Plan
from fedpeft.privacy._together import composed
from fedpeft.sweep import command, tuning
from fedpeft.sweep.place import Place
from fedpeft.sweep.tuning import Promise, Promises, as_text, costs, spent_in
from fedpeft.types import Sampling
from tests.tiny import support_lines

DELTA = 1e-5


def promise(kind: Any, **changed: Any) -> Promise:
    given = {"whom": "users", "relation": "add or remove one client", "data": "d", "delta": DELTA}
    return Promise(**{**given, "kind": kind, "simulated": False, **changed})


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """Return the epsilon of one Gaussian mechanism (Balle and Wang 2018, theorem 8)."""

    def spent(eps: float) -> float:
        a, b = 1 / (2 * sigma) - eps * sigma, -1 / (2 * sigma) - eps * sigma
        return float(norm.cdf(a) - math.exp(eps + norm.logcdf(b)))

    low, high = 0.0, 100.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > delta else (low, middle)
    return high


def test_runs_of_everybody_are_one_gaussian() -> None:
    runs = [("d", [promise((Sampling("all", 10), noise, 5))]) for noise in (4.0, 4.0, 8.0)]
    (cost,) = costs(runs)
    sigma = (2 * 5 / 16 + 5 / 64) ** -0.5
    exact = gaussian_epsilon(sigma, DELTA)
    assert exact <= cost.epsilon <= exact * 1.01
    one = gaussian_epsilon((5 / 16) ** -0.5, DELTA)
    assert one <= cost.one <= one * 1.01
    assert (cost.runs, cost.accountant, cost.unpromised) == (3, "PLD", 0)
    assert cost.epsilon < 3 * cost.one


def test_runs_with_coins_are_those_of_another_accountant() -> None:
    kinds = [(0.1, 1.0, 40), (0.1, 1.5, 40), (0.2, 1.5, 10)]
    runs = [("d", [promise((Sampling("coins", 100, q), z, n))]) for q, z, n in kinds]
    (cost,) = costs([*runs, runs[0]])
    other = PLDAccountant(value_discretization_interval=1e-3)
    for q, z, n in [*kinds, kinds[0]]:
        other.compose(dp.PoissonSampledDpEvent(q, dp.GaussianDpEvent(z)), n)
    assert cost.epsilon == pytest.approx(other.get_epsilon(DELTA), rel=0.02)
    assert cost.runs == 4


def test_fixed_cohorts_are_composed_by_rdp() -> None:
    kind = Sampling("fixed", 100, size=10), 1.2, 30
    (cost,) = costs([("d", [promise(kind)])] * 5)
    other = RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
    event = dp.SampledWithoutReplacementDpEvent(100, 10, dp.GaussianDpEvent(1.2))
    other.compose(event, 150)
    assert cost.accountant == "RDP"
    assert cost.epsilon == pytest.approx(other.get_epsilon(DELTA), rel=0.02)


def test_a_client_s_turns_count_in_each_run() -> None:
    kind = Sampling("turns", 50, size=5, most=3), 2.0, 40
    (cost,) = costs([("d", [promise(kind)])] * 4)
    exact = gaussian_epsilon(2.0 / math.sqrt(12), DELTA)
    assert exact <= cost.epsilon <= exact * 1.01


def test_the_strictest_delta_counts_and_one_kind_is_what_a_run_says() -> None:
    kind = Sampling("coins", 100, 0.1), 1.0, 40
    (cost,) = costs([("d", [promise(kind)]), ("d", [promise(kind, delta=1e-7)])])
    assert cost.delta == 1e-7
    assert cost.one == pytest.approx(composed((kind,), 1e-7)[0])


def test_what_cannot_be_added_up_is_apart() -> None:
    kind = Sampling("all", 10), 4.0, 5
    bare = ("d", list[Promise]())
    record = promise(kind, whom="records", relation="one record")
    runs = [("d", [promise(kind), record]), ("d", [promise(kind)]), bare, ("e", [promise(kind)])]
    (cost,) = costs(runs)
    assert (cost.whom, cost.runs, cost.unpromised) == ("users", 2, 1)
    said = "\n".join(as_text([cost]))
    assert "choosing the best of 2 private runs costs epsilon" in said
    assert "1 runs on the same records promise nothing" in said
    assert costs([("d", [promise(kind)])]) == []


USER = "user(noise_multiplier=2.0, clip=0.5, simulate_noise=true)"
BOTH = f"{USER} | record(noise_multiplier=1.5, simulate_noise=true)"


def private_lines(bert: Path, **changed: Any) -> dict[str, Any]:
    lines = support_lines(bert, rounds=2, evaluate="test", cohort="poisson(rate=0.5)", **changed)
    lines["weighting"] = "uniform(denominator='expected')"
    return lines


def test_a_plan_s_promises(bert: Path) -> None:
    plan = Plan.from_lines({**private_lines(bert), "privacy": BOTH})
    users, records = Promises().of(plan, "d")
    assert users.kind[0].rate == 0.5
    assert users.kind[1:] == (2.0, 2)
    assert (users.whom, users.simulated, users.delta) == ("users", True, 1e-5)
    assert records.whom == "records"
    steps = plan.trainer.budget(100)[0]
    assert records.kind[1:] == (1.5, 2 * steps)
    bare = Plan.from_lines(private_lines(bert))
    assert Promises().of(bare, "d") == []


def test_a_sweep_says_it_before_and_keeps_it(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    privacy = ["none", USER, USER.replace("2.0", "4.0")]
    content = {"plan": private_lines(bert), "axes": {"privacy": privacy}, "seeds": [0, 1]}
    path, out = tmp_path / "sweep.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    place = Place("inline", "inline")
    assert command.sweep(path, out, place, check=True)
    before = capsys.readouterr().out
    kinds = tuple((Sampling("coins", 4, 0.5), z, 4) for z in (2.0, 4.0))
    expected = composed(kinds, 1e-5)[0]
    told = f"choosing the best of 4 private runs costs epsilon {expected:.4g} of users at delta"
    assert told in before
    assert "these runs simulate it, and are NOT private" in before
    assert "2 runs on the same records promise nothing" in before
    assert command.sweep(path, out, place)
    assert capsys.readouterr().out.count(told) == 2
    (cost,) = json.loads((out / "tuning.json").read_text())["costs"]
    assert cost["epsilon"] == expected
    assert (cost["runs"], cost["unpromised"], cost["simulated"]) == (4, 2, True)
    # a run that no file names any more has looked at the records, too
    path.write_text(yaml.safe_dump({**content, "seeds": [2]}, sort_keys=False))
    assert command.sweep(path, out, place)
    assert [c.runs for c in spent_in(out)] == [6]
    assert json.loads((out / tuning.COSTS).read_text())["costs"][0]["runs"] == 6


def test_a_search_whose_trials_promise_different_things_says_so(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "search.yaml"
    plan = {**private_lines(bert), "privacy": USER}
    search = "random(trials=6, batch=2, maximize='test/accuracy')"
    for axis, is_even in (("trainer.lr", True), ("privacy.noise_multiplier", False)):
        axes = {axis: {"low": 1.0, "high": 2.0}}
        path.write_text(yaml.safe_dump({"plan": plan, "search": search, "axes": axes}))
        assert command.sweep(path, tmp_path / "out", Place("inline", None), check=True)
        said = capsys.readouterr().out
        assert "choosing the best of 6 private runs costs epsilon" in said
        assert ("if all trials were as those of the first batch" in said) != is_even
