"""What choosing among private runs costs: against dp-accounting's accountants, and a formula."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dp_accounting as dp
import numpy as np
import pytest
import yaml
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from fedpeft.errors import RunError
from fedpeft.plan import Plan
from fedpeft.privacy._together import composed, repeated
from fedpeft.search.random import Random
from fedpeft.spec import build
from fedpeft.sweep import command, tuning
from fedpeft.sweep.card import frontier_section
from fedpeft.sweep.drawing import settled
from fedpeft.sweep.place import Place
from fedpeft.sweep.search_file import read_search
from fedpeft.sweep.tuning import Draw, Promise, Promises, as_text, costs, spent_in
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


def papernot_steinke(run: Sequence[float], mean: float, shape: float, gamma: float) -> float:
    """Return the epsilon of theorem 2 of arXiv 2110.03620, for Renyi divergences by whole order."""
    orders = np.arange(2, 2 + len(run))
    each = np.asarray(run)
    hat = ((1 + shape) * ((1 - 1 / orders) * each + np.log(1 / gamma) / orders)).min()
    total = each + hat + np.log(mean) / (orders - 1)
    spent = total + np.log1p(-1 / orders) - np.log(DELTA * orders) / (orders - 1)
    return float(spent.min())


@pytest.mark.parametrize(("count", "shape"), [("geometric", 1.0), ("logarithmic", 0.0)])
def test_the_best_of_a_drawn_number_costs_what_its_theorem_says(count: str, shape: float) -> None:
    search, mean, sigma = Random(trials=20, maximize="a", count=count), 20.0, 6.0  # type: ignore[arg-type]
    assert search.shape == shape
    kind = Sampling("all", 10), sigma, 9
    runs = [("d", [promise(kind)])] * 7
    (cost,) = costs(runs, Draw(mean, shape, each=2))
    rate = float(brentq(lambda t: math.expm1(t) / t - mean, 1e-9, 20)) if not shape else 0
    gamma = 1 / mean if shape else math.exp(-rate)
    run = [2 * 9 * order / (2 * sigma**2) for order in range(2, 65)]
    assert cost.best == pytest.approx(papernot_steinke(run, mean, shape, gamma), rel=0.01)
    assert cost.best is not None
    assert cost.one < cost.best < costs([("d", [promise(kind)])] * 40)[0].epsilon
    assert "nothing but the best trial is published" in "\n".join(as_text([cost]))
    # it holds whatever number was drawn, and for no others
    assert costs(runs[:1], Draw(mean, shape, each=2))[0].best == cost.best
    other = ("d", [promise((Sampling("all", 10), 7.0, 9))])
    assert costs([*runs, other], Draw(mean, shape, each=2))[0].best is None
    assert costs([*runs, ("d", [])], Draw(mean, shape, each=2))[0].best is None


def test_fixed_cohorts_and_caps_have_a_best_as_well() -> None:
    for of in (Sampling("fixed", 100, size=10), Sampling("coins", 100, 0.1, size=20)):
        (cost,) = costs([("d", [promise((of, 1.2, 30))])], Draw(10, 1.0, each=1))
        assert cost.best is not None
        assert cost.best > cost.one


@pytest.mark.parametrize("count", ["geometric", "logarithmic"])
def test_the_number_of_trials_has_the_mean_that_is_said(count: Any) -> None:
    search = Random(trials=20, maximize="a", count=count)
    drawn = [search.settled(np.random.default_rng(i)) for i in range(4000)]
    trials = np.array([each.trials for each in drawn])
    assert trials.min() == 1
    assert trials.mean() == pytest.approx(20, abs=5 * trials.std() / 4000**0.5)
    # the share of single trials: one over the mean, or of a logarithmic series
    first = 1 / 20
    if count == "logarithmic":
        rate = float(brentq(lambda t: math.expm1(t) / t - 20, 1e-9, 20))
        first = -math.expm1(-rate) / rate
    assert (trials == 1).mean() == pytest.approx(first, abs=0.025)
    assert {each.count for each in drawn} == {"fixed"}
    assert len({each.seed for each in drawn}) == 4000
    one = Random(trials=1, maximize="a", count=count)
    assert one.settled(np.random.default_rng(0)).trials == 1


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


def drawn_search(bert: Path, folder: Path, **content: Any) -> Path:
    path = folder / "search.yaml"
    plan = {**private_lines(bert), "privacy": USER}
    search = "random(trials=3, batch=2, maximize='test/accuracy', count='geometric')"
    axes = {"uplink": ["raw", "half"]}
    path.write_text(yaml.safe_dump({"plan": plan, "search": search, "axes": axes, **content}))
    return path


def test_a_drawn_search_is_drawn_once_and_says_what_its_best_costs(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out, place = drawn_search(bert, tmp_path), tmp_path / "out", Place("inline", "inline")
    assert command.sweep(path, out, place, check=True)
    assert not (out / "drawn.json").exists()  # nothing is drawn for who only looks
    assert "nothing but the best trial is published" in capsys.readouterr().out
    assert command.sweep(path, out, place)
    kept = (out / "drawn.json").read_bytes()
    assert (out / "drawn.json").stat().st_mode & 0o777 == 0o600
    settled = build("search", json.loads(kept)["settled"])
    rows = list(csv.DictReader((out / "sweep.csv").read_text().splitlines()))
    assert len(rows) == settled.trials
    assert len({row["run"] for row in rows}) == len(rows)  # a point that comes again runs again
    assert sorted(map(int, (row["seed"] for row in rows)))[0] > 1000  # no numbers of trials
    assert str(settled.seed) not in capsys.readouterr().out
    assert command.sweep(path, out, place)
    assert (out / "drawn.json").read_bytes() == kept
    told = json.loads((out / "tuning.json").read_text())
    (cost,) = told["costs"]
    kind = Sampling("coins", 4, 0.5), 2.0, 2
    assert cost["best"] == repeated(kind, 1, 3, 1.0, 1e-5)
    # the card of the best says nothing of the others
    card = frontier_section(out / told["best"]["runs"][0])
    assert f"epsilon {cost['best']:.4g} of users" in card
    assert "NOT private" in card
    assert all(row["run"] not in card for row in rows)
    # another look at the records, and the best is one of all
    other = tmp_path / "sweep.yaml"
    plan = {**private_lines(bert), "privacy": USER, "seed": 10**6}
    other.write_text(yaml.safe_dump({"plan": plan, "axes": {"uplink": ["raw"]}}))
    assert command.sweep(other, out, place)
    assert command.sweep(path, out, place)
    assert json.loads((out / "tuning.json").read_text())["costs"][0]["best"] is None


def test_who_draws_again_is_refused(bert: Path, tmp_path: Path) -> None:
    out, place = tmp_path / "out", Place("inline", "inline")
    assert command.sweep(drawn_search(bert, tmp_path), out, place)
    more = "random(trials=9, batch=2, maximize='test/accuracy', count='geometric')"
    with pytest.raises(RunError, match=r"drawn.json: the number of trials was drawn for random"):
        command.sweep(drawn_search(bert, tmp_path, search=more), out, place)
    (out / "drawn.json").unlink()
    with pytest.raises(RunError, match="runs from before the trials were drawn; use another"):
        command.sweep(drawn_search(bert, tmp_path), out, place)
    (out / "drawn.json").write_text("{")
    with pytest.raises(RunError, match=r"drawn.json: holds no draw; restore it, or use another"):
        command.sweep(drawn_search(bert, tmp_path), out, place)


def test_runs_that_promise_in_earnest_are_drawn_by_secret_coins(bert: Path, tmp_path: Path) -> None:
    file = read_search(drawn_search(bert, tmp_path))
    assert file is not None
    drawn = [settled(file, tmp_path / str(i), secret=True).search for i in range(8)]
    assert len({each.seed for each in drawn}) == 8  # type: ignore[attr-defined]
    open_ = [settled(file, tmp_path / f"open-{i}", secret=False).search for i in range(2)]
    assert open_[0] == open_[1]
