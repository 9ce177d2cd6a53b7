"""A run that was killed anywhere and resumed is the run that was never killed, bit for bit."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedpeft import driver
from fedpeft.durable import FAULTS, KINDS
from fedpeft.tensor_file import read_tensor_file
from tests.killing import LINES, Ended, Runs, digest
from tests.tiny import support_files, support_plan

pytestmark = pytest.mark.xdist_group("resume")
"""One process has the run that others are compared with."""
FAST = (
    "plan.synced:3",  # of plan.yaml, versions.json, run.json
    "memory.renamed:5",  # in the second round
    "checkpoint.half:2",
    "checkpoint.settled",  # the first ledger line is missing, and with it the ledger
    "ledger.half:2",
    "adapter.synced",
    "compare.settled:2",
    "result.written",
)
TIMES = {"plan": 3, "memory": 9, "checkpoint": 3, "ledger": 3, "compare": 3}
"""How often each kind is written by the plan in ``killing.LINES``; other kinds once."""
ELSEWHERE = ("spending", "reply", "roster", "submission", "asked", "kept", "key", "noise")
"""Kinds of files that nodes and servers write, not simulations of that plan."""


@dataclass(frozen=True, slots=True)
class Whole:
    """A run that was not interrupted."""

    path: Path
    ended: Ended


@pytest.fixture(scope="module")
def whole(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    path = tmp_path_factory.mktemp("whole") / "run"
    ended = runs(path)
    assert (ended.signal, ended.error) == (0, "")
    return Whole(path, ended)


def content(path: Path) -> dict[str, bytes]:
    """Every file below ``path``, but the events of TensorBoard."""
    files = [p for p in path.rglob("*") if p.is_file() and not p.name.startswith("events.")]
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in files}


def timeless(text: bytes) -> Any:
    found = json.loads(text)
    return {k: v for k, v in found.items() if "seconds" not in k and k != "run"}


def state(path: Path, name: str) -> list[tuple[str, bytes]]:
    tensors, _ = read_tensor_file(path / name, "")
    return [(k, v.tobytes()) for k, v in tensors.items()]


def check_same(path: Path, whole: Whole, ended: Ended) -> None:
    """The run in ``path`` ended as ``whole`` did and left the same behind."""
    assert (ended.signal, ended.error) == (0, "")
    assert ended.tensors == whole.ended.tensors
    found, expected = content(path), content(whole.path)
    assert sorted(found) == sorted(expected)
    for name in found:
        if name in ("run.json", "result.json"):
            assert timeless(found[name]) == timeless(expected[name]), name
        elif name == "rounds.jsonl":
            lines = found[name].splitlines(), expected[name].splitlines()
            assert [*map(timeless, lines[0])] == [*map(timeless, lines[1])]
        elif name.startswith("checkpoints/"):
            assert state(path, name) == state(whole.path, name), name
        else:
            assert found[name] == expected[name], name


def killed(runs: Runs, path: Path, fault: str, resume: bool = False, **lines: Any) -> None:
    ended = runs(path, fault=fault, resume=resume, **lines)
    assert ended.signal == signal.SIGKILL, f"{fault} did not fire: {ended}"


def test_the_plan_writes_all_there_is(whole: Whole) -> None:
    found = set(content(whole.path))
    assert found >= {
        *("run.json", "plan.yaml", "versions.json", "rounds.jsonl", "compare.json", "result.json"),
        *("checkpoints/state-000002.safetensors", "checkpoints/state-000003.safetensors"),
        *("adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
    }
    assert sum(name.startswith("memory/") for name in found) == 4
    assert set(TIMES) | {"adapter", "result", *ELSEWHERE} == set(KINDS)
    table = whole.ended.table
    assert table is not None
    assert list(table["rows"]) == ["base", "federated", "central"]
    assert table["best_round"] < 2, "the adapter that is exported is not that of the last round"
    names = {
        k.partition("/")[0] for k, _ in state(whole.path, "checkpoints/state-000003.safetensors")
    }
    assert names == {"params", "slots", "control", "best"}


@pytest.mark.parametrize("fault", FAST)
def test_killed_and_resumed_is_the_same(
    runs: Runs, whole: Whole, tmp_path: Path, fault: str
) -> None:
    killed(runs, tmp_path / "run", fault)
    check_same(tmp_path / "run", whole, runs(tmp_path / "run", resume=True))


@pytest.mark.slow
@pytest.mark.parametrize("fault", [f for f in FAULTS if not f.startswith(ELSEWHERE)])
def test_killed_at_every_point_and_resumed_is_the_same(
    runs: Runs, whole: Whole, tmp_path: Path, fault: str
) -> None:
    times = TIMES.get(fault.partition(".")[0], 1)
    for nth in range(1, times + 1):
        path = tmp_path / str(nth)
        killed(runs, path, f"{fault}:{nth}")
        check_same(path, whole, runs(path, resume=True))
    assert runs(tmp_path / "more", fault=f"{fault}:{times + 1}").signal == 0


VARIANTS: dict[str, dict[str, Any]] = {
    "personal adapters": {
        "personal": "ditto",
        "eval_every": 2,
        "eval_clients": 2,
        "keep_best": "none",
    },
    "tuned for evaluation": {"personal": "tuned(steps=1)", "correction": "none", "compare": ""},
    "whole model": {"adapter": "full", "optimizer": "yogi(lr=0.01)", "compare": ""},
    "the round before": {"correction": "scaffold_m_vr(beta=0.3)", "compare": ""},
    "anchors": {"correction": "fedamd(p=0.5)", "compare": ""},
    "duals": {
        "correction": "admm_robust(while_away=2)",
        "seed": 5,  # under which a client misses round 1 and is asked again
        "cohort": "uniform(size=2)",
        "weighting": "uniform(denominator='population')",
        "optimizer": "sgd",
        "compare": "",
    },
    "private": {
        "correction": "none",
        "compare": "",
        "weighting": "uniform(denominator='expected')",
        "privacy": "user(noise_multiplier=1.0, quantile=0.5, bit_noise=1.0, simulate_noise=true)",
    },
    "average head": {"adapter": "lora(r=2, alpha=4)", "optimizer": "sgd", "patience": 2},
    "lossy and adaptive": {
        "adapter": "lora(r=2, alpha=4, dropout=0.2)",
        "trainer": "plain(optimizer='adamw', lr=0.01, epochs=1, batch=8, schedule='cosine')",
        "correction": "fedprox(mu=0.1)",
        "uplink": "half",
        "downlink": "half(dtype='bfloat16')",
        "cohort": "poisson(rate=0.4)",
        "keep_best": "none",
        "eval_every": 2,
        "eval_clients": 2,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_plans_resume_too(runs: Runs, tmp_path: Path, variant: str) -> None:
    lines = VARIANTS[variant]
    other = Whole(tmp_path / "whole", runs(tmp_path / "whole", **lines))
    assert (other.ended.signal, other.ended.error) == (0, "")
    for fault in ("checkpoint.written:2", "ledger.begun:2", "adapter.synced"):
        path = tmp_path / fault
        killed(runs, path, fault, **lines)
        check_same(path, other, runs(path, resume=True, **lines))


def test_killed_again_and_again_is_the_same(runs: Runs, whole: Whole, tmp_path: Path) -> None:
    path = tmp_path / "run"
    killed(runs, path, "memory.settled:5")
    for fault in ("memory.settled:2", "checkpoint.renamed", "adapter.renamed", "adapter.synced"):
        killed(runs, path, fault, resume=True)
    killed(runs, path, "result.half", resume=True)
    check_same(path, whole, runs(path, resume=True))


@pytest.mark.parametrize(
    ("fault", "rounds"), [("memory.begun:6", 2), ("ledger.begun:2", 1), ("adapter.begun", 0)]
)
def test_no_more_than_the_round_in_flight_is_lost(
    runs: Runs, tmp_path: Path, fault: str, rounds: int
) -> None:
    killed(runs, tmp_path / "run", fault)
    ended = runs(tmp_path / "run", resume=True)
    assert (ended.calls.count("round"), ended.calls.count("client")) == (rounds, 3 * rounds)


def test_comparisons_that_are_done_are_kept(runs: Runs, tmp_path: Path) -> None:
    killed(runs, tmp_path / "run", "result.begun")
    assert runs(tmp_path / "run", resume=True).calls == ()


@pytest.mark.parametrize("at", ["client:5", "round:2", "compare:1"])
def test_interrupted_and_resumed_is_the_same(
    runs: Runs, whole: Whole, tmp_path: Path, at: str
) -> None:
    path = tmp_path / "run"
    ended = runs(path, interrupt=at)
    assert (ended.signal, ended.error) == (0, "KeyboardInterrupt: ")
    check_same(path, whole, runs(path, resume=True))


def test_resumed_from_the_checkpoint_before(runs: Runs, whole: Whole, tmp_path: Path) -> None:
    """The newest is damaged while clients have already gone on to the next round."""
    path = tmp_path / "run"
    killed(runs, path, "memory.settled:8")
    newest = path / "checkpoints" / "state-000002.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    before = content(path)
    error = runs(path, resume=True).error
    assert error.startswith(f"DamagedError: {newest}: cut short or damaged")
    assert error.endswith("delete it to resume from state-000001.safetensors")
    assert content(path) == before
    newest.unlink()
    check_same(path, whole, runs(path, resume=True))


def test_a_damaged_memory_is_refused(runs: Runs, tmp_path: Path) -> None:
    path = tmp_path / "run"
    killed(runs, path, "memory.settled:4")
    for memory in (path / "memory").iterdir():
        memory.write_bytes(memory.read_bytes()[:-1])
    before = content(path)
    error = runs(path, resume=True).error
    assert error.startswith("DamagedError: ")
    assert error.endswith("restore the client's memory or start a new run")
    assert content(path) == before


def test_a_lost_memory_is_refused(runs: Runs, tmp_path: Path) -> None:
    path = tmp_path / "run"
    killed(runs, path, "ledger.settled")
    shutil.rmtree(path / "memory")
    before = content(path)
    error = runs(path, resume=True).error
    assert "RunError: client client-00" in error
    assert "the server knows round 0, its memory holds []; restore the client's memory" in error
    assert content(path) == before


# --- what is not resumed -------------------------------------------------------------------------


def test_a_finished_run_is_not_run_again(
    whole: Whole, runs: Runs, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(whole.path)
    events = len(list(whole.path.glob("events.*")))
    ended = runs(whole.path, resume=True)
    assert (ended.signal, ended.error, ended.calls) == (0, "", ())
    assert ended.table == whole.ended.table
    assert ended.history == whole.ended.history
    assert ended.tensors == whole.ended.tensors

    def never(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(driver, "Site", never)
    plan = support_plan(bert, **LINES)
    result = driver.simulate(plan, out=whole.path, resume=True)
    assert digest(result.tensors) == whole.ended.tensors
    assert content(whole.path) == before
    assert len(list(whole.path.glob("events.*"))) == events
    assert runs(whole.path).error.endswith(
        "holds a finished run; add --resume, or choose another --out"
    )


def test_a_changed_plan_is_named(runs: Runs, tmp_path: Path) -> None:
    path = tmp_path / "run"
    killed(runs, path, "checkpoint.begun:2")
    before = content(path)
    changed: dict[str, tuple[Any, str]] = {
        "rounds": (4, "rounds was 3, is 4; change it back to resume, or choose another --out"),
        "seed": (1, "seed was 0, is 1"),
        "uplink": ("half", """uplink was 'raw', is "half(dtype='float16')"; change it back"""),
    }
    for name, (value, said) in changed.items():
        error = runs(path, resume=True, **{name: value}).error
        assert error.startswith(f"RunError: {path}: the plan was changed: {said}")
        assert content(path) == before


def test_a_changed_data_file_is_named(runs: Runs, tmp_path: Path) -> None:
    train, test = support_files(tmp_path / "data")
    path, data = tmp_path / "run", f"jsonl(train={str(train)!r}, test={str(test)!r})"
    killed(runs, path, "checkpoint.begun:2", data=data)
    before = content(path)
    train.write_text(train.read_text().replace("the", "a", 1))
    error = runs(path, resume=True, data=data).error
    assert error.startswith("RunError: ")
    assert "the data changed since the run began; choose another --out" in error
    assert content(path) == before


def test_a_changed_model_is_named(runs: Runs, bert: Path, tmp_path: Path) -> None:
    model, path = tmp_path / "model", tmp_path / "run"
    shutil.copytree(bert, model)
    killed(runs, path, "checkpoint.begun:2", model=str(model))
    before = content(path)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    error = runs(path, resume=True, model=str(model)).error
    assert error.startswith("RunError: ")
    assert "the model changed since the run began; choose another --out" in error
    assert content(path) == before


def test_a_folder_of_something_else_is_left_alone(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    error = runs(tmp_path).error
    assert error.endswith("not empty and no run of fedpeft; choose another --out")
    assert content(tmp_path) == {"thesis.tex": b"mine"}


def test_a_run_without_a_folder_is_the_same(runs: Runs, whole: Whole) -> None:
    ended = runs(None)
    assert ended.tensors == whole.ended.tensors
    assert ended.history is not None
    assert whole.ended.history is not None
    for ours, theirs in zip(ended.history, whole.ended.history, strict=True):
        assert {k: v for k, v in ours.items() if "seconds" not in k} == {
            k: v for k, v in theirs.items() if "seconds" not in k
        }
