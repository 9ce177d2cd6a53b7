from __future__ import annotations

import json
import random
import time
import tomllib
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.task_identity import TaskIdentity

import client.app
import server.app
from fedpeft import hiding
from fedpeft.driver import simulate
from fedpeft.durable import is_held
from fedpeft.errors import PlanError, RunError, SiteError, WireError
from fedpeft.export import read_tensors
from fedpeft.federation import Federation, deal
from fedpeft.flower.config import LINES, Settings, as_toml, read_config, run_config
from fedpeft.flower.inside import hasten
from fedpeft.flower.messages import (
    Hello,
    hello_record,
    metrics_record,
    packet_record,
    read_hello,
    read_metrics,
    read_packet,
)
from fedpeft.ledger import Ledger, Release
from fedpeft.plan import Plan, read_lines
from fedpeft.tensor_file import read_tensor_file
from fedpeft.types import Tensors
from fedpeft.wire import body
from tests.tiny import support_lines, support_plan, tiny_bert

ROOT = Path(__file__).parents[1]
SGD = "plain(optimizer='sgd', lr=0.1, steps=2, batch=4)"


class FakeGrid(Grid):
    """Runs the real ClientApp in this process; its knobs say what goes wrong on the way.

    ``broken`` maps (node, message type) to what the client raises; ``silent`` nodes never answer;
    ``slow`` ones answer only when they are asked for the ``slow``-th time.
    """

    def __init__(self, config: dict[str, Any], nodes: int) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 1, 1
        self.config, self.total = config, nodes
        self.nodes = {100 + 7 * (i * 5 % nodes): i for i in range(nodes)}
        self.sent: list[Message] = []
        self.waiting: dict[str, Message] = {}
        self.broken: dict[tuple[int, str], Exception] = {}
        self.silent: set[tuple[int, str]] = set()
        self.gone: set[int] = set()
        self.slow: dict[int, int] = {}
        self.allowed: dict[str, float | str] = {}
        self.extra: list[Message] = []
        self.app = client.app.app

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, *args: Any, **kwargs: Any) -> Iterable[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            if message.metadata.dst_node_id in self.gone:
                continue
            ids.append(f"m{len(self.sent)}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            self.sent.append(message)
            self.waiting[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        asked = [i for i in message_ids if i in self.waiting]
        random.Random(len(self.sent)).shuffle(asked)
        replies, self.extra = self.extra, []
        for i in asked:
            message = self.waiting[i]
            place = self.nodes[message.metadata.dst_node_id]
            if (place, message.metadata.message_type) in self.silent:
                continue
            if self.slow.get(place, 0) > 0:
                self.slow[place] -= 1
                continue
            replies.append(self.play(self.waiting.pop(i), place))
        return replies

    def play(self, message: Message, place: int) -> Message:
        context = Context(
            run_id=7,
            node_id=message.metadata.dst_node_id,
            node_config={"partition-id": place, "num-partitions": self.total, **self.allowed},
            state=RecordDict(),
            run_config=self.config,
        )
        error = self.broken.get((place, message.metadata.message_type))
        if error is not None:
            return Message(Error(2, f"<class 'X'>:<'\nException: {error}'>"), reply_to=message)
        reply = self.app(message, context)
        assert not context.state  # client memory is on disk
        return reply


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("tiny") / "bert")


pytestmark = pytest.mark.usefixtures("apart")

EVEN = "uniform(denominator='expected')"
SECRET = "user(noise_multiplier=1.0, clip=0.5)"
HIDDEN = "record(noise_multiplier=1.0, simulate_noise=true)"
SEEDED = "user(noise_multiplier=1.0, quantile=0.5, bit_noise=1.0, simulate_noise=true)"


def config_of(plan: Plan, **settings: Any) -> dict[str, Any]:
    return {**run_config(plan), "threads": 1, **settings}


def serve(grid: FakeGrid) -> None:
    context = Context(7, 1, {}, RecordDict(), grid.config)
    server.app.app(grid, context)


def result_of(out: Path) -> tuple[Tensors, list[dict[str, Any]], dict[str, Any]]:
    history = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    return read_tensors(out / "adapter"), history, json.loads((out / "result.json").read_text())


def assert_same(one: Path, other: Path) -> None:
    files = ["adapter/adapter_model.safetensors", "adapter/adapter_config.json"]
    for name in files:
        assert (one / name).read_bytes() == (other / name).read_bytes()
    (_, a, first), (_, b, second) = result_of(one), result_of(other)
    for line in (*a, *b, first, second):
        line.pop("seconds")
        line.pop("server_seconds")
    assert a == b
    assert first == second


def test_a_server_s_structured_log_tells_the_rounds_as_its_ledger_does(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDPEFT_LOG", "json")
    lines = {"weighting": EVEN, "cohort": "poisson(rate=0.5)", "evaluate": "test"}
    plan = support_plan(bert, privacy=SECRET, rounds=2, **lines)
    serve(FakeGrid(config_of(plan, out=str(tmp_path / "out")), nodes=plan.clients or 0))
    said = [each for each in capsys.readouterr().err.splitlines() if each.startswith('{"time"')]
    told = [json.loads(each) for each in said]
    _, history, _ = result_of(tmp_path / "out")
    rounds = [each for each in told if each["event"] == "round"]
    for each in rounds:
        assert [each.pop(name) for name in ("level", "event")] == ["info", "round"]
        del each["time"], each["folder"]
    assert rounds == history
    assert told[-1]["event"] == "finished"


@pytest.mark.parametrize(
    "lines",
    [
        {},
        {"compare": "base, alone, central", "clients": 3},
        {"correction": "scaffold", "trainer": SGD, "rounds": 3, "cohort": "uniform(size=3)"},
        {"adapter": "lora(r=4, alpha=8, head='local')", "rounds": 3},
        {"uplink": "half", "downlink": "half", "holdout": 0},
        {"personal": "ditto", "cohort": "uniform(size=3)", "rounds": 3},
        {"personal": "tuned(steps=3)", "adapter": "lora(r=4, head='local')"},
        {"weighting": "fedau(cutoff=2)", "cohort": "uniform(size=2)", "rounds": 4},
        {"weighting": "fedvarp", "cohort": "uniform(size=2)", "rounds": 4},
        {"privacy": SEEDED, "weighting": EVEN, "cohort": "poisson(rate=0.5)", "rounds": 4},
        {"privacy": HIDDEN, "weighting": "uniform", "correction": "scaffold", "trainer": SGD},
    ],
    ids=[
        *("plain", "compare", "scaffold", "local-head", "half", "ditto", "tuned", "fedau"),
        *("fedvarp", "private", "hidden"),
    ],
)
def test_flower_and_simulation_agree_bit_for_bit(
    bert: Path, tmp_path: Path, lines: dict[str, Any]
) -> None:
    plan = support_plan(bert, **lines)
    simulate(plan, out=tmp_path / "in-process")
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out")), nodes=plan.clients or 0)
    serve(grid)
    assert_same(tmp_path / "in-process", tmp_path / "out")


def test_a_node_keeps_one_ledger_over_all_runs_and_stops_before_its_limit(
    bert: Path, tmp_path: Path
) -> None:
    """Two runs of two rounds: the smaller client's limit allows it three, and the run goes on."""
    plan = support_plan(
        bert, privacy="record(noise_multiplier=3.0)", weighting="uniform", evaluate="test",
        holdout=0, clients=2, trainer="plain(optimizer='sgd', lr=0.1, steps=2, batch=8)",
    )  # fmt: skip
    each = [Ledger(releases=[_release(deal(plan), plan, n) for n in range(k)]) for k in range(5)]
    data = deal(plan).splits.fingerprint
    spent = [ledger.epsilon(data, 1e-5) for ledger in each]
    for run in (7, 8):
        grid = FakeGrid(config_of(plan, out=str(tmp_path / f"out-{run}")), nodes=2)
        grid.allowed = {"max-epsilon": (spent[3] + spent[4]) / 2}
        serve(grid)
    _, history, _ = result_of(tmp_path / "out-7")
    assert history[-1]["epsilon_record"] == pytest.approx(spent[2], rel=5e-3)
    (folder,) = tmp_path.rglob("ledgers")
    held = [json.loads(path.read_text())["releases"] for path in sorted(folder.glob("*.json"))]
    assert [len(releases) for releases in held] == [3, 4]  # the larger client spends less
    assert {release["run"] for release in held[0]} == {release["run"] for release in held[1]}
    assert len({release["run"] for release in held[0]}) == 2


def _release(federation: Federation, plan: Plan, n: int) -> Release:
    units = min(federation.population.values())
    step = hiding.stepping_of(plan, units)
    assert step is not None
    told = (step.rate, step.noise_multiplier, step.steps)
    return Release(federation.splits.fingerprint, "r", n, "b", "record", *told)


@pytest.mark.parametrize(
    ("allowed", "message"),
    [
        ({"max-epsilon": 0}, "max-epsilon=0 is no number above 0"),
        ({"max-epsilon": "3"}, "max-epsilon='3' is no number"),
        ({"max-epsilon": True}, "max-epsilon=True is no number"),
        ({"max-epsilon": 3, "max-delta": 1}, "max-delta=1 is no number between 0 and 1"),
        ({"max-epsilon": 3}, "allows epsilon 3, and this plan hides no records"),
    ],
)
def test_a_node_s_limit_is_read_as_it_is_meant(
    bert: Path, tmp_path: Path, allowed: dict[str, Any], message: str
) -> None:
    plan = support_plan(bert, clients=2, holdout=0)
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out")), nodes=2)
    grid.allowed = allowed
    with pytest.raises(RunError, match=message):
        serve(grid)


@pytest.mark.parametrize(
    ("privacy", "allowed"),
    [
        ("record(noise_multiplier=3.0)", {}),
        ("record(noise_multiplier=3.0)", {"max-epsilon": 30}),
        ("none", {"max-epsilon": 30}),
    ],
)
def test_a_node_that_hides_records_says_no_metrics_of_them(
    bert: Path, tmp_path: Path, privacy: str, allowed: dict[str, float | str]
) -> None:
    """A server may ask for them under a plan that does not; there is no noise on them."""
    own = "clients" if privacy == "none" else "test"
    plan = support_plan(bert, privacy=privacy, weighting="uniform", evaluate=own, rounds=1)
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out")), nodes=plan.clients or 0)
    serve(grid)
    asked = next(m for m in grid.sent if m.metadata.message_type == "train")
    message = Message(asked.content, asked.metadata.dst_node_id, "evaluate")
    place, grid.allowed = grid.nodes[asked.metadata.dst_node_id], allowed
    reply = grid.play(message, place)
    assert "are not noised, so none leave this node" in str(reply.error.reason)
    if privacy == "none":  # without a limit it does as ever
        grid.allowed = {}
        assert read_metrics(grid.play(message, place).content)


def test_a_server_app_holds_what_was_submitted_before_it_meets_anybody(
    bert: Path, tmp_path: Path
) -> None:
    plan, submitted = support_plan(bert, rounds=1, evaluate=""), tmp_path / "submitted" / "name"
    submitted.mkdir(parents=True)
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "runs" / "name")), nodes=plan.clients or 0)
    looked, nodes = list[tuple[bool, bool]](), grid.get_node_ids

    def look() -> Iterable[int]:
        looked.append((is_held(submitted), is_held(tmp_path / "runs" / "name")))
        return nodes()

    grid.get_node_ids = look  # type: ignore[method-assign]
    serve(grid)
    assert looked[0] == (True, False)
    assert not is_held(submitted)


def test_a_node_evaluates_under_a_plan_that_says_so_alone(bert: Path, tmp_path: Path) -> None:
    plan = support_plan(bert, evaluate="test", rounds=1)
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out")), nodes=plan.clients or 0)
    serve(grid)
    asked = next(m for m in grid.sent if m.metadata.message_type == "train")
    message = Message(asked.content, asked.metadata.dst_node_id, "evaluate")
    reply = grid.play(message, grid.nodes[asked.metadata.dst_node_id])
    assert "the plan evaluates on no client's records (evaluate)" in str(reply.error.reason)


def test_a_promise_holds_where_every_client_fails(bert: Path, tmp_path: Path) -> None:
    """To stop would tell of them: the round releases noise, and its line tells of nobody."""
    plan = support_plan(bert, privacy=SECRET, weighting=EVEN, evaluate="test", holdout=0)
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out")), nodes=4)
    for place in range(4):
        grid.broken[place, "train"] = MemoryError("no room")
    serve(grid)
    _, history, _ = result_of(tmp_path / "out")
    assert [{*line} - {"test/loss", "test/accuracy", "test/f1"} for line in history] == [
        {"round", "epsilon", "epsilon_rdp", "clip"}
    ] * 2


def test_a_weighting_learns_from_who_really_replied(bert: Path, tmp_path: Path) -> None:
    plan = support_plan(bert, weighting="fedau", rounds=3)
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out")), nodes=4)
    grid.broken[2, "train"] = MemoryError("no room")
    serve(grid)
    tensors, note = read_tensor_file(tmp_path / "out/checkpoints/state-000003.safetensors", "")
    _, history, _ = result_of(tmp_path / "out")
    (failed,) = history[0]["refused"]
    waited = dict(zip(note["learned"], tensors["learned/waited"].tolist(), strict=True))
    assert waited == {client: 3 if client == failed else 0 for client in waited}
    assert [line["weight_sum"] for line in history] == [0.75] * 3


def test_known_rates_are_not_those_of_real_machines(bert: Path, tmp_path: Path) -> None:
    plan = support_plan(bert, weighting="known")
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out")), nodes=4)
    with pytest.raises(PlanError, match=r"known has no rate of client 'client-000'"):
        serve(grid)


def test_a_failing_client_is_named_and_the_round_goes_on(bert: Path, tmp_path: Path) -> None:
    plan = support_plan(bert)
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out")), nodes=4)
    grid.broken[2, "train"] = MemoryError("no room")
    grid.broken[1, "evaluate"] = MemoryError("no room")
    serve(grid)
    _, history, _ = result_of(tmp_path / "out")
    names = sorted(history[0]["per_client"])
    assert len(names) == 3
    assert len(history[0]["replied"]) == 3
    ((name, reason),) = history[0]["refused"].items()
    assert "no room (code 2)" in reason
    assert name not in history[0]["replied"]


def test_a_refusal_names_client_and_reason(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory lost on one client: it says so, and only it is missing from then on."""
    plan = support_plan(bert, correction="scaffold", trainer=SGD, rounds=3)
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out")), nodes=4)
    play, lost = grid.play, list[Path]()

    def lossy(message: Message, place: int) -> Message:
        if len(grid.sent) == 16 and not lost:  # greeting, a round, its evaluation, the next round
            lost.extend((tmp_path / "home" / "clients").glob("*/client-001*"))
            lost[0].unlink()
        return play(message, place)

    monkeypatch.setattr(grid, "play", lossy)
    serve(grid)
    _, history, _ = result_of(tmp_path / "out")
    refused = [sorted(line.get("refused", {})) for line in history]
    assert refused == [[], ["client-001"], ["client-001"]]
    assert "restore the client's memory" in history[1]["refused"]["client-001"]


def test_a_round_that_every_client_refuses_ends_the_run(bert: Path, tmp_path: Path) -> None:
    grid = FakeGrid(config_of(support_plan(bert), out=str(tmp_path / "out")), nodes=4)
    for place in range(4):
        grid.broken[place, "train"] = MemoryError("no room")
    with pytest.raises(RunError, match=r"no client plays this round; client-00\d: .*no room"):
        serve(grid)
    grid.broken.clear()
    serve(grid)  # no round was recorded, so the run may begin anew
    assert len(result_of(tmp_path / "out")[1]) == 2


def test_a_silent_client_is_left_out_after_the_deadline(bert: Path, tmp_path: Path) -> None:
    config = config_of(support_plan(bert), out=str(tmp_path / "out"), deadline=0.3)
    grid = FakeGrid(config, nodes=4)
    grid.silent = {(3, "train"), (3, "evaluate")}
    serve(grid)
    _, history, _ = result_of(tmp_path / "out")
    assert [line["refused"] for line in history] == 2 * [
        {"client-003": "no reply within 0.3 seconds"}
    ]


def test_late_and_unknown_replies_are_dropped_with_a_line(
    bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = support_plan(bert, correction="scaffold", trainer=SGD, rounds=3, holdout=0)
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out"), deadline=0.3), nodes=4)
    grid.silent = {(3, "train")}
    stray = Message(RecordDict(), 1, "train")
    stray.metadata.__dict__["_message_id"] = "stray"
    grid.extra = [Message(RecordDict(), reply_to=stray)]
    push = grid.push_messages

    def wakes(messages: Iterable[Message]) -> Iterable[str]:
        if len(grid.sent) == 4 + 2 * 4:  # the third round: it now answers all three
            grid.silent.clear()
        return push(messages)

    grid.push_messages = wakes  # type: ignore[method-assign]
    with caplog.at_level("INFO", logger="flwr.fedpeft"):
        serve(grid)
    _, history, _ = result_of(tmp_path / "out")
    assert [sorted(line.get("refused", {})) for line in history[:2]] == 2 * [["client-003"]]
    said = [record.message for record in caplog.records]
    assert sum("client-003 said too late" in text for text in said) == 2
    assert sum("not sent: stray" in text for text in said) == 1


def test_a_late_round_does_not_push_out_the_memory_of_a_newer_one(
    bert: Path, tmp_path: Path
) -> None:
    plan = support_plan(bert, correction="scaffold", trainer=SGD, rounds=2)
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out")), nodes=4)
    serve(grid)
    old = next(m for m in grid.sent if m.metadata.message_type == "train")
    (memory,) = (tmp_path / "home" / "clients").iterdir()
    before = {path: path.read_bytes() for path in memory.iterdir()}
    reply = grid.play(old, grid.nodes[old.metadata.dst_node_id])
    assert "round 0 is over" in str(reply.error.reason)
    assert {path: path.read_bytes() for path in memory.iterdir()} == before


def test_more_nodes_than_clients(
    bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = support_plan(bert)
    simulate(plan, out=tmp_path / "in-process")
    with caplog.at_level("WARNING", logger="flwr.fedpeft"):
        grid = FakeGrid(config_of(plan, out=str(tmp_path / "out")), nodes=6)
        grid.slow = dict.fromkeys(range(4), 3)
        serve(grid)
    assert_same(tmp_path / "in-process", tmp_path / "out")
    assert sum("the plan has no client for it" in r.message for r in caplog.records) == 2


@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_fewer_nodes_than_clients_share_them(bert: Path, tmp_path: Path, nodes: int) -> None:
    plan = support_plan(bert, correction="scaffold", trainer=SGD)
    simulate(plan, out=tmp_path / "in-process")
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out")), nodes=nodes)
    serve(grid)
    assert_same(tmp_path / "in-process", tmp_path / "out")


def test_a_node_refuses_a_client_it_does_not_play(bert: Path) -> None:
    grid = FakeGrid(config_of(support_plan(bert)), nodes=4)
    for name, reason in (("client-001", "does not play 'client-001'"), ("", "names no client")):
        message = Message(packet_record(b"", name), next(iter(grid.nodes)), "train")
        assert reason in str(grid.play(message, 0).error.reason)


def test_the_server_waits_for_clients_and_then_names_those_missing(
    bert: Path, tmp_path: Path
) -> None:
    grid = FakeGrid(config_of(support_plan(bert), out=str(tmp_path / "out"), wait=0.3), nodes=4)
    grid.silent = {(1, "query")}
    with pytest.raises(RunError, match=r"1 of 4 clients are missing \(client-001\).*0.3 seconds"):
        serve(grid)


def test_nodes_that_come_later_are_greeted(bert: Path, tmp_path: Path) -> None:
    grid = FakeGrid(config_of(support_plan(bert), out=str(tmp_path / "out")), nodes=4)
    nodes, calls = dict(grid.nodes), []
    grid.total = 0

    def appearing() -> Iterable[int]:
        calls.append(0)
        return list(nodes)[: len(calls) - 1]

    grid.get_node_ids = appearing  # type: ignore[method-assign]
    serve(grid)
    assert len(result_of(tmp_path / "out")[1]) == 2


def test_a_node_that_left_is_refused(bert: Path, tmp_path: Path) -> None:
    grid = FakeGrid(config_of(support_plan(bert, rounds=1), out=str(tmp_path / "out")), nodes=4)
    engine_nodes = {place: node for node, place in grid.nodes.items()}
    push = grid.push_messages

    def leaving(messages: Iterable[Message]) -> Iterable[str]:
        if len(grid.sent) == 4:
            grid.gone.add(engine_nodes[2])
        return push(messages)

    grid.push_messages = leaving  # type: ignore[method-assign]
    serve(grid)
    (line,) = result_of(tmp_path / "out")[1]
    assert "its node is gone" in line["refused"]["client-002"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": "0.0.9"}, "node 100: has fedpeft 0.0.9, the server has"),
        ({"plan": "x"}, "node 100: reads other data than the server"),
        ({"records": [1]}, "node 100: client-000 has 1 records, in the plan"),
        ({"clients": ["client-001"]}, "says that it plays client-001, as another node did"),
        ({"clients": ["client-009"]}, "plays 'client-009', which the plan does not have"),
    ],
)
def test_a_node_that_does_not_fit_is_named(
    bert: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    grid = FakeGrid(config_of(support_plan(bert), out=str(tmp_path / "out")), nodes=4)
    play = grid.play

    def lying(message: Message, place: int) -> Message:
        reply = play(message, place)
        if place == 0:
            told = replace(read_hello(reply.content), **changes)
            if "clients" in changes:
                told = replace(told, records=[deal(support_plan(bert)).population["client-001"]])
            reply.content = hello_record(told)
        return reply

    grid.play = lying  # type: ignore[method-assign]
    with pytest.raises(RunError, match="clients are missing") as caught:
        serve(grid)
    assert reason in str(caught.value)


def test_a_run_id_cannot_leave_the_folder_of_memories(bert: Path, tmp_path: Path) -> None:
    plan = support_plan(bert, correction="scaffold", trainer=SGD)
    grid = FakeGrid(config_of(plan), nodes=4)
    packet = body({}, {}).seal({"run": "../../elsewhere", "round": 0, "ack": -1})
    message = Message(packet_record(packet, "client-000"), next(iter(grid.nodes)), "train")
    assert "names no run" in str(grid.play(message, 0).error.reason)


def test_a_node_without_partition_says_so(bert: Path) -> None:
    plan = support_plan(bert)
    FakeGrid({}, 1)  # sets the identity that messages need
    context = Context(7, 5, {}, RecordDict(), config_of(plan))
    reply = client.app.app(Message(RecordDict(), 5, "query"), context)
    assert "no partition-id" in str(reply.error.reason)


def test_records_hold_what_was_put_in() -> None:
    for hello in (Hello(["a", "b"], [3, 5], 4, "0.1", "d"), Hello([], [], 4, "0.1", "d")):
        assert read_hello(hello_record(hello)) == hello
    assert read_packet(packet_record(b"abc")) == b"abc"
    assert read_metrics(metrics_record({"loss": 0.1, "n": 3})) == {"loss": 0.1, "n": 3.0}
    assert read_metrics(metrics_record({})) == {}


def test_other_records_are_refused() -> None:
    foreign = [
        RecordDict(),
        RecordDict({"packet": ArrayRecord({"bytes": Array(np.zeros(3, np.uint8))})}),
        RecordDict({"packet": ArrayRecord({"a": Array(np.zeros(3)), "b": Array(np.zeros(3))})}),
        RecordDict({"hello": ConfigRecord({"clients": ["a"], "records": "many"})}),
        RecordDict({"metrics": MetricRecord({"loss": [1.0, 2.0]})}),
    ]
    for content in foreign:
        for read in (read_packet, read_hello, read_metrics):
            with pytest.raises(WireError):
                read(content)


def test_the_app_is_the_quickstart() -> None:
    app = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    quickstart = read_lines(ROOT / "simulations" / "quickstart.yaml")
    settings = {field.name: field.default for field in fields(Settings)}
    assert app["config"] == {name: quickstart.get(name, "") for name in LINES} | settings
    assert set(quickstart) <= set(LINES)
    plan, found = read_config(app["config"])
    assert plan == Plan.from_lines(quickstart)
    assert found == Settings()


@pytest.mark.parametrize(
    "lines",
    [
        {},
        {"evaluate": "test", "keep_best": "test/loss", "patience": 3, "holdout": 0.25, "seed": 4},
        {"evaluate": ""},
        {"uplink": "half", "compare": "base, central"},
    ],
)
def test_a_plan_survives_the_run_config(bert: Path, lines: dict[str, Any]) -> None:
    plan = support_plan(bert, **lines)
    flat = run_config(plan)
    assert list(flat) == list(LINES)
    again, _ = read_config(flat)
    assert run_config(again) == flat
    assert again.evaluations == plan.evaluations
    assert again == replace(plan, evaluate=again.evaluate)
    assert tomllib.loads(as_toml(plan)) == flat


def test_paths_become_absolute_where_they_exist(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = support_lines(bert)
    monkeypatch.chdir(bert.parent)
    (bert.parent / "text").write_text("a file called as a column\n")
    lines |= {"model": "bert", "data": "jsonl(train='support.train.jsonl', test='./no.jsonl')"}
    flat = run_config(Plan.from_lines(lines))
    assert flat["model"] == str(bert.resolve())
    assert str(bert.parent / "support.train.jsonl") in str(flat["data"])
    assert "test='./no.jsonl'" in str(flat["data"])
    assert "text='text'" in str(flat["task"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hub").mkdir()
    assert run_config(Plan.from_lines(lines | {"model": "org/name"}))["model"] == "org/name"


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"threads": 0}, "threads: 0 must be at least 1"),
        ({"deadline": -1.0}, "deadline: -1.0 must be at least 0"),
        ({"resume": "yes"}, "resume: 'yes' must be a bool"),
        ({"wait": True}, "wait: True must be a float"),
    ],
)
def test_settings_are_checked(bert: Path, settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        read_config(config_of(support_plan(bert), **settings))


def test_objects_on_their_way_are_looked_for_again_soon() -> None:
    """Flower itself waits for a second."""
    flower = SimpleNamespace(pull_objects=inflatable_utils.pull_objects)
    hasten(flower, "pull_objects")
    hasten(flower, "pull_objects")  # once is enough
    tries = list[float]()

    def pull(object_id: str) -> bytes:
        tries.append(time.monotonic())
        if len(tries) < 3:
            raise inflatable_utils.ObjectUnavailableError(object_id)
        return object_id.encode()

    assert flower.pull_objects(["x"], pull) == {"x": b"x"}
    first, second, third = tries
    assert 0.04 <= second - first < third - second


@pytest.mark.parametrize("pull", [None, lambda object_ids, pull_object_fn: {}])
def test_a_flower_that_pulls_otherwise_is_refused(pull: Any) -> None:
    with pytest.raises(SiteError, match=r"pulls messages otherwise .* install flwr 1\.41"):
        hasten(SimpleNamespace(pull_objects=pull), "pull_objects")
