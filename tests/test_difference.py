"""Differences on the downlink: after any gap, a client decodes the same bits as everybody."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedpeft.broadcasts import as_decoded, messages
from fedpeft.client_rounds import Asked, client_round, receive
from fedpeft.coding import Coding
from fedpeft.driver import simulate
from fedpeft.errors import PlanError, RunError, SpecError, WireError
from fedpeft.memory import InProcess, OnDisk
from fedpeft.mirror import Mirror, followed, whole
from fedpeft.models import _base
from fedpeft.plan import Plan
from fedpeft.preview import preview
from fedpeft.rng import derive
from fedpeft.rounds import server_round
from fedpeft.spec import build
from fedpeft.state import ServerState, start
from fedpeft.tables import Tables
from fedpeft.tensor_file import read_tensor_file
from fedpeft.weighing import weighed
from fedpeft.wire import Message, body, unpack
from tests.killing import Runs
from tests.quadratic import Quadratic, QuadraticSite, play, quadratic_plan, record
from tests.test_flower import FakeGrid, assert_same, config_of, result_of, serve
from tests.test_resume import Whole, check_same, killed
from tests.tiny import support_plan

F64 = NDArray[np.float64]
WIDTH, CLIENTS = 400, 6
SGD = "plain(optimizer='sgd', lr=0.02, steps=2, batch=1)"
TOPK = "difference(topk(density=0.02))"


pytestmark = pytest.mark.usefixtures("apart")


def learner(width: int = WIDTH) -> Quadratic:
    rng = np.random.default_rng(0)
    return Quadratic(rng.uniform(0.5, 1.5, (CLIENTS, width)), rng.normal(size=(CLIENTS, width)))


# --- what clients hold, against a second implementation -------------------------------------------


@dataclass
class Federation:
    """Clients on other machines, and a server; the test decides on the transport."""

    plan: Plan
    memories: Any = field(default_factory=InProcess)

    def __post_init__(self) -> None:
        held = {f"client-{i}": [record(i)] for i in range(CLIENTS)}
        self.tables = Tables(self.plan, {"x": (WIDTH,)})
        rng = np.random.default_rng(3)
        initial = {"x": rng.normal(size=WIDTH).astype("f4")}
        self.site = QuadraticSite(learner(), self.tables, initial, held)
        self.state: ServerState = start(self.plan, self.tables, initial)

    def message(self, name: str, *, remote: bool = True, training: bool = True) -> Message:
        ((_, found),) = messages(
            self.plan, self.tables, self.state, "run", [name], remote=remote, training=training
        )
        return found

    def held(self, name: str, *, training: bool = True) -> bytes:
        """Return the bits that a client has decoded, from bytes alone."""
        site = QuadraticSite(
            self.site.learner, Tables(self.plan, {"x": (WIDTH,)}), self.site.initial, self.site.held
        )
        data = bytes(self.message(name, training=training))
        asked = Asked(name, data, self.memories.load(name))
        return receive(self.plan, site, asked, training=training).tensors["x"].tobytes()

    def play(self, name: str) -> Message:
        reply, memory = client_round(
            self.plan, self.site, name, bytes(self.message(name)), self.memories.load(name)
        )
        self.memories.save(name, memory)
        return reply

    def end(self, replies: Sequence[tuple[str, Any]]) -> None:
        cohort = list(dict.fromkeys(name for name, _ in replies))
        population = dict.fromkeys(self.site.held, 1)
        weights = weighed(self.plan, self.state, cohort, population)
        self.state, report = server_round(
            self.plan, self.tables, self.state, "run", population, weights, replies
        )
        assert all(why == "no reply" or "second" in why for why in report.refused.values())


def top(vector: F64, share: float) -> F64:
    kept = np.argsort(-np.abs(vector), kind="stable")[: max(1, round(share * len(vector)))]
    found = np.zeros_like(vector)
    found[kept] = vector[kept]
    return found


@pytest.mark.parametrize("on_disk", [False, True])
def test_everybody_holds_the_same_whatever_was_missed(tmp_path: Path, on_disk: bool) -> None:
    """The second implementation is float64, and has one state for all."""
    rng = np.random.default_rng(1)
    memories = OnDisk(tmp_path) if on_disk else InProcess()
    ours = Federation(quadratic_plan(downlink=TOPK, trainer=SGD), memories)
    mirror = ours.state.params["x"].astype(np.float64)
    kinds, last = {"whole": 0, "differences": 0}, 0
    for round in range(60):
        if round:
            mirror += top(ours.state.params["x"].astype(np.float64) - mirror, 0.02)
        bits = ours.state.mirror.tensors["x"]
        np.testing.assert_allclose(bits, mirror, rtol=1e-6, atol=1e-6)
        sent = as_decoded(ours.plan, ours.tables, ours.state)
        assert sent.moving["x"].tobytes() == bits.tobytes()
        replies: list[tuple[str, Any]] = []
        for i, name in enumerate(ours.site.held):
            message = ours.message(name)
            assert message.nbytes == len(bytes(message))
            assert ours.message(name, remote=False).nbytes == message.nbytes
            assert ours.held(name) == bits.tobytes()
            assert ours.held(name, training=False) == bits.tobytes()
            if rng.random() > (0.7, 0.5, 0.2, 0.05, 0.02, 0.0)[i]:
                continue
            kinds["differences" if message.nbytes < 4 * WIDTH else "whole"] += 1
            first, again = ours.play(name), ours.play(name)
            assert bytes(first) == bytes(again)
            answer = RunError("no reply") if rng.random() < 0.3 else first
            replies += [(name, answer), *([(name, again)] if rng.random() < 0.2 else [])]
        ours.end(replies)
        last = len(ours.state.mirror.steps)
        assert sum(ours.state.mirror.sizes.values()) < 4 * WIDTH
        if on_disk:
            ours.memories = OnDisk(tmp_path)
    assert kinds["whole"] >= 3
    assert kinds["differences"] > 30
    assert 1 <= last < 60, "old differences are dropped"


def test_in_process_everything_is_at_hand_and_only_what_would_travel_counts() -> None:
    ours = Federation(quadratic_plan(downlink=TOPK, trainer=SGD))
    for _ in range(3):
        ours.end([(name, ours.play(name)) for name in [*ours.site.held][:3]])
    asked = ["client-0", "client-5"]
    sent = messages(ours.plan, ours.tables, ours.state, "run", asked)
    near, far = (message for _, message in sent)
    assert near.body is far.body
    assert near.nbytes < far.nbytes / 4
    assert near.sizes["adapter"] < far.sizes["adapter"] == 4 * WIDTH
    got = ours.tables.decode(near, 3)
    assert np.shares_memory(got.adapter["x"], ours.state.mirror.tensors["x"])


def test_what_nobody_can_need_is_dropped() -> None:
    coding, rng = Coding(build("codecs", TOPK)), np.random.default_rng(0)
    x = {"x": rng.normal(size=WIDTH).astype("f4")}
    mirror = Mirror({"x": np.zeros(WIDTH, "f4")})
    for version in range(1, 9):
        mirror = mirror.plus(coding, x, version, derive(0, version), {2, 5})
    assert [*mirror.steps] == [v for v in range(3, 9) if v in mirror.steps]
    assert 3 in mirror.steps
    assert not mirror.reaches(1)
    assert mirror.reaches(2)
    assert not mirror.plus(coding, x, 9, derive(0, 9), set()).steps
    heavy = Coding(build("codecs", "difference(half)"))
    mirror = Mirror({"x": np.zeros(WIDTH, "f4")})
    for version in range(1, 9):
        mirror = mirror.plus(heavy, x, version, derive(0, version), {0})
        assert sum(mirror.sizes.values()) < 4 * WIDTH
    assert [*mirror.steps] == [8], "two halves are as long as the whole"


@pytest.mark.parametrize("codec", ["topk | int8", "topk(density=0.1) | half", "raw", "int8"])
def test_every_codec_and_the_head_come_down_in_differences(codec: str) -> None:
    rng = np.random.default_rng(0)
    shapes = {"a": (30, 4), "head": (7,), "b": (4, 30)}
    coding = Coding(build("codecs", f"difference({codec})"), {"head"})
    mirror = Mirror({k: rng.normal(size=s).astype("f4") for k, s in shapes.items()})
    begun = mirror.tensors
    for version in (1, 2):
        moved = {k: v + rng.normal(size=v.shape).astype("f4") for k, v in begun.items()}
        mirror = mirror.plus(coding, moved, version, derive(0, version), {0})
    if mirror.reaches(0):
        expected = coding.expected({"adapter": shapes})
        packed = bytes(body(mirror.since(0), expected).seal({}))
        came = unpack(packed, expected, 1 << 16).sections
        found = followed(coding, begun, came, [1, 2])
        assert all(found[k].tobytes() == mirror.tensors[k].tobytes() for k in shapes)
    if codec == "raw":
        assert not mirror.steps
        np.testing.assert_allclose(mirror.tensors["a"], moved["a"], atol=1e-6)


@pytest.mark.parametrize(
    ("density", "lr", "rounds", "bounds"),
    [
        (0.2, 0.06, 100, (0.01, 0.15)),
        pytest.param(0.05, 0.02, 800, (0.02, 0.2), marks=pytest.mark.slow),
    ],
)
def test_both_ways_compressed_comes_near_the_minimum(
    density: float, lr: float, rounds: int, bounds: tuple[float, float]
) -> None:
    best, found = learner(40).minimum(), []
    codec, slow = f"topk(density={density})", f"plain(optimizer='sgd', lr={lr}, steps=1, batch=1)"
    for up in ("raw", f"feedback({codec})"):
        lines = {"uplink": up, "downlink": f"difference({codec})", "trainer": slow}
        *_, last = play(quadratic_plan(**lines), learner(40), rounds)
        found.append(float(np.linalg.norm(last.params["x"] - best) / np.linalg.norm(best)))
    assert found[0] < bounds[0]
    assert found[1] < bounds[1]


# --- messages that are none ----------------------------------------------------------------------


def test_what_does_not_continue_what_is_held_is_refused() -> None:
    ours = Federation(quadratic_plan(downlink=TOPK, trainer=SGD))
    ours.end([("client-0", ours.play("client-0"))])
    data, memory = bytes(ours.message("client-0")), ours.memories.load("client-0")
    memory.versions[0].pop("mirror/x")
    with pytest.raises(WireError, match="holds nothing to add them to"):
        receive(ours.plan, ours.site, Asked("client-0", data, memory), training=True)
    coding, held = ours.tables.downlink, {"x": np.zeros(WIDTH, "f4")}
    step = ours.state.mirror.since(0)
    for sections, reason in (
        ({"adapter": {f"2/{k[2:]}": v for k, v in step["adapter"].items()}}, "of no version"),
        ({"adapter": {k[2:]: v for k, v in step["adapter"].items()}}, "of no version"),
        ({"adapter": {}}, "is missing"),
        ({"adapter": {**step["adapter"], "1/kept": np.full(8, np.inf, "f4")}}, "not.*finite"),
    ):
        with pytest.raises(WireError, match=reason):
            followed(coding, held, sections, [1])
    for tensors, reason in (
        ({"x": held["x"][:-1]}, "other names or shapes"),
        ({"y": held["x"]}, "other names or shapes"),
        ({"x": held["x"] + np.nan}, "not finite"),
        ({"x": held["x"].astype("f8")}, "not float32"),
    ):
        with pytest.raises(WireError, match=reason):
            whole({"adapter": tensors}, {"x": (WIDTH,)})


def test_a_difference_that_is_not_finite_ends_the_run() -> None:
    coding = Coding(build("codecs", TOPK))
    mirror = Mirror({"x": np.full(WIDTH, -3e38, "f4")})
    with pytest.raises(RunError, match=r"before round 1 is not finite.*lower"):
        mirror.plus(coding, {"x": np.full(WIDTH, 3e38, "f4")}, 1, derive(0), {0})


# --- whole runs ----------------------------------------------------------------------------------

LINES: dict[str, Any] = {
    "downlink": "difference(topk(density=0.02) | int8)",
    "cohort": "uniform(size=3)",
    "rounds": 4,
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "both ways": {"uplink": "feedback(topk(density=0.05) | int8)"},
    "local head": {"adapter": "lora(r=4, alpha=8, head='local')"},
    "scaffold": {"correction": "scaffold", "trainer": "plain(optimizer='sgd', lr=0.1, steps=2)"},
    "ditto": {"personal": "ditto"},
    "tuned": {"personal": "tuned(steps=1)"},
    "fedex": {"adapter": "lora(r=2, alpha=4)", "aggregator": "fedex"},
    "stack": {"adapter": "lora(r=2, alpha=4, fresh='client')", "aggregator": "stack"},
    "nothing": {
        "adapter": "lora(r=2, alpha=4, fresh='client', head='frozen')",
        "aggregator": "stack",
    },
    "flexlora": {"aggregator": "flexlora"},
    "fedask": {"aggregator": "fedask"},
    "keep best": {"keep_best": "clients/loss", "eval_every": 2, "optimizer": "adam(lr=0.01)"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_flower_and_simulation_agree_bit_for_bit(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Bytes included: what a simulation counts is what travels between machines."""
    monkeypatch.setattr("fedpeft.site.load_base", _base.load_base.__wrapped__)
    plan = support_plan(bert, **{**LINES, **KINDS[kind]})
    simulate(plan, out=tmp_path / "in-process")
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out")), nodes=plan.clients or 0)
    serve(grid)
    if kind not in ("fedex", "stack", "nothing"):  # a simulation counts folds by their tensors
        assert_same(tmp_path / "in-process", tmp_path / "out")
    one, other = result_of(tmp_path / "in-process"), result_of(tmp_path / "out")
    assert all(one[0][k].tobytes() == other[0][k].tobytes() for k in one[0])
    for ours, theirs in zip(one[1], other[1], strict=True):
        assert (ours["down_bytes"], ours["down_head_bytes"]) == (
            theirs["down_bytes"],
            theirs["down_head_bytes"],
        )
        assert ours.get("eval_bytes") == theirs.get("eval_bytes")


def test_fewer_bytes_come_down(bert: Path) -> None:
    lines = {**LINES, "cohort": "everyone", "rounds": 6}
    found = simulate(support_plan(bert, **lines)).history
    plain = simulate(support_plan(bert, **{**lines, "downlink": "raw"})).history
    assert abs(found[0]["down_bytes"] - plain[0]["down_bytes"]) < 300
    for line in found[1:]:
        assert line["down_bytes"] < plain[0]["down_bytes"] / 4
        assert line["down_head_bytes"] < plain[0]["down_head_bytes"] / 4


def test_a_warm_start_is_where_differences_begin(bert: Path, tmp_path: Path) -> None:
    simulate(support_plan(bert, rounds=1), out=tmp_path / "first")
    lines = {**LINES, "warm_start": str(tmp_path / "first" / "adapter")}
    result = simulate(support_plan(bert, **lines))
    assert all(np.isfinite(value).all() for value in result.tensors.values())


def test_processes_have_the_bits_of_one(bert: Path) -> None:
    plan = support_plan(bert, **LINES)
    one, other = simulate(plan), simulate(plan, engine="processes(workers=2, threads=1)")
    assert all(np.array_equal(one.tensors[k], other.tensors[k]) for k in one.tensors)
    down = [[line["down_bytes"] for line in each.history] for each in (one, other)]
    assert down[0] == down[1]


@pytest.fixture(scope="module")
def killed_lines() -> dict[str, Any]:
    return {"downlink": LINES["downlink"], "uplink": "feedback(topk(density=0.05))"}


@pytest.fixture(scope="module")
def unkilled(
    runs: Runs, killed_lines: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Whole:
    path = tmp_path_factory.mktemp("whole") / "run"
    ended = runs(path, **killed_lines)
    assert (ended.signal, ended.error) == (0, "")
    names = read_tensor_file(path / "checkpoints/state-000003.safetensors", "")[0]
    assert {k.partition("/")[0] for k in names} >= {"mirror", "step"}
    return Whole(path, ended)


@pytest.mark.parametrize(
    "fault", ["memory.renamed:5", "checkpoint.half:2", "checkpoint.settled", "ledger.half:2"]
)
def test_killed_and_resumed_is_the_same(
    runs: Runs, unkilled: Whole, killed_lines: dict[str, Any], tmp_path: Path, fault: str
) -> None:
    killed(runs, tmp_path / "run", fault, **killed_lines)
    check_same(tmp_path / "run", unkilled, runs(tmp_path / "run", resume=True, **killed_lines))


# --- what is refused, and what it will cost ------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ({"adapter": "lora(r=4, ranks='1,2,4')"}, "sends all clients the same differences"),
        ({"adapter": "lora(r=4, ranks='1..4')"}, "sends all clients the same differences"),
        (
            {"uplink": "difference(topk)"},
            r"uplink: difference\(topk\) needs a receiver that holds.*or feedback\(topk\)",
        ),
        ({"downlink": "topk(density=0.5)"}, r"use downlink: difference\(topk\(density=0.5\)\)"),
    ],
)
def test_what_differences_cannot_bear(lines: dict[str, str], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        quadratic_plan(**{"adapter": "lora", "downlink": "difference(topk)", **lines})


def test_all_that_is_kept_may_come_down_as_it_is() -> None:
    assert quadratic_plan(downlink="topk(density=1.0)").downlink == build(
        "codecs", "topk(density=1.0)"
    )
    with pytest.raises(SpecError, match="sees to what is lost itself"):
        build("codecs", "difference(feedback(topk))")


@pytest.mark.parametrize("cohort", ["everyone", "uniform(size=2)"])
def test_the_preview_estimates_what_comes_down(bert: Path, cohort: str) -> None:
    plan = support_plan(bert, **{**LINES, "cohort": cohort, "rounds": 8})
    found = preview(plan)["bytes"]
    assert not found["exact"]
    table = simulate(plan).table
    assert found["down_total"] == pytest.approx(table["down_bytes"], rel=0.25)
