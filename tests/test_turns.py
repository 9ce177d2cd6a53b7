"""A promise to clients who overlap: each takes part in few rounds, and that alone is counted."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedpeft import Plan, simulate
from fedpeft.checkpoint import Checkpoint, load_checkpoint
from fedpeft.durable import MOMENTS
from fedpeft.errors import PlanError, RunError
from fedpeft.flower.config import Settings, check_settings
from fedpeft.ledger import CLIENT, OnDiskLedgers
from fedpeft.one_round import Run, is_over, one_round
from fedpeft.preflight import check
from fedpeft.preview import as_text, preview
from fedpeft.privacy import _accountant
from fedpeft.releases import mechanism_of
from fedpeft.turns import after, exhausted, left, possible
from fedpeft.types import Flight, Sampling
from fedpeft.watching import Quiet
from tests.killing import Runs
from tests.test_buffered import CLIENTS, WIDTH, begin, rounds, run_of
from tests.test_flower import FakeGrid, config_of, result_of, serve
from tests.test_privacy import exact_delta
from tests.test_private_runs import PLAIN
from tests.tiny import support_plan

EVEN = "uniform(denominator='expected')"
SEEDED = "user(noise_multiplier=0.5, clip=0.5, participations=2, simulate_noise=true)"
SECRET = "user(noise_multiplier=0.5, clip=0.5, participations=2)"
BUFFERED = "buffered(size=2, concurrency=3)"
SLOW = "lognormal(median=10, devices=1.0)"


def rationed(model: Path, **lines: Any) -> Plan:
    usual = {"privacy": SECRET, "weighting": EVEN, "schedule": BUFFERED, "latency": SLOW}
    return support_plan(model, **usual | {"evaluate": "test", "cohort": "everyone"} | lines)


# --- how much -----------------------------------------------------------------------------------


def few(most: int, population: int = 100) -> Sampling:
    return Sampling("turns", population, size=10, most=most)


@pytest.mark.parametrize(("most", "rounds"), [(1, 1), (1, 40), (3, 2), (5, 100)])
def test_what_a_client_spends_is_one_gaussian_for_each_time_it_takes_part(
    most: int, rounds: int
) -> None:
    import dp_accounting as dp
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    noise, times = 2.0, min(most, rounds)
    found = _accountant.epsilon(few(most), noise, rounds, 1e-5)
    relation, event = dp.NeighboringRelation.ADD_OR_REMOVE_ONE, dp.GaussianDpEvent(noise)
    library = PLDAccountant(relation, value_discretization_interval=1e-3).compose(event, times)
    assert found == pytest.approx(library.get_epsilon(1e-5), rel=2e-3)
    assert exact_delta(noise / math.sqrt(times), found) <= 1e-5
    renyi = RdpAccountant(_accountant._ORDERS, relation).compose(event, times)
    beside = _accountant.renyi(few(most), noise, rounds, 1e-5)
    assert beside == pytest.approx(renyi.get_epsilon(1e-5), rel=1e-9)
    assert beside is not None
    assert found <= beside


def test_nothing_is_gained_by_more_clients_or_rounds_and_nothing_lost() -> None:
    spent = [_accountant.epsilon(few(3), 2.0, n, 1e-5) for n in (1, 2, 3, 4, 1000)]
    assert spent[0] < spent[1] < spent[2] == spent[3] == spent[4]
    assert _accountant.epsilon(few(3, 10**6), 2.0, 9, 1e-5) == spent[2]
    everyone = _accountant.epsilon(Sampling("all", 100), 2.0, 3, 1e-5)
    assert everyone == pytest.approx(spent[2], rel=1e-9)
    noise = _accountant.calibrated(few(3), 4.0, 1000, 1e-5)
    assert 3.98 < _accountant.epsilon(few(3), noise, 1000, 1e-5) <= 4.0


# --- how often ----------------------------------------------------------------------------------


class Told(Quiet):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def warn(self, text: str) -> None:
        self.texts.append(text)


def to_the_end(run: Run) -> list[Checkpoint]:
    found = [begin(run)]
    while not is_over(run.plan, found[-1]):
        found.append(one_round(run, found[-1]))
        run.history.append(found[-1].line)
    return found[1:]


def quadratics(privacy: str = SEEDED, schedule: str = BUFFERED, **lines: Any) -> Run:
    return run_of(privacy=privacy, schedule=schedule, weighting=EVEN, **lines)


@settings(max_examples=25, deadline=None)
@given(
    most=st.integers(1, 4),
    size=st.integers(1, CLIENTS),
    concurrency=st.integers(1, 2 * CLIENTS),
    oldest=st.integers(0, 3),
)
def test_nobody_is_in_more_rounds_than_promised(
    most: int, size: int, concurrency: int, oldest: int
) -> None:
    """Whatever overlaps: until too few are left to fill a round, and then the run is over."""
    schedule = f"buffered(size={size}, concurrency={concurrency}, max_staleness={oldest})"
    privacy = SEEDED.replace("participations=2", f"participations={most}")
    run = quadratics(privacy, schedule, rounds=CLIENTS * most + 1)
    found = to_the_end(run)
    times = Counter(name for line in run.history for name in line["replied"])
    assert max(times.values()) <= most
    assert max(found[-1].turns.values()) <= most
    assert all(times[name] <= asked for name, asked in found[-1].turns.items())
    assert len(found) <= possible(run.plan, CLIENTS) <= CLIENTS * most // size
    assert found[-1].over
    assert all(not at.over for at in found[:-1])


def test_all_may_take_part_as_often_as_promised() -> None:
    """Everybody at once, all of them in each round: nothing of what was promised is left over."""
    run = quadratics(schedule=f"buffered(size={CLIENTS}, concurrency={CLIENTS})", rounds=9)
    found = to_the_end(run)
    assert len(found) == possible(run.plan, CLIENTS) == 2
    assert found[-1].turns == {f"client-{i}": 2 for i in range(CLIENTS)}
    assert found[-1].over == (
        "0 clients are left who have not been asked 2 times, and a round takes 5 replies; more "
        "need a higher participations, which costs epsilon, or more clients"
    )


def test_who_is_at_work_may_still_fill_a_round() -> None:
    plan = quadratics(rounds=9).plan
    asked = {"a": 2, "b": 2, "c": 1}
    assert left(plan, asked, ["a", "b", "c", "d"]) == ["c", "d"]
    assert after(plan, asked, ["c", "d"]) == {"a": 2, "b": 2, "c": 2, "d": 1}
    assert exhausted(plan, asked, [], ["a", "b"])
    assert not exhausted(plan, asked, [], ["a", "b", "c", "d"])
    assert not exhausted(plan, asked, [Flight("a", 1, 0.0)], ["a", "b", "c"])
    free = run_of(schedule=BUFFERED).plan
    assert left(free, asked, "abc") == ["a", "b", "c"]
    assert after(free, {}, ["a"]) == {}
    assert not exhausted(free, asked, [], [])


def test_who_is_asked_follows_from_the_coins_of_the_round_and_from_nothing_said() -> None:
    """Other records, the same times: the same clients are asked, in the same rounds."""
    asked = []
    for places in (0.0, 9.0):
        run = quadratics(rounds=5)
        run.site.learner.places[:] += places  # type: ignore[attr-defined]
        asked.append([(at.turns, at.flying) for at in rounds(run, 5)])
    assert asked[0] == asked[1]
    fresh = [[at.turns for at in rounds(quadratics(SECRET, rounds=5), 3)] for _ in range(6)]
    assert any(turns != fresh[0] for turns in fresh), "the plan's seed decides whom it asks"


# --- what is released ---------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [0, 2])
def test_noise_has_the_declared_deviation_over_the_buffer_s_size(
    missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds of rounds in which nothing is sent but zeros, some of them never."""
    monkeypatch.setattr("fedpeft.one_round.spent", lambda *_: {})  # a second for each round
    privacy = "user(noise_multiplier=0.7, clip=0.5, participations=1000)"
    still = "plain(optimizer='sgd', lr=1e-14, steps=1, batch=1)"
    dropout = f"always(dropout={0.2 * missing})"
    run = quadratics(privacy, trainer=still, rounds=400, availability=dropout)
    models = [np.zeros(WIDTH), *(at.state.params["x"] for at in rounds(run, 400))]
    draws = np.diff(np.array(models, np.float64), axis=0).reshape(-1) / (0.7 * 0.5 / 2)
    assert stats.kstest(draws, "norm").pvalue > 1e-4
    low, high = stats.chi2.ppf([1e-5, 1 - 1e-5], len(draws)) / len(draws)
    assert low < np.mean(draws**2) < high


@pytest.fixture(scope="module")
def runs(bert: Path) -> Iterator[Runs]:
    with Runs(bert) as made:
        yield made


def lines_of(**lines: Any) -> dict[str, Any]:
    usual = {"privacy": SEEDED, "weighting": EVEN, "evaluate": "test", "cohort": "everyone"}
    return {**PLAIN, **usual, "schedule": BUFFERED, "latency": SLOW, "rounds": 4, **lines}


POINTS = (
    *(f"checkpoint.{moment}:3" for moment in MOMENTS),
    *(f"ledger.{moment}:2" for moment in MOMENTS[:3]),
    *("checkpoint.half:1", "memory.half:3"),
)


@pytest.fixture(scope="module")
def whole(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return runs(tmp_path_factory.mktemp("whole") / "run", **lines_of())


@pytest.mark.parametrize("fault", POINTS)
def test_a_run_that_is_killed_goes_on_with_the_same_bits(
    runs: Runs, whole: Any, tmp_path: Path, fault: str
) -> None:
    """The same releases of the same clients: none is asked more often for the kill."""
    lines, out = lines_of(), tmp_path / "run"
    assert runs(out, fault=fault, **lines).signal == signal.SIGKILL
    again = runs(out, resume=True, **lines)
    assert again.error == ""
    assert again.tensors == whole.tensors
    replied = [[line["replied"] for line in ended.history or ()] for ended in (again, whole)]
    assert replied[0] == replied[1]
    times = Counter(name for names in replied[0] for name in names)
    assert max(times.values()) <= 2


def checkpoint(path: Path) -> Checkpoint:
    digest = json.loads((path / "run.json").read_text())["digest"]
    found = load_checkpoint(path / "checkpoints", digest)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("fault", "done"), [("checkpoint.written:3", 1), ("checkpoint.settled:3", 2)]
)
def test_a_secret_round_that_is_played_again_is_one_release(
    runs: Runs, tmp_path: Path, fault: str, done: int
) -> None:
    """The last one, twice from what is durable: the same clients, the same noise and model."""
    lines, out = lines_of(privacy=SECRET, rounds=done + 1), tmp_path / "run"
    assert runs(out, fault=fault, **lines).signal == signal.SIGKILL
    stood = checkpoint(out)
    assert stood.state.round == done
    assert sum(stood.turns.values()) >= 2 * stood.state.round
    shutil.copytree(out, tmp_path / "copy")
    found = [runs(path, resume=True, **lines) for path in (out, tmp_path / "copy")]
    assert [ended.error for ended in found] == ["", ""]
    assert found[0].tensors == found[1].tensors
    ends = [checkpoint(path) for path in (out, tmp_path / "copy")]
    assert ends[0].turns == ends[1].turns
    assert max(ends[0].turns.values()) <= 2


def test_a_run_that_runs_out_of_turns_ends_with_a_line_and_is_finished(
    bert: Path, tmp_path: Path
) -> None:
    plan = rationed(bert, privacy=SECRET.replace("=2)", "=1)"), rounds=9)
    told, out = Told(), tmp_path / "run"
    result = simulate(plan, out=out, watch=told)
    assert len(result.history) == 2
    assert result.table["rounds"] == 2
    (line,) = [text for text in told.texts if "is over" in text]
    assert line.startswith("the run is over after 2 of 9 rounds: 0 clients are left who have not")
    assert "spent in 2 rounds" in (out / "adapter/README.md").read_text()
    epsilons = [line["epsilon"] for line in result.history]
    assert epsilons[0] == epsilons[1]  # nobody takes part twice
    assert simulate(plan, out=out, resume=True).table == result.table
    for name in ("rounds.jsonl", "result.json"):
        assert "client-0" not in (out / name).read_text()


# --- at nodes -----------------------------------------------------------------------------------


def asked_at(grid: FakeGrid) -> Counter[int]:
    sent = (m for m in grid.sent if m.metadata.message_type == "train")
    return Counter(grid.nodes[m.metadata.dst_node_id] for m in sent)


@pytest.mark.usefixtures("apart")
def test_on_flower_what_is_refused_keeps_its_place_and_counts(bert: Path, tmp_path: Path) -> None:
    """One client says nothing but errors: as many rounds, each with noise, as with its updates."""
    plan = rationed(bert, latency="none", rounds=9, privacy=SEEDED)
    grid = FakeGrid(config_of(plan, out=str(tmp_path / "out")), nodes=4)
    real = grid.app
    broken = {node for node, place in grid.nodes.items() if place == 1}

    def app(message: Any, context: Any) -> Any:
        from flwr.app import Error, Message

        if context.node_id in broken and message.metadata.message_type == "train":
            return Message(Error(2, "<class 'X'>:<'\nException: no'>"), reply_to=message)
        return real(message, context)

    grid.app = app  # type: ignore[assignment]
    serve(grid)
    _, history, _ = result_of(tmp_path / "out")
    assert len(history) == 4  # four clients, two times each, two in a round
    assert asked_at(grid) == dict.fromkeys(range(4), 2)
    places = [len(line["replied"]) + len(line.get("refused", ())) for line in history]
    assert places == [2, 2, 2, 2]
    assert sum("client-001" in line.get("refused", ()) for line in history) == 2


@pytest.mark.usefixtures("apart")
def test_nodes_count_alike_and_a_server_that_comes_back_makes_nobody_take_part_more_often(
    bert: Path, tmp_path: Path
) -> None:
    """Killed at each push in turn: what nodes wrote down and what was released stay in bounds."""
    plan = rationed(bert, latency="none", rounds=9)
    for killed in range(1, 9):
        out = tmp_path / f"out-{killed}"
        grid = FakeGrid(config_of(plan, out=str(out)), nodes=4)
        push, count = grid.push_messages, [0]

        def pushing(messages: Any, at: int = killed, count: Any = count, push: Any = push) -> Any:
            told = list(messages)
            count[0] += told[0].metadata.message_type == "train"
            if count[0] == at:
                raise KeyboardInterrupt
            return push(told)

        grid.push_messages = pushing  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            serve(grid)
        again = FakeGrid(config_of(plan, out=str(out), resume=True), nodes=4)
        serve(again)
        run = json.loads((out / "run.json").read_text())["run"]
        for _, ledger in OnDiskLedgers(tmp_path / "home/ledgers").all():
            own = [release for release in ledger.releases if release.run == run]
            assert {release.unit for release in own} <= {CLIENT}
            assert len({(r.round, r.broadcast) for r in own}) == len(own) <= 2
            assert len({r.round for r in own}) == len(own)  # never another broadcast of a round
        stood = checkpoint(out)
        assert max(stood.turns.values()) <= 2
        assert len((out / "rounds.jsonl").read_text().splitlines()) == 4


@pytest.mark.usefixtures("apart")
def test_nobody_is_asked_again_because_its_app_broke_down(bert: Path, tmp_path: Path) -> None:
    config = config_of(rationed(bert, latency="none"), out=str(tmp_path / "out"), every=True)
    with pytest.raises(PlanError, match=r"so its reply comes later.*set every=false"):
        serve(FakeGrid(config, nodes=4))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("apart")
def test_nobody_is_asked_whose_work_follows_its_records(bert: Path, tmp_path: Path) -> None:
    for trainer in ("plain(lr=0.01, epochs=1)", "plain(lr=0.01, records=30)"):
        plan = rationed(bert, latency="none", trainer=trainer)
        with pytest.raises(PlanError, match=r"trainer: plain.* more records.*; say steps=\.\.\."):
            serve(FakeGrid(config_of(plan, out=str(tmp_path / "out")), nodes=4))
    assert not (tmp_path / "out").exists()
    free = support_plan(bert, trainer="plain(lr=0.01, epochs=1)")
    check_settings(free, Settings(every=True))


@pytest.mark.usefixtures("apart")
def test_no_round_is_played_while_nobody_is_there_who_may_be_asked(
    bert: Path, tmp_path: Path
) -> None:
    """Those who are have no turns left: the run waits, ends with a line, and goes on later."""
    lines = {"privacy": SECRET.replace("=2)", "=1)"), "schedule": "buffered(size=1, concurrency=1)"}
    plan, out = rationed(bert, latency="none", rounds=4, **lines), tmp_path / "out"
    grid = FakeGrid(config_of(plan, out=str(out), wait=0.2), nodes=4)
    ids = grid.get_node_ids

    def staying() -> Any:
        asked = [m.metadata.dst_node_id for m in grid.sent if m.metadata.message_type == "train"]
        return ids() if len(asked) < 2 else asked

    grid.get_node_ids = staying  # type: ignore[method-assign]
    with pytest.raises(
        RunError, match=r"for 0\.2 seconds, of the 2 that may still be asked; start"
    ):
        serve(grid)
    assert len((out / "rounds.jsonl").read_text().splitlines()) == 2
    again = FakeGrid(config_of(plan, out=str(out), resume=True), nodes=4)
    serve(again)
    assert asked_at(grid) + asked_at(again) == dict.fromkeys(range(4), 1)
    assert len((out / "rounds.jsonl").read_text().splitlines()) == 4


# --- what is told and refused -------------------------------------------------------------------


def test_the_preview_says_how_often_and_for_how_many_rounds(bert: Path) -> None:
    found = preview(rationed(bert, rounds=9))
    told = found["privacy"]
    assert (told["participations"], told["rounds_possible"]) == (2, 4)
    assert told["epsilon"] == pytest.approx(
        _accountant.epsilon(Sampling("all", 4), 0.5, 2, 1e-5), rel=1e-9
    )
    expected = 0.5 * math.sqrt(told["travelling"]) / 2
    assert told["noise_norm"] == pytest.approx(expected)
    text = as_text(found)
    for words in (
        "each client is asked at most 2 times, enough for 4 rounds at most",
        "2 replies in a round, of 4 clients who are each asked at most 2 times",
        "must not depend on anybody's records",
        f"size={math.ceil(told['noise_norm'] * 2)} in the schedule",
        "4 clients with participations=2 fill at most 4 rounds, and the plan has 9",
    ):
        assert words in text
    assert not any("fill at most" in w for w in check(rationed(bert, rounds=4)).warnings)
    assert "participations" not in as_text(preview(support_plan(bert)))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ({"schedule": "sync"}, "which schedule: buffered without compensation counts"),
        ({"schedule": "sync(over=2)"}, "which schedule: buffered without compensation counts"),
        ({"schedule": "buffered(size=2, compensation=0.1)"}, "single ones would be kept or looked"),
        ({"schedule": "inversion(buffered)"}, "what a single client's records are like"),
        ({"privacy": SECRET.replace("clip", "quantile=0.5, clip")}, "leave quantile out"),
        ({"privacy": "user(noise_multiplier=1, participations=0)"}, "participations"),
        ({"privacy": "user(noise_multiplier=1)"}, r"user\(participations=...\) with buffered"),
        ({"availability": "bernoulli(mean=0.5)"}, "who is there depends on nobody's records"),
        ({"availability": "markov(rates='shuffled')"}, "depends on nobody's records"),
        ({"latency": "lognormal(slow=0.3, stragglers='rarest')"}, "use stragglers='drawn'"),
        ({"weighting": "uniform(denominator='population')"}, "divides by the size of its buffer"),
        ({"weighting": "uniform"}, "weights and their denominator must follow"),
        ({"cohort": "poisson(rate=0.5)"}, "asks whoever is free"),
    ],
)
def test_what_would_break_the_promise_is_refused(
    bert: Path, lines: Mapping[str, str], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        rationed(bert, **lines)


@pytest.mark.parametrize(
    "lines",
    [
        {"schedule": "buffered(size=3, law='exponential', deadline=60)"},
        {"availability": "bernoulli(rates='same', mean=0.7, dropout=0.2)"},
        {"latency": "lognormal(slow=0.3)", "uplink": "feedback(topk(density=0.1) | int8)"},
        {"privacy": f"{SECRET} | record(epsilon=8)", "trainer": "plain(lr=0.01, steps=2, batch=4)"},
    ],
)
def test_what_does_not_is_played(bert: Path, lines: Mapping[str, str]) -> None:
    result = simulate(rationed(bert, rounds=2, **lines))
    assert len(result.history) == 2
    assert all(np.isfinite(v).all() for v in result.tensors.values())


def test_records_are_hidden_for_as_many_rounds_as_clients_take_part_in(bert: Path) -> None:
    """Two of nine rounds need less noise than nine."""
    both = f"{SECRET} | record(epsilon=8)"
    lines = {"trainer": "plain(lr=0.01, steps=2, batch=4)", "rounds": 9}
    noise = [
        preview(rationed(bert, privacy=privacy, **lines))["hiding"]["noise_multiplier"]
        for privacy in (both, "record(epsilon=8, rounds=2)", "record(epsilon=8)")
    ]
    assert noise[0] == noise[1] < noise[2]
    made = mechanism_of(rationed(bert, privacy=both, **lines), 4)
    assert made is not None
    assert made.sampling.most == 2
