"""Error feedback: nothing is lost for good, whatever becomes of replies and of processes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedpeft.broadcasts import messages
from fedpeft.client_rounds import client_round
from fedpeft.codecs.raw import Raw
from fedpeft.driver import simulate
from fedpeft.errors import PlanError, RunError, SpecError
from fedpeft.memory import InProcess, OnDisk
from fedpeft.models import _base
from fedpeft.plan import Plan
from fedpeft.preview import preview
from fedpeft.residuals import still_owed, with_owed
from fedpeft.rounds import server_round
from fedpeft.spec import build, method
from fedpeft.state import ServerState, start
from fedpeft.tables import Tables
from fedpeft.tensor_file import read_tensor_file
from fedpeft.types import Rng, Tensors
from fedpeft.weighing import weighed
from fedpeft.wire import Message, unpack
from tests.killing import Runs
from tests.quadratic import Quadratic, QuadraticSite, play, quadratic_plan, record
from tests.test_flower import FakeGrid, assert_same, config_of, serve
from tests.test_resume import Whole, check_same, killed
from tests.tiny import support_plan

F64 = NDArray[np.float64]
WIDTH, CLIENTS = 40, 5
SGD = "plain(optimizer='sgd', lr=0.05, steps=1, batch=1)"
TOPK = "topk(density=0.1)"


pytestmark = pytest.mark.usefixtures("apart")


def learner(seed: int = 0) -> Quadratic:
    rng = np.random.default_rng(seed)
    return Quadratic(rng.uniform(0.5, 1.5, (CLIENTS, WIDTH)), rng.normal(size=(CLIENTS, WIDTH)))


# --- what is sent, against a second implementation ------------------------------------------------


@dataclass
class Federation:
    """Clients and a server whose transport the test decides on."""

    plan: Plan
    memories: Any = field(default_factory=InProcess)

    def __post_init__(self) -> None:
        held = {f"client-{i}": [record(i)] for i in range(CLIENTS)}
        self.tables = Tables(self.plan, {"x": (WIDTH,)})
        initial = {"x": np.zeros(WIDTH, np.float32)}
        self.site = QuadraticSite(learner(), self.tables, initial, held)
        self.state: ServerState = start(self.plan, self.tables, initial)

    def play(self, name: str) -> Message:
        """Have a client play the round, and save what it remembers."""
        ((_, message),) = messages(self.plan, self.tables, self.state, "run", [name])
        reply, memory = client_round(self.plan, self.site, name, message, self.memories.load(name))
        self.memories.save(name, memory)
        return reply

    def decoded(self, reply: Message) -> F64:
        up = self.tables.up(self.state.round)
        sections = unpack(reply, self.tables.uplink.expected(up), 1 << 20).sections
        found: F64 = self.tables.uplink.decode(sections, up["adapter"])["x"].astype(np.float64)
        return found

    def end(self, replies: Sequence[tuple[str, Any]]) -> Mapping[str, str]:
        """End the round; return who was refused."""
        cohort = list(dict.fromkeys(name for name, _ in replies))
        population = dict.fromkeys(self.site.held, 1)
        weights = weighed(self.plan, self.state, cohort, population)
        self.state, report = server_round(
            self.plan, self.tables, self.state, "run", population, weights, replies
        )
        return report.refused


def top(vector: F64, share: float) -> F64:
    kept = np.argsort(-np.abs(vector), kind="stable")[: max(1, round(share * len(vector)))]
    found = np.zeros_like(vector)
    found[kept] = vector[kept]
    return found


@pytest.mark.parametrize("decay", [1.0, 0.5])
@pytest.mark.parametrize("on_disk", [False, True])
def test_lost_and_doubled_replies_lose_nothing(tmp_path: Path, decay: float, on_disk: bool) -> None:
    """The second implementation has no versions: it knows which replies have arrived."""
    rng = np.random.default_rng(1)
    line = f"feedback({TOPK}, decay={decay})"
    memories = OnDisk(tmp_path) if on_disk else InProcess()
    ours = Federation(quadratic_plan(uplink=line, trainer=SGD), memories)
    plain = Federation(quadratic_plan(uplink="raw", trainer=SGD))
    owed = {name: np.zeros(WIDTH) for name in ours.site.held}
    deltas, arrived = dict(owed), dict(owed)
    lost = 0
    for _ in range(40):
        plain.state = ours.state
        cohort = [name for name in ours.site.held if rng.random() < 0.6]
        replies: list[tuple[str, Any]] = []
        for name in cohort:
            delta = plain.decoded(plain.play(name))
            first, again = ours.play(name), ours.play(name)  # the message came twice
            assert bytes(first) == bytes(again)
            sent = top(delta + owed[name], 0.1)
            np.testing.assert_allclose(ours.decoded(first), sent, rtol=1e-5, atol=1e-7)
            if rng.random() < 0.3:
                lost += 1
                replies.append((name, RunError("no reply")))
                continue
            replies.append((name, first))
            if rng.random() < 0.3:
                replies.append((name, again))
            owed[name] = decay * (delta + owed[name] - sent)
            deltas[name] = deltas[name] + delta
            arrived[name] = arrived[name] + ours.decoded(first)
        ours.end(replies)
        if on_disk:
            ours.memories = OnDisk(tmp_path)  # another process
    assert lost > 10
    for name in ours.site.held:
        acknowledged = ours.state.acks[name]
        kept = ours.memories.load(name).at(acknowledged, name)
        np.testing.assert_allclose(kept["residual/x"], owed[name], rtol=1e-4, atol=1e-6)
        if decay == 1:
            whole = arrived[name] + kept["residual/x"]
            np.testing.assert_allclose(whole, deltas[name], rtol=0, atol=1e-6)
            assert np.abs(deltas[name]).max() > 0.1


def test_a_residual_goes_to_nobody_else() -> None:
    ours = Federation(quadratic_plan(uplink=f"feedback({TOPK})", trainer=SGD))
    for _ in range(3):
        ours.end([(name, ours.play(name)) for name in ours.site.held])
    alone = ours.play("client-1")
    residuals = {
        name: ours.memories.load(name).versions[2]["residual/x"] for name in ours.site.held
    }
    assert len({value.tobytes() for value in residuals.values()}) == CLIENTS
    for name in ours.site.held:
        if name != "client-1":
            ours.memories._held.pop(name)
    assert bytes(ours.play("client-1")) == bytes(alone)
    assert not any(np.shares_memory(a, ours.state.params["x"]) for a in residuals.values())


@pytest.mark.parametrize(
    ("density", "lr", "rounds"),
    [(0.2, 0.06, 100), pytest.param(0.05, 0.02, 800, marks=pytest.mark.slow)],
)
def test_feedback_converges_where_the_codec_alone_does_not(
    density: float, lr: float, rounds: int
) -> None:
    found, best = {}, learner().minimum()
    alone, slow = f"topk(density={density})", f"plain(optimizer='sgd', lr={lr}, steps=1, batch=1)"
    for line in (alone, f"feedback({alone})"):
        plan = quadratic_plan(uplink=line, trainer=slow)
        *_, last = play(plan, learner(), rounds)
        found[line] = float(np.linalg.norm(last.params["x"] - best) / np.linalg.norm(best))
    assert found[alone] > 0.5
    assert found[f"feedback({alone})"] < 0.15


# --- tensors that rest ---------------------------------------------------------------------------


def test_what_does_not_travel_is_still_owed() -> None:
    codec: Any = build("codecs", f"feedback({TOPK}, decay=0.5)")
    shapes = {"a": (3, 4), "b": (4, 3)}
    rng = np.random.default_rng(0)
    before = {k: rng.normal(size=s).astype("f4") for k, s in shapes.items()}
    delta = {"a": rng.normal(size=(2, 4)).astype("f4")}  # the third rank and b rest
    given = with_owed(delta, before)
    np.testing.assert_array_equal(given["a"], delta["a"] + before["a"][:2])
    arrived = {"a": given["a"] * (np.abs(given["a"]) > 1)}
    after = still_owed(codec, before, given, arrived, shapes)
    np.testing.assert_array_equal(after["b"], before["b"])
    np.testing.assert_array_equal(after["a"][2], before["a"][2])
    np.testing.assert_array_equal(after["a"][:2], 0.5 * (given["a"] - arrived["a"]))
    fresh = still_owed(codec, {}, given, arrived, shapes)
    np.testing.assert_array_equal(fresh["a"][2], 0)
    assert {*fresh} == {"a"}


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_client_that_diverges_owes_what_it_did(wrong: float) -> None:
    codec: Any = build("codecs", f"feedback({TOPK})")
    before = {"x": np.full(WIDTH, 0.5, "f4")}
    delta = {"x": np.full(WIDTH, wrong, "f4")}
    given = with_owed(delta, before)
    arrived = codec.decode(codec.encode(given, np.random.default_rng(0)), {"x": (WIDTH,)})
    assert not np.isfinite(arrived["x"]).all(), "the server sees that it diverged"
    after = still_owed(codec, before, given, arrived, {"x": (WIDTH,)})
    np.testing.assert_array_equal(after["x"], before["x"])


TURNS = {
    "rolora": {"adapter": "lora(r=4, alpha=8, train='B/A')"},
    "mixed": {"adapter": "lora(r=4, alpha=8, ranks='1,2,4')"},
    "resting": {"adapter": "lora(r=4, alpha=8, ranks='1..4')"},
    "local head": {"adapter": "lora(r=4, alpha=8, head='local')"},
    "own B": {"adapter": "lora(r=4, alpha=8, local='B', head='frozen')"},
    "fedask": {"aggregator": "fedask"},
    "hetlora": {"adapter": "lora(r=4, alpha=8, ranks='1,2,4')", "aggregator": "hetlora"},
    "fedrot": {"adapter": "lora(r=4, alpha=8, align=0.5)"},
    "ditto": {"personal": "ditto"},
    "scaffold": {"correction": "scaffold", "trainer": "plain(optimizer='sgd', lr=0.1, steps=2)"},
}


def memory_of(folder: Path) -> list[tuple[Tensors, dict[str, Any]]]:
    return [read_tensor_file(path, "") for path in sorted((folder / "memory").iterdir())]


@pytest.mark.parametrize("turn", TURNS)
def test_it_runs_with_whatever_travels(bert: Path, tmp_path: Path, turn: str) -> None:
    lines = {"cohort": "uniform(size=3)", "rounds": 4, **TURNS[turn]}
    plan = support_plan(bert, uplink="feedback(topk(density=0.05) | int8)", **lines)
    result = simulate(plan, out=tmp_path / "run")
    assert not any(line.get("refused") for line in result.history)
    assert all(np.isfinite(value).all() for value in result.tensors.values())
    shapes = {k: v.shape for k, v in result.tensors.items()}
    names = set[str]()
    for tensors, note in memory_of(tmp_path / "run"):
        newest = f"{note['versions'][-1]}/residual/"
        owed = {k.removeprefix(newest): v for k, v in tensors.items() if k.startswith(newest)}
        names |= {*owed}
        for name, value in owed.items():
            assert value.dtype == np.float32
            assert all(n <= whole for n, whole in zip(value.shape, shapes[name], strict=True))
            assert np.isfinite(value).all()
    heads = {k for k in shapes if k.startswith("classifier")}
    expected = {
        "local head": {*shapes} - heads,
        "own B": {k for k in shapes if "lora_A" in k},
        "fedask": heads,
    }
    assert names == expected.get(turn, {*shapes})


def test_rolora_owes_the_factor_at_rest(bert: Path, tmp_path: Path) -> None:
    lines = {"adapter": "lora(r=4, alpha=8, train='B/A', head='frozen')", "rounds": 3}
    simulate(support_plan(bert, uplink="feedback(topk)", **lines), out=tmp_path / "run")
    for tensors, note in memory_of(tmp_path / "run"):
        assert note["versions"] == ["0", "1", "2"]
        owed = {
            v: {k.partition("/residual/")[2]: x for k, x in tensors.items() if k[0] == v}
            for v in note["versions"]
        }
        assert {k.split(".")[-2] for k in owed["0"]} == {"lora_B"}
        for name, value in owed["0"].items():
            np.testing.assert_array_equal(owed["1"][name], value)
            assert (owed["2"][name] != value).any()


# --- processes, kills, Flower --------------------------------------------------------------------

LINES: dict[str, Any] = {
    "uplink": "feedback(topk(density=0.05) | int8, decay=0.9)",
    "cohort": "uniform(size=3)",
    "rounds": 3,
}


def test_flower_and_simulation_agree_bit_for_bit(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedpeft.site.load_base", _base.load_base.__wrapped__)
    plan = support_plan(bert, **LINES)
    simulate(plan, out=tmp_path / "in-process")
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out")), nodes=plan.clients or 0)
    serve(grid)
    assert_same(tmp_path / "in-process", tmp_path / "out")


def test_processes_have_the_bits_of_one(bert: Path) -> None:
    plan = support_plan(bert, **LINES)
    one, other = simulate(plan), simulate(plan, engine="processes(workers=2, threads=1)")
    assert all(np.array_equal(one.tensors[k], other.tensors[k]) for k in one.tensors)


@pytest.fixture(scope="module")
def whole(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    path = tmp_path_factory.mktemp("whole") / "run"
    ended = runs(path, uplink=LINES["uplink"])
    assert (ended.signal, ended.error) == (0, "")
    return Whole(path, ended)


@pytest.mark.parametrize("fault", ["memory.renamed:5", "checkpoint.half:2", "ledger.half:2"])
def test_killed_and_resumed_is_the_same(
    runs: Runs, whole: Whole, tmp_path: Path, fault: str
) -> None:
    killed(runs, tmp_path / "run", fault, uplink=LINES["uplink"])
    check_same(tmp_path / "run", whole, runs(tmp_path / "run", resume=True, uplink=LINES["uplink"]))


def test_a_lost_memory_is_named(bert: Path, tmp_path: Path) -> None:
    ours = Federation(quadratic_plan(uplink=f"feedback({TOPK})", trainer=SGD), OnDisk(tmp_path))
    ours.end([(name, ours.play(name)) for name in ours.site.held])
    shutil.rmtree(tmp_path)
    with pytest.raises(RunError, match="the server knows round 0, its memory holds"):
        ours.play("client-1")


# --- what is refused -----------------------------------------------------------------------------


@method
class Loud(Raw):
    """Returns ten times what it is given."""

    def encode(self, tensors: Tensors, rng: Rng) -> Tensors:
        return {k: 10 * v for k, v in tensors.items()}


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ({"aggregator": "flexlora"}, "means nothing once the server has made them anew"),
        (
            {"aggregator": "fedsvd", "adapter": "lora(train='B', send='both')"},
            "means nothing once the server has made them anew",
        ),
        ({"aggregator": "ties(space='dense')"}, "made them anew"),
        ({"aggregator": "fedex"}, "that a round leaves behind"),
        (
            {"aggregator": "stack", "adapter": "lora(fresh='client')"},
            "begin anew in every round; use the codec without feedback",
        ),
        (
            {"downlink": "feedback(topk)", "uplink": "raw"},
            r"downlink: feedback\(topk\) is for updates.*use downlink: difference\(topk\)",
        ),
        (
            {"downlink": "topk", "uplink": "raw"},
            r"downlink: topk loses 0.\d+ times .*use downlink: difference\(topk\)",
        ),
    ],
)
def test_what_a_residual_cannot_bear(lines: dict[str, str], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        quadratic_plan(**{"adapter": "lora", "uplink": "feedback(topk)", **lines})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("feedback(tests.test_feedback:Loud)", "loses 9 times the norm of what it is given"),
        ("feedback(feedback(topk))", "sees to what is lost itself"),
        ("feedback(topk) | int8", r"wraps the whole chain: write feedback\(codec \| codec\)"),
        ("feedback", "feedback needs codec"),
        ("feedback(topk(density=2))", "topk: density=2 must be"),
        ("feedback(nope)", "there is no codecs method 'nope'"),
        ("feedback(decay=0.5)", "feedback needs codec"),
        ("feedback(topk, topk)", "name every value"),
    ],
)
def test_specs_that_are_refused(text: str, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        build("codecs", text)


def test_a_wrapper_says_what_its_codec_does() -> None:
    found = build("codecs", "feedback(raw)").offers
    assert {"enlarging-code", "remembering-code"} <= {*found}
    assert "unbiased-code" not in build("codecs", "feedback(int8)").offers


def test_a_plan_that_runs_is_previewed(bert: Path) -> None:
    found = preview(support_plan(bert, **LINES))
    plain = preview(support_plan(bert, **{**LINES, "uplink": "topk(density=0.05) | int8"}))
    assert found["bytes"] == plain["bytes"]
    assert found["memory"]["residual_bytes"] == 4 * found["parameters"]["travelling"]
    assert plain["memory"]["residual_bytes"] == 0
