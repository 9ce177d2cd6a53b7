"""Clients in several processes: the bits of one process, whoever dies, whatever is abandoned."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from fedpeft import simulate
from fedpeft.broadcasts import broadcast, header
from fedpeft.driver import Result
from fedpeft.engine._base import Engine, Stage
from fedpeft.engine._block import Block
from fedpeft.engine._dispatch import Answered, Broken, Died, Dispatch, Event, Ready, Window
from fedpeft.engine._parcel import bytes_of, pack
from fedpeft.engine._worker import Setup
from fedpeft.engine.processes import Processes
from fedpeft.errors import PlanError, RunError, SpecError, TrainError
from fedpeft.federation import deal
from fedpeft.grouping import Grouping
from fedpeft.memory import InProcess
from fedpeft.plan import Plan
from fedpeft.site import Site
from fedpeft.state import start
from fedpeft.types import Tensors
from fedpeft.watching import Line, Quiet
from fedpeft.wire import Body, Message
from tests.tiny import support_lines, support_plan
from tests.waiting import HANGS, wait_until

ROOT = Path(__file__).parents[1]
SGD = "plain(optimizer='sgd', lr=0.1, steps=2, batch=4)"
LOCAL: Mapping[str, str] = {
    "adapter": "lora(r=4, alpha=8, head='local')",
    "correction": "scaffold",
    "trainer": SGD,
}
"""Clients that keep control variates and a head."""


class Told(Quiet):
    """Writes down warnings and steps; interrupts after the round ``last``."""

    def __init__(self, last: int | None = None) -> None:
        self.warnings: list[str] = []
        self.records, self._last = 0, last

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def seen(self, records: int) -> None:
        self.records += records

    def round(self, line: Line) -> None:
        if line["round"] == self._last:
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def rounds(result: Result) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if "seconds" not in k} for line in result.history]


def failing(**fields: object) -> str:
    return f"tests.failing:Failing({', '.join(f'{k}={v!r}' for k, v in fields.items())})"


@contextlib.contextmanager
def running(plan: Plan, engine: Processes) -> Iterator[tuple[Engine, list[tuple[str, Message]]]]:
    """A running engine, and the requests of a first round."""
    with (
        contextlib.closing(Site(plan, deal(plan))) as site,
        engine.start(Stage(site, InProcess(), None, lambda _: None)) as made,
    ):
        state = start(plan, site.tables, site.initial)
        body = broadcast(plan, site.tables, state)
        yield made, [(c, body.seal(header(state, "run", c))) for c in made.population()]


# --- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("lines", [{"trainer": SGD}, LOCAL], ids=["plain", "memories"])
def test_any_number_of_workers_gives_the_bits_of_one_process(
    bert: Path, tmp_path: Path, lines: dict[str, Any]
) -> None:
    plan = support_plan(bert, rounds=3, **lines)
    expected = simulate(plan)
    for workers in (1, 2, 3):
        out, told = tmp_path / str(workers) if workers == 2 else None, Told()
        engine = Processes(workers=workers, threads=1)
        found = simulate(plan, out=out, engine=engine, watch=told)
        assert same(found.tensors, expected.tensors)
        assert rounds(found) == rounds(expected)
        assert told.records == sum(line["seen"] for line in found.history)


def test_groups_are_near(bert: Path) -> None:
    plan = support_plan(bert, trainer=SGD)
    expected = simulate(plan).tensors
    found = simulate(plan, engine="processes(workers=2, threads=1, group=2)").tensors
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5)


def test_a_resumed_run_is_the_run_that_was_not_interrupted(bert: Path, tmp_path: Path) -> None:
    plan = support_plan(bert, rounds=3, **LOCAL)
    engine = "processes(workers=2, threads=1)"
    with pytest.raises(KeyboardInterrupt):
        simulate(plan, out=tmp_path / "run", engine=engine, watch=Told(last=1))
    found = simulate(plan, out=tmp_path / "run", resume=True, engine=engine)
    assert same(found.tensors, simulate(plan).tensors)


def test_messages_longer_than_a_pipe_pass_both_ways(bert: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer, BertModel

    config = AutoConfig.from_pretrained(bert, hidden_size=192, intermediate_size=256)
    BertModel(config).save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "wide")
    plan = support_plan(tmp_path / "wide", adapter="full", trainer=SGD, rounds=1, clients=8)
    found = simulate(plan, engine="processes(workers=3, threads=1)")
    assert found.table["up_bytes"] > 8 * (1 << 20)
    assert same(found.tensors, simulate(plan).tensors)


# --- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["kill", "exit"])
def test_a_worker_that_dies_is_replaced_and_changes_nothing(
    bert: Path, tmp_path: Path, how: str
) -> None:
    trainer = failing(how=how, once=str(tmp_path / "once"), round=0.3)
    plan, told = support_plan(bert, rounds=3, **{**LOCAL, "trainer": trainer}), Told()
    engine = "processes(workers=2, threads=1)"
    found = simulate(plan, out=tmp_path / "run", engine=engine, watch=told)
    (warning,) = (text for text in told.warnings if "worker" in text)
    cause = "SIGKILL, perhaps out of memory" if how == "kill" else "exit status 3"
    assert warning.startswith(f"a worker died ({cause}); playing client-00")
    assert same(found.tensors, simulate(plan).tensors)


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("kill", TrainError, r"workers keep dying \(SIGKILL, .*\) while they play client-00\d"),
        ("raise", RunError, r"a worker failed: KeyError: 'no such thing' \(failing.py:\d+, in fit"),
        ("refuse", PlanError, "^trainer: will not; trainer: cannot\n"),
    ],
)
def test_what_always_fails_is_one_error(bert: Path, how: str, kind: type, message: str) -> None:
    plan = support_plan(bert, trainer=failing(how=how))
    with pytest.raises(kind, match=message) as caught:
        simulate(plan, engine="processes(workers=2, threads=1)")
    if how == "refuse":
        assert caught.value.problems == ("trainer: will not", "trainer: cannot")  # type: ignore[attr-defined]
    if how == "raise":
        assert "failing.py" in caught.value.__notes__[0]


def test_training_that_diverges_is_the_error_of_one_process(bert: Path) -> None:
    plan = support_plan(bert, trainer="plain(optimizer='sgd', lr=1e30, steps=4)")
    with pytest.raises(TrainError, match=r"no client can be trained; client-00\d: .*not finite"):
        simulate(plan, engine="processes(workers=2, threads=1)")


def test_a_worker_that_cannot_start_ends_the_run(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedpeft.plan.Plan.lines", lambda _: {"model": "x"})
    plan = support_plan(bert)
    with pytest.raises(PlanError, match="the plan has no line 'task'"):
        simulate(plan, engine="processes(workers=2, threads=1)")


@pytest.mark.parametrize(
    ("device", "places"),
    [
        ("cpu", ["cpu", "cpu", "cpu"]),
        ("cuda", ["cuda:0", "cuda:1", "cuda:0"]),
        ("cuda:0", ["cuda:0", "cuda:0", "cuda:0"]),
        ("cuda:1", ["cuda:1", "cuda:1", "cuda:1"]),
    ],
)
def test_workers_take_the_gpu_that_is_named_or_all_in_turn(
    bert: Path, monkeypatch: pytest.MonkeyPatch, device: str, places: list[str]
) -> None:
    """As far as can be told without a GPU: what the workers are started with."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    context, told = type(multiprocessing.get_context("forkserver")), list[str]()

    def process(self: Any, args: Sequence[Any], **_: Any) -> Any:
        told.append(args[-1])
        return SimpleNamespace(start=lambda: None, kill=lambda: None, join=str, close=str)

    monkeypatch.setattr(context, "Process", process)
    plan = support_plan(bert)
    with contextlib.closing(Site(plan, deal(plan))) as site:
        stage = Stage(site, InProcess(), None, lambda _: None, device=device)
        with Processes(workers=3, threads=1).start(stage):
            assert told == places


@pytest.mark.parametrize(
    "spec", ["processes(workers=0)", "processes(workers=1.5)", "processes(worker=2)", "process"]
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(bert: Path, spec: str) -> None:
    with pytest.raises(SpecError, match=r"worker|processes"):
        simulate(support_plan(bert), engine=spec)


def test_a_round_that_was_abandoned_leaves_nothing_to_the_next(bert: Path) -> None:
    plan = support_plan(bert, trainer=SGD)
    with running(plan, Processes(workers=2, threads=1)) as (engine, requests):
        exchanged = iter(engine.exchange(requests))
        next(exchanged)
        exchanged.close()  # type: ignore[attr-defined]
        answers = dict(engine.exchange(requests))
        assert answers.keys() == engine.population().keys()
        assert all(isinstance(answer, Message) for answer in answers.values())
        held = dict(engine.evaluate(requests))
        assert held.keys() <= answers.keys()


def test_no_worker_outlives_the_run(bert: Path, tmp_path: Path) -> None:
    simulate(
        support_plan(bert, trainer=failing(pids=str(tmp_path), how="kill", round=2.0)),
        engine="processes(workers=2, threads=1)",
    )
    found = [int(path.name) for path in tmp_path.iterdir()]
    assert len(found) == 2
    assert not [pid for pid in found if Path(f"/proc/{pid}").exists()]


# --- dealing windows -----------------------------------------------------------------------------


class Scripted:
    """A crew that says what it is told to."""

    size = 2

    def __init__(self, *events: tuple[int, Event]) -> None:
        self._events = deque(events)
        self.handed: list[tuple[int, str]] = []
        self.replaced: list[int] = []

    def hand(self, number: int, window: Window, width: int) -> None:
        self.handed.append((number, str(window)))

    def next(self) -> tuple[int, Event]:
        return self._events.popleft()

    def restart(self, number: int) -> None:
        self.replaced.append(number)


class Planner:
    """As much of a player as dealing windows asks for."""

    def __init__(self, size: int) -> None:
        self._size, self.grouping = size, Grouping(8, checkpointing=True)

    def window(self, *_: int) -> int:
        return self._size

    def narrow(self, width: int) -> None:
        self.grouping = replace(self.grouping, width=min(width, self.grouping.width))


def dispatch(crew: Scripted, size: int = 1) -> tuple[Dispatch, list[str], Any]:
    warnings: list[str] = []
    player = Planner(size)
    federation = SimpleNamespace(held={name: [0] for name in "abcd"})
    site = SimpleNamespace(federation=federation)
    stage: Any = SimpleNamespace(site=site, warn=warnings.append, seen=lambda _: None)
    return Dispatch(stage, player, crew), warnings, player  # type: ignore[arg-type]


def asked(names: str) -> list[tuple[str, Message]]:
    body = Body([], [])
    return [(name, Message(b"{}", body)) for name in names]


def answers(made: Dispatch, names: str) -> list[tuple[str, Any]]:
    return list(made.exchange(asked(names)))


READY = Ready(None, ())


def test_answers_come_in_any_order_and_once() -> None:
    crew = Scripted(
        (1, READY),
        (0, READY),
        (0, Answered("b", 1)),
        (1, Answered("a", 2)),
        (1, Died("why")),
        (0, READY),
        (0, Answered("a", 2)),
        (0, READY),
    )
    made, warnings, _ = dispatch(crew)
    assert answers(made, "ab") == [("b", 1), ("a", 2)]
    assert crew.handed == [(1, "a"), (0, "b"), (0, "a")]
    assert crew.replaced == [1]
    assert warnings == ["a worker died (why); playing a again"]


def test_windows_hold_one_broadcast() -> None:
    crew = Scripted((0, READY), (1, READY), (0, READY), (1, READY))
    made, _, _ = dispatch(crew, size=3)
    list(made.evaluate([*asked("ab"), *asked("cd")]))
    assert [text for _, text in crew.handed] == ["a and 1 more", "c and 1 more"]


def test_clients_that_are_sent_the_same_are_played_together() -> None:
    crew = Scripted((0, READY), (1, READY), (0, READY), (1, READY))
    made, _, _ = dispatch(crew, size=3)
    one, other = asked("ab"), asked("cd")
    list(made.evaluate([one[0], other[0], one[1], other[1]]))
    assert [text for _, text in crew.handed] == ["a and 1 more", "c and 1 more"]


def test_a_smaller_group_is_kept_and_told_once() -> None:
    crew = Scripted((0, Ready(4, ["smaller"])), (1, Ready(8, ["smaller"])), (0, READY), (1, READY))
    made, warnings, player = dispatch(crew)
    list(made.evaluate(asked("abc")[1:]))
    assert (player.grouping, warnings) == (Grouping(4, checkpointing=True), ["smaller"])


def test_windows_of_an_abandoned_round_are_let_end() -> None:
    crew = Scripted(
        (0, READY),
        (0, Answered("a", 1)),
        (0, Answered("b", "late")),
        (0, READY),
        (0, Answered("c", 3)),
        (0, READY),
    )
    made, _, _ = dispatch(crew, size=2)
    first = iter(made.exchange(asked("ab")))
    assert next(first)[0] == "a"
    assert answers(made, "c") == [("c", 3)]


def test_an_error_of_a_window_is_raised_and_the_worker_is_used_again() -> None:
    crew = Scripted((0, READY), (0, Broken(PlanError("no"))), (0, READY), (0, READY))
    made, _, _ = dispatch(crew)
    with pytest.raises(PlanError, match="no"):
        list(made.exchange(asked("a")))
    list(made.exchange(asked("b")))
    assert crew.handed == [(0, "a"), (0, "b")]


@pytest.mark.parametrize(
    ("events", "kind", "message"),
    [
        ([(0, Died("x"))] * 3, RunError, r"workers cannot start \(x\)"),
        ([(0, READY), (0, Died("x"))] * 3, TrainError, r"keep dying \(x\) while they play a"),
    ],
)
def test_deaths_have_an_end(events: Sequence[tuple[int, Event]], kind: type, message: str) -> None:
    made, _, _ = dispatch(Scripted(*events))
    with pytest.raises(kind, match=message):
        list(made.exchange(asked("a")))


# --- what is shared ------------------------------------------------------------------------------


def test_a_parcel_keeps_ties_kinds_and_arrays() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    model[1].weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    model.tied, model.empty = model[0].weight, torch.zeros(0)
    rows = np.arange(5000)
    parcel, tensors, arrays = pack({"model": model, "rows": rows})
    assert (len(tensors), len(arrays)) == (8, 1)
    assert len(parcel.pickled) < 8000
    found = parcel.open([*map(bytes_of, tensors), *arrays])
    assert found["model"].tied is found["model"][0].weight
    assert np.array_equal(found["rows"], rows)
    for name, value in model.state_dict().items():
        assert torch.equal(found["model"].state_dict()[name], value)
        assert found["model"].state_dict()[name].dtype == value.dtype
    assert not any(p.requires_grad for p in found["model"].parameters())
    with pytest.raises(RunError, match=r"workers cannot be sent .*lambda"):
        pack(lambda: None)


def test_a_block_is_one_memory_and_writes_stay_ones_own() -> None:
    layer = torch.nn.Linear(64, 64, bias=False)
    before = layer.weight.detach().clone()
    with contextlib.closing(Block(layer)) as block:
        one, other = (block.parcel.open(block.map.open(os.dup(block.descriptor))) for _ in range(2))
    assert torch.equal(layer.weight, before)
    with torch.no_grad():
        one.weight += 1
        assert torch.equal(other.weight, before)
        layer.weight += 2  # the parent's own weights are the block's
    assert torch.equal(other.weight, before + 2)


def test_what_goes_far_names_no_file_of_the_cache(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path / "cache"))
    plan = support_plan(bert)
    with contextlib.closing(Site(plan, deal(plan))) as site:
        near, far = (pack(Setup.of(site, Grouping(), 1, far=far)) for far in (False, True))
        tokens = list(site.train("client-000"))
    (entry,) = (tmp_path / "cache" / "tokens").iterdir()
    assert entry.name.encode() in near[0].pickled
    assert entry.name.encode() not in far[0].pickled
    setup = far[0].open([*map(bytes_of, far[1]), *far[2]])
    found = [setup.texts.train[i] for i in setup.federation.train["client-000"]]
    for a, b in zip(found, tokens, strict=True):
        assert all(np.array_equal(a[k], b[k]) for k in b)


# --- whole processes -----------------------------------------------------------------------------


def begun(bert: Path, tmp_path: Path, **fields: object) -> subprocess.Popen[str]:
    """Start a run on the command line; return once two of its workers train."""
    pids = tmp_path / "pids"
    pids.mkdir()
    lines = support_lines(bert, trainer=failing(pids=str(pids), **fields), rounds=3)
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(lines))
    engine = "processes(workers=2, threads=1)"
    command = [sys.executable, "-m", "fedpeft", "run", str(tmp_path / "plan.yaml")]
    run = subprocess.Popen(
        [*command, "--out", str(tmp_path / "run"), "--threads", "1", "--engine", engine],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: run.poll() is not None or len(list(pids.iterdir())) >= 2)
    return run


def wait_for_the_end(tmp_path: Path) -> None:
    pids = [path.name for path in (tmp_path / "pids").iterdir()]
    assert len(pids) == 2
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


@pytest.mark.slow
def test_a_parent_that_is_killed_leaves_no_worker(bert: Path, tmp_path: Path) -> None:
    with begun(bert, tmp_path, how="sleep") as run:
        run.kill()
        run.wait(HANGS)
        wait_for_the_end(tmp_path)


@pytest.mark.slow
def test_an_interrupt_ends_quietly_and_can_be_resumed(bert: Path, tmp_path: Path) -> None:
    with begun(bert, tmp_path, how="sleep", round=0.3, once=str(tmp_path / "once")) as run:
        wait_until((tmp_path / "once").exists)
        os.killpg(run.pid, signal.SIGINT)
        _, said = run.communicate(timeout=HANGS)
    assert run.returncode == 130
    assert "Traceback" not in said
    wait_for_the_end(tmp_path)
    plan = Plan.from_yaml(tmp_path / "plan.yaml")
    engine = "processes(workers=2, threads=1)"
    found = simulate(plan, out=tmp_path / "run", resume=True, engine=engine)
    assert [line["round"] for line in found.history] == [0, 1, 2]
    assert same(found.tensors, simulate(plan).tensors)


def test_bfloat16_is_the_same_in_every_process(bert: Path) -> None:
    plan = support_plan(bert, precision="bfloat16", rounds=1)
    alone = simulate(plan, engine="inline")
    spread = simulate(plan, engine="processes(workers=2, threads=1)")
    assert same(alone.tensors, spread.tensors)
