"""Clients of different ranks: from the plan's line through every engine to the server's step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft import Plan, simulate
from fedpeft.adapters._ranks import parse
from fedpeft.admission import admit
from fedpeft.broadcasts import messages
from fedpeft.client_rounds import ALONE, client_round
from fedpeft.errors import PlanError, SpecError, WireError
from fedpeft.learner import ModelLearner
from fedpeft.preview import as_text, preview
from fedpeft.rounds import server_round
from fedpeft.site import Site
from fedpeft.spec import build, method
from fedpeft.state import start
from fedpeft.tables import Tables
from fedpeft.tensors import narrowed, padded, shapes_of
from fedpeft.types import Correction, Packet, Sent, Step, Tensors, Update, Weights
from fedpeft.watching import Line, Quiet
from fedpeft.wire import pack
from tests.architectures import checkpoint, fresh_base
from tests.camp import (
    CLASSES,
    CLASSIFY,
    SGD,
    SIZES,
    WIDE,
    Camp,
    apart,
    assert_same,
    camp_of,
    first_round,
    passes_of,
    second_round,
    train,
    train_alone,
)
from tests.test_flower import FakeGrid, config_of, result_of, serve
from tests.tiny import support_plan

RANKS = {"client-000": 2, "client-001": 3, "client-002": 4}
TABLE = ",".join(f"{name}={rank}" for name, rank in RANKS.items())
ADAPTER = f"lora(r=4, alpha=8, ranks={TABLE!r})"
OTHERS = {"anna": 2, "ben": 3, "carl": 1, "dora": 2, "emma": 4}
IN_CAMP = "r=4, alpha=8, ranks='anna=2,dora=2,ben=3,carl=1,4'"
EXACT = 1e-9


@pytest.fixture
def camps(tmp_path: Path, bert: Path) -> Iterator[Callable[..., Camp]]:
    """Return a way to set up clients of one BERT in double precision."""
    base = fresh_base(checkpoint("bert", tmp_path / "bert", bert), CLASSIFY, CLASSES, double=False)
    base.model.to(torch.float64)
    made: list[Camp] = []

    def make(adapter: str = IN_CAMP, trainer: str = SGD, correction: str = "none") -> Camp:
        made.append(camp_of(base, "bert", trainer, correction, adapter))
        return made[-1]

    yield make
    for camp in made:
        camp.spy.detach()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@method
class Drift(Correction):
    """Sends control state of every entry down."""

    def server_init(self, params: Tensors) -> Tensors:
        return {k: np.zeros_like(v) for k, v in params.items()}

    def broadcast(self, control: Tensors) -> Tensors:
        return control


class Stopped(Quiet):
    """Interrupts after the first round."""

    def round(self, line: Line) -> None:
        raise KeyboardInterrupt


def mixed(bert: Path, **lines: Any) -> Plan:
    return support_plan(bert, **{"clients": 3, "partition": "iid", "adapter": ADAPTER} | lines)


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def untimed(history: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if "seconds" not in k} for line in history]


# --- the line -----------------------------------------------------------------------------------


def test_ranks_are_drawn_by_name_and_weight() -> None:
    ranks = parse("4*40, 8*20, 16*10")
    names = [f"c{i}" for i in range(7000)]
    drawn = Counter(ranks.of(name, 3) for name in names)
    assert abs(drawn[4] - 4000) < 200
    assert abs(drawn[8] - 2000) < 200
    assert abs(drawn[16] - 1000) < 150
    assert [ranks.of(name, 3) for name in names[:50]] == [ranks.of(n, 3) for n in names[:50]]
    assert [ranks.of(n, 3) for n in names] != [ranks.of(n, 4) for n in names]
    evenly = Counter(parse("2,2,5").of(name, 0) for name in names)
    assert abs(evenly[2] - 2 * evenly[5]) < 400


def test_named_clients_have_their_ranks_and_the_others_the_rest() -> None:
    ranks = parse("anna=4, ben b.=16,8")
    assert [ranks.of(name, 0) for name in ("anna", "ben b.", "carl")] == [4, 16, 8]
    ranks.check(["anna", "ben b.", "carl"])
    assert {parse("anna=4,8,16").of(f"c{i}", 0) for i in range(50)} == {8, 16}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("four", "entry 'four'; write ranks to draw from"),
        ("4,,8", "entry ''"),
        ("0,8", "entry '0'"),
        ("-4,8", "entry '-4'"),
        ("4*0,8", r"entry '4\*0'"),
        ("4*x,8", r"entry '4\*x'"),
        ("4*nan,8", r"entry '4\*nan'"),
        ("4*inf,8", r"entry '4\*inf'"),
        ("a=4*2,8", r"entry 'a=4\*2'"),
        ("=4,8", "entry '=4'"),
        ("a=,8", "entry 'a='"),
        ("a=4,a=8", "names 'a' twice"),
        ("4,16", "goes up to 16, and r=8 is the rank of the whole adapter; set r=16"),
        ("2,4", "goes up to 4, and r=8 is the rank of the whole adapter; set r=4"),
    ],
)
def test_a_wrong_line_gives_one_clear_error(text: str, reason: str) -> None:
    with pytest.raises(SpecError, match=f"lora: ranks={text!r}".replace("*", r"\*")) as caught:
        build("adapters", f"lora(r=8, ranks={text!r})")
    assert caught.match(reason)


def test_clients_that_the_federation_lacks_or_the_table_forgets(bert: Path) -> None:
    plan = mixed(bert, adapter="lora(r=4, ranks='client-00=2,4')")
    with pytest.raises(PlanError, match=r"adapter: ranks names 'client-00', .*client-000"):
        simulate(plan)
    plan = mixed(bert, adapter="lora(r=4, ranks='client-000=2,client-001=4')")
    with pytest.raises(PlanError, match="adapter: ranks gives client 'client-002' none; end it"):
        preview(plan)


@pytest.mark.parametrize(
    ("line", "spec", "reason"),
    [
        ("correction", "scaffold", "each entry has clients of its own"),
        ("aggregator", "lora_fair", "factors of one rank"),
    ],
)
def test_what_mixed_ranks_do_not_fit_is_refused(
    bert: Path, line: str, spec: str, reason: str
) -> None:
    trainer = "plain(optimizer='sgd', lr=0.1)"
    with pytest.raises(PlanError, match=reason):
        mixed(bert, trainer=trainer, **{line: spec})


def test_control_state_of_any_correction_is_refused() -> None:
    plan: Any = Plan.from_lines(
        {
            "model": "tiny-novels",
            "task": "classify",
            "data": "embedded(name='support')",
            "adapter": "lora(r=2, ranks='a=1,2')",
            "correction": "tests.test_mixed_ranks:Drift",
            "rounds": 1,
        }
    )
    tables = Tables(plan, {"m.lora_A.weight": (2, 3), "m.lora_B.weight": (4, 2)})
    assert tables.of("b") is tables
    with pytest.raises(PlanError, match="correction: sends control state of every entry"):
        tables.of("a")


# --- what clients hold --------------------------------------------------------------------------


def test_tables_are_those_of_the_client(bert: Path) -> None:
    shapes = {"m.lora_A.weight": (4, 7), "m.lora_B.weight": (5, 4), "head.bias": (3,)}
    tables = Tables(mixed(bert), shapes)
    assert tables.of("client-002") is tables
    own = tables.of("client-000")
    assert own is tables.of("client-000")
    expected = {"m.lora_A.weight": (2, 7), "m.lora_B.weight": (5, 2), "head.bias": (3,)}
    assert own.up(0) == own.down(0) == {"adapter": expected}
    tensors = {k: np.random.default_rng(0).random(s) for k, s in shapes.items()}
    part = own.part(tensors)
    assert np.array_equal(part["m.lora_B.weight"], tensors["m.lora_B.weight"][:, :2])
    assert part["head.bias"] is tensors["head.bias"]
    assert own.part(tensors) is part
    one, other = padded([part, part], shapes)
    assert shapes_of(one) == shapes
    assert one["m.lora_A.weight"] is other["m.lora_A.weight"]
    assert not one["m.lora_A.weight"][2:].any()
    assert same(narrowed(one, expected), part)


def test_clients_of_different_ranks_are_in_a_group_what_they_are_alone(
    camps: Callable[..., Camp],
) -> None:
    for trainer in (SGD, "plain(lr=0.05, epochs=1, batch=2, weight_decay=0.1)"):
        for correction in ("none", "fedprox(mu=0.5)"):
            camp = camps(f"{IN_CAMP}, dropout=0.3", trainer, correction)
            moment = second_round(camp)
            together = train(camp, moment, list(SIZES), WIDE)
            job, fit = camp.watched.job, camp.watched.fitted
            assert together.passes == passes_of(fit.steps, 16)
            assert_same(together, train_alone(camp, moment), EXACT)
            order = sorted(SIZES, key=lambda c: -camp.watched.budget(SIZES[c])[0])
            for name, value in fit.params.items():
                for k, client in enumerate(order):
                    less = camp.tables.of(client).shapes[name]
                    out = value[k].clone()
                    out[tuple(map(slice, less))] = 0
                    assert not out.any()  # entries that it lacks are zero and never move
                    assert (name in job.masks) == ("lora_" in name)
                    has = torch.zeros(value[k].shape)
                    has[tuple(map(slice, less))] = 1
                    assert torch.equal(job.masks.get(name, torch.ones_like(value))[k].float(), has)


def _sent_up(reply: Any) -> Any:
    return np.concatenate([np.frombuffer(piece, np.float32) for piece in reply.body.pieces])


@pytest.mark.parametrize(
    ("more", "trainer"),
    [
        ("dropout=0.2", SGD),
        ("align=0.5", SGD),
        ("train='B'", SGD.replace("lr=0.5", "lr=0.05, precondition=True")),
    ],
)
def test_a_client_of_lower_rank_is_one_of_an_adapter_of_that_rank_and_scale(
    camps: Callable[..., Camp], more: str, trainer: str
) -> None:
    camp = camps(f"{IN_CAMP}, {more}", trainer)
    together = train(camp, first_round(camp), list(SIZES), WIDE)
    for client, rank in OTHERS.items():
        narrow = camps(f"r={rank}, alpha={8 * rank / 4!r}, {more}", trainer)
        narrow.initial = narrowed(camp.initial, narrow.tables.shapes)
        found = train(narrow, first_round(narrow), [client])
        expected = narrowed(together.updates[client], narrow.tables.shapes)
        assert apart(found.updates[client], expected) < EXACT
        one, other = (_sent_up(t.played[client].reply) for t in (together, found))
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_what_stays_with_a_client_has_its_rank(camps: Callable[..., Camp]) -> None:
    camp = camps(f"{IN_CAMP}, local='B', head='local'")
    moment = second_round(camp)
    for client, rank in OTHERS.items():
        kept = moment.memories[client].versions[0]
        ranks = {v.shape[1] for k, v in kept.items() if "lora_B" in k}
        assert ranks == {rank}
        assert all(v.any() for v in kept.values())
    together = train(camp, moment, list(SIZES), WIDE)
    assert_same(together, train_alone(camp, moment), EXACT)


def test_a_group_is_evaluated_with_what_each_has(camps: Callable[..., Camp]) -> None:
    from fedpeft.evaluation import group_evaluation

    camp = camps()
    moment = second_round(camp)
    asked = moment.asked(camp, list(SIZES))
    held = [camp.held(c) for c in SIZES]
    for grouping in (ALONE, WIDE):
        found = group_evaluation(camp.plan, camp, asked, held, grouping)
        for client, metrics, records in zip(SIZES, found, held, strict=True):
            rank = OTHERS[client]
            narrow = camps(f"r={rank}, alpha={8 * rank / 4!r}")
            whole = {**camp.initial, **moment.state.params}
            own = narrowed(whole, narrow.tables.shapes)
            (expected,) = narrow.learner.evaluate([own], [records])
            assert metrics["loss"] == pytest.approx(expected["loss"], abs=1e-6)


# --- the server ---------------------------------------------------------------------------------


@pytest.mark.parametrize("downlink", ["raw", "half"])
def test_updates_say_what_the_client_was_sent(bert: Path, downlink: str) -> None:
    class Keeping:
        def reduce(self, updates: Any, sent: Sent, weights: Weights) -> Step:
            kept.extend(updates)
            return Step({k: np.zeros_like(v) for k, v in sent.moving.items()})

    kept: list[Update] = []
    plan = mixed(bert, downlink=downlink)
    object.__setattr__(plan, "aggregator", Keeping())
    shapes = {"m.lora_A.weight": (4, 7), "m.lora_B.weight": (5, 4)}
    tables, rng = Tables(plan, shapes), np.random.default_rng(0)
    state = start(plan, tables, {k: rng.random(s, np.float32) for k, s in shapes.items()})
    population = dict.fromkeys(RANKS, 8)
    told: dict[str, Any] = {"steps": 1, "seen": 4, "lr_sum": 0.1, "loss": 1.0}
    replies, decoded = [], {}
    for client, message in messages(plan, tables, state, "run", RANKS):
        own = tables.of(client)
        decoded[client] = own.decode(bytes(message), 0).adapter
        assert shapes_of(decoded[client]) == own.shapes
        delta = {k: np.ones(s, np.float32) for k, s in own.shapes.items()}
        header = {"run": "run", "round": 0, **told}
        replies.append((client, pack(Packet({"adapter": delta}, header), own.up(0))))
    weights = Weights(dict.fromkeys(RANKS, 1.0), 3.0)
    _, report = server_round(plan, tables, state, "run", population, weights, replies)
    assert not report.refused
    for update, (client, rank) in zip(kept, RANKS.items(), strict=True):
        assert shapes_of(update.delta) == shapes
        assert update.delta["m.lora_A.weight"].sum() == 7 * rank
        assert not update.delta["m.lora_B.weight"][:, rank:].any()
        assert (update.sent is None) == (rank == 4)
        if update.sent:
            assert same(update.sent.moving, decoded[client])


def test_a_reply_of_another_rank_is_refused(bert: Path) -> None:
    shapes = {"m.lora_A.weight": (4, 7), "m.lora_B.weight": (5, 4)}
    plan = mixed(bert, uplink="raw")
    tables = Tables(plan, shapes)
    weights = Weights(dict.fromkeys(RANKS, 1.0), 3.0)
    told: dict[str, Any] = {
        "run": "r",
        "round": 0,
        "steps": 2,
        "seen": 8,
        "lr_sum": 0.1,
        "loss": 0.5,
    }

    def reply(sender: str, table: str) -> Any:
        delta = {k: np.ones(s, np.float32) for k, s in tables.of(sender).shapes.items()}
        return pack(Packet({"adapter": delta}, told), tables.of(table).up(0))

    population = dict.fromkeys(RANKS, 20)
    for client in RANKS:
        good = reply(client, client)
        assert admit(plan, tables, ("r", 0), client, good, population, weights).client == client
        for other in RANKS.keys() - {client}:
            for message in (reply(other, other), reply(other, client)):
                with pytest.raises(WireError) as caught:
                    admit(plan, tables, ("r", 0), client, message, population, weights)
                has = rf"\({RANKS[client]}, 7\) of \(4, 7\)|the whole adapter"
                named = rf"'m\.lora_A\.weight' is \({RANKS[other]}, 7\), the plan expects"
                assert caught.match(rf".*by the plan this client has ({has})|.*{named}")


# --- whole runs ---------------------------------------------------------------------------------


def test_groups_processes_and_resumed_runs_agree(bert: Path, tmp_path: Path) -> None:
    plan = mixed(bert, rounds=3, adapter=ADAPTER.replace("r=4", "r=4, head='local'"))
    alone = simulate(plan)
    assert all(len(line["replied"]) == 3 for line in alone.history)
    grouped = simulate(plan, engine="inline(group=8)").tensors
    for name, value in alone.tensors.items():
        np.testing.assert_allclose(grouped[name], value, atol=1e-4)
    for workers in (1, 2):
        found = simulate(plan, engine=f"processes(workers={workers}, threads=1)")
        assert same(found.tensors, alone.tensors)
        assert untimed(found.history) == untimed(alone.history)
    with pytest.raises(KeyboardInterrupt):
        simulate(plan, out=tmp_path / "run", watch=Stopped())
    found = simulate(plan, out=tmp_path / "run", resume=True)
    assert same(found.tensors, alone.tensors)
    assert untimed(found.history) == untimed(alone.history)


def test_flower_gives_the_bits_of_a_simulation(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDPEFT_HOME", str(tmp_path / "home"))
    plan = mixed(bert, aggregator="flexlora")
    expected = simulate(plan)
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out")), nodes=3)
    serve(grid)
    tensors, history, _ = result_of(tmp_path / "out")
    assert untimed(history) == untimed(expected.history)
    assert same({k: expected.tensors[k] for k in tensors}, tensors)


def test_bytes_are_those_of_the_narrowed_shapes(bert: Path) -> None:
    plan = mixed(bert, rounds=2, uplink="half")
    told, result = preview(plan), simulate(plan)
    count, table = told["bytes"], result.table
    assert abs(count["up_total"] - table["up_bytes"]) <= 40 * 6
    assert abs(count["down_total"] - table["down_bytes"]) <= 40 * 6
    assert abs(count["evaluation_total"] - table["eval_bytes"]) <= 40 * 6
    wide = 2 * 2 * (32 + 32)  # two layers, query and value; a row of A and a column of B
    spread = count["up_per_client_most"] - count["up_per_client_least"]
    assert abs(spread - 2 * 2 * wide) <= 8
    spread = count["down_per_client_most"] - count["down_per_client_least"]
    assert abs(spread - 4 * 2 * wide) <= 8
    assert "on average: their ranks differ" in as_text(told)
    evenly = preview(mixed(bert, adapter="lora(r=4, alpha=8)"))
    assert evenly["bytes"]["up_per_client_least"] == evenly["bytes"]["up_per_client_most"]
    assert "on average" not in as_text(evenly)


@pytest.mark.parametrize(
    "adapter", ["train='B'", "train='B', send='both'", "train='A'", "train='B/A'", "local='B'"]
)
def test_every_role_runs_with_mixed_ranks(bert: Path, adapter: str) -> None:
    plan = mixed(bert, adapter=ADAPTER.replace("r=4", f"r=4, {adapter}"), downlink="half")
    alone = simulate(plan)
    assert not any("refused" in line for line in alone.history)
    grouped = simulate(plan, engine="inline(group=8)").tensors
    for name, value in alone.tensors.items():
        np.testing.assert_allclose(grouped[name], value, atol=1e-4)


def test_ranks_that_are_all_equal_change_no_bit(bert: Path) -> None:
    plain = simulate(mixed(bert, adapter="lora(r=4, alpha=8)"))
    equal = simulate(mixed(bert, adapter="lora(r=4, alpha=8, ranks='4')"))
    assert same(plain.tensors, equal.tensors)
    assert untimed(plain.history) == untimed(equal.history)


def test_sites_derive_ranks_from_the_plan_alone(bert: Path) -> None:
    from fedpeft.federation import deal

    plan = mixed(bert, adapter="lora(r=4, ranks='2,3,4')", clients=8)
    one, other = Site(plan, deal(plan)), Site(plan, deal(plan))
    names = list(one.federation.population)
    shapes = [one.tables.of(c).shapes for c in names]
    assert shapes == [other.tables.of(c).shapes for c in names]
    assert len({tuple(s.items()) for s in shapes}) > 1
    state = start(plan, one.tables, one.initial)
    from fedpeft.memory import Memory

    for client, message in messages(plan, one.tables, state, "run", names[:2]):
        reply, _ = client_round(plan, other, client, bytes(message), Memory())
        weights = Weights({client: 1.0}, 1.0)
        population = one.federation.population
        admit(plan, one.tables, ("run", 0), client, bytes(reply), population, weights)
    one.close()
    other.close()


def test_clients_alone_keep_their_ranks(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensors] = []
    evaluate = ModelLearner.evaluate

    def watched(self: Any, tensors: Any, examples: Any, width: int = 1) -> Any:
        seen.extend(tensors)
        return evaluate(self, tensors, examples, width)

    plan = mixed(bert, rounds=1, evaluate="test", compare="alone", holdout=0.0)
    rows = []
    for engine in ("inline", "inline(group=8)"):
        with monkeypatch.context() as patch:
            patch.setattr(ModelLearner, "evaluate", watched)
            seen.clear()
            rows.append(simulate(plan, engine=engine).table["rows"]["alone"])
        alone = [own for own in seen if len(seen) == 5][1:4]  # after the round's, before the last
        for own, rank in zip(alone, RANKS.values(), strict=True):
            for name in (k for k in own if "lora_B" in k):
                assert own[name][:, :rank].any()
                assert not own[name][:, rank:].any()
    assert rows[0] == pytest.approx(rows[1], abs=1e-3)
