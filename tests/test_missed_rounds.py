"""Rounds that clients were not asked in and train in: as if they had trained when they were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft import simulate
from fedpeft.client_rounds import ALONE, Played, group_round
from fedpeft.errors import PlanError
from fedpeft.grouping import Grouping
from fedpeft.memory import Memory
from fedpeft.plan import Plan
from fedpeft.preview import as_text, preview
from fedpeft.rng import derive_seed
from fedpeft.spec import build, method
from fedpeft.stacking import stack, unstack
from fedpeft.tensors import prefixed, select
from fedpeft.types import Correction, Job, Tensors
from tests.architectures import fresh_base
from tests.camp import CLASSES, CLASSIFY, SIZES, WIDE, Camp, Moment, camp_of, second_round
from tests.tiny import support_plan

ADAPTER = "r=3, alpha=6, local='B', head='local', dropout=0.3"
MOMENTUM = "plain(optimizer='sgd', lr=0.1, epochs=1, batch=2, momentum=0.5, schedule='linear')"
ADMM: dict[str, Any] = {
    "adapter": "lora(r=2, local='B')",
    "weighting": "uniform(denominator='population')",
    "cohort": "uniform(size=2)",
    "rounds": 4,
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def camp(bert: Path) -> Iterator[Camp]:
    """Clients of one BERT who train for two missed rounds at most, and keep their own B."""
    base = fresh_base(bert, CLASSIFY, CLASSES, double=False)
    made = camp_of(base, "bert", MOMENTUM, "admm_robust(rho=0.5, while_away=2)", ADAPTER)
    made.plan = replace(made.plan, trainer=made.watched.trainer)
    yield made
    made.spy.detach()


def later(moment: Moment, round: int) -> Moment:
    """Return the same federation when ``round`` begins: others have taken part meanwhile."""
    moved = {k: v + np.float32(0.01) for k, v in moment.state.params.items()}
    return replace(moment, state=replace(moment.state, round=round, params=moved))


def played(
    camp: Camp, moment: Moment, clients: Sequence[str], grouping: Grouping = ALONE
) -> list[Played]:
    found = group_round(camp.plan, camp, moment.asked(camp, clients), grouping)
    assert not [one.reply for one in found if isinstance(one.reply, Exception)]
    return found


def resting(camp: Camp) -> Camp:
    correction = build("corrections", "admm_robust(rho=0.5)")
    return replace(camp, plan=replace(camp.plan, correction=correction))


def eager(camp: Camp, client: str, memory: Memory, received: Tensors, rounds: range) -> Memory:
    """Train in each of ``rounds`` when it is due, and write down what there is to remember."""
    (held,) = memory.versions.values()
    for round in rounds:
        roles, kept = camp.tables.roles(round), select(held, "correction")
        here = {**received, **select(held, "local")}
        stacked = stack([here], torch.device("cpu"))
        dual = prefixed("own", select(kept, "dual"))
        constants = {**prefixed("origin", {k: here[k] for k in roles.up}), **dual}
        job = Job(
            learner=camp.learner,
            params={k: v for k, v in stacked.items() if k in roles.train},
            fixed={k: v for k, v in stacked.items() if k not in roles.train},
            examples=[camp.records[client]],
            seeds=[derive_seed(camp.plan.seed, round, client, "train")],
            adjust=camp.plan.correction.adjust,
            constants=stack([constants], torch.device("cpu")),
            progress=(round / camp.plan.rounds, (round + 1) / camp.plan.rounds),
        )
        (trained,) = unstack(camp.plan.trainer.fit(job).params)
        whole = {**here, **trained}
        ((gradient, _),) = camp.learner.mean_gradients([whole], roles.up, [camp.records[client]])
        held = {**held, **prefixed("correction/dual", {k: -v for k, v in gradient.items()})}
        held |= prefixed("local", {k: trained[k] for k in roles.local})
    return Memory({next(iter(memory.versions)): held})


@pytest.mark.parametrize(("round", "missed"), [(1, 0), (2, 1), (3, 2)])
def test_it_is_training_in_each_round_to_the_same_bits(camp: Camp, round: int, missed: int) -> None:
    """Also what the limit leaves out: of three rounds that were missed two are made up for."""
    moment = second_round(camp)
    received = {**camp.initial}  # what round 0 sent, whole
    for client in ("anna", "dora"):
        (lazy,) = played(camp, later(moment, round), [client])
        by_hand = eager(camp, client, moment.memories[client], received, range(1, 1 + missed))
        then = replace(later(moment, round), memories={client: by_hand})
        (expected,) = played(resting(camp), then, [client])
        assert bytes(lazy.reply) == bytes(expected.reply)  # type: ignore[arg-type]
        found, wanted = (one.memory.versions[round] for one in (lazy, expected))
        assert {k for k in found if not k.startswith("last/")} == {*wanted}
        for name, value in wanted.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)
        (rested,) = played(resting(camp), later(moment, round), [client])
        assert (bytes(lazy.reply) == bytes(rested.reply)) == (missed == 0)  # type: ignore[arg-type]


def test_no_more_rounds_than_the_limit(camp: Camp) -> None:
    camp.plan = replace(camp.plan, rounds=9)
    moment = second_round(camp)
    (found,) = played(camp, later(moment, 7), ["ben"])
    by_hand = eager(camp, "ben", moment.memories["ben"], {**camp.initial}, range(1, 3))
    then = replace(later(moment, 7), memories={"ben": by_hand})
    (expected,) = played(resting(camp), then, ["ben"])
    assert bytes(found.reply) == bytes(expected.reply)  # type: ignore[arg-type]


def test_clients_that_missed_the_same_round_share_its_passes(camp: Camp) -> None:
    """Some have missed two rounds, one has missed one, and one was never asked."""
    moment = second_round(camp)
    (again,) = played(camp, later(moment, 1), ["carl"])
    memories = {**moment.memories, "carl": again.memory}
    del memories["emma"]
    acks = {**moment.state.acks, "carl": 1}
    del acks["emma"]
    moment = later(moment, 3)
    moment = Moment(replace(moment.state, acks=acks), memories)
    alone = [one for client in SIZES for one in played(camp, moment, [client])]
    camp.spy.clients.clear()
    together = played(camp, moment, list(SIZES), WIDE)
    steps = [max(1, len(camp.records[c]) // 2) for c in SIZES]
    assert sum(camp.spy.clients) > 2 * sum(steps)
    assert max(camp.spy.clients) == len(SIZES)
    assert sorted({*camp.spy.clients}) != [1]
    for one, other in zip(together, alone, strict=True):
        for name, value in other.memory.versions[3].items():
            got = one.memory.versions[3][name]
            np.testing.assert_allclose(got, value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_who_was_never_asked_has_missed_nothing(camp: Camp) -> None:
    moment = later(second_round(camp), 3)
    new = Moment(replace(moment.state, acks={}), {})
    (found,), (expected,) = (played(one, new, ["dora"]) for one in (camp, resting(camp)))
    assert bytes(found.reply) == bytes(expected.reply)  # type: ignore[arg-type]


def test_a_reply_that_was_lost_leaves_a_missed_round(camp: Camp) -> None:
    moment = second_round(camp)
    (lost,) = played(camp, later(moment, 1), ["ben"])
    then = later(moment, 3)
    known = replace(then, memories={**then.memories, "ben": lost.memory})
    (found,), (expected,) = (played(camp, one, ["ben"]) for one in (known, then))
    assert bytes(found.reply) == bytes(expected.reply)  # type: ignore[arg-type]


def test_training_that_does_not_stay_finite_changes_nothing(camp: Camp) -> None:
    """Only what the last broadcast held is beyond all bounds: the round itself is sound."""
    moment = second_round(camp)
    memory = moment.memories["anna"].versions[0]
    huge = {k: v * np.float32(1e38) if k.startswith("last/") else v for k, v in memory.items()}
    then = replace(later(moment, 3), memories={"anna": Memory({0: huge})})
    with np.errstate(over="ignore", invalid="ignore"):
        (found,) = played(camp, then, ["anna"])
    (expected,) = played(resting(camp), later(moment, 3), ["anna"])
    assert bytes(found.reply) == bytes(expected.reply)  # type: ignore[arg-type]


def test_runs_in_groups_and_processes_agree_and_say_what_it_takes(bert: Path) -> None:
    lines = {**ADMM, "correction": "admm_robust(rho=0.5, while_away=3)"}
    plan = support_plan(bert, **lines)
    first = simulate(plan)
    grouped = simulate(plan, engine="inline(group=4)")
    for name, value in first.tensors.items():
        np.testing.assert_allclose(grouped.tensors[name], value, rtol=1e-4, atol=1e-6)
    rests = simulate(support_plan(bert, **{**lines, "correction": "admm_robust(rho=0.5)"}))
    assert any(not np.array_equal(rests.tensors[k], v) for k, v in first.tensors.items())
    found = preview(plan)
    assert found["local"]["while_away"] == 3
    assert found["memory"]["away_bytes"] == 4 * found["parameters"]["travelling"]
    assert "and as many for each of up to 3 rounds missed" in as_text(found)
    assert "what came last, to train with while away" in as_text(found)


@method
class Restless(Correction):
    """Takes no gradient beside those of its steps."""

    while_away: int = 1


def test_who_hides_records_takes_no_steps_that_nobody_counts() -> None:
    lines: dict[str, Any] = {"model": "m", "task": "classify", "data": "jsonl(train='a')"}
    lines |= {"adapter": "lora(r=2)", "trainer": "plain", "evaluate": "test", "rounds": 3}
    lines |= {"weighting": "uniform", "privacy": "record(noise_multiplier=1.0)"}
    Plan.from_lines({**lines, "correction": "tests.test_missed_rounds:Restless(while_away=0)"})
    with pytest.raises(PlanError, match="its ledger counts those of one round; set while_away=0"):
        Plan.from_lines({**lines, "correction": "tests.test_missed_rounds:Restless"})
