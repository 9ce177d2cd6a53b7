"""Rounds of several phases: FedASK against dense algebra, and what goes wrong between phases."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft import Plan, lowrank, simulate
from fedpeft.aggregators.fedask import FedAsk
from fedpeft.aggregators.flexlora import FlexLora
from fedpeft.broadcasts import messages
from fedpeft.client_rounds import Asked, client_round, group_round
from fedpeft.errors import FedPeftError, PlanError, RunError, WireError
from fedpeft.federation import deal
from fedpeft.flower.messages import read_packet
from fedpeft.memory import InProcess, Memory
from fedpeft.phases import Ask, Later, Reply, Sum
from fedpeft.preview import preview
from fedpeft.rng import derive
from fedpeft.rounds import server_round
from fedpeft.site import Site
from fedpeft.state import start
from fedpeft.tables import Tables
from fedpeft.tensor_file import read_tensor_file
from fedpeft.tensors import select, shapes_of
from fedpeft.traffic import WHOLE
from fedpeft.types import Packet, Sent, Tensors, Update, Weights
from fedpeft.watching import Line, Quiet
from fedpeft.weighing import weighed
from fedpeft.wire import Message, body, pack, peek, unpack
from tests.killing import Runs
from tests.test_flower import FakeGrid, config_of, result_of, serve
from tests.test_resume import Whole, check_same, killed
from tests.tiny import support_plan

GQA: Mapping[str, tuple[int, int]] = {"q": (19, 17), "k": (9, 17), "wide": (18, 41)}
"""Module to (out, in); of different shapes, as under grouped-query attention."""
SGD = "plain(optimizer='sgd', lr=5.0, steps=3, batch=4)"
ASK = "fedask(width=16)"
CLIENTS = ("client-000", "client-001", "client-002", "client-003")
EXACT = 1e-6


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def untimed(history: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if "seconds" not in k} for line in history]


def apart(x: Any, y: Any) -> float:
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def dense(tensors: Tensors, module: str) -> Any:
    return lowrank.product(tensors, module).dense()


def best(matrix: Any, rank: int) -> Any:
    u, s, vt = np.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


# --- the algebra --------------------------------------------------------------------------------


def factors_of(rng: Any, rank: int, common: Tensors) -> dict[str, np.ndarray]:
    """Random factors, but for those that are ``common``."""
    found = dict[str, np.ndarray]()
    for module, (m, n) in GQA.items():
        a, b = lowrank.factors(module)
        found[a] = (rng.standard_normal((rank, n)) / np.sqrt(n)).astype(np.float32)
        found[b] = rng.standard_normal((m, rank)).astype(np.float32)
    return {k: common.get(k, v) for k, v in found.items()}


@dataclass
class Round:
    """One round of ``FedAsk`` over the server's own code; ``lost`` are missing by phase."""

    held: Tensors
    trained: Mapping[str, Tensors]
    weights: Weights
    width: int
    lost: Mapping[int, set[str]] = field(default_factory=dict)
    seed: int = 3
    notes: list[tuple[str, str]] = field(default_factory=list)
    asked: list[tuple[str, Tensors]] = field(default_factory=list)

    def after(self, order: Sequence[str] = ()) -> Tensors:
        method = FedAsk(width=self.width)
        phases = method.phases(shapes_of(self.held))
        names = [c for c in order or self.trained if c not in self.lost.get(0, set())]
        first = Sum(phases[0][1], self.weights)
        for client in names:
            first.add(client, method.answer(0, self.trained[client], {}, self.seed))
        told: dict[str, Any] = {"run": "r", "round": 1}

        def ask(requests: Iterable[tuple[str, Message]]) -> Iterator[Reply]:
            for client, message in requests:
                phase = int(peek(message)["phase"])
                question = unpack(message, {"question": phases[phase][0]}, 1 << 20)
                self.asked.append((client, question.sections["question"]))
                if client in self.lost.get(phase, set()):
                    yield client, RunError("gone")
                    continue
                found = method.answer(
                    phase, self.trained[client], question.sections["question"], self.seed
                )
                header = {**told, "phase": phase}
                yield client, pack(Packet({"answer": found}, header), {"answer": phases[phase][1]})

        later = Later(method, phases, told, self.weights, Sent(self.held, {}, self.seed))

        def note(client: str, _: int, __: Mapping[str, int], why: str) -> None:
            self.notes.append((client, why))

        return {**self.held, **later.settled(first, names, ask, note)}

    def target(self, module: str, until: int = 1) -> Any:
        """The mean of the products [m, n] in float64; who is missing counts as what was sent."""
        gone = set[str]().union(*(self.lost.get(phase, set()) for phase in range(until + 1)))
        left, total = 1.0, np.zeros(GQA[module])
        for client, tensors in self.trained.items():
            if client not in gone:
                share = self.weights.of[client] / self.weights.denominator
                total += share * dense(tensors, module)
                left -= share
        return total + left * dense(self.held, module)

    def rounding(self, module: str) -> float:
        """What a float32 sketch may lose: a square one is ill-conditioned now and then."""
        target = self.target(module)
        width = min(self.width, *target.shape)
        sketch = derive(self.seed, "sketch", module).standard_normal((target.shape[1], width))
        values = np.linalg.svd(target @ sketch, compute_uv=False)
        rank = int(np.linalg.matrix_rank(target, tol=1e-5 * np.linalg.norm(target, 2)))
        return EXACT * max(10.0, float(values[0] / values[rank - 1]))


def played(seed: int, ranks: Sequence[int], width: int, moving: str = "AB", **more: Any) -> Round:
    rng = np.random.default_rng(seed)
    held = factors_of(rng, max(ranks), {})
    trained = {}
    for i, rank in enumerate(ranks):
        still = {} if "A" in moving else {k: v for k, v in held.items() if "lora_A" in k}
        still |= {} if "B" in moving else {k: v for k, v in held.items() if "lora_B" in k}
        whole = factors_of(rng, max(ranks), still)
        trained[f"c{i}"] = {k: v[:rank] if "lora_A" in k else v[:, :rank] for k, v in whole.items()}
    of = {client: float(rng.integers(1, 5)) for client in trained}
    return Round(held, trained, Weights(of, sum(of.values())), width, **more)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([(3, 3, 3), (1, 2, 3), (2, 1, 3, 3), (3,), (2, 2)]),
    st.sampled_from(["AB", "B", "A"]),
)
def test_exact_up_to_the_cut_where_the_width_is_the_sum_of_the_ranks(
    seed: int, ranks: tuple[int, ...], moving: str
) -> None:
    one = moving == "AB" or len({*ranks}) > 1
    found = played(seed, ranks, sum(ranks) if one else max(ranks), moving)
    after, rank = found.after(), max(ranks)
    for module in GQA:
        target = found.target(module)
        floor = np.linalg.svd(target, compute_uv=False)
        if rank < len(floor) and floor[rank - 1] - floor[rank] > 0.02 * floor[0]:
            assert apart(dense(after, module), best(target, rank)) < found.rounding(module)
        error = np.linalg.norm(dense(after, module) - target)
        assert error <= np.linalg.norm(floor[rank:]) + found.rounding(module) * floor[0]
        b, a = after[f"{module}.lora_B.weight"], after[f"{module}.lora_A.weight"]
        assert np.allclose(np.linalg.norm(b, axis=0), np.linalg.norm(a, axis=1), rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_it_is_flexlora_of_split_values(seed: int) -> None:
    """A sketch of no more than the rank may be ill-conditioned, and it travels as float32."""
    found = played(seed, (3, 3, 3), 9)
    updates = [
        Update(c, {k: v - found.held[k] for k, v in own.items()}, found.weights.of[c], 1.0)
        for c, own in found.trained.items()
    ]
    step = FlexLora(sigma_to="split").reduce(updates, Sent(found.held), found.weights)
    after = found.after()
    for module in GQA:
        assert apart(dense(after, module), dense(step.replaced, module)) < 1e-4


@pytest.mark.parametrize(
    "lost",
    [{0: {"c1"}}, {1: {"c1"}}, {0: {"c2"}, 1: {"c0"}}, {1: {"c0", "c2"}}, {0: {"c0", "c1"}}],
)
@pytest.mark.parametrize("moving", ["AB", "B"])
def test_who_is_missing_in_any_phase_counts_as_what_was_sent(
    lost: dict[int, set[str]], moving: str
) -> None:
    """Against the two sketches of dense matrices."""
    found = played(5, (3, 3, 3), 9 if moving == "AB" else 3, moving, lost=lost)
    after = found.after()
    for module in GQA:
        target = found.target(module)
        expected = best(projected(found, module) @ target, 3)
        assert apart(dense(after, module), expected) < 10 * EXACT
        if 1 not in lost:
            assert apart(dense(after, module), best(target, 3)) < 10 * EXACT
        lowest = np.linalg.norm(best(target, 3) - target)
        moved = sum(
            found.weights.of[c]
            / found.weights.denominator
            * np.linalg.norm(dense(found.trained[c], module) - dense(found.held, module))
            for c in lost.get(1, set())
        )
        error = np.linalg.norm(dense(after, module) - target)
        assert error <= lowest + moved + EXACT * np.linalg.norm(target)
    for client, why in found.notes:
        assert why == ("phase 1: gone" if client in lost.get(1, set()) else "")
    assert {client for client, _ in found.asked} == {*found.trained} - lost.get(0, set())


@pytest.mark.parametrize("times", [0.5, 1.6])
def test_weights_that_are_not_the_denominator(times: float) -> None:
    """What is left of 1, on either side, counts as what was sent."""
    found = played(5, (3, 3, 3), 12)
    found.weights = replace(found.weights, denominator=times * found.weights.denominator)
    after = found.after()
    for module in GQA:
        assert apart(dense(after, module), best(found.target(module), 3)) < 10 * EXACT


@pytest.mark.parametrize("lost", [{0: {"c0", "c1"}}, {1: {"c0", "c1"}}, {0: {"c0"}, 1: {"c1"}}])
def test_without_any_answer_no_factor_changes(lost: dict[int, set[str]]) -> None:
    found = played(6, (3, 3), 6, lost=lost)
    assert same(found.after(), found.held)


def test_products_that_are_all_zero_change_no_factor() -> None:
    found = played(7, (3, 3), 6)
    zero = {k: v * ("lora_A" in k) for k, v in found.held.items()}
    still = Round(zero, dict.fromkeys(found.trained, zero), found.weights, 6)
    assert same(still.after(), zero)


def projected(found: Round, module: str) -> Any:
    """Return the projection [m, m] on the range of the first sketch, in float64."""
    first, width = found.target(module, until=0), min(found.width, *GQA[module])
    sketch = derive(found.seed, "sketch", module).standard_normal((GQA[module][1], width))
    u, s, _ = np.linalg.svd(first @ sketch, full_matrices=False)
    basis = u[:, s > 1e-5 * s[0]]
    return basis @ basis.T


@pytest.mark.parametrize("width", [3, 4, 6])
def test_with_less_width_the_error_is_that_of_a_randomised_decomposition(width: int) -> None:
    """Halko, Martinsson and Tropp 2011, arXiv 0909.4061: here dense, in float64."""
    found = played(8, (3, 3, 3), width)
    after = found.after()
    for module in GQA:
        target = found.target(module)
        expected = best(projected(found, module) @ target, 3)
        error = apart(dense(after, module), target)
        assert error == pytest.approx(apart(expected, target), rel=1e-5)
        assert error > 1.0001 * apart(best(target, 3), target)


def test_the_order_of_clients_changes_no_more_than_rounding() -> None:
    found = played(9, (1, 2, 3), 6)
    forward, backward = found.after(), found.after(["c2", "c1", "c0"])
    assert all(apart(dense(forward, m), dense(backward, m)) < EXACT for m in GQA)


def test_a_width_below_the_rank_is_refused_before_anything_is_loaded(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("fedpeft.site.load_base", never)
    plan = support_plan(bert, aggregator="fedask(width=3)")
    for run in (simulate, preview):
        with pytest.raises(PlanError, match=r"^aggregator: fedask: width=3 .* rank 4.*width=4 or"):
            run(plan)


# --- whole runs ---------------------------------------------------------------------------------


def asking(bert: Path, **lines: Any) -> Plan:
    return support_plan(bert, **{"aggregator": ASK, "trainer": SGD, "rounds": 3} | lines)


def check_flexlora(plan_of: Callable[..., Plan], **lines: Any) -> None:
    found = simulate(plan_of(aggregator=ASK, **lines))
    expected = simulate(plan_of(aggregator="flexlora(sigma_to='split')", **lines))
    first = simulate(plan_of(cohort="poisson(rate=0.000001)", aggregator="mean", **lines))
    assert not any("refused" in line for line in found.history)
    for name, value in expected.tensors.items():
        error = np.linalg.norm(found.tensors[name] - value)
        assert error <= 1e-4 * np.linalg.norm(value), name
    for ours, theirs in zip(found.history, expected.history, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
    moved = [k for k, v in first.tensors.items() if not np.array_equal(v, found.tensors[k])]
    assert any("lora_B" in k for k in moved)


@pytest.mark.parametrize(
    "adapter",
    [
        "lora(r=2)",
        "lora(r=2, head='local')",
        "lora(r=2, head='frozen')",
        "lora(r=2, train='B', send='both')",
        "lora(r=2, train='B/A')",
        "lora(r=3, ranks='1,2,3', head='frozen')",
        "lora(r=2, align=0.5)",
    ],
)
def test_whole_runs_are_those_of_flexlora(bert: Path, adapter: str) -> None:
    check_flexlora(lambda **lines: asking(bert, adapter=adapter, **lines))


@pytest.mark.parametrize(
    "lines",
    [
        {"downlink": "half"},
        {"correction": "fedprox(mu=0.1)"},
        {"weighting": "uniform(denominator='expected')", "holdout": 0},
    ],
)
def test_whole_runs_with_other_lines_are_those_of_flexlora(
    bert: Path, lines: dict[str, Any]
) -> None:
    check_flexlora(lambda **more: asking(bert, **{"adapter": "lora(r=2)"} | lines | more))


def language_model(kind: str, tokenizer: Path, folder: Path) -> Path:
    """Write GPT-2, which has Conv1D layers, or a Llama with one head of keys for two of queries."""
    import transformers

    size: dict[str, Any] = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2}
    config: Any
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, **size)
    else:
        config = transformers.LlamaConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=48,
            max_position_embeddings=64,
            pad_token_id=0,
            **size,
        )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_whole_runs_of_language_models(llama: Path, tmp_path: Path, kind: str) -> None:
    folder = language_model(kind, llama, tmp_path / kind)
    lines = {"task": "causal_lm(max_length=24)", "partition": "iid", "adapter": "lora(r=2)"}
    check_flexlora(lambda **more: asking(folder, **lines, **more))


def test_empty_and_drawn_cohorts(bert: Path) -> None:
    nobody = simulate(asking(bert, cohort="poisson(rate=0.000001)"))
    begun = simulate(asking(bert, cohort="poisson(rate=0.000001)", aggregator="mean"))
    assert same(nobody.tensors, begun.tensors)
    lines = {"cohort": "poisson(rate=0.4)", "rounds": 4, "adapter": "lora(r=2)"}
    found = simulate(asking(bert, **lines))
    expected = simulate(asking(bert, **lines, aggregator="flexlora(sigma_to='split')"))
    assert {len(line["replied"]) for line in found.history} - {4}
    for name, value in expected.tensors.items():
        np.testing.assert_allclose(found.tensors[name], value, atol=1e-6)


def test_groups_are_near_and_workers_the_same(bert: Path, tmp_path: Path) -> None:
    plan = asking(bert, adapter="lora(r=3, ranks='1,2,3', head='local')")
    alone = simulate(plan)
    grouped = simulate(plan, engine="inline(group=8)").tensors
    for name, value in alone.tensors.items():
        np.testing.assert_allclose(grouped[name], value, atol=1e-4)
    found = simulate(plan, engine="processes(workers=2, threads=1)", out=tmp_path / "run")
    assert same(found.tensors, alone.tensors)
    assert untimed(found.history) == untimed(alone.history)


@pytest.mark.parametrize("adapter", ["lora(r=2)", "lora(r=3, ranks='1,2,3', head='frozen')"])
def test_the_preview_is_what_the_run_sends(bert: Path, adapter: str) -> None:
    plan = asking(bert, adapter=adapter)
    told, table = preview(plan)["bytes"], simulate(plan).table
    assert told["exact"]
    for way in ("up", "down"):
        assert abs(told[f"{way}_total"] - table[f"{way}_bytes"]) <= 2 * 40 * 12


class Calls(Quiet):
    """Writes down how far clients were said to be."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def client(self, done: int, cohort: int) -> None:
        self.calls.append((done, cohort))

    def round(self, line: Line) -> None:
        self.calls.append((-1, -1))


def test_each_phase_moves_the_bar_of_clients(bert: Path) -> None:
    watch = Calls()
    simulate(asking(bert, rounds=1, clients=2), watch=watch)
    assert watch.calls == [(1, 2), (2, 2), (1, 2), (2, 2), (-1, -1)]


# --- what travels, and what is refused ------------------------------------------------------------


class Table:
    """A server and its clients in one process; ``meddle`` sees each reply before the server."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.site = Site(plan, deal(plan))
        self.memories = InProcess()
        self.state = start(plan, self.site.tables, self.site.initial)
        self.requests: list[tuple[str, Message]] = []

    def close(self) -> None:
        self.site.close()

    def play(self, client: str, message: Message) -> Message:
        self.requests.append((client, message))
        memory = self.memories.load(client)
        reply, after = client_round(self.plan, self.site, client, bytes(message), memory)
        self.memories.save(client, after)
        return reply

    def round(self, meddle: Callable[[int, str, Any], Any], ask: Ask | None = None) -> Any:
        population = self.site.federation.population
        weights = weighed(self.plan, self.state, list(population), population)

        def bring(requests: Iterable[tuple[str, Message]]) -> Iterator[Reply]:
            for client, message in list(requests):
                phase = int(peek(message).get("phase", 0))
                try:
                    yield client, meddle(phase, client, self.play(client, message))
                except FedPeftError as error:
                    yield client, error

        sent = messages(self.plan, self.site.tables, self.state, "run", list(population))
        return server_round(
            self.plan,
            self.site.tables,
            self.state,
            "run",
            population,
            weights,
            bring(sent),
            ask or bring,
        )

    def target(self, module: str, gone: Iterable[str]) -> Any:
        """The mean of the products that clients hold now, ``gone`` as they were sent."""
        population = self.site.federation.population
        total = np.zeros(dense({**self.site.initial, **self.state.params}, module).shape)
        held = {**self.site.initial, **self.state.params}
        for client, records in population.items():
            share = records / sum(population.values())
            kept = select(self.memories.load(client).versions[self.state.round], "trained")
            total += share * dense(held if client in gone else kept, module)
        return total


@pytest.fixture
def table(bert: Path) -> Iterator[Table]:
    lines = {"adapter": "lora(r=2)", "partition": "iid", "trainer": "plain(lr=0.05, steps=3)"}
    with contextlib.closing(Table(asking(bert, **lines))) as made:
        yield made


def tampered(tables: Tables, **change: Any) -> Any:
    """Return a good answer of phase 1, changed."""
    shapes = tables.phases[1][1]
    answer = {k: np.ones(s, np.float32) for k, s in shapes.items()}
    header = {"run": "run", "round": 0, "phase": 1} | change.pop("header", {})
    header = {k: v for k, v in header.items() if v is not None}
    values = change.pop("values", lambda found: found)(answer)
    return pack(Packet({change.pop("section", "answer"): values}, header), {"answer": shapes})


def _first(found: dict[str, np.ndarray], made: Callable[[np.ndarray], np.ndarray]) -> Any:
    name = next(iter(found))
    return {**found, name: made(found[name])}


def _poisoned(value: float) -> Callable[[dict[str, np.ndarray]], Any]:
    def change(found: dict[str, np.ndarray]) -> Any:
        next(iter(found.values()))[0, 0] = value
        return found

    return change


BAD: Mapping[str, tuple[dict[str, Any], str]] = {
    "run": ({"header": {"run": "other"}}, "belongs to run other, round 0"),
    "round": ({"header": {"round": 1}}, "belongs to run run, round 1"),
    "no phase": ({"header": {"phase": None}}, "answers phase None"),
    "phase": ({"header": {"phase": 2}}, "answers phase 2"),
    "text": ({"header": {"phase": "1"}}, "answers phase 1"),
    "shape": (
        {"values": lambda found: _first(found, lambda v: v[:, :-1].copy())},
        "other names, shapes or types",
    ),
    "turned": (
        {"values": lambda found: _first(found, lambda v: v.T.copy())},
        "other names, shapes or types",
    ),
    "dtype": (
        {"values": lambda found: _first(found, lambda v: v.astype(np.float64))},
        "other names, shapes or types",
    ),
    "integers": (
        {"values": lambda found: _first(found, lambda v: v.astype(np.int32))},
        "other names, shapes or types",
    ),
    "nan": ({"values": _poisoned(np.nan)}, "not finite, or absurdly large"),
    "infinite": ({"values": _poisoned(-np.inf)}, "not finite, or absurdly large"),
    "large": ({"values": _poisoned(1e30)}, "not finite, or absurdly large"),
    "fewer": (
        {"values": lambda found: dict(list(found.items())[1:])},
        "other names, shapes or types",
    ),
    "more": (
        {"values": lambda found: {**found, "x": np.ones(1, np.float32)}},
        "other names, shapes or types",
    ),
    "oversized": (
        {"values": lambda found: {**found, "x": np.ones(1 << 20, np.float32)}},
        "where at most",
    ),
    "section": ({"section": "adapter"}, r"holds sections \['adapter'\]"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("form", [lambda m: m, bytes], ids=["object", "bytes"])
def test_a_tampered_answer_is_refused_by_name_and_the_round_goes_on(
    table: Table, kind: str, form: Any
) -> None:
    change, reason = BAD[kind]
    bad = form(tampered(table.site.tables, **dict(change)))
    size = len(bad) if isinstance(bad, bytes) else bad.nbytes
    sizes = list[int]()

    def meddle(phase: int, client: str, reply: Any) -> Any:
        found = bad if (phase, client) == (1, "client-002") else reply
        sizes.append(size if found is bad else reply.nbytes)
        return found

    after, report = table.round(meddle)
    assert list(report.refused) == ["client-002"]
    assert re.search(reason, report.refused["client-002"])
    assert report.refused["client-002"].startswith("phase 1: ")
    assert list(report.replied) == list(CLIENTS)
    assert report.up.all()[WHOLE] == sum(sizes)
    assert (after.round, after.acks) == (1, dict.fromkeys(CLIENTS, 0))
    for module in lowrank.modules(after.params):
        expected = best(table.target(module, {"client-002"}), 2)
        assert apart(dense(after.params, module), expected) < 10 * EXACT


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e20])
def test_a_bad_first_answer_refuses_the_reply(table: Table, value: float) -> None:
    def meddle(phase: int, client: str, reply: Message) -> Message:
        if (phase, client) != (0, "client-001"):
            return reply
        up = table.site.tables.uplink.expected(table.site.tables.up(0))
        packet = unpack(reply, up, 1 << 24)
        wrong = {k: np.full_like(v, value) for k, v in packet.sections["answer"].items()}
        return pack(Packet({**packet.sections, "answer": wrong}, packet.header), up)

    after, report = table.round(meddle)
    assert "not finite, or absurdly large" in report.refused["client-001"]
    assert "client-001" not in report.replied
    assert [c for c, m in table.requests if "phase" in peek(m)] == [
        c for c in CLIENTS if c != "client-001"
    ]
    for module in lowrank.modules(after.params):
        expected = best(table.target(module, {"client-001"}), 2)
        assert apart(dense(after.params, module), expected) < 10 * EXACT


def test_a_second_or_an_uninvited_answer_counts_as_nothing(table: Table) -> None:
    whole, _ = table.round(lambda _, __, reply: reply)
    calm = table.requests[:]

    def twice(requests: Iterable[tuple[str, Message]]) -> Iterator[Reply]:
        for client, message in list(requests):
            reply = table.play(client, message)
            yield client, reply
            if client == "client-001":
                yield client, reply
                yield "client-999", reply

    table.requests.clear()
    after, report = table.round(lambda _, __, reply: reply, twice)
    assert len(table.requests) == len(calm)
    assert same(after.params, whole.params)
    for client in ("client-001", "client-999"):
        assert "second answer, or one that was not asked for" in report.refused[client]


def test_the_server_sees_only_sums(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What leads to new factors is two sums, the adapter before and a public seed."""
    seen: list[tuple[str, Any]] = []
    for name in ("reduce", "ask", "settle"):
        real = getattr(FedAsk, name)

        def watched(self: Any, *given: Any, name: str = name, real: Any = real) -> Any:
            if name == "reduce":
                updates = list(given[0])
                seen.append((name, updates))
                given = (iter(updates), *given[1:])
            else:
                seen.append((name, ([*given[0]], given[1])))
            return real(self, *given)

        monkeypatch.setattr(FedAsk, name, watched)
    simulate(asking(bert, adapter="lora(r=2)", rounds=1))
    assert [name for name, _ in seen] == ["reduce", "ask", "settle"]
    for update in seen[0][1]:
        assert not update.answer
        assert update.delta
        assert not any(lowrank.is_factor(name) for name in update.delta)
    for name, (sums, sent) in seen[1:]:
        assert isinstance(sent, Sent)
        assert len(sums) == (2 if name == "settle" else 1)
        for one in sums:
            assert all(value.dtype == np.float64 for value in one.values())
    (before, _), (after, _) = seen[1][1], seen[2][1]
    assert before[0] is after[0]


def test_no_factor_travels_up(table: Table) -> None:
    tables = table.site.tables
    assert all(not lowrank.is_factor(k) for k in tables.up(0)["adapter"])
    assert set(tables.down(0)["adapter"]) == set(tables.shapes)
    plan = replace(table.plan, adapter=replace(table.plan.adapter, head="frozen"))  # type: ignore[type-var]
    assert Tables(plan, tables.shapes).up(0)["adapter"] == {}


def test_questions_are_asked_of_who_answered_and_are_one_body(table: Table) -> None:
    table.round(lambda _, __, reply: reply)
    asked = [(client, message) for client, message in table.requests if "phase" in peek(message)]
    assert [client for client, _ in asked] == list(CLIENTS)
    assert len({id(message.body) for _, message in asked}) == 1
    assert {tuple(peek(message)) for _, message in asked} == {("run", "round", "phase")}


# --- what clients keep ----------------------------------------------------------------------------


def question_of(table: Table, **told: Any) -> Message:
    shapes = table.site.tables.phases[1][0]
    found = {k: np.eye(*s, dtype=np.float32) for k, s in shapes.items()}
    header: dict[str, Any] = {"run": "run", "round": 0, "phase": 1} | told
    return body({"question": found}, {"question": shapes}).seal(header)


def test_a_client_that_lost_what_it_trained_says_so(table: Table) -> None:
    def forgets(phase: int, client: str, reply: Message) -> Message:
        if (phase, client) == (0, "client-003"):
            table.memories.save(client, Memory())
        return reply

    after, report = table.round(forgets)
    assert report.refused == {
        "client-003": "phase 1: has not trained in round 0, or lost what it trained"
    }
    table.state = after  # it needs nothing of what it lost to take part in the next round
    assert table.round(lambda _, __, reply: reply)[1].refused == {}


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"phase": 0}, "phase 0, rounds have 2"),
        ({"phase": 2}, "phase 2, rounds have 2"),
        ({"phase": -1}, "phase -1"),
        ({"phase": "1"}, "phase '1'"),
        ({"phase": 1.0}, "phase 1.0"),
        ({"round": "0"}, "asks for nothing"),
    ],
)
def test_clients_refuse_what_is_no_question(
    table: Table, told: dict[str, Any], reason: str
) -> None:
    client, message = next(
        iter(messages(table.plan, table.site.tables, table.state, "run", CLIENTS))
    )
    table.play(client, message)
    with pytest.raises(WireError, match=reason):
        table.play(client, question_of(table, **told))
    table.play(client, question_of(table))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_clients_refuse_a_question_that_is_not_finite(table: Table, value: float) -> None:
    client, message = next(
        iter(messages(table.plan, table.site.tables, table.state, "run", CLIENTS))
    )
    table.play(client, message)
    shapes = table.site.tables.phases[1][0]
    wrong = {k: np.full(s, value, np.float32) for k, s in shapes.items()}
    header: dict[str, Any] = {"run": "run", "round": 0, "phase": 1}
    with pytest.raises(WireError, match=r"question .* not finite"):
        table.play(client, body({"question": wrong}, {"question": shapes}).seal(header))


def test_another_plan_asks_for_nothing(bert: Path, table: Table) -> None:
    plan = asking(bert, aggregator="mean")
    with contextlib.closing(Site(plan, deal(plan))) as site:
        asked = Asked("client-000", question_of(table), Memory())
        with pytest.raises(WireError, match="phase 1, rounds have 1"):
            group_round(plan, site, [asked])


def test_what_was_trained_is_kept_for_its_round_alone(bert: Path, tmp_path: Path) -> None:
    sizes = []
    for rounds in (1, 4):
        out = tmp_path / str(rounds)
        simulate(asking(bert, adapter="lora(r=2)", rounds=rounds), out=out)
        files = sorted((out / "memory").glob("*.safetensors"))
        assert len(files) == 4
        for path in files:
            tensors, _ = read_tensor_file(path, "")
            assert {k.split("/")[0] for k in tensors} == {str(rounds - 1)}
            assert all(lowrank.is_factor(k) for k in tensors)
        sizes.append(sum(path.stat().st_size for path in files))
    assert max(sizes) < sizes[0] + 4 * 64  # no more than the names of the versions


def test_no_later_phase_writes_a_memory(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[str] = []
    save = InProcess.save

    def counted(self: Any, client: str, memory: Memory) -> None:
        saved.append(client)
        save(self, client, memory)

    monkeypatch.setattr(InProcess, "save", counted)
    simulate(asking(bert, rounds=2))
    assert saved == [*CLIENTS] * 2


def test_the_answer_is_the_same_when_asked_again(table: Table) -> None:
    client, message = next(
        iter(messages(table.plan, table.site.tables, table.state, "run", CLIENTS))
    )
    table.play(client, message)
    first, second = (bytes(table.play(client, question_of(table))) for _ in range(2))
    assert first == second


# --- who dies between two phases ------------------------------------------------------------------


def test_a_worker_that_dies_between_phases_changes_no_bit(bert: Path, tmp_path: Path) -> None:
    lines = {"adapter": "lora(r=2, head='local')", "rounds": 2}
    expected = simulate(asking(bert, **lines))
    dying = f"tests.failing:FailingAsk(width=16, once={str(tmp_path / 'died')!r})"
    warnings: list[str] = []
    watch = Quiet()
    watch.warn = warnings.append  # type: ignore[method-assign,assignment]
    plan = asking(bert, **lines, aggregator=dying)
    found = simulate(plan, engine="processes(workers=2, threads=1)", watch=watch)
    assert (tmp_path / "died").exists()
    assert sum("a worker died (SIGKILL" in text for text in warnings) == 1
    assert same(found.tensors, expected.tensors)
    assert untimed(found.history) == untimed(expected.history)


RESUMED: Mapping[str, Any] = {
    "adapter": "lora(r=2, alpha=4, head='local')",
    "correction": "none",
    "optimizer": "sgd",
    "keep_best": "none",
    "compare": "",
}


def lines_of(once: Path) -> dict[str, Any]:
    return {**RESUMED, "aggregator": f"tests.failing:FailingAsk(width=16, once={str(once)!r})"}


def test_killed_between_phases_and_resumed_is_the_same(runs: Runs, tmp_path: Path) -> None:
    once = tmp_path / "died"
    once.touch()
    whole = Whole(tmp_path / "whole", runs(tmp_path / "whole", **lines_of(once)))
    once.unlink()
    assert runs(tmp_path / "run", **lines_of(once)).signal == signal.SIGKILL
    assert once.exists()
    check_same(tmp_path / "run", whole, runs(tmp_path / "run", resume=True, **lines_of(once)))


@pytest.mark.slow
def test_killed_at_fault_points_and_then_between_phases(runs: Runs, tmp_path: Path) -> None:
    once = tmp_path / "died"
    once.touch()
    lines = lines_of(once)
    whole = Whole(tmp_path / "whole", runs(tmp_path / "whole", **lines))
    for fault in ("memory.renamed:5", "memory.begun:9", "checkpoint.half:2", "ledger.half:2"):
        path = tmp_path / fault
        once.touch()
        killed(runs, path, fault, **lines)
        once.unlink()
        assert runs(path, resume=True, **lines).signal == signal.SIGKILL
        check_same(path, whole, runs(path, resume=True, **lines))
    assert runs(tmp_path / "more", fault="memory.begun:10", **lines).signal == 0


# --- over Flower ----------------------------------------------------------------------------------


@pytest.fixture
def homes(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where clients keep their memory."""
    request.getfixturevalue("apart")
    return tmp_path / "home"


@pytest.mark.parametrize(
    "adapter", ["lora(r=2)", "lora(r=3, ranks='1,2,3', head='local')", "lora(r=2, train='B/A')"]
)
def test_flower_gives_the_bits_of_a_simulation(
    bert: Path, tmp_path: Path, homes: Path, adapter: str
) -> None:
    plan = asking(bert, adapter=adapter)
    expected = simulate(plan)
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out")), nodes=3)
    serve(grid)
    tensors, history, _ = result_of(tmp_path / "out")
    assert untimed(history) == untimed(expected.history)
    assert same({k: expected.tensors[k] for k in tensors}, tensors)
    kinds = [m.metadata.message_type for m in grid.sent]
    assert kinds.count("train") == 3 * 2 * 4


def phase_of(message: Any) -> int:
    """Return the phase of a message to a node, -1 for one that is not about training."""
    if message.metadata.message_type != "train":
        return -1
    return int(peek(read_packet(message.content)).get("phase", 0))


def test_a_client_of_flower_that_restarts_between_phases(
    bert: Path, tmp_path: Path, homes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its disk did not outlive it: it says so, and takes part in the next round."""
    plan = asking(bert, adapter="lora(r=2)")
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out")), nodes=4)
    play, lost = grid.play, list[Path]()

    def lossy(message: Any, place: int) -> Any:
        if phase_of(message) == 1 and not lost:
            lost.extend(homes.glob("clients/*/client-001*"))
            lost[0].unlink()
        return play(message, place)

    monkeypatch.setattr(grid, "play", lossy)
    serve(grid)
    _, history, _ = result_of(tmp_path / "out")
    reason = "phase 1: has not trained in round 0, or lost what it trained"
    refused = [line.get("refused", {}) for line in history]
    assert refused == [{"client-001": reason}, {}, {}]
    assert all(len(line["replied"]) == 4 for line in history)


def test_a_client_of_flower_that_is_silent_in_a_later_phase(
    bert: Path, tmp_path: Path, homes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = asking(bert, adapter="lora(r=2)", rounds=2, holdout=0)
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out"), deadline=0.3), nodes=4)
    pull = grid.pull_messages

    def muted(message_ids: Iterable[str]) -> Iterable[Any]:
        heard = []
        for i in message_ids:
            waiting = grid.waiting.get(i)
            place = grid.nodes[waiting.metadata.dst_node_id] if waiting else -1
            if not (waiting and place == 3 and phase_of(waiting) == 1):
                heard.append(i)
        return pull(heard)

    monkeypatch.setattr(grid, "pull_messages", muted)
    serve(grid)
    _, history, _ = result_of(tmp_path / "out")
    reason = "phase 1: no reply within 0.3 seconds"
    assert [line["refused"] for line in history] == 2 * [{"client-003": reason}]
    assert [len(line["replied"]) for line in history] == [4, 4]


def test_a_phase_that_all_clients_of_flower_refuse_ends_the_run(
    bert: Path, tmp_path: Path, homes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = asking(bert, adapter="lora(r=2)", rounds=2)
    expected = simulate(plan)
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out")), nodes=4)
    play = grid.play

    def lossy(message: Any, place: int) -> Any:
        if phase_of(message) == 1:
            for path in homes.glob("clients/*/client-*"):
                path.unlink()
        return play(message, place)

    with monkeypatch.context() as patch:
        patch.setattr(grid, "play", lossy)
        with pytest.raises(RunError, match=r"no client plays this round; .*lost what it trained"):
            serve(grid)
    serve(grid)
    assert same(result_of(tmp_path / "out")[0], expected.tensors)


def test_a_question_of_an_older_round_is_refused(bert: Path, tmp_path: Path, homes: Path) -> None:
    plan = asking(bert, adapter="lora(r=2)", rounds=2)
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out")), nodes=4)
    serve(grid)
    old = next(m for m in grid.sent if phase_of(m) == 1)
    reply = grid.play(old, grid.nodes[old.metadata.dst_node_id])
    assert "round 0 is over" in str(reply.error.reason)
