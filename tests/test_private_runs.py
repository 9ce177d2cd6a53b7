"""Runs that promise something: what leaves, what is secret, what is redone, what is refused."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import shutil
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from fedpeft import Plan, simulate, spending
from fedpeft.checkpoint import load_checkpoint
from fedpeft.durable import MOMENTS
from fedpeft.errors import PlanError, RunError
from fedpeft.federation import deal
from fedpeft.ledger import InProcessLedgers
from fedpeft.one_round import one_round
from fedpeft.post import Simulated
from fedpeft.preflight import check
from fedpeft.preview import as_text, preview
from fedpeft.releases import Coins, chooser, drawn
from fedpeft.site import Site
from fedpeft.spending import Purse
from fedpeft.types import Privacy
from fedpeft.watching import Quiet
from tests.killing import Runs
from tests.tiny import support_plan

EVEN = "uniform(denominator='expected')"
SEEDED = "user(noise_multiplier=0.5, clip=0.5, simulate_noise=true)"
SECRET = "user(noise_multiplier=0.5, clip=0.5)"


def private(model: Path, **lines: Any) -> Plan:
    usual = {"privacy": SECRET, "weighting": EVEN, "cohort": "poisson(rate=0.6)"}
    return support_plan(model, **usual | {"evaluate": "test"} | lines)


# --- what leaves --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("private") / "run"
    simulate(private(bert, rounds=3), out=path)
    return path


def test_the_ledger_tells_nothing_of_clients(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2]
    allowed = {"round", "epsilon", "epsilon_rdp", "clip", "test/loss", "test/accuracy", "test/f1"}
    for line in lines:
        assert set(line) == allowed
    spent = [line["epsilon"] for line in lines]
    assert spent == sorted(spent)
    result = json.loads((run / "result.json").read_text())
    assert result["epsilon"] == spent[-1]
    assert not {"up_bytes", "down_bytes", "seconds"} & set(result)
    for name in ("rounds.jsonl", "result.json", "adapter/README.md", "adapter/fedpeft.json"):
        assert "client-0" not in (run / name).read_text()


def test_tensorboard_tells_no_more(run: Path) -> None:
    events = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    found = events.EventAccumulator(str(run))
    found.Reload()
    assert set(found.Tags()["scalars"]) <= {
        *("epsilon", "epsilon_rdp", "clip", "test/loss", "test/accuracy", "test/f1")
    }


def test_the_model_card_says_what_was_spent(run: Path) -> None:
    card = (run / "adapter/README.md").read_text()
    last = json.loads((run / "rounds.jsonl").read_text().splitlines()[-1])
    assert f"epsilon {last['epsilon']:.3f} at delta 1e-05, spent in 3 rounds" in card
    assert f"{last['epsilon_rdp']:.3f} by RDP" in card
    for words in ("add or remove one client", "PLD", "probability 0.6", "the server is trusted"):
        assert words in card
    assert "Training records" not in card
    assert "fingerprint" not in card


def test_checkpoints_are_their_owner_s_alone_and_coins_are_new_in_each_run(
    run: Path, bert: Path, tmp_path: Path
) -> None:
    simulate(private(bert, rounds=3), out=tmp_path / "other")
    keys = []
    for folder in (run, tmp_path / "other"):
        paths = sorted((folder / "checkpoints").iterdir())
        assert [p.stat().st_mode & 0o777 for p in paths] == [0o600]  # no round's key is left
        digest = json.loads((folder / "run.json").read_text())["digest"]
        found = load_checkpoint(folder / "checkpoints", digest)
        assert found is not None
        keys.append(found.state.coins.key)
    assert len({*keys}) == 2
    weights = [p / "adapter/adapter_model.safetensors" for p in (run, tmp_path / "other")]
    assert weights[0].read_bytes() != weights[1].read_bytes()


def test_a_simulation_that_seeds_its_noise_is_repeatable_and_says_so(
    bert: Path, tmp_path: Path
) -> None:
    plan = private(bert, privacy=SEEDED, evaluate="clients,test")
    told: list[str] = []

    class Told(Quiet):
        def warn(self, text: str) -> None:
            told.append(text)

    one = simulate(plan, out=tmp_path / "a", watch=Told())
    other, shared = simulate(plan), simulate(plan, engine="inline(group=4)")
    assert all(np.array_equal(one.tensors[k], other.tensors[k]) for k in one.tensors)
    for k in one.tensors:  # how passes round is the processor's affair
        np.testing.assert_allclose(shared.tensors[k], one.tensors[k], atol=1e-6)
    assert "NOT private" in (tmp_path / "a/adapter/README.md").read_text()
    assert any("NOT private" in text for text in told)
    assert "replied" in one.history[0]
    again = simulate(replace(plan, seed=1))
    assert any(not np.array_equal(one.tensors[k], again.tensors[k]) for k in one.tensors)


def test_without_a_promise_nothing_is_clipped_drawn_or_told(bert: Path) -> None:
    plan = support_plan(bert)
    assert drawn(plan, 0, plan.privacy.bound) == Coins()
    result = simulate(plan)
    assert not {"epsilon", "clip"} & {name for line in result.history for name in line}
    assert "epsilon" not in result.table


# --- a redone round -----------------------------------------------------------------------------

PLAIN = {"correction": "none", "keep_best": "none", "compare": "", "optimizer": "sgd"}
"""What ``killing.LINES`` has and a promise does not go with."""


@pytest.fixture(scope="module")
def runs(bert: Path) -> Iterator[Runs]:
    with Runs(bert) as made:
        yield made


def lines_of(**lines: Any) -> dict[str, Any]:
    usual = {"privacy": SECRET, "weighting": EVEN, "evaluate": "test", "cohort": "everyone"}
    return PLAIN | usual | lines


def coins(path: Path) -> tuple[int, Coins]:
    digest = json.loads((path / "run.json").read_text())["digest"]
    found = load_checkpoint(path / "checkpoints", digest)
    assert found is not None
    return found.state.round, found.state.coins


def test_a_round_that_is_played_again_releases_the_same(runs: Runs, tmp_path: Path) -> None:
    """Killed before round 1 is durable: it goes on twice from one set of coins."""
    lines, out = lines_of(rounds=2, cohort="poisson(rate=0.6)"), tmp_path / "run"
    assert runs(out, fault="checkpoint.half:3", **lines).signal == signal.SIGKILL
    assert coins(out)[0] == 1
    shutil.copytree(out, tmp_path / "copy")
    found = [runs(path, resume=True, **lines) for path in (out, tmp_path / "copy")]
    assert [ended.error for ended in found] == ["", ""]
    assert found[0].tensors == found[1].tensors
    assert found[0].history == found[1].history


def test_coins_are_durable_before_the_first_broadcast(bert: Path, tmp_path: Path) -> None:
    plan, out = private(bert, cohort="everyone"), tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedpeft.driver.one_round", _stopped)
        with pytest.raises(KeyboardInterrupt):
            simulate(plan, out=out)
    round, first = coins(out)
    assert (round, len(first.key), first.clip) == (0, 32, 0.5)
    with pytest.raises(RunError, match="add --resume, or choose another --out"):
        simulate(plan, out=out)
    used: list[Coins] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedpeft.driver.one_round", lambda run, at: _stopped(run, at, used))
        with pytest.raises(KeyboardInterrupt):
            simulate(plan, out=out, resume=True)
    assert used == [first]


def _stopped(run: Any, at: Any, used: list[Coins] | None = None) -> Any:
    if used is not None:
        used.append(at.state.coins)
    raise KeyboardInterrupt


def test_no_key_of_a_round_in_the_ledger_is_left(bert: Path, tmp_path: Path) -> None:
    plan, out = private(bert, cohort="everyone", rounds=4), tmp_path / "run"
    played, left = list[str](), list[set[str]]()

    def noted(run: Any, at: Any) -> Any:
        held = (path.read_bytes() for path in (out / "checkpoints").iterdir())
        left.append({key for key in played if any(key.encode() in data for data in held)})
        played.append(at.state.coins.key.hex())
        assert coins(out)[1].key.hex() == played[-1]
        return one_round(run, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedpeft.driver.one_round", noted)
        simulate(plan, out=out)
    assert len({*played}) == 4
    assert left == [set()] * 4
    (last,) = (out / "checkpoints").iterdir()
    assert not any(key.encode() in last.read_bytes() for key in played)


@pytest.mark.parametrize(
    "fault",
    [
        *(f"checkpoint.{moment}:3" for moment in MOMENTS),
        *(f"ledger.{moment}:2" for moment in ("begun", "half", "written", "synced", "settled")),
    ],
)
def test_one_checkpoint_is_enough_wherever_a_kill_comes(
    runs: Runs, tmp_path: Path, fault: str
) -> None:
    """Before the line is durable there are two; what is torn then is of the newer one."""
    lines, out = lines_of(rounds=3), tmp_path / "run"
    assert runs(out, fault=fault, **lines).signal == signal.SIGKILL
    before = coins(out)
    again = runs(out, resume=True, **lines)
    assert again.error == ""
    assert [line["round"] for line in again.history or ()] == [0, 1, 2]
    (path,) = (out / "checkpoints").iterdir()
    assert before[1].key.hex().encode() not in path.read_bytes()


def test_what_was_released_is_not_made_again(runs: Runs, tmp_path: Path) -> None:
    """Going back behind a released round would add its noise to other replies."""
    lines, out = lines_of(rounds=3), tmp_path / "run"
    assert runs(out, fault="ledger.settled:2", **lines).signal == signal.SIGKILL
    sorted((out / "checkpoints").iterdir())[-1].unlink()
    again = runs(out, resume=True, **lines)
    assert "round 1 was released, and what it released cannot" in again.error


# --- Flower's defects ---------------------------------------------------------------------------
# 1, 2 (the clip's direction, its noise): test_privacy.py, the clip that follows and the noise of
# every round; 6 (weights): there, no client moves the sum, and the refusals below.


def broken(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    real = Simulated.replies

    def replies(self: Simulated, taken: Any) -> Iterator[Any]:
        for client, reply in real(self, taken):
            yield client, RunError("broken") if client in names else reply

    monkeypatch.setattr(Simulated, "replies", replies)


def test_3_a_zero_update_is_an_update(bert: Path) -> None:
    plan = private(bert, privacy=SEEDED, trainer="plain(optimizer='sgd', lr=1e-14, steps=1)")
    plan = replace(plan, cohort=support_plan(bert).cohort)
    result = simulate(plan)
    assert [len(line["replied"]) for line in result.history] == [4, 4]
    assert all(np.isfinite(v).all() for v in result.tensors.values())


def test_4_a_failed_client_is_a_zero_and_even_all_failed_release_noise(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = private(bert, privacy=SEEDED, cohort="everyone")
    whole = simulate(plan)
    broken(monkeypatch, "client-001")
    one = simulate(plan)
    assert [len(line["replied"]) for line in one.history] == [3, 3]
    broken(monkeypatch, *(f"client-{i:03}" for i in range(4)))
    none = simulate(plan)
    assert [len(line["replied"]) for line in none.history] == [0, 0]
    spent = [[line["epsilon"] for line in r.history] for r in (whole, one, none)]
    assert spent[0] == spent[1] == spent[2]
    assert len({r.tensors["classifier.weight"].tobytes() for r in (whole, one, none)}) == 3


def test_5_fewer_replies_do_not_change_noise_or_denominator(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same coins with and without a client: what differs is its clipped update over four."""
    plan = private(bert, privacy=SEEDED, cohort="everyone", rounds=1)
    whole = simulate(plan).tensors
    broken(monkeypatch, "client-001")
    less = simulate(plan).tensors
    apart = np.sqrt(sum(float(((whole[k] - less[k]).astype(float) ** 2).sum()) for k in whole))
    assert 0 < apart <= 0.5 / 4 * (1 + 1e-5)


def test_7_the_accountant_knows_sampling_and_a_clip_that_moves(bert: Path) -> None:
    moving = "user(noise_multiplier=1.0, clip=0.5, quantile=0.5, bit_noise=2.0)"
    still = "user(noise_multiplier=1.0, clip=0.5)"
    found = [
        preview(private(bert, privacy=privacy, cohort=cohort))["privacy"]["epsilon"]
        for privacy in (still, moving)
        for cohort in ("everyone", "poisson(rate=0.1)")
    ]
    assert found[0] == found[2]
    assert found[1] == found[3]
    assert found[1] < found[0]


def test_8_epsilon_is_that_of_all_rounds_so_far(bert: Path) -> None:
    result = simulate(private(bert, privacy=SEEDED, rounds=3))
    spent = [line["epsilon"] for line in result.history]
    assert spent[0] < spent[1] < spent[2]
    assert spent[2] == preview(private(bert, rounds=3))["privacy"]["epsilon"]


def test_the_clip_that_follows_is_told_and_goes_on_after_a_kill(runs: Runs, tmp_path: Path) -> None:
    moving = (
        "user(noise_multiplier=1.0, clip=0.5, quantile=0.5, bit_noise=2.0, simulate_noise=true)"
    )
    lines = lines_of(privacy=moving, rounds=3)
    whole = runs(tmp_path / "whole", **lines)
    assert whole.history is not None
    clips = [line["clip"] for line in whole.history]
    assert clips[0] == 0.5
    assert len({*clips}) == 3
    assert runs(tmp_path / "run", fault="checkpoint.settled:2", **lines).signal == signal.SIGKILL
    again = runs(tmp_path / "run", resume=True, **lines)
    assert again.history is not None
    assert [line["clip"] for line in again.history] == clips
    assert again.tensors == whole.tensors


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ({"weighting": "examples"}, "privacy: user.*weights and their denominator must follow"),
        ({"weighting": "uniform"}, r"use weighting: uniform\(denominator='expected'\)"),
        ({"weighting": "fedau"}, "weights that follow from who took part are private"),
        ({"weighting": "mifa"}, "one update would count in every later round"),
        ({"weighting": "fedvarp"}, "one update would count in every later round"),
        ({"weighting": "known(rates='0.5')"}, "must follow from the plan alone"),
        ({"correction": "feddyn"}, "control state has no such bound"),
        ({"correction": "fedamd"}, "use correction: none or fedprox"),
        ({"aggregator": "ties", "adapter": "lora(train='B')"}, "so the step must be a function of"),
        ({"aggregator": "flexlora"}, "adds noise to the sum of the updates"),
        ({"aggregator": "fedask"}, "answers are neither clipped nor noised"),
        ({"schedule": "buffered(size=2)", "cohort": "everyone"}, "where replies compete"),
        ({"schedule": "inversion(buffered)"}, "what a single client's records are like"),
        ({"schedule": "sync(minimum=2)"}, "where replies compete"),
        ({"schedule": "sync(over=1.5)"}, "use schedule: sync without minimum and over"),
        ({"evaluate": "clients,test"}, "metrics on the clients' held-out records are not noised"),
        ({"compare": "base, alone"}, "alone trains on the clients' records without noise"),
        ({"compare": "central"}, "central trains on the clients' records without noise"),
        ({"keep_best": "clients/accuracy"}, "must be a metric of test"),
    ],
)
def test_what_would_break_the_promise_is_refused(
    bert: Path, lines: Mapping[str, str], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        private(bert, **lines)


@pytest.mark.parametrize(
    "lines",
    [
        {"schedule": "sync(deadline=60)"},
        {"uplink": "feedback(topk(density=0.1) | int8)", "downlink": "difference(topk | int8)"},
        {"optimizer": "adam", "correction": "fedprox"},
        {"aggregator": "fedsvd", "adapter": "lora(r=2, train='B', send='both')"},
        {"aggregator": "frlora", "adapter": "lora(r=2, fresh='round')"},
        {"adapter": "lora(r=4, ranks='1..4')", "cohort": "uniform(size=2)"},
        {"adapter": "lora(r=4, ranks='1,4', head='local')"},
        {"adapter": "core(r=2)", "keep_best": "test/accuracy"},
        {"availability": "bernoulli(mean=0.4, dropout=0.3)", "cohort": "uniform(size=2)"},
        {"compare": "base", "holdout": 0, "evaluate": "clients,test"},
    ],
)
def test_what_does_not_is_played(bert: Path, lines: Mapping[str, str]) -> None:
    result = simulate(private(bert, **lines))
    assert len(result.history) == 2
    assert all(np.isfinite(v).all() for v in result.tensors.values())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedpeft.attendance.Attendance.reachable", lambda *_: [])
        empty = simulate(private(bert, **lines))
    assert [line["epsilon"] for line in empty.history] == [
        line["epsilon"] for line in result.history
    ]


@dataclass(frozen=True)
class Masking(Privacy):
    """Secure aggregation as far as a plan would see it: it adds up what travels."""

    needs: ClassVar[Mapping[str, str]] = {
        "uplink-linear-code": "adds up what clients send before it is decoded, so codes must add "
        "up: use uplink: raw",
        "linear": "sees sums alone; use aggregator: mean",
    }


@pytest.mark.parametrize("uplink", ["int8", "topk", "half", "feedback(topk)", "raw | int8"])
def test_masking_can_refuse_codes_that_do_not_add_up(bert: Path, uplink: str) -> None:
    """The downlink's code does not help: it is raw here, whose values do add up."""
    plan = support_plan(bert, uplink=uplink)
    with pytest.raises(PlanError, match="so codes must add up: use uplink: raw"):
        replace(plan, privacy=Masking())
    for good in ("raw", "sketch"):
        fits = replace(support_plan(bert, uplink=good), privacy=Masking())
        assert fits.lines()["uplink"].startswith(good)


@dataclass(frozen=True)
class Claims(Privacy):
    """Says that it hides clients or records, and has nothing that does."""

    records: bool = False

    @property
    def bound(self) -> float:
        return math.inf if self.records else 1.0

    @property
    def secret(self) -> bool:
        return True

    @property
    def hides(self) -> bool:
        return self.records


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (False, "bounds updates, and has no mechanism that noises their sum"),
        (True, r"says that it hides records, and not by what steps \(stepping\)"),
    ],
)
def test_a_promise_that_nothing_keeps_is_no_plan_and_trains_nobody(
    bert: Path, records: bool, message: str
) -> None:
    """Neither checked nor charged: no round of it counts as nothing."""
    plan = replace(support_plan(bert, weighting=EVEN, evaluate="test", holdout=0))
    plan = replace(plan, privacy=Claims(records))
    with pytest.raises(PlanError, match=message):
        check(plan)
    with contextlib.closing(Site(plan, deal(plan))) as site:
        purse = Purse(InProcessLedgers(), is_apart=True)
        with pytest.raises(PlanError, match=message):
            spending.key_of(plan, site, "client-000", ("run", 0), [], purse)


# --- the plan's preview -------------------------------------------------------------------------


def test_the_preview_says_what_is_promised_and_what_it_costs(bert: Path) -> None:
    plan = private(bert, privacy="user(epsilon=8, clip=0.5)", rounds=4)
    found = preview(plan)
    told = found["privacy"]
    assert told["epsilon_per_round"] < told["epsilon"] <= 8
    assert told["epsilon"] < told["epsilon_rdp"]
    travels = told["travelling"]
    expected = told["noise_multiplier"] * np.sqrt(travels) / (0.6 * 4)
    assert told["noise_norm"] == pytest.approx(expected)
    clients, fewer = told["clients_needed"], told["parameters_needed"]
    assert told["noise_multiplier"] * np.sqrt(travels) / (0.6 * clients) <= 1
    assert told["noise_multiplier"] * np.sqrt(fewer) / (0.6 * 4) <= 1
    text = as_text(found)
    for words in (
        *("epsilon ", "by PLD", "a round; delta 1e-05", "one client; neighbours: add or remove"),
        *("the server is trusted", "with probability 0.6", "accuracy will be near chance"),
        f"{clients:,} clients asked as often",
    ):
        assert words in text
    assert "privacy" in preview(support_plan(bert))
    assert "epsilon" not in as_text(preview(support_plan(bert)))


def test_a_fixed_cohort_is_accounted_by_rdp_for_replaced_clients(bert: Path) -> None:
    told = preview(private(bert, cohort="uniform(size=2)"))["privacy"]
    assert (told["accountant"], told["relation"]) == ("RDP", "replace one client")
    assert told["noise_norm"] == pytest.approx(2 * 0.5 * np.sqrt(told["travelling"]) / 2)
    everyone = preview(private(bert, cohort="uniform(size=4)"))["privacy"]
    assert (everyone["accountant"], everyone["sampler"]) == ("PLD", "all 4 clients in every round")


def test_warnings(bert: Path, tmp_path: Path) -> None:
    weak = check(private(bert, privacy="user(noise_multiplier=1.0, delta=0.3)")).warnings
    assert any("delta=0.3 allows to publish the data of one client in 4" in text for text in weak)
    assert not any("privacy" in text for text in check(private(bert)).warnings)


def test_the_planned_noise_is_what_was_measured_for_the_study() -> None:
    """2,000 users, rate 0.25, 20 rounds: epsilon 8, 3 and 1, with RDP as it was planned with."""
    from fedpeft.privacy import _accountant
    from fedpeft.types import Sampling

    users = Sampling("coins", 2000, 0.25)
    for target, clips in ((8.0, 0.42), (3.0, 0.80), (1.0, 1.9)):
        noise = _accountant.calibrated(users, target, 20, 1e-5)
        beside = _accountant.renyi(users, noise, 20, 1e-5)
        assert beside is not None
        assert beside > target >= _accountant.epsilon(users, noise, 20, 1e-5)
        assert 0.9 * clips < noise * np.sqrt(37_600) / 500 < clips


def test_the_cohort_of_a_round_is_drawn_from_its_own_coins(bert: Path) -> None:
    from fedpeft.state import ServerState

    plan = private(bert, cohort="poisson(rate=0.5)")
    names = [f"c{i}" for i in range(64)]
    drawn_by = [
        tuple(
            chooser(plan, ServerState({}, {}, {}, coins=Coins(bytes([i]) * 32, 1.0)), names)(names)
        )
        for i in range(8)
    ]
    assert len({*drawn_by}) == 8
