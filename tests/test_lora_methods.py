"""``simulations/lora_methods``: its plans, what is kept of runs, and what is said of them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fedpeft.errors import DataError, PlanError, RunError
from fedpeft.preflight import check
from fedpeft.spec import build
from simulations._study import store as stores
from simulations._study.store import Run, Store
from simulations.lora_methods import __main__ as command
from simulations.lora_methods import _pieces, _plans, _report, _work
from simulations.lora_methods._data import AgNews
from simulations.lora_methods._pieces import Piece
from simulations.lora_methods._plans import CENTRAL, CLIENTS, KNOWN, METHODS, RATES

AVAILABLE = [name for name in (CENTRAL, *KNOWN) if _plans.available(name)]
FEDIT = Piece("fedit", 50)
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("clients", CLIENTS)
@pytest.mark.parametrize("name", AVAILABLE)
def test_every_plan_passes_the_preflight(
    name: str, clients: int, shared: Callable[[str], Path]
) -> None:
    shared("cls/ag_news.train.jsonl.gz")
    plan = _plans.plan_of(_plans.lines(name, clients), 0.01, 1)
    found = check(plan)
    modules = {k.rpartition(".lora_")[0] for k in found.shapes if ".lora_" in k}
    assert len(modules) == 12, "query and value of six layers"
    ranks = {shape[0] for k, shape in found.shapes.items() if k.endswith("lora_A.weight")}
    assert ranks == {plan.adapter.r * getattr(plan.adapter, "heads", 1)}  # type: ignore[attr-defined]
    assert ranks == {4} or KNOWN[name].keeps
    assert len(found.federation.splits.test or ()) == 2000
    assert len(found.federation.train) == (1 if name == CENTRAL else clients)
    assert plan.trainer.lr == 0.01  # type: ignore[attr-defined]
    assert plan.adapter.head in ("average", "local")  # type: ignore[attr-defined]
    assert not getattr(plan.adapter, "dropout", 0.0)


def test_only_the_presets_lines_differ() -> None:
    fedit, other = _plans.lines("fedit", 3), _plans.lines("lora_fair", 3)
    differ = {k for k in fedit if fedit[k] != other[k]}
    assert differ == {"adapter", "aggregator"}
    assert fedit["trainer"] == (
        "plain(optimizer='adamw', lr=LR, steps=2, batch=8, schedule='linear', final=0.05)"
    )


@pytest.mark.parametrize("clients", CLIENTS)
def test_all_methods_have_the_same_work_and_the_same_clients_asked(clients: int) -> None:
    presets = [_plans.lines(name, clients) for name in KNOWN if _plans.available(name)]
    for line in ("trainer", "cohort", "rounds", "clients", "partition", "model", "precision"):
        assert len({str(lines[line]) for lines in presets}) == 1, line


def test_what_names_a_run_is_pinned() -> None:
    """A change here makes every committed result one of other settings."""
    assert _plans.lines("ffa_lora", 50) == {
        "model": "minilm",
        "precision": "bfloat16",
        "task": "classify(max_length=48)",
        "data": "simulations.lora_methods._data:AgNews(test_rows=2000)",
        "partition": "dirichlet(alpha=0.1)",
        "clients": 50,
        "cohort": "uniform(size=10)",
        "rounds": 40,
        "eval_every": 40,
        "evaluate": "clients,test",
        "trainer": "plain(optimizer='adamw', lr=LR, steps=2, batch=8, "
        "schedule='linear', final=0.05)",
        "adapter": "lora(r=4, alpha=8.0, targets='attention', train='B', init='kaiming')",
        "correction": "none",
        "weighting": "examples",
        "aggregator": "mean",
        "optimizer": "sgd",
    }


def test_committed_results_are_those_of_the_present_settings() -> None:
    store = Store(_pieces.RESULTS)
    names = {piece.name for piece in _pieces.pieces()}
    for path in _pieces.RESULTS.glob("*.json"):
        assert path.stem in names
        piece = stores.named(_pieces.pieces(), path.stem)
        runs = store.runs(piece)
        assert len({(r["lr"], r["seed"]) for r in runs}) == len(runs) > 0


def test_a_head_that_a_preset_freezes_is_averaged() -> None:
    adapter = build("adapters", _plans.lines("fedsvd", 3)["adapter"])
    assert (adapter.head, adapter.train, adapter.send) == ("average", "B", "both")


def test_the_centralised_adapter_sees_as_many_records() -> None:
    assert "records=6400, batch=8" in _plans.lines(CENTRAL, 50)["trainer"]
    assert "records=1920, batch=8" in _plans.lines(CENTRAL, 3)["trainer"]


def test_the_test_rows_are_drawn_once(shared: Callable[[str], Path]) -> None:
    shared("cls/ag_news.test.jsonl.gz")
    small, same = AgNews(test_rows=30).load(), AgNews(test_rows=30).load()
    every = AgNews(test_rows=7600).load()
    assert list(small.test or ()) == list(same.test or ())
    places = [list(every.test or ()).index(row) for row in small.test or ()]
    assert places == sorted(set(places))
    assert len(small.train) == len(every.train) == 13654
    assert len({small.fingerprint, every.fingerprint}) == 2
    with pytest.raises(DataError, match="test_rows=7601: there are 7600"):
        AgNews(test_rows=7601).load()


def fake(given: Mapping[str, Any], lr: float, seed: int) -> Run:
    """A run whose held-out accuracy is best at the middle rate, and test accuracy at the last."""
    held = 0.8 - abs(math.log(lr / RATES[1])) / 100
    scores = {"held/accuracy": held, "held/loss": 1.0, "test/accuracy": 0.5 + lr + seed / 100}
    run = {"lr": lr, "seed": seed, "metrics": scores, "majority": {"held": 0.6, "test": 0.26}}
    traffic = {"up_bytes": 2_000_000, "down_bytes": 3_000_000, "server_cpu_s": 0.012}
    return {**run, **traffic, "personalised": "local" in given["adapter"]}


def made(store: Store, piece: Piece, play: Callable[..., Run] = fake) -> list[Run]:
    return list(stores.advance(store, piece, play, lambda: True))


def test_a_piece_tries_rates_then_runs_the_best_on_all_seeds(tmp_path: Path) -> None:
    store = Store(tmp_path)
    found = [(run["lr"], run["seed"]) for run in made(store, FEDIT)]
    assert found == [*((lr, 0) for lr in RATES), (RATES[1], 1), (RATES[1], 2)]
    assert made(store, FEDIT) == []
    more = made(store, Piece("fedit", 50, contrast=True))
    assert [(run["lr"], run["seed"]) for run in more] == [(RATES[1], 3), (RATES[1], 4)]
    held = json.loads((tmp_path / "fedit_50.json").read_text())
    assert held["settings"] == _plans.lines("fedit", 50)
    assert len(held["runs"]) == 7


def test_an_interrupted_piece_loses_the_run_under_way_only(tmp_path: Path) -> None:
    store, played = Store(tmp_path), list[tuple[float, int]]()

    def stopped(given: Mapping[str, Any], lr: float, seed: int) -> Run:
        played.append((lr, seed))
        if len(played) == 3:
            raise KeyboardInterrupt
        return fake(given, lr, seed)

    with pytest.raises(KeyboardInterrupt):
        made(store, FEDIT, stopped)
    assert [r["lr"] for r in store.runs(FEDIT)] == [*RATES[:2]]
    assert stores.missing(store, [FEDIT]) == {"fedit_50": f"rate {RATES[2]:g}"}
    made(store, FEDIT, stopped)
    assert played[2:4] == [(RATES[2], 0)] * 2
    assert len(set(played)) == len(played) - 1 == 5


def test_no_run_starts_once_time_is_up(tmp_path: Path) -> None:
    left = iter([True, True, False])
    runs = list(stores.advance(Store(tmp_path), FEDIT, fake, lambda: next(left)))
    assert len(runs) == 2


def test_training_that_does_not_stay_finite_is_no_candidate(tmp_path: Path) -> None:
    def broken(given: Mapping[str, Any], lr: float, seed: int) -> Run:
        bad = {"lr": lr, "seed": seed, "problem": "not finite"}
        return bad if lr == RATES[1] else fake(given, lr, seed)

    store = Store(tmp_path)
    found = made(store, FEDIT, broken)
    assert len(found) == 5
    assert store.rate(FEDIT) == RATES[2], "nearer to the middle than the first"
    assert sorted(store.best(FEDIT)) == [0, 1, 2]


def test_results_of_other_settings_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made(store, FEDIT)
    path = tmp_path / "fedit_50.json"
    path.write_text(path.read_text().replace("classify(max_length=48)", "classify(max_length=64)"))
    with pytest.raises(RunError, match="made with another task than now"):
        store.runs(FEDIT)


def test_a_method_that_the_package_lacks_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = _plans.Method("flora", "no_such_preset")
    monkeypatch.setattr(_plans, "KNOWN", {**KNOWN, "flora": lacking})
    monkeypatch.setattr(_pieces, "KNOWN", {**KNOWN, "flora": lacking})
    store = Store(tmp_path)
    assert made(store, Piece("flora", 3)) == []
    text = _report.write(store)
    assert "| flora | **missing**: the package has no preset no_such_preset |" in text
    assert "flora_3: the package has no preset no_such_preset; fedit_3: not run" in text


def test_the_report_says_what_is_there_and_what_is_missing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made(store, Piece("fedit", 3, contrast=True))
    made(store, Piece("fedsa_lora", 3))
    list(stores.advance(store, Piece("rolora", 3), fake, iter([True] * 4 + [False]).__next__))
    text = _report.write(store)
    assert text == (tmp_path / "table.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    three = rows[rows.index(next(r for r in rows if "| 26.0 ± 0.0 |" in r)) :]
    assert "| fedit | 0.01 | 52.0 ± 1.0 | 80.0 ± 0.0 | 2.00 | 3.00 | 12.0 | 3 |" in three
    personal = next(r for r in three if r.startswith("| fedsa_lora "))
    assert personal.startswith("| fedsa_lora \\* |")
    rolora = next(r for r in three if r.startswith("| rolora"))
    assert rolora.endswith("| 2, **missing**: seed 2 |")
    assert sum("**missing**: not run" in r for r in rows) > 20
    contrast = next(r for r in rows if r.startswith("| 3 | rolora | fedit |"))
    assert "+0.00 | +0.00 to +0.00 | 2 of 5 seeds; **missing**: rolora_3: seed 2" in contrast
    plot = (tmp_path / "accuracy.svg").read_bytes()
    _report.write(store)
    assert (tmp_path / "accuracy.svg").read_bytes() == plot


def test_a_contrast_is_paired_by_seed(tmp_path: Path) -> None:
    def better(given: Mapping[str, Any], lr: float, seed: int) -> Run:
        run = fake(given, lr, seed)
        run["metrics"]["test/accuracy"] += 0.02 + 0.001 * (seed - 2)
        return run

    store = Store(tmp_path)
    made(store, Piece("fedit", 50, contrast=True))
    made(store, Piece("rolora", 50, contrast=True), better)
    made(store, Piece("ffa_lora", 50, contrast=True))
    text = _report.write(store)
    # differences 1.8 ... 2.2: deviation 0.158, so +- 2.776 x 0.158 / sqrt(5) = 0.196
    assert "| +2.00 | +1.80 to +2.20 | higher |" in text
    assert "| +0.00 | +0.00 to +0.00 | no difference |" in text


def test_the_command_lists_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(Store(tmp_path), FEDIT)
    assert command.main(["--list", "--results", str(tmp_path), "--piece", "fedit_50"]) == 0
    assert "fedit_50: 5 runs, best rate 0.01; missing: seed 3, seed 4" in capsys.readouterr().out
    assert command.main(["--list", "--results", str(tmp_path), "--piece", "fedit_51"]) == 2
    assert "there is no piece 'fedit_51'; did you mean 'fedit_50'?" in capsys.readouterr().err


def test_a_method_that_does_not_fit_does_not_cost_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(given: Mapping[str, Any], lr: float, seed: int) -> Run:
        if "train='B'" in given["adapter"]:
            raise PlanError("aggregator: does not fit")
        return fake(given, lr, seed)

    monkeypatch.setattr(_work, "play", refuse)
    pieces = ["--piece", "ffa_lora_3", "--piece", "fedit_3", "--results", str(tmp_path)]
    assert command.main(pieces) == 1
    assert "ffa_lora_3: aggregator: does not fit" in capsys.readouterr().err
    assert len(Store(tmp_path).runs(Piece("fedit", 3))) == 7


def test_methods_are_pieces_of_both_sizes() -> None:
    names = [piece.name for piece in _pieces.pieces() if not piece.contrast]
    assert len(names) == len(set(names))
    assert {f"{m.name}_{n}" for m in METHODS for n in CLIENTS} < set(names)
    known = {*KNOWN}
    assert {side for c in _pieces.CONTRASTS for side in (c.left, c.right)} <= known


@pytest.mark.slow
def test_the_quick_grid_runs(shared: Callable[[str], Path]) -> None:
    """As users start it: processes that are spawned cannot import a package's ``__main__``.

    Other studies run their quick look with one job.
    """
    shared("cls/ag_news.train.jsonl.gz")
    line = [sys.executable, "-m", "simulations.lora_methods", "--quick", "--jobs", "2"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.count("| 2 |") == 3, "two methods and the majority class, over two seeds"
