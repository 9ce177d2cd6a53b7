"""Sites with records of their own train on these alone, and refuse what they do not allow."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.app import Message

from fedpeft import wire
from fedpeft.driver import simulate
from fedpeft.errors import DataError, FedPeftError, PlanError, RunError
from fedpeft.flower.messages import addressee, packet_record, read_hello, read_metrics, read_packet
from fedpeft.ledger import CLIENT, OnDiskLedgers, spent
from fedpeft.plan import Plan
from fedpeft.releases import mechanism_of
from fedpeft.replay import replay
from tests.test_flower import FakeGrid, config_of, result_of, serve
from tests.tiny import LABELS, support_lines, support_rows, tiny_bert, tiny_llama

pytestmark = pytest.mark.usefixtures("apart")

SITES = ("alpha", "beta", "gamma")
NAMES = f"classify(names='{','.join(LABELS)}')"
SGD = "plain(optimizer='sgd', lr=0.1, steps=2, batch=4)"
EVEN = "uniform(denominator='expected')"
HIDDEN = "record(noise_multiplier=1.0, simulate_noise=true)"
SEEDED = "user(noise_multiplier=1.0, quantile=0.5, bit_noise=1.0, simulate_noise=true)"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("tiny") / "bert")


def written(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Camp:
    """A folder per site with its records and ``client.yaml``; all records in one file beside."""

    def __init__(self, folder: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.bert, self._monkeypatch = folder, bert, monkeypatch
        self.rows = [
            {**row, "site": SITES[(0, 1, 0, 2, 1, 0)[i % 6]], "who": f"w{i // 5}"}
            for i, row in enumerate(support_rows()[0])
        ]

    def settle(self, **lines: Any) -> None:
        """Write everything down; ``lines`` are of every ``client.yaml``."""
        self.all = written(self.folder / "all.jsonl", self.rows)
        for site in SITES:
            own = (row for row in self.rows if row["site"] == site)
            written(self.folder / site / "own.jsonl", own)
            self.client(site, **lines)

    def client(self, site: str, **lines: Any) -> Path:
        """Write a site's ``client.yaml``."""
        given = {
            "site": site, "server": "127.0.0.1:9092", "insecure": True, "home": "state",
            "data": "jsonl(train='own.jsonl')",
        } | lines  # fmt: skip
        path = self.folder / site / "client.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in given.items() if v is not None}))
        return path

    def plan(self, **lines: Any) -> Plan:
        """Return the plan of the sites."""
        found = support_lines(self.bert, task=NAMES, partition=None, clients=None)
        test = str(self.bert.parent / "support.test.jsonl")
        data = f"sites(names='{','.join(SITES)}', test={test!r})"
        return Plan.from_lines(found | {"data": data} | lines)

    def simulated(self, **lines: Any) -> Plan:
        """Return the same plan with all records in one place."""
        test = str(self.bert.parent / "support.test.jsonl")
        data = f"jsonl(train={str(self.all)!r}, test={test!r})"
        found = support_lines(self.bert, task=NAMES, clients=None)
        by_site = {"data": data, "partition": "by_field(field='site')"}
        return Plan.from_lines(found | by_site | lines)

    def grid(self, plan: Plan, **settings: Any) -> FakeGrid:
        """Return a grid whose nodes are the sites."""
        config = config_of(plan, **{"out": str(self.folder / "out"), **settings})
        grid = FakeGrid(config, nodes=len(SITES))
        play = grid.play

        def at_home(message: Message, place: int) -> Message:
            path = self.folder / SITES[place] / "client.yaml"
            self._monkeypatch.setenv("FEDPEFT_CLIENT", str(path))
            try:
                return play(message, place)
            finally:
                self._monkeypatch.delenv("FEDPEFT_CLIENT")

        grid.play = at_home  # type: ignore[method-assign]
        return grid


@pytest.fixture
def camp(tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> Camp:
    return Camp(tmp_path, bert, monkeypatch)


def in_order(camp: Camp) -> None:
    """Leave the records as they are."""


def mixed(camp: Camp) -> None:
    """Mix the records; one site has none with a certain label, and few in all."""
    random.Random(5).shuffle(camp.rows)
    camp.rows = [r for r in camp.rows if (r["site"], r["label"]) != ("beta", LABELS[1])]
    beta = [r for r in camp.rows if r["site"] == "beta"]
    camp.rows = [r for r in camp.rows if r not in beta[9:]]


@pytest.mark.parametrize(
    ("lines", "change"),
    [
        ({}, in_order),
        ({}, mixed),
        ({"correction": "scaffold", "trainer": SGD, "rounds": 3}, in_order),
        ({"privacy": SEEDED, "weighting": EVEN, "cohort": "poisson(rate=0.7)"}, mixed),
        ({"privacy": HIDDEN, "weighting": "uniform", "trainer": SGD}, in_order),
        (
            {
                "privacy": "record(noise_multiplier=1.0, unit='who', simulate_noise=true)",
                "weighting": "uniform",
                "trainer": SGD,
            },
            mixed,
        ),
        ({"adapter": "lora(r=4, head='local')", "trainer": "plain(epochs=1, batch=4)"}, mixed),
        ({"personal": "ditto", "keep_best": "clients/loss"}, in_order),
    ],
    ids=["plain", "mixed", "scaffold", "user", "record", "unit", "local-head", "ditto"],
)
def test_sites_and_simulation_agree_bit_for_bit(
    camp: Camp, lines: dict[str, Any], change: Callable[[Camp], None]
) -> None:
    change(camp)
    camp.settle()
    simulate(camp.simulated(**lines), out=camp.folder / "in-process")
    serve(camp.grid(camp.plan(**lines)))
    name = "adapter/adapter_model.safetensors"
    assert (camp.folder / "out" / name).read_bytes() == (
        camp.folder / "in-process" / name
    ).read_bytes()
    (_, a, _), (_, b, _) = (result_of(camp.folder / f) for f in ("out", "in-process"))
    kept = (
        "loss",
        "seen",
        "test/loss",
        "clients/loss",
        "per_client",
        "weight_sum",
        "epsilon_record",
    )
    assert [[line.get(k) for k in kept] for line in a] == [
        [line.get(k) for k in kept] for line in b
    ]


def refusal(camp: Camp, plan: Plan, **settings: Any) -> str:
    with pytest.raises(RunError) as caught:
        serve(camp.grid(plan, **settings))
    return str(caught.value)


def test_a_site_s_records_are_asked_for_by_no_path_of_the_plan(camp: Camp) -> None:
    """What the server reads of the plan's data is its own test set, and a node not even that."""
    camp.settle()
    test = written(camp.folder / "test.jsonl", support_rows()[1])
    plan = camp.plan(data=f"sites(names='{','.join(SITES)}', test={str(test)!r})")
    grid = camp.grid(plan)
    play, there = grid.play, test.read_text()

    def away(message: Message, place: int) -> Message:
        test.unlink()
        try:
            return play(message, place)
        finally:
            test.write_text(there)

    grid.play = away  # type: ignore[method-assign]
    serve(grid)
    tensors, history, _ = result_of(camp.folder / "out")
    assert tensors
    assert "test/loss" in history[-1]
    card = (camp.folder / "out/adapter/README.md").read_text()
    trained = sum(read_hello(m.content).records[0] for m in grid_hellos(camp, plan))
    assert f"| Training records | {trained} |" in card


def grid_hellos(camp: Camp, plan: Plan) -> list[Message]:
    grid = camp.grid(plan)
    push = [Message(m, node, "query") for node, m in ((n, empty()) for n in grid.nodes)]
    return [grid.play(message, grid.nodes[message.metadata.dst_node_id]) for message in push]


def empty() -> Any:
    from flwr.app import RecordDict

    return RecordDict()


@pytest.mark.parametrize(
    ("limits", "lines", "reason"),
    [
        ({"models": ["minilm"]}, {}, "model: {bert} is none of those allowed here (minilm)"),
        ({"tasks": ["causal_lm"]}, {}, "task: classify is none of those allowed here (causal_lm)"),
        ({"rank": 3}, {}, "adapter: rank 4, and the highest here is 3"),
        ({"rank": 8}, {"adapter": "full"}, "adapter: full has no rank, and the highest here is 8"),
        ({"rank": 8}, {"adapter": "core(r=4, heads=3)"}, "adapter: rank 12, and the highest here"),
        ({"rounds": 1}, {}, "rounds: 2, and the most here are 1"),
        ({"epsilon": 3}, {}, "privacy: none hides no records, and what they may spend here is"),
        (
            {"client_epsilon": 3},
            {},
            "privacy: none hides no clients, and what this one may spend is epsilon 3",
        ),
    ],
)
def test_a_plan_beyond_a_site_s_limits_is_refused_before_anything_is_read(
    camp: Camp, limits: dict[str, Any], lines: dict[str, Any], reason: str
) -> None:
    camp.settle()
    camp.client("beta", limits=limits, data="jsonl(train='not-there.jsonl')")
    said = refusal(camp, camp.plan(**lines))
    assert "1 of 3 clients are missing (beta)" in said
    assert f"beta refuses this plan: {reason.format(bert=camp.bert)}" in said
    assert "not-there" not in said


def test_every_reason_is_told_at_once_and_the_others_are_not_asked_to_wait(camp: Camp) -> None:
    camp.settle()
    camp.client("beta", limits={"rank": 2, "rounds": 1})
    assert "rank 4, and the highest here is 2; rounds: 2, and the most here are 1" in refusal(
        camp, camp.plan(), wait=3600.0
    )


def test_limits_that_allow_a_plan(camp: Camp) -> None:
    limits = {
        "models": [str(camp.bert)], "tasks": ["classify"], "rank": 4, "rounds": 2, "seconds": 900,
    }  # fmt: skip
    camp.settle(limits=limits)
    serve(camp.grid(camp.plan(rounds=1)))
    assert result_of(camp.folder / "out")[1][0]["replied"] == list(SITES)


def test_limits_hold_from_the_message_after_they_were_written(camp: Camp) -> None:
    camp.settle()
    grid = camp.grid(camp.plan(rounds=2, evaluate="test"))
    play = grid.play

    def tightened(message: Message, place: int) -> Message:
        if len(grid.sent) > 6:
            camp.client("gamma", limits={"rounds": 1})
        return play(message, place)

    grid.play = tightened  # type: ignore[method-assign]
    serve(grid)
    _, history, _ = result_of(camp.folder / "out")
    assert "refused" not in history[0]
    assert "gamma refuses this plan: rounds: 2" in history[1]["refused"]["gamma"]


def test_a_message_that_takes_too_long_is_given_up_between_batches(
    camp: Camp, monkeypatch: pytest.MonkeyPatch
) -> None:
    camp.settle()
    camp.client("beta", limits={"seconds": 5})
    camp.client("gamma", limits={"seconds": 1e6})
    ticks = iter(range(0, 10**9, 2))  # two seconds from one look at the clock to the next
    monkeypatch.setattr("fedpeft.deployment.limits.monotonic", lambda: float(next(ticks)))
    plan = camp.plan(trainer="plain(optimizer='sgd', steps=9, batch=4)", rounds=1, evaluate="test")
    serve(camp.grid(plan))
    _, history, _ = result_of(camp.folder / "out")
    assert history[0]["replied"] == ["alpha", "gamma"]
    assert "gave up after 5 seconds" in history[0]["refused"]["beta"]
    assert not [*(camp.folder / "beta/state/replies").rglob("*-*")]
    assert [*(camp.folder / "gamma/state/replies").rglob("*")]


def test_an_evaluation_that_takes_too_long_is_given_up_and_the_run_goes_on(
    camp: Camp, monkeypatch: pytest.MonkeyPatch
) -> None:
    camp.settle()
    ticks = iter(range(0, 10**9, 2))
    monkeypatch.setattr("fedpeft.deployment.limits.monotonic", lambda: float(next(ticks)))
    grid = camp.grid(camp.plan(rounds=1, evaluate="clients"))
    play = grid.play

    def hurried(message: Message, place: int) -> Message:
        if message.metadata.message_type == "evaluate":
            camp.client("beta", limits={"seconds": 1})
        return play(message, place)

    grid.play = hurried  # type: ignore[method-assign]
    serve(grid)
    (line,) = result_of(camp.folder / "out")[1]
    assert line["replied"] == [*SITES]
    assert sorted(line["per_client"]) == ["alpha", "gamma"]
    assert "gave up after 1 seconds" in line["not_evaluated"]["beta"]


def retold(asked: Message, kind: str, **header: Any) -> Message:
    """Return another message of the same adapter, as a server makes one that has a plan's lines."""
    packet = bytes(read_packet(asked.content))
    head, _, checksum, rest = wire._cut(packet)
    told = json.loads(head)
    told["h"] |= header
    head = wire._dump(told)
    sums = wire._checksum([head]), checksum
    packet = wire._PREAMBLE.pack(wire._MAGIC, len(head), rest.nbytes, *sums) + head + bytes(rest)
    client = addressee(asked.content)
    return Message(packet_record(packet, client), asked.metadata.dst_node_id, kind)


def test_a_signed_run_needs_a_name_of_its_own(camp: Camp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one a server could have the same signed plan played again and again."""
    monkeypatch.setattr("fedpeft.node.check_signed", lambda config: None)
    camp.settle(owners=["alice.pub"])
    assert "this one has no name that was signed (run)" in refusal(camp, camp.plan())
    serve(camp.grid(camp.plan(rounds=1), run="one"))


def one_of(grid: FakeGrid, kind: str) -> Message:
    return next(m for m in grid.sent if m.metadata.message_type == kind)


def test_a_server_cannot_have_a_run_played_under_other_names(camp: Camp) -> None:
    """Nor does one that tries leave folders at the site."""
    camp.settle()
    grid = camp.grid(camp.plan(rounds=2), run="a-signed-name")
    serve(grid)
    for kind in ("train", "evaluate"):
        asked = one_of(grid, kind)
        place = grid.nodes[asked.metadata.dst_node_id]
        kept = sorted((camp.folder / SITES[place] / "state/clients").iterdir())
        assert [path.name for path in kept] == ["a-signed-name"]
        for name in ("another", "a-signed-name-2", "../up", ""):
            reply = grid.play(retold(asked, kind, run=name), place)
            assert reply.has_error(), (kind, name)
            assert "run" in str(reply.error.reason)
        assert sorted((camp.folder / SITES[place] / "state/clients").iterdir()) == kept


def test_no_round_is_trained_beyond_the_plan_s(camp: Camp) -> None:
    camp.settle()
    grid = camp.grid(camp.plan(rounds=2, evaluate="test"), run="r")
    serve(grid)
    asked = one_of(grid, "train")
    for round in (2, 3, -1):
        reply = grid.play(
            retold(asked, "train", round=round), grid.nodes[asked.metadata.dst_node_id]
        )
        assert f"message is of round {round}, and the plan has 2 rounds" in str(reply.error.reason)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_server_that_asks_on_and_on_is_answered_as_often_as_the_plan_needs(
    camp: Camp, kind: str
) -> None:
    """Each message differs, as adapters that look for a record would; that again costs nothing."""
    camp.settle()
    grid = camp.grid(camp.plan(rounds=1), run="r")
    serve(grid)
    asked = one_of(grid, kind)
    place = grid.nodes[asked.metadata.dst_node_id]
    replies = [grid.play(retold(asked, kind, probe=i), place) for i in range(8)]
    assert [reply.has_error() for reply in replies] == [False] * 3 + [True] * 5
    assert f"4 different messages of this run to {kind} on" in str(replies[3].error.reason)
    for _ in range(9):
        again = grid.play(retold(asked, kind), place)
        assert read_metrics(again.content) if kind == "evaluate" else read_packet(again.content)


def test_measures_stay_where_the_site_says_so(camp: Camp) -> None:
    """The loss of training and of evaluation; the others' are told, and the adapter is the same."""
    camp.settle()
    serve(camp.grid(camp.plan(), out=str(camp.folder / "told")))
    camp.client("beta", limits={"metrics": False})
    grid = camp.grid(camp.plan())
    play, replies = grid.play, list[tuple[int, Message]]()

    def listening(message: Message, place: int) -> Message:
        reply = play(message, place)
        replies.append((place, reply))
        return reply

    grid.play = listening  # type: ignore[method-assign]
    serve(grid)
    name = "adapter/adapter_model.safetensors"
    assert (camp.folder / "out" / name).read_bytes() == (camp.folder / "told" / name).read_bytes()
    (_, quiet, _), (_, told, _) = (result_of(camp.folder / f) for f in ("out", "told"))
    assert [sorted(line["per_client"]) for line in quiet] == [["alpha", "gamma"]] * 2
    assert [sorted(line["per_client"]) for line in told] == [list(SITES)] * 2
    assert all("refused" not in line and "not_evaluated" not in line for line in quiet)
    assert quiet[0]["loss"] != told[0]["loss"]
    assert quiet[0]["seen"] == told[0]["seen"]
    packets = list[bytes]()
    for place, reply in replies:
        if SITES[place] == "beta":
            assert not reply.content.metric_records.get("metrics")
            if "packet" in reply.content.array_records:
                packets.append(reply.content.array_records["packet"]["bytes"].data)
    assert len(packets) == 2
    assert all(b'"loss"' not in packet and b'"withheld"' in packet for packet in packets)


def test_a_site_that_measures_nothing_does_not_hide_that_it_diverged(camp: Camp) -> None:
    camp.settle(limits={"metrics": False})
    with pytest.raises(RunError, match="its loss is not finite"):
        serve(camp.grid(camp.plan(trainer="plain(optimizer='sgd', lr=1e30, steps=3, batch=4)")))


def test_a_limit_on_epsilon_is_of_all_records_that_a_site_ever_had(camp: Camp) -> None:
    """Neither another test set in the plan nor a new record begins a new budget."""
    lines = {
        "privacy": "record(noise_multiplier=3.0)", "weighting": "uniform", "evaluate": "test",
        "trainer": "plain(optimizer='sgd', lr=0.1, steps=2, batch=8)", "rounds": 2,
    }  # fmt: skip
    camp.settle()
    serve(camp.grid(camp.plan(**lines), out=str(camp.folder / "first")))
    (ledger,) = (own for _, own in OnDiskLedgers(camp.folder / "gamma/state/ledgers").all())
    once = ledger.epsilon(None, 1e-5)
    camp.client("gamma", limits={"epsilon": 1.05 * once})
    own = camp.folder / "gamma/own.jsonl"
    own.write_text(own.read_text() + json.dumps({"text": "another", "label": LABELS[0]}) + "\n")
    test = written(camp.folder / "other.jsonl", support_rows()[1][:20])
    other = f"sites(names='{','.join(SITES)}', test={str(test)!r})"
    serve(camp.grid(camp.plan(**{**lines, "data": other}), out=str(camp.folder / "second")))
    (again,) = (own for _, own in OnDiskLedgers(camp.folder / "gamma/state/ledgers").all())
    assert len({release.data for release in again.releases}) == len({*ledger.releases}) - 1 == 1
    assert again.releases == ledger.releases  # the first round of the second run is one too many
    (folder,) = (camp.folder / "gamma/state").glob("ledgers")
    assert [line["data"] for line in spent(folder, 1e-5)] == [ledger.releases[0].data[:12]]
    camp.client("gamma")
    serve(camp.grid(camp.plan(**lines), out=str(camp.folder / "third")))
    told = list(spent(folder, 1e-5))
    assert [line["rounds"] for line in told] == [2, 2, 4]
    assert told[-1]["data"] == "all of it"
    assert told[-1]["epsilon"] > max(told[0]["epsilon"], told[1]["epsilon"])
    _, history, _ = result_of(camp.folder / "second")
    assert history[-1]["round"] == 1


def test_a_limit_on_a_site_as_a_client_is_of_all_runs(camp: Camp) -> None:
    """Of its own ``client.yaml``, and of whatever its records were; other sites go on."""
    lines = {"weighting": EVEN, "evaluate": "test", "holdout": 0, "rounds": 2}
    plan = camp.plan(privacy="user(noise_multiplier=2.0)", **lines)
    camp.settle()
    serve(camp.grid(plan, out=str(camp.folder / "first")))
    (ledger,) = (own for _, own in OnDiskLedgers(camp.folder / "gamma/state/ledgers").all())
    camp.client("gamma", limits={"client_epsilon": 1.05 * ledger.epsilon(None, 1e-5, CLIENT)})
    own = camp.folder / "gamma/own.jsonl"
    own.write_text(own.read_text() + json.dumps({"text": "another", "label": LABELS[0]}) + "\n")
    serve(camp.grid(plan, out=str(camp.folder / "second")))
    counts = {
        site: len(held.releases)
        for site in SITES
        for _, held in OnDiskLedgers(camp.folder / site / "state/ledgers").all()
    }
    assert counts == {"alpha": 4, "beta": 4, "gamma": 2}


def test_runs_without_a_promise_close_a_site_s_limit_unless_its_owner_says_so(camp: Camp) -> None:
    camp.settle()
    serve(camp.grid(camp.plan(rounds=1), out=str(camp.folder / "open")))
    lines = {"weighting": EVEN, "evaluate": "test", "holdout": 0, "rounds": 1}
    plan = camp.plan(privacy="user(noise_multiplier=2.0)", **lines)
    for name, limits, charged in (
        ("closed", {"client_epsilon": 50}, 1),
        ("opened", {"client_epsilon": 50, "promised_only": True}, 2),
    ):
        camp.client("beta", limits=limits)
        serve(camp.grid(plan, out=str(camp.folder / name)))
        (ledger,) = (own for _, own in OnDiskLedgers(camp.folder / "beta/state/ledgers").all())
        assert len(ledger.releases) == charged


def test_nobody_is_told_how_many_records_a_site_has_under_a_promise_to_sites(camp: Camp) -> None:
    camp.settle()
    own = [sum(row["site"] == site for row in camp.rows) for site in SITES]
    lines = {"weighting": EVEN, "evaluate": "test", "holdout": 0}
    secret = camp.plan(privacy="user(noise_multiplier=1.0)", **lines)
    assert [read_hello(m.content).records for m in grid_hellos(camp, secret)] == [[0]] * 3
    for privacy in ("none", HIDDEN):
        open_plan = camp.plan(privacy=privacy, weighting="uniform", holdout=0)
        said = {
            hello.clients[0]: hello.records[0]
            for m in grid_hellos(camp, open_plan)
            for hello in [read_hello(m.content)]
        }
        assert said == dict(zip(SITES, own, strict=True))
    serve(camp.grid(secret))
    card = (camp.folder / "out/adapter/README.md").read_text()
    assert "Training records" not in card
    assert all(str(n) not in json.dumps(result_of(camp.folder / "out")[1]) for n in [2**31 - 1])


def test_what_a_site_spends_as_a_client_follows_from_how_many_the_plan_has(camp: Camp) -> None:
    camp.settle()
    lines = {"weighting": EVEN, "evaluate": "test", "holdout": 0, "rounds": 1}
    plan = camp.plan(privacy="user(epsilon=8)", cohort="uniform(size=2)", **lines)
    expected, alone = (mechanism_of(plan, clients) for clients in (3, 1))
    assert expected is not None
    assert alone is not None
    assert expected.unamplified != alone.unamplified
    serve(camp.grid(plan))
    found = [
        release
        for site in SITES
        for _, ledger in OnDiskLedgers(camp.folder / site / "state/ledgers").all()
        for release in ledger.releases
    ]
    assert [(r.unit, r.noise) for r in found] == [(CLIENT, expected.unamplified)] * 2


def test_a_unit_s_records_are_not_counted_in_the_hello(camp: Camp) -> None:
    camp.settle()
    plan = camp.plan(
        privacy="record(noise_multiplier=1.0, unit='who')", weighting="uniform", holdout=0,
        evaluate="test",
    )  # fmt: skip
    said = {
        h.clients[0]: h.records[0] for m in grid_hellos(camp, plan) for h in [read_hello(m.content)]
    }
    assert said == {s: len({r["who"] for r in camp.rows if r["site"] == s}) for s in SITES}


def test_a_site_that_comes_back_with_other_records_is_refused(camp: Camp) -> None:
    camp.settle()
    grid = camp.grid(camp.plan(rounds=3, evaluate="test", cohort="uniform(size=2)"))
    play = grid.play
    (node,) = (n for n, place in grid.nodes.items() if SITES[place] == "beta")

    def away(message: Message, place: int) -> Message:
        reply = play(message, place)
        if len(grid.sent) == 5 and node in grid.nodes:  # a new node of the site, with new records
            grid.nodes[node + 1000] = grid.nodes.pop(node)
            own = camp.folder / "beta/own.jsonl"
            own.write_text("".join(own.read_text().splitlines(keepends=True)[:8]))
        return reply

    grid.play = away  # type: ignore[method-assign]
    serve(grid)
    _, history, _ = result_of(camp.folder / "out")
    assert [line["reachable"] for line in history][-1] == 2


def test_a_run_does_not_go_on_with_other_records(camp: Camp) -> None:
    camp.settle()
    serve(camp.grid(camp.plan(rounds=1)))
    own = camp.folder / "beta/own.jsonl"
    own.write_text("".join(own.read_text().splitlines(keepends=True)[:8]))
    with pytest.raises(FedPeftError, match="the data changed since the run began"):
        serve(camp.grid(camp.plan(rounds=1), resume=True))


def test_nodes_without_records_of_their_own_and_sites_that_have_no_part(camp: Camp) -> None:
    camp.settle()
    camp.client("gamma", data=None)
    said = refusal(camp, camp.plan())
    assert "this node has no records of its own" in said
    camp.client("gamma")
    two = camp.plan(data="sites(names='alpha,beta')")
    serve(camp.grid(two))
    assert result_of(camp.folder / "out")[1][0]["replied"] == ["alpha", "beta"]
    dealt = Plan.from_lines(support_lines(camp.bert, clients=3))
    with pytest.raises(RunError, match="trains on its own records alone, and this plan brings"):
        serve(camp.grid(dealt, out=str(camp.folder / "dealt"), wait=0.5))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "a", "label": "refund of Mr X"}', "label 'refund of Mr X' is not a known"),
        ('{"text": "Mr X has measles"', "not JSON"),
        (json.dumps({"text": "a " * 300, "label": LABELS[0]}), "302 tokens"),
    ],
    ids=["label", "damaged", "long"],
)
def test_what_is_wrong_with_a_record_is_said_at_its_site_alone(
    camp: Camp, line: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    camp.settle()
    own = camp.folder / "beta/own.jsonl"
    own.write_text(own.read_text() + line + "\n")
    with caplog.at_level("WARNING", logger="flwr.fedpeft"):
        if "tokens" in said:
            serve(camp.grid(camp.plan(rounds=1, evaluate="test")))
            reason = result_of(camp.folder / "out")[1][0]["refused"]["beta"]
        else:
            reason = refusal(camp, camp.plan())
    assert "beta cannot use its records for this plan; its own log says why" in reason
    assert "Mr X" not in reason
    assert "tokens" not in reason
    assert any("beta: data: " in r.message and said in r.message for r in caplog.records)


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ({"partition": "dirichlet(alpha=1.0)"}, "partition: dirichlet(alpha=1.0) deals records"),
        ({"clients": 3}, "clients: the data line names them; leave clients=3 out"),
        (
            {"availability": "bernoulli(rates='labels')"},
            "availability: bernoulli is for simulations, and the records of sites",
        ),
        ({"latency": "lognormal(slow=0.3)"}, "latency: lognormal(slow=0.3) is for simulations"),
        ({"compare": "base, alone"}, "compare: alone trains on the clients' records in one place"),
        ({"data": "sites(names='alpha,Beta')"}, "sites: 'Beta' is no name of a site"),
        ({"data": "sites(names='alpha,alpha')"}, "sites: alpha is there twice"),
    ],
)
def test_what_follows_from_everybody_s_records_is_refused(
    camp: Camp, lines: dict[str, Any], problem: str
) -> None:
    with pytest.raises(PlanError) as caught:
        camp.plan(**lines)
    assert problem in str(caught.value)


def test_classes_have_to_be_listed_and_a_simulation_has_no_records(camp: Camp) -> None:
    from fedpeft.preflight import check
    from fedpeft.scattered import gathered

    plan = camp.plan(task="classify")
    with pytest.raises(PlanError, match=r"task: classify reads its classes off all records.*list"):
        check(plan, gathered(plan))
    with pytest.raises(PlanError, match=r"data: the records of sites.*by_field"):
        simulate(camp.plan())


def test_a_plan_is_checked_as_far_as_can_be(camp: Camp) -> None:
    from fedpeft.preview import as_text, preview

    found = preview(camp.plan())
    assert (found["clients"], found["records"], found["classes"]) == (3, {"test": 40}, [*LABELS])
    assert found["local"] == {"steps_least": 2, "steps_most": 2, "while_away": 0}
    text = as_text(found)
    assert "each site's own, 40 test" in text
    assert "2 to 2 steps per round" in text
    epochs = preview(camp.plan(trainer="plain(epochs=1, batch=4)", compare="base"))
    assert "as many steps per round as a site's records make" in as_text(epochs)
    hides = preview(camp.plan(privacy=HIDDEN, weighting="uniform"))
    assert hides["hiding"] == {}
    assert any("follows from how many a site has" in text for text in hides["warnings"])
    assert found["bytes"]["up_per_client"] > 0


def test_the_server_needs_no_test_set_and_takes_one_of_any_form(camp: Camp) -> None:
    from fedpeft.data.sites import Sites

    assert Sites(names="b, a").clients() == ["a", "b"]
    plain = Sites(names="a").load()
    assert (list(plain.train), plain.test) == ([], None)
    (camp.folder / "t.csv").write_text("text,label\na,x\n")
    rows = Sites(names="a", test=str(camp.folder / "t.csv")).load()
    assert rows.test == [{"text": "a", "label": "x"}]
    assert rows.fingerprint != plain.fingerprint
    with pytest.raises(DataError, match="cannot find"):
        Sites(names="a", test="nowhere.jsonl").load()


def test_texts_without_labels_need_no_classes(
    camp: Camp, tmp_path_factory: pytest.TempPathFactory
) -> None:
    llama = tiny_llama(tmp_path_factory.mktemp("llama") / "model")
    camp.settle()
    lines = {"model": str(llama), "task": "causal_lm(max_length=24)", "evaluate": "clients"}
    simulate(camp.simulated(**lines), out=camp.folder / "in-process")
    serve(camp.grid(camp.plan(**lines, data=f"sites(names='{','.join(SITES)}')")))
    found = [camp.folder / f / "adapter/adapter_model.safetensors" for f in ("out", "in-process")]
    assert found[0].read_bytes() == found[1].read_bytes()


def test_a_run_of_sites_goes_on_after_its_server_died_and_can_be_computed_again(camp: Camp) -> None:
    camp.settle()
    lines = {"correction": "scaffold", "trainer": SGD, "rounds": 3}
    simulate(camp.simulated(**lines), out=camp.folder / "in-process")
    grid = camp.grid(camp.plan(**lines))
    push = grid.push_messages

    def dying(messages: Iterable[Message]) -> Iterable[str]:
        if len(grid.sent) == 11:
            raise KeyboardInterrupt
        return push(messages)

    grid.push_messages = dying  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        serve(grid)
    done = (camp.folder / "out/rounds.jsonl").read_text().splitlines()
    assert len(done) == 1
    serve(camp.grid(camp.plan(**lines), resume=True))
    found = [camp.folder / f / "adapter/adapter_model.safetensors" for f in ("out", "in-process")]
    assert found[0].read_bytes() == found[1].read_bytes()
    again = replay(camp.folder / "out", camp.simulated(**lines), out=camp.folder / "again")
    assert again.differ == {}
