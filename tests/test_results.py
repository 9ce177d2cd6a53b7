"""What sites keep of a run, and what of it leaves them."""

from __future__ import annotations

import errno
import json
import os
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message
from typer.testing import CliRunner

from fedpeft.baselines import train
from fedpeft.cli import app
from fedpeft.closing import messages
from fedpeft.driver import simulate
from fedpeft.durable import MOMENTS
from fedpeft.errors import FedPeftError, RunError, SiteError
from fedpeft.export import read_tensors
from fedpeft.federation import deal
from fedpeft.flower.messages import KEEP, log, packet_record, read_metrics, read_packet
from fedpeft.handing_out import outgoing, owed, standing
from fedpeft.node import Node
from fedpeft.plan import Plan
from fedpeft.results import Kept, find, kept
from fedpeft.site import Site
from fedpeft.warm.channel import Keeping
from tests.fake_trainer import Fake
from tests.test_flower import FakeGrid, config_of, result_of, serve
from tests.test_sites import EVEN, SGD, SITES, Camp
from tests.tiny import support_lines

pytestmark = pytest.mark.usefixtures("apart")

MODEL = "adapter_model.safetensors"
FOLD = {"adapter": "lora(r=4, fresh='client')", "aggregator": "stack"}


@pytest.fixture
def camp(tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> Camp:
    made = Camp(tmp_path, bert, monkeypatch)
    made.settle()
    return made


def results_of(camp: Camp, site: str) -> Kept:
    (found,) = kept(camp.folder / site / "state")
    return found


def weights(folder: Path) -> dict[str, bytes]:
    """Return what a folder has of weights and configuration; it must have both."""
    paths = [*folder.glob("*.safetensors"), *folder.glob("*config.json")]
    found = {path.name: path.read_bytes() for path in paths}
    assert len(found) > 1
    return found


def sent(grid: FakeGrid, site: str = "beta") -> Message:
    """Return the last message that brought a site its result."""
    return [
        m
        for m in grid.sent
        if m.metadata.message_type == KEEP and SITES[grid.nodes[m.metadata.dst_node_id]] == site
    ][-1]


def gain(camp: Camp, site: str, run: str = "out") -> Any:
    path = camp.folder / site / "client.yaml"
    return CliRunner().invoke(app, ["gain", str(path), run], catch_exceptions=True)


@pytest.mark.parametrize(
    ("lines", "own"),
    [
        ({}, False),
        ({"keep_best": "clients/loss", "downlink": "int8", "rounds": 3}, False),
        ({"personal": "ditto"}, True),
        ({"personal": "tuned(steps=3)"}, True),
        ({"adapter": "lora(r=4, head='local')"}, True),
        ({"adapter": "lora(r=4, local='B', head='local')", "personal": "tuned(steps=2)"}, True),
        ({"adapter": "lora(r=4, ranks='2,4')", "aggregator": "hetlora"}, False),
        ({**FOLD, "personal": "tuned(steps=2)"}, True),
        ({"correction": "scaffold", "trainer": SGD}, False),
        ({"adapter": "lora(r=4, ranks='2,4')", "personal": "ditto"}, True),
        ({"adapter": "core(r=3)", "personal": "tuned(steps=2)"}, True),
        ({"adapter": "full"}, False),
        ({"adapter": "head", "personal": "tuned(steps=2)"}, True),
        ({"adapter": "lora(r=4, train='B')", "downlink": "difference(topk(density=0.1))"}, False),
    ],
    ids=[
        *("plain", "best", "ditto", "tuned", "local", "fedsa", "ranks", "fold", "scaffold"),
        *("ranks-ditto", "core", "full", "head", "difference"),
    ],
)
def test_each_site_keeps_the_exported_adapter_bit_for_bit(
    camp: Camp, lines: dict[str, Any], own: bool
) -> None:
    serve(camp.grid(camp.plan(**lines)))
    exported = camp.folder / "out" / "adapter"
    for site in SITES:
        found = results_of(camp, site)
        assert weights(found.folder / "adapter") == weights(exported)
        assert (found.folder / "personal").exists() == own
        if own:
            mine = read_tensors(found.folder / "personal")
            shared = read_tensors(exported)
            assert {*mine} == {*shared}
            assert any(not np.array_equal(mine[k], shared[k]) for k in shared)
        assert [*found.report["rows"]] == ["base", "federated", *(["personal"] if own else [])]
        assert found.report["missing"] == {}
        told = (found.folder / "README.md").read_text()
        assert "federated adapter" in told
        assert ("personal adapter" in told) == own
    assert owed(camp.folder / "out") == []
    assert all(s.kept and s.gain is None for s in standing(camp.folder / "out").values())


@pytest.mark.parametrize(
    "lines",
    [{}, {"personal": "ditto"}, {"personal": "tuned(steps=3)"}],
    ids=["plain", "ditto", "tuned"],
)
def test_a_report_says_what_the_last_evaluation_measured(camp: Camp, lines: dict[str, Any]) -> None:
    serve(camp.grid(camp.plan(**lines)))
    _, history, _ = result_of(camp.folder / "out")
    for site in SITES:
        rows = results_of(camp, site).report["rows"]
        assert rows["federated"] == history[-1]["per_client"][site]
        if lines:
            assert rows["personal"] == history[-1]["personal_per_client"][site]


def test_a_kept_adapter_is_that_of_a_simulation_and_nothing_of_a_site_reaches_the_server(
    camp: Camp,
) -> None:
    simulate(camp.simulated(), out=camp.folder / "in-process")
    grid = camp.grid(camp.plan())
    play, replies = grid.play, list[Message]()

    def listening(message: Message, place: int) -> Message:
        reply = play(message, place)
        if message.metadata.message_type == KEEP:
            replies.append(reply)
        return reply

    grid.play = listening  # type: ignore[method-assign]
    serve(grid)
    there = results_of(camp, "alpha").folder / "adapter" / MODEL
    assert there.read_bytes() == (camp.folder / "in-process/adapter" / MODEL).read_bytes()
    assert [read_metrics(reply.content) for reply in replies] == [{}] * 3


def another(camp: Camp, site: str, **changes: Any) -> bytes:
    """Return the packet that would bring a site another result of the same run."""
    result = outgoing(camp.folder / "out")
    first = next(iter(result.adapter))
    by = np.float32(changes.pop("by", 0.0))
    adapter = {**result.adapter, first: result.adapter[first] + by}
    ((_, message),) = messages(replace(result, adapter=adapter, **changes), [site])
    return bytes(message)


def asked(grid: FakeGrid, packet: bytes, site: str = "beta", client: str = "") -> Message:
    """Send a packet to a site; return what it answers."""
    place = SITES.index(site)
    (node,) = (n for n, other in grid.nodes.items() if other == place)
    message = Message(packet_record(packet, client or site), node, KEEP)
    message.metadata.__dict__["_message_id"] = "again"
    return grid.play(message, place)


def files(folder: Path) -> dict[Path, tuple[bytes, int]]:
    found = (p for p in folder.rglob("*") if p.is_file())
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in found}


def test_the_same_message_again_changes_nothing_and_another_is_refused(camp: Camp) -> None:
    grid = camp.grid(camp.plan())
    serve(grid)
    folder = results_of(camp, "beta").folder
    before = files(folder)
    assert read_metrics(asked(grid, read_packet(sent(grid).content)).content) == {}
    reply = asked(grid, another(camp, "beta", by=1.0))
    assert "another result, which is kept" in str(reply.error.reason)
    assert files(folder) == before


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"plan": "0" * 64}, "result is of another plan"),
        ({"run": "../../etc"}, "message names no run"),
        ({"name": "../x"}, "result is of no run"),
        ({"rounds": 9}, "result is after 9 rounds, the plan has 2"),
        ({"acks": {"beta": 7}}, "result is after 2 rounds"),
        ({"by": np.inf}, "is not finite"),
    ],
)
def test_what_is_no_result_of_the_run_is_refused_and_leaves_nothing(
    camp: Camp, changes: dict[str, Any], reason: str
) -> None:
    grid = camp.grid(camp.plan())
    serve(grid)
    shutil.rmtree(camp.folder / "beta/state/results")
    assert reason in str(asked(grid, another(camp, "beta", **changes)).error.reason)
    assert not [*(camp.folder / "beta/state").glob("results/*")]
    (trained,) = [m for m in grid.sent if m.metadata.message_type == "train"][-1:]
    assert asked(grid, read_packet(trained.content)).has_error()
    packet = another(camp, "beta")
    assert "does not play" in str(asked(grid, packet, client="alpha").error.reason)
    assert not asked(grid, packet).has_error()  # so it was the changes


def test_results_of_two_runs_lie_beside_each_other(camp: Camp) -> None:
    serve(camp.grid(camp.plan(), out=str(camp.folder / "first")))
    before = files(results_of(camp, "alpha").folder)
    serve(camp.grid(camp.plan(seed=1), out=str(camp.folder / "second")))
    home = camp.folder / "alpha/state"
    found = {each.report["name"]: each for each in kept(home)}
    assert sorted(found) == ["first", "second"]
    assert files(found["first"].folder) == before
    assert find(home, "second").folder == found["second"].folder
    assert find(home, found["first"].folder.name[:8]).folder == found["first"].folder
    for name in ("third", found["first"].folder.name[:3], "../first"):
        with pytest.raises(SiteError, match=r"keeps no result of such a run; there is .*first \("):
            find(home, name)


def test_a_site_that_was_away_gets_the_result_when_the_run_is_taken_up_again(
    camp: Camp, caplog: pytest.LogCaptureFixture
) -> None:
    """And the others are not asked again: neither for that, nor to be there."""
    plan = camp.plan(personal="ditto")
    grid = camp.grid(plan)
    play = grid.play
    (node,) = (n for n, place in grid.nodes.items() if SITES[place] == "beta")

    def leaving(message: Message, place: int) -> Message:
        reply = play(message, place)
        if len([m for m in grid.sent if m.metadata.message_type == "evaluate"]) == 6:
            grid.nodes.pop(node, None)
        return reply

    grid.play = leaving  # type: ignore[method-assign]
    serve(grid)
    out = camp.folder / "out"
    assert owed(out) == ["beta"]
    assert standing(out)["beta"].why == "its node is away"
    assert not (camp.folder / "beta/state/results").exists()
    before = files(out)

    only = camp.grid(plan, resume=True)
    only.nodes = {n: place for n, place in only.nodes.items() if SITES[place] != "gamma"}
    with caplog.at_level("INFO", logger=log.name):
        serve(only)
    assert "its result goes to beta" in caplog.text
    kinds = [(m.metadata.message_type, only.nodes[m.metadata.dst_node_id]) for m in only.sent]
    assert sorted(kinds) == [("query", 0), ("query", 1), (KEEP, 1)]
    assert owed(out) == []
    found = results_of(camp, "beta").folder
    assert (found / "adapter" / MODEL).read_bytes() == (out / "adapter" / MODEL).read_bytes()
    assert (found / "personal" / MODEL).exists()
    after = files(out)
    assert {p for p in before if before[p] != after[p]} == {out / "kept.json"}


def test_a_run_whose_sites_stay_away_ends_and_owes_them(camp: Camp) -> None:
    grid = camp.grid(camp.plan())
    grid.broken = {(place, KEEP): OSError("no room") for place in range(3)}
    serve(grid)
    out = camp.folder / "out"
    assert owed(out) == [*SITES]
    assert "no room" in standing(out)["alpha"].why
    again = camp.grid(camp.plan(), resume=True, wait=0.1)
    again.nodes = {}
    serve(again)
    assert owed(out) == [*SITES]
    with pytest.raises(RunError, match="holds the result of another plan"):
        serve(camp.grid(camp.plan(seed=1), resume=True))
    serve(camp.grid(camp.plan(), resume=True))
    assert owed(out) == []


def test_a_site_that_took_no_part_keeps_the_shared_adapter_alone(camp: Camp) -> None:
    grid = camp.grid(camp.plan(personal="ditto", evaluate="clients"))
    grid.broken[SITES.index("beta"), "train"] = MemoryError("no room")
    serve(grid)
    found = results_of(camp, "beta")
    assert not (found.folder / "personal").exists()
    assert "no reply of this site was used" in found.report["missing"]["personal"]
    assert "personal adapter: none" in (found.folder / "README.md").read_text()
    assert (found.folder / "adapter" / MODEL).exists()


def test_a_personal_adapter_that_diverged_is_none(camp: Camp) -> None:
    """The shared one is as good as ever."""
    serve(camp.grid(camp.plan(personal="tuned(steps=4, lr=1e30)", evaluate="clients")))
    for site in SITES:
        found = results_of(camp, site)
        assert found.report["missing"] == {"personal": "none: its training diverged"}
        assert [*found.report["rows"]] == ["base", "federated"]


def test_a_site_whose_time_is_over_keeps_the_adapter_and_says_what_is_missing(
    camp: Camp, monkeypatch: pytest.MonkeyPatch
) -> None:
    camp.client("beta", limits={"seconds": 5})
    grid = camp.grid(camp.plan())
    play = grid.play

    def slow(message: Message, place: int) -> Message:
        if message.metadata.message_type == KEEP:
            ticks = iter(range(0, 10**9, 9))
            monkeypatch.setattr("fedpeft.deployment.limits.monotonic", lambda: float(next(ticks)))
        return play(message, place)

    grid.play = slow  # type: ignore[method-assign]
    serve(grid)
    found = results_of(camp, "beta")
    assert "gave up after 5 seconds" in found.report["missing"]["rows"]
    assert (found.folder / "adapter" / MODEL).exists()
    done = gain(camp, "beta")  # which has all the time it takes
    assert done.exit_code == 0, done.output
    assert [*results_of(camp, "beta").report["missing"]] == []
    assert sorted(results_of(camp, "beta").report["rows"]) == ["alone", "base", "federated"]


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_nothing_half_and_the_site_is_asked_again(
    camp: Camp, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedpeft.adapters.lora import Lora

    grid = camp.grid(camp.plan())
    play, whole = grid.play, Lora.export

    def filled(message: Message, place: int) -> Message:
        if message.metadata.message_type == KEEP and SITES[place] == "beta":
            monkeypatch.setattr(Lora, "export", full)
        try:
            return play(message, place)
        finally:
            monkeypatch.setattr(Lora, "export", whole)

    grid.play = filled  # type: ignore[method-assign]
    serve(grid)
    why = "beta cannot keep the result (No space left on device); make room there"
    assert standing(camp.folder / "out")["beta"].why.startswith(why)
    assert [*(camp.folder / "beta/state/results").iterdir()] == []
    serve(camp.grid(camp.plan(), resume=True))
    assert owed(camp.folder / "out") == []


MOMENTS_OF_A_KILL = [f"kept.{m}:{n}" for m in ("begun", "half", "written") for n in (1, 2, 3, 4)]
MOMENTS_OF_A_KILL += ["kept.synced:4", "kept.renamed:4", "kept.settled:4", "adapter.renamed:1"]


@pytest.mark.parametrize("point", MOMENTS_OF_A_KILL)
def test_a_node_that_dies_while_it_keeps_the_result_keeps_all_of_it_the_next_time(
    camp: Camp, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What dies here is this process' work: the fault point raises, and what was done stays."""
    grid = camp.grid(camp.plan(personal="ditto"))
    play = grid.play
    wanted, _, count = point.partition(":")
    left = [int(count)]

    class Killed(BaseException):
        """No handler of errors sees it."""

    def dies(name: str) -> None:
        left[0] -= name == wanted
        if name == wanted and left[0] == 0:
            raise Killed

    def dying(message: Message, place: int) -> Message:
        if message.metadata.message_type != KEEP or SITES[place] != "beta":
            return play(message, place)
        with monkeypatch.context() as patch:
            patch.setattr("fedpeft.durable.fault", dies)
            patch.setattr("fedpeft.durable.is_feared", lambda name: name == wanted)
            with pytest.raises(Killed):
                play(message, place)
        return Message(Error(8, "the app's process ended"), reply_to=message)

    grid.play = dying  # type: ignore[method-assign]
    serve(grid)
    out, home = camp.folder / "out", camp.folder / "beta/state"
    assert owed(out) == ["beta"]
    for found in kept(home):  # all of it, or nothing that is shown
        assert (found.folder / "personal" / MODEL).exists()
        assert found.report["rows"]
    serve(camp.grid(camp.plan(personal="ditto"), resume=True))
    assert owed(out) == []
    (found,) = kept(home)
    assert (found.folder / "adapter" / MODEL).read_bytes() == (out / "adapter" / MODEL).read_bytes()
    assert [p.name for p in (home / "results").iterdir()] == [found.folder.name]


SERVER_DIES = [f"kept.{m}:{n}" for m in MOMENTS for n in (1, 2, 3)]
"""While it writes what it sends, who is to have it, and that the first site has it."""


@pytest.mark.parametrize("point", SERVER_DIES)
def test_a_server_app_that_dies_while_it_hands_out_does_so_when_it_is_started_again(
    camp: Camp, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = camp.grid(camp.plan(evaluate="test", rounds=1))
    play = grid.play
    wanted, _, count = point.partition(":")
    left, away = [int(count)], [False]

    class Killed(BaseException):
        """No handler of errors sees it."""

    def dies(name: str) -> None:
        left[0] -= name == wanted and not away[0]
        if name == wanted and not away[0] and left[0] == 0:
            raise Killed

    def at_a_site(message: Message, place: int) -> Message:
        away[0] = True
        try:
            return play(message, place)
        finally:
            away[0] = False

    grid.play = at_a_site  # type: ignore[method-assign]
    with monkeypatch.context() as patch:
        patch.setattr("fedpeft.durable.fault", dies)
        patch.setattr("fedpeft.durable.is_feared", lambda name: name == wanted)
        with pytest.raises(Killed):
            serve(grid)
    out = camp.folder / "out"
    serve(camp.grid(camp.plan(evaluate="test", rounds=1), resume=True))
    assert owed(out) == []
    assert [site.kept for site in standing(out).values()] == [True] * 3
    for site in SITES:
        assert weights(results_of(camp, site).folder / "adapter") == weights(out / "adapter")


def test_the_gain_is_measured_against_training_alone_and_stays_at_the_site(camp: Camp) -> None:
    plan = camp.plan(personal="ditto", rounds=3)
    serve(camp.grid(plan))
    before = files(results_of(camp, "alpha").folder / "adapter")
    done = gain(camp, "alpha")
    assert done.exit_code == 0, done.output
    found = results_of(camp, "alpha").report
    assert [*found["rows"]] == ["base", "federated", "personal", "alone"]
    for row in ("base model, untrained", "this site alone", "federated adapter", "personal adap"):
        assert row in done.stdout
    assert "sign test p = " in done.stdout
    assert "training alone: 24 of 24 records seen" in done.stderr
    about = found["gain"]["federated"]
    own = found["rows"]
    for name in ("loss", "accuracy"):
        assert about["by"][name] == pytest.approx(own["federated"][name] - own["alone"][name])
    ups = about["better"] - about["worse"]
    assert ups / about["records"] == pytest.approx(about["by"]["accuracy"])
    assert files(results_of(camp, "alpha").folder / "adapter") == before
    again = gain(camp, "alpha")
    assert again.exit_code == 0
    assert "has trained alone for this run before" in again.stderr
    assert again.stdout == done.stdout

    # alone is what the simulation's own baseline trains of the same records
    expected = alone_of(camp.simulated(rounds=3), "alpha")
    assert own["alone"] == pytest.approx(expected, rel=1e-6)
    serve(camp.grid(plan, resume=True))
    assert standing(camp.folder / "out")["alpha"].gain is None


def alone_of(plan: Plan, client: str) -> Any:
    """Return the metrics of training alone, by the library's pieces for simulations."""
    with closing(Site(plan, deal(plan))) as site:
        told = [site.train(client)], [site.initial], 24, [("alone", client)]
        (tensors,) = train(plan, site, *told, lambda _: None)
        return site.learner.evaluate([tensors], [site.held(client)])[0]


def test_the_gain_leaves_only_where_the_site_says_so(camp: Camp) -> None:
    camp.client("beta", limits={"gain": True})
    serve(camp.grid(camp.plan()))
    out = camp.folder / "out"
    told = standing(out)
    assert (told["beta"].kept, told["beta"].later, told["beta"].gain) == (True, True, None)
    assert (told["alpha"].later, owed(out)) == (False, ["beta"])
    for site in SITES:
        assert gain(camp, site).exit_code == 0
    serve(camp.grid(camp.plan(), resume=True))
    told = standing(out)
    assert told["alpha"].gain is None
    mine = results_of(camp, "beta").report["gain"]["federated"]["by"]
    assert told["beta"].gain == mine
    assert owed(out) == []
    assert str(mine["loss"])[:8] not in json.dumps(result_of(out)[1])  # of rounds it is none


@pytest.mark.parametrize(
    "lines",
    [
        {"privacy": "user(noise_multiplier=1.0)", "weighting": EVEN, "evaluate": "test"},
        {
            "privacy": "record(noise_multiplier=3.0)", "weighting": "uniform", "evaluate": "test",
            "trainer": "plain(optimizer='sgd', lr=0.1, steps=2, batch=8)",
        },
    ],
    ids=["user", "record"],
)  # fmt: skip
def test_no_gain_leaves_where_a_promise_was_made(camp: Camp, lines: dict[str, Any]) -> None:
    camp.client("beta", limits={"gain": True})
    plan = camp.plan(**lines)
    serve(camp.grid(plan))
    assert gain(camp, "beta").exit_code == 0
    assert results_of(camp, "beta").report["gain"]
    grid = camp.grid(plan)
    (packet,) = [another(camp, "beta", plan=plan.digest())]
    assert read_metrics(asked(grid, packet).content) == {}
    assert not standing(camp.folder / "out")["beta"].later


def test_what_fedpeft_gain_cannot_do_it_says_in_a_line(
    camp: Camp, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(camp.grid(camp.plan()))
    serve(camp.grid(camp.plan(holdout=0, evaluate="test"), out=str(camp.folder / "whole")))

    def problem(run: str, site: str = "beta") -> str:
        done = gain(camp, site, run)
        assert isinstance(done.exception, FedPeftError), done.output
        assert "\n" not in str(done.exception)
        return str(done.exception)

    assert "'nothing': this site keeps no result of such a run; there is " in problem("nothing")
    assert "no records of this site were held out" in problem("whole")
    assert (
        "no records were held out"
        in (find(camp.folder / "beta/state", "whole").folder / "README.md").read_text()
    )
    with monkeypatch.context() as patch:
        patch.setattr("fedpeft.durable.os.replace", full)
        assert "cannot be written (No space left on device); what came" in problem("out")
    assert not find(camp.folder / "beta/state", "out").report["gain"]
    own = camp.folder / "beta/own.jsonl"
    rows = own.read_text()
    own.write_text("".join(rows.splitlines(keepends=True)[:-1]))
    assert "data: holds other records than at the end of this run" in problem("out")
    own.write_text(rows)
    (found,) = (k for k in kept(camp.folder / "beta/state") if k.report["name"] == "out")
    (other,) = (k for k in kept(camp.folder / "beta/state") if k.report["name"] == "whole")
    (other.folder / "report.json").write_text("{")
    assert "damaged (" in problem("nothing")
    assert "report.json: damaged; restore it" in problem(other.folder.name)
    (found.folder / "tensors.safetensors").write_bytes(b"cut")
    assert "cut short or damaged" in problem("out")
    assert not found.report["gain"]


def test_a_node_that_is_dealt_the_plan_s_records_keeps_nothing(camp: Camp, tmp_path: Path) -> None:
    plan = Plan.from_lines(support_lines(camp.bert, clients=3))
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "dealt")), nodes=3)
    serve(grid)
    assert KEEP not in {m.metadata.message_type for m in grid.sent}
    assert not (tmp_path / "dealt/kept.json").exists()
    assert not [*tmp_path.rglob("results")]


def test_a_node_is_what_keeps_results() -> None:
    assert isinstance(Node(), Keeping)
    assert not isinstance(Fake(), Keeping)
