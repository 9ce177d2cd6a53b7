"""Whole runs whose rounds edit the base: on every engine, killed, over Flower, and afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import client.app
from fedpeft.driver import simulate
from fedpeft.errors import ModelError
from fedpeft.export import read_tensors
from fedpeft.models import _base
from fedpeft.plan import Plan
from fedpeft.preview import preview
from fedpeft.tensor_file import read_tensor_file
from fedpeft.tensors import select
from fedpeft.types import Tensors
from tests.killing import Runs
from tests.test_cli import Run, fedpeft
from tests.test_flower import FakeGrid, config_of, result_of, serve
from tests.test_resume import Whole, check_same, killed
from tests.tiny import support_lines, support_plan

__all__ = ["fedpeft"]
pytestmark = pytest.mark.xdist_group("fold_runs")
"""One process has the runs that others are compared with."""
METHODS: Mapping[str, dict[str, str]] = {
    "stack": {"adapter": "lora(r=2, alpha=4, fresh='client')", "aggregator": "stack"},
    "energy": {
        "adapter": "lora(r=2, alpha=4, fresh='client', targets='all-linear')",
        "aggregator": "stack(energy=0.8)",
    },
    "mixed": {
        "adapter": "lora(r=3, alpha=6, ranks='1,2,3', fresh='client')",
        "aggregator": "stack",
    },
    "fedex": {"adapter": "lora(r=2, alpha=4)", "aggregator": "fedex"},
    "cut": {"adapter": "lora(r=2, alpha=4)", "aggregator": "fedex(rank=1)"},
    "frlora": {"adapter": "lora(r=2, alpha=4, fresh='round')", "aggregator": "frlora"},
}
Same = Callable[[Tensors, Tensors], bool]


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Server and clients share this process but, as in real life, no base model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("FEDPEFT_HOME", str(tmp_path / "home"))
    for module in ("grid", "nodes"):
        monkeypatch.setattr(f"fedpeft.flower.{module}.SLEEP", (0.0, 0.001))
    yield
    forget()
    torch.set_num_threads(threads)


def forget() -> None:
    """Have the client's process forget all that is not on disk."""
    client.app.forget()


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


def plan_of(bert: Path, method: str, **lines: Any) -> Plan:
    return support_plan(bert, **{**METHODS[method], "rounds": 4, **lines})


# --- every method, every head, every engine ------------------------------------------------------


@pytest.mark.parametrize("head", ["average", "local", "frozen"])
@pytest.mark.parametrize("method", METHODS)
def test_every_way_of_the_head_runs(bert: Path, method: str, head: str) -> None:
    adapter = METHODS[method]["adapter"].replace("alpha", f"head={head!r}, alpha")
    result = simulate(plan_of(bert, method, adapter=adapter, uplink="half", downlink="half"))
    assert all(line["asked"] == len(line["replied"]) == 4 for line in result.history)
    assert all(np.isfinite(value).all() for value in result.tensors.values())
    moved = [v for k, v in result.tensors.items() if ".fold_" in k and v.size]
    assert moved
    assert all(value.any() for value in moved)
    head_names = [k for k in result.tensors if k.startswith("classifier")]
    start = simulate(plan_of(bert, method, adapter=adapter, rounds=1)).tensors
    still = all(np.array_equal(result.tensors[k], start[k]) for k in head_names)
    assert still == (head != "average")


@pytest.mark.parametrize("method", ["mixed", "fedex"])
def test_processes_have_the_bits_of_one(bert: Path, method: str) -> None:
    plan = plan_of(bert, method, cohort="uniform(size=3)", rounds=3)
    one = simulate(plan)
    other = simulate(plan, engine="processes(workers=2, threads=1)")
    assert same(one.tensors, other.tensors)
    assert _timeless(one.history) == _timeless(other.history)


def _timeless(history: Any) -> Any:
    return [{k: v for k, v in line.items() if "seconds" not in k} for line in history]


@pytest.mark.parametrize("method", ["stack", "fedex", "frlora"])
def test_rounds_without_anybody_change_nothing(bert: Path, method: str) -> None:
    lines = {"cohort": "poisson(rate=0.15)", "rounds": 6, "holdout": 0, "evaluate": "test"}
    result = simulate(plan_of(bert, method, **lines))
    asked = [line["asked"] for line in result.history]
    assert 0 in asked[1:]
    assert any(asked)
    losses = [line["test/loss"] for line in result.history]
    for at in range(1, len(asked)):
        assert (losses[at] == losses[at - 1]) == (asked[at] == 0)


@pytest.mark.parametrize("method", ["stack", "fedex"])
def test_what_it_is_compared_with_edits_nothing(bert: Path, method: str) -> None:
    result = simulate(plan_of(bert, method, compare="base,alone,central"))
    rows = result.table["rows"]
    assert list(rows) == ["base", "alone", "federated", "central"]
    plain = simulate(plan_of(bert, method, compare="base", rounds=1)).table["rows"]
    assert rows["base"] == plain["base"]
    assert rows["federated"]["loss"] == pytest.approx(result.table["last"]["test/loss"], abs=1e-6)
    assert rows["central"]["loss"] < rows["base"]["loss"]


# --- killed --------------------------------------------------------------------------------------

KILLED = {
    "adapter": "lora(r=2, alpha=4, head='local', fresh='client')",
    "aggregator": "stack",
    "correction": "none",
    "optimizer": "sgd",
}
SPARED: dict[str, Any] = {**METHODS["fedex"], "correction": "none", "optimizer": "sgd"}


@pytest.fixture(scope="module", params=[KILLED, SPARED], ids=["stack", "fedex"])
def lines(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = request.param
    return found


@pytest.fixture(scope="module")
def whole(runs: Runs, lines: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Whole:
    path = tmp_path_factory.mktemp("whole") / "run"
    return Whole(path, runs(path, **lines))


def test_killed_and_resumed_is_the_same(
    runs: Runs, whole: Whole, tmp_path: Path, lines: dict[str, Any]
) -> None:
    assert (whole.ended.signal, whole.ended.error) == (0, "")
    _, note = read_tensor_file(whole.path / "checkpoints" / "state-000003.safetensors", "")
    assert [round for round, *_ in note["fold"]][-1] == 3
    assert whole.ended.history is not None
    assert len({line["down_bytes"] for line in whole.ended.history}) > 1
    for fault in ("checkpoint.half:2", "ledger.half:2"):
        path = tmp_path / fault
        killed(runs, path, fault, **lines)
        check_same(path, whole, runs(path, resume=True, **lines))


@pytest.mark.slow
@pytest.mark.parametrize("step", ["begun", "half", "written", "synced", "renamed", "settled"])
def test_killed_at_every_checkpoint_and_resumed_is_the_same(
    runs: Runs, whole: Whole, tmp_path: Path, lines: dict[str, Any], step: str
) -> None:
    for kind, times in (("checkpoint", 3), ("ledger", 3), ("adapter", 1)):
        for nth in range(1, times + 1):
            path = tmp_path / f"{kind}-{nth}"
            ended = runs(path, fault=f"{kind}.{step}:{nth}", **lines)
            if ended.signal:
                check_same(path, whole, runs(path, resume=True, **lines))


# --- over Flower ---------------------------------------------------------------------------------


def near(ours: Any, theirs: Any) -> None:
    """Compare two histories: bytes to the digits in the heads of messages, all else to the bit."""
    for one, other in zip(ours, theirs, strict=True):
        for name, count in (("down_bytes", one["asked"]), ("eval_bytes", 4)):
            assert abs(one.pop(name) - other.pop(name)) <= 40 * count
        here, there = one.pop("traffic"), other.pop("traffic")
        for name in {*here, *there}:
            assert abs(here[name].pop("down_bytes") - there[name].pop("down_bytes")) <= 40
        assert here == there
        assert _timeless([one]) == _timeless([other])


@pytest.mark.parametrize(("method", "nodes"), [*((m, 4) for m in METHODS), ("stack", 2)])
def test_flower_and_simulation_agree_bit_for_bit(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, nodes: int
) -> None:
    """Clients miss rounds, and their processes forget all that is not on disk."""
    plan = plan_of(bert, method, cohort="uniform(size=2)", rounds=6)
    simulate(plan, out=tmp_path / "in-process")
    monkeypatch.setattr("fedpeft.site.load_base", _base.load_base.__wrapped__)
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out")), nodes=nodes)
    push, sizes = grid.push_messages, list[int]()

    def restarts(messages: Any) -> Any:
        if len(grid.sent) % 7 == 0:
            forget()
        listed = list(messages)
        sizes.extend(_length(m) for m in listed if m.metadata.message_type == "train")
        return push(listed)

    grid.push_messages = restarts  # type: ignore[method-assign]
    serve(grid)
    (ours, history, _), (theirs, expected, _) = (
        result_of(tmp_path / name) for name in ("out", "in-process")
    )
    assert same(ours, theirs)
    assert sum(sizes) == sum(line["down_bytes"] for line in history)
    assert len({len(line["replied"]) for line in history}) == 1
    near(history, expected)
    state = tmp_path / "out" / "checkpoints" / "state-000006.safetensors"
    tensors, note = read_tensor_file(state, "")
    assert {round for round, *_ in note["fold"]} <= {*note["acks"].values(), 6}
    assert len({*note["acks"].values()}) > 1, "somebody missed a round"
    assert any(value.size for value in select(tensors, "fold").values())


def _length(message: Any) -> int:
    return len(message.content.array_records["packet"]["bytes"].data)


def test_lost_replies_are_no_missed_edits(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that is not heard remembers more than the server knows, and is sent it again."""
    plan = plan_of(bert, "stack", rounds=5)
    monkeypatch.setattr("fedpeft.site.load_base", _base.load_base.__wrapped__)
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out")), nodes=4)
    play, heard = grid.play, list[tuple[int, str]]()

    def lossy(message: Any, place: int) -> Any:
        reply = play(message, place)
        if message.metadata.message_type == "train" and place == 1:
            heard.append((place, "train"))
            if len(heard) in (2, 3):  # it played, and wrote its memory
                grid.broken[1, "train"] = MemoryError("gone on the way")
                reply = play(message, place)
                grid.broken.clear()
        return reply

    monkeypatch.setattr(grid, "play", lossy)
    serve(grid)
    _, history, _ = result_of(tmp_path / "out")
    assert [sorted(line.get("refused", {})) for line in history] == [
        [], ["client-001"], ["client-001"], [], [],
    ]  # fmt: skip
    assert all("not_evaluated" not in line for line in history)


def test_a_lost_memory_is_named_and_the_others_go_on(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedpeft.site.load_base", _base.load_base.__wrapped__)
    plan = plan_of(bert, "fedex", rounds=3)
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out")), nodes=4)
    play, lost = grid.play, list[Path]()

    def lossy(message: Any, place: int) -> Any:
        if len(grid.sent) == 16 and not lost:
            lost.extend((tmp_path / "home" / "clients").glob("*/client-001*"))
            lost[0].unlink()
        return play(message, place)

    monkeypatch.setattr(grid, "play", lossy)
    serve(grid)
    _, history, _ = result_of(tmp_path / "out")
    assert [sorted(line.get("refused", {})) for line in history] == [
        [], ["client-001"], ["client-001"],
    ]  # fmt: skip
    assert "restore the client's memory" in history[1]["refused"]["client-001"]


# --- afterwards ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fedex"])
def test_the_best_round_is_exported_with_its_own_edits(
    bert: Path, tmp_path: Path, method: str
) -> None:
    trainer = "plain(optimizer='sgd', lr=3.0, steps=3, batch=4)"  # too high: it gets worse again
    lines = {"trainer": trainer, "keep_best": "test/loss", "rounds": 6}
    result = simulate(plan_of(bert, method, **lines), out=tmp_path / "run")
    best = result.table["best_round"]
    assert best < 5
    lines = {"trainer": trainer, "rounds": best + 1}
    shorter = simulate(plan_of(bert, method, **lines), out=tmp_path / "shorter")
    assert same(result.tensors, shorter.tensors)
    exported = [read_tensors(tmp_path / name / "adapter") for name in ("run", "shorter")]
    assert same(*exported)


@pytest.mark.parametrize("method", ["energy", "mixed", "fedex"])
def test_it_is_evaluated_merged_and_no_start(
    fedpeft: Run, bert: Path, tmp_path: Path, method: str
) -> None:
    out, path = tmp_path / "run", tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(support_lines(bert, **METHODS[method], rounds=3)))
    assert fedpeft("run", path, "--out", out)[0] == 0
    last = json.loads((out / "result.json").read_text())["last"]["test/loss"]
    assert json.loads(fedpeft("eval", out)[1])["loss"] == pytest.approx(last, abs=1e-5)
    code, text, _ = fedpeft("predict", out, "cancel it")
    assert (code, set(json.loads(text))) == (0, {"label", "probability"})
    assert fedpeft("export", out, "--merged", "--out", tmp_path / "merged")[0] == 0
    found = json.loads(fedpeft("eval", tmp_path / "merged")[1])
    assert found["loss"] == pytest.approx(last, abs=1e-5)
    start = f"warm_start={out / 'adapter'}"
    code, _, said = fedpeft("run", path, start, "--out", tmp_path / "again")
    assert code == 2
    (line,) = [line for line in said.splitlines() if "several ranks" in line]
    assert "merge it, and start from the merged model" in line
    assert "Traceback" not in said


def test_a_merged_model_is_a_base_for_more(bert: Path, llama: Path, tmp_path: Path) -> None:
    lines = {"task": "causal_lm(max_length=32)", "partition": "iid", **METHODS["stack"]}
    simulate(support_plan(llama, **lines), out=tmp_path / "run")
    with pytest.raises(ModelError, match="merge it"):
        simulate(support_plan(llama, **lines, warm_start=str(tmp_path / "run" / "adapter")))


# --- what it costs -------------------------------------------------------------------------------


@pytest.mark.parametrize("cohort", ["everyone", "uniform(size=2)"])
@pytest.mark.parametrize("method", ["stack", "mixed", "fedex", "cut", "frlora"])
def test_the_preview_is_near_what_is_sent(bert: Path, method: str, cohort: str) -> None:
    plan = plan_of(bert, method, cohort=cohort, rounds=6)
    expected, found = preview(plan)["bytes"], simulate(plan)
    assert not expected["exact"]
    close = 0.03 if cohort == "everyone" else 0.3
    for name, key in (("down_bytes", "down_total"), ("eval_bytes", "evaluation_total")):
        sent = sum(line[name] for line in found.history)
        assert expected[key] == pytest.approx(sent, rel=close), (key, expected[key], sent)
    assert expected["up_total"] == pytest.approx(found.table["up_bytes"], rel=close)
