"""``simulations/compression``: its plans, who chooses the rate, and what is said of runs."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fedpeft.errors import PlanError, RunError
from fedpeft.preflight import check
from fedpeft.significance import paired
from fedpeft.spec import names
from simulations._study import store as stores
from simulations._study.store import Run, Store
from simulations.compression import __main__ as command
from simulations.compression import _pieces, _plans, _report, _work
from simulations.compression._figures import figures
from simulations.compression._pieces import Piece
from simulations.compression._plans import LOSSY, SHAKESPEARE, SST2, TASKS, Code

INT8, TOPK = _plans.CODES["int8"], _plans.CODES["topk_1"]
RAW = Piece(SST2)
RATE = SST2.rates[1]
AVAILABLE = [piece for piece in _pieces.pieces() if not piece.lacks]
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("piece", AVAILABLE, ids=lambda piece: piece.name)
def test_every_plan_passes_the_preflight(piece: Piece, shared: Callable[[str], Path]) -> None:
    shared("cls/sst2.train.jsonl.gz")
    plan = _plans.plan_of(piece.settings, 0.01, 1)
    found = check(plan)
    assert len(found.federation.train) == 10
    assert len(found.federation.splits.test or ()) == (872 + 1821 if piece.task == SST2 else 1504)
    assert plan.trainer.lr == 0.01  # type: ignore[attr-defined]
    assert plan.cohort.expected(10) == 10, "error feedback needs all in every round"


def test_no_codec_is_named_with_fields_that_it_has_not() -> None:
    """What ``feedback`` refuses is a result; what is misspelt is a mistake."""
    lacking = {piece.uplink: piece.lacks for piece in _pieces.pieces() if piece.lacks}
    assert not [uplink for uplink, why in lacking.items() if "has no field" in why]
    alone = [why for uplink, why in lacking.items() if not uplink.startswith("feedback")]
    assert all(why.startswith("the package has no codec") for why in alone)


def test_only_the_uplink_differs() -> None:
    for task in TASKS:
        raw = Piece(task).settings
        for piece in _pieces.pieces([task])[1:]:
            assert {k for k in raw if raw[k] != piece.settings[k]} == {"uplink"}
    assert Piece(SST2, TOPK, True).uplink == "feedback(topk(density=0.01))"
    assert Piece(SST2, _plans.CODES["randk_5"], True).uplink == (
        "feedback(randk(density=0.05, unbiased=False))"
    )


def test_what_names_a_run_is_pinned() -> None:
    """A change here makes every committed result one of other settings."""
    assert Piece(SST2, TOPK).settings == {
        "model": "minilm",
        "precision": "bfloat16",
        "task": "classify(max_length=64)",
        "data": 'jsonl(train="cls/sst2.train.jsonl.gz", '
        'test="cls/sst2.dev.jsonl.gz, cls/sst2.test.jsonl.gz")',
        "partition": "dirichlet(alpha=0.5)",
        "clients": 10,
        "adapter": "lora(r=8, alpha=16)",
        "cohort": "everyone",
        "rounds": 24,
        "eval_every": 24,
        "evaluate": "clients,test",
        "trainer": "plain(optimizer='adamw', lr=LR, steps=4, batch=4, "
        "schedule='linear', final=0.05)",
        "uplink": "topk(density=0.01)",
    }
    assert Piece(SHAKESPEARE).settings["partition"] == 'by_field(field="client", max_clients=10)'
    assert "clients" not in Piece(SHAKESPEARE).settings


def test_committed_results_are_those_of_the_present_settings() -> None:
    store = Store(_pieces.RESULTS)
    for path in _pieces.RESULTS.glob("*.json"):
        piece = stores.named(_pieces.pieces(), path.stem)
        runs = store.runs(piece)
        assert len({(r["lr"], r["seed"]) for r in runs}) == len(runs) > 0


def test_every_codec_is_a_piece_alone_and_with_feedback() -> None:
    found = [piece.name for piece in _pieces.pieces()]
    assert len(found) == len(set(found)) == len(TASKS) * (1 + 2 * len(LOSSY))
    assert found[:2] == ["sst2_raw", "shakespeare_raw"], "they choose the rates"


def fake(given: Mapping[str, Any], lr: float, seed: int) -> Run:
    """A run whose held-out loss is least at the middle rate; a codec costs two points."""
    lossy = given["uplink"] != "raw"
    held = 1 + abs(math.log(lr / RATE))
    scores = {"held/loss": held, "test/perplexity": 100 + seed + (4 if lossy else 0)}
    if "classify" in given["task"]:
        lost = 0.02 + 0.001 * (seed - 2) if lossy else 0.0
        scores |= {"held/accuracy": 0.8, "test/accuracy": 0.8 + seed / 100 - lost}
    traffic = {"up_bytes": 1_000_000 if lossy else 40_000_000, "float32_bytes": 30_000_000}
    return {"lr": lr, "seed": seed, "metrics": scores, "refused": 0, **traffic}


def made(store: Store, piece: Piece, play: Callable[..., Run] = fake) -> list[tuple[float, int]]:
    runs = stores.advance(store, piece, play, lambda: True)
    return [(run["lr"], run["seed"]) for run in runs]


def test_raw_chooses_the_rate_and_the_others_take_it(tmp_path: Path) -> None:
    store, int8 = Store(tmp_path), Piece(SST2, INT8)
    assert made(store, int8) == []
    assert store.missing(int8) == "the rate, which sst2_raw chooses"
    rest = [(RATE, seed) for seed in SST2.seeds]
    assert made(store, RAW) == [*((lr, 0) for lr in SST2.rates), *rest[1:]]
    assert store.missing(int8) == "not run"
    assert made(store, int8) == rest
    assert made(store, int8) == made(store, RAW) == []
    assert stores.missing(store, [RAW, int8]) == {}


def test_a_failed_run_is_kept_and_named(tmp_path: Path) -> None:
    def broken(given: Mapping[str, Any], lr: float, seed: int) -> Run:
        return (
            {"lr": lr, "seed": seed, "problem": "diverged"} if seed == 3 else fake(given, lr, seed)
        )

    store, int8 = Store(tmp_path), Piece(SST2, INT8)
    made(store, RAW)
    assert len(made(store, int8, broken)) == 5
    assert made(store, int8) == []
    assert store.missing(int8) == "seed 3 (failed)"
    assert "| 4, **missing**: seed 3 (failed) |" in _report.write(store)


def test_results_of_other_settings_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made(store, RAW)
    path = tmp_path / "sst2_raw.json"
    path.write_text(path.read_text().replace('"rounds": ', '"rounds": 1'))
    with pytest.raises(RunError, match="made with another rounds than now"):
        store.runs(RAW)


def test_what_the_package_lacks_or_refuses_is_missing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made(store, RAW)
    odd = Piece(SST2, Code("odd", "topk(density=0.01) | no_such(x=0.1) | none_such"))
    assert odd.lacks == "the package has no codec no_such, none_such"
    assert made(store, odd) == []
    refused = Piece(SST2, Code("worse", "topk(density=2)"))
    assert refused.lacks.startswith("refused: topk: density=2 ")
    assert store.missing(refused) == refused.lacks
    assert ("feedback" in names("codecs")) is not (
        Piece(SST2, INT8, True).lacks == "the package has no codec feedback"
    )


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    store, int8 = Store(tmp_path), Piece(SST2, INT8)
    for piece in (RAW, int8):
        made(store, piece)
    found = figures(store, int8)
    assert found is not None
    assert found.difference is not None
    wanted = paired([-1.8, -1.9, -2.0, -2.1, -2.2])
    for name in ("mean", "low", "high"):
        assert getattr(found.difference, name) == pytest.approx(getattr(wanted, name))
    assert found.scores == pytest.approx([78.2, 79.1, 80.0, 80.9, 81.8])
    assert (found.up_bytes, found.fewer, found.refused) == (1e6, 30.0, 0)
    assert found.deviation == pytest.approx(1.42302, abs=1e-5)
    assert figures(store, RAW).difference is None  # type: ignore[union-attr]
    assert figures(store, Piece(SST2, TOPK)) is None


def test_the_report_says_what_is_there_and_what_is_missing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made(store, RAW)
    made(store, Piece(SST2, INT8))
    made(store, Piece(SHAKESPEARE))
    made(store, Piece(SHAKESPEARE, INT8))
    made(store, Piece(SHAKESPEARE, TOPK), lambda *given: {**fake(*given), "refused": 2})
    list(stores.advance(store, Piece(SST2, TOPK), fake, iter([True, False]).__next__))
    text = _report.write(store)
    assert text == (tmp_path / "table.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert "| `raw` | 82.0 ± 1.6 | 40.00 | 0.8 | 1.0 |  | |  | 5 |" in rows
    # differences -1.8 ... -2.2: deviation 0.158, so +- 2.776 x 0.158 / sqrt(5) = 0.196
    lost = "-2.00 | -2.20 to -1.80 | lower"
    assert f"| `int8` | 80.0 ± 1.4 | 1.00 | 30.0 | 40.0 | {lost} | 5 |" in rows
    few = "| `topk(density=0.01)` | 78.2 | 1.00 | 30.0 | 40.0 |  | |  | 1, **missing**: seed 1, "
    assert any(row.startswith(few) for row in rows)
    assert (
        "| `int8` | 105.0 ± 1.0 | 1.00 | 30.0 | 40.0 | +4.00 | +4.00 to +4.00 | higher | 3 |"
        in rows
    )
    assert any(row.endswith("| 3; 6 replies refused |") for row in rows)
    assert f"| 25 times | 1 | `int8` | 30.0 | {lost} |" in rows
    assert rows.count("| 50 times | 0 | **missing** | | | | |") == 2
    assert "| `topk(density=0.01) \\| int8` | **missing**: not run |" in text
    assert (
        "24 rounds, 5 seeds, rate 0.01 of 0.005, 0.01, 0.02; higher accuracy (%) is better." in text
    )
    assert "3 seeds, rate 0.01 of 0.003, 0.01, 0.03; lower perplexity is better." in text
    plot = (tmp_path / "uplink.svg").read_bytes()
    _report.write(store)
    assert (tmp_path / "uplink.svg").read_bytes() == plot


def test_the_best_at_a_goal_is_that_of_the_task(tmp_path: Path) -> None:
    def finer(given: Mapping[str, Any], lr: float, seed: int) -> Run:
        run = fake(given, lr, seed)
        run["metrics"]["test/perplexity"] -= 3
        return {**run, "up_bytes": 250_000}

    store = Store(tmp_path)
    made(store, Piece(SHAKESPEARE))
    made(store, Piece(SHAKESPEARE, INT8))
    made(store, Piece(SHAKESPEARE, TOPK), finer)
    text = _report.write(store)
    best = "| `topk(density=0.01)` | 120.0 | +1.00 | +1.00 to +1.00 | higher |"
    assert [f"| {n} times | {of} {best}" in text for n, of in ((25, 2), (50, 1), (100, 1))] == [
        True
    ] * 3


def test_a_report_of_nothing_names_every_piece(tmp_path: Path) -> None:
    text = _report.write(Store(tmp_path))
    rows = [line for line in text.splitlines() if "**missing**" in line and line.startswith("| `")]
    assert len(rows) == len(_pieces.pieces())
    assert (tmp_path / "uplink.svg").exists()


def test_the_command_lists_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(Store(tmp_path), RAW)
    given = ["--list", "--results", str(tmp_path), "--piece"]
    assert command.main([*given, "sst2_raw"]) == 0
    assert "sst2_raw: 7 runs, best rate 0.01; complete" in capsys.readouterr().out
    assert command.main([*given, "sst2_int8"]) == 0
    assert "sst2_int8: 0 runs, best rate 0.01; missing: not run" in capsys.readouterr().out
    assert command.main([*given, "sst2_int9"]) == 2
    assert "there is no piece 'sst2_int9'; did you mean 'sst2_int8'?" in capsys.readouterr().err


def test_a_piece_brings_raw_and_one_that_fails_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(given: Mapping[str, Any], lr: float, seed: int) -> Run:
        if given["uplink"] == TOPK.spec:
            raise PlanError("uplink: does not fit")
        if given["uplink"] == "half":
            raise RunError("the server's step is not finite")
        return fake(given, lr, seed)

    monkeypatch.setattr(_work, "play", refuse)
    wanted = [arg for name in ("topk_1", "half", "int8") for arg in ("--piece", f"sst2_{name}")]
    assert command.main([*wanted, "--results", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert "sst2_topk_1: uplink: does not fit" in told
    assert "sst2_half: the server's step is not finite" in told
    store = Store(tmp_path)
    assert [len(store.runs(Piece(SST2, code))) for code in (_plans.RAW, INT8)] == [7, 5]


@pytest.mark.slow
def test_the_quick_grid_runs(shared: Callable[[str], Path]) -> None:
    """As users start it: processes that are spawned cannot import a package's ``__main__``.

    Other studies run their quick look with one job.
    """
    shared("cls/sst2.train.jsonl.gz")
    line = [sys.executable, "-m", "simulations.compression", "--quick", "--jobs", "2"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.count("| 2 |") == 4, "raw and a codec of both tasks, over two seeds"
