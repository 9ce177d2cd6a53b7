"""Many clients in one pass: how many there really are, and that each does what it does alone."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft.adapters import _stacked
from fedpeft.adapters.lora import Lora
from fedpeft.client_rounds import ALONE
from fedpeft.driver import simulate
from fedpeft.engine._base import Stage
from fedpeft.engine._player import Player
from fedpeft.errors import PlanError, TrainError
from fedpeft.evaluation import group_evaluation
from fedpeft.federation import deal
from fedpeft.grouping import Grouping
from fedpeft.memory import InProcess, Memory
from fedpeft.models._base import Base
from fedpeft.site import Site
from fedpeft.spec import build, names
from fedpeft.tables import limit
from fedpeft.types import Dropout, Example, Job, Metrics, Stacked
from fedpeft.watching import Quiet
from fedpeft.wire import Message, peek, unpack
from tests.architectures import VOCABULARY, checkpoint, fresh_base, randomised
from tests.camp import (
    ARENAS,
    CLASSES,
    CLASSIFY,
    LANGUAGE,
    PICTURES,
    SGD,
    SIZES,
    STEPS,
    WIDE,
    Camp,
    Moment,
    Spy,
    apart,
    assert_same,
    camp_of,
    first_round,
    passes_of,
    plan_of,
    second_round,
    train,
    train_alone,
)
from tests.tiny import support_plan

pytestmark = pytest.mark.xdist_group("groups")
"""One process has the models."""
ADAMW = "plain(lr=0.05, epochs=1, batch=2)"
IN_TURN = "clients train one at a time"
EXACT, SINGLE = 1e-9, 1e-4
"""How far a client in a group may be from the same client alone, relative to its update."""
Bases = Callable[[str, torch.dtype], Base]
Camps = Callable[..., Camp]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Bases:
    """Return a base that tests share and leave as it was."""
    root, made = tmp_path_factory.mktemp("groups"), dict[tuple[str, torch.dtype], Base]()

    def find(kind: str, dtype: torch.dtype) -> Base:
        if (kind, dtype) not in made:
            head = ARENAS.get(kind, (CLASSIFY, ""))[0]
            tokenizer = None if head == PICTURES else bert
            folder = checkpoint(kind, root / f"{kind}-{dtype}", tokenizer)
            classes = () if head == LANGUAGE else CLASSES
            base = fresh_base(folder, head, classes, double=False)
            base.model.to(dtype)
            made[kind, dtype] = base
        return made[kind, dtype]

    return find


@pytest.fixture
def camps(bases: Bases) -> Iterator[Camps]:
    """Return a way to set up clients; adapters are detached in the end."""
    made: list[Camp] = []

    def make(
        arena: str,
        *given: Any,
        dtype: torch.dtype = torch.float64,
        base: Base | None = None,
        **more: Any,
    ) -> Camp:
        made.append(camp_of(base or bases(arena.split()[0], dtype), arena, *given, **more))
        return made[-1]

    yield make
    for camp in made:
        camp.spy.detach()


# --- every trainer and every correction ---------------------------------------------------------


def _trainers() -> list[str]:
    """Every trainer with every optimizer it has, so that clients differ in their steps."""
    found = []
    for name in names("trainers"):
        kind = type(build("trainers", name))
        hints, fields = typing.get_type_hints(kind), {f.name for f in dataclasses.fields(kind)}
        wanted = {"epochs": "1", "batch": "2", "lr": "0.05"}
        given = [f"{k}={v}" for k, v in wanted.items() if k in fields]
        kinds = [f"optimizer={o!r}" for o in typing.get_args(hints.get("optimizer"))]
        found += [f"{name}({', '.join([*given, each])})" for each in kinds or [""]]
    return found


def _corrections() -> list[str]:
    """Every correction, with fields that have all clients train in the round that is watched."""
    return [{"fedamd": "fedamd(every=4)"}.get(name, name) for name in names("corrections")]


def _pairs() -> list[tuple[str, str]]:
    """Every trainer with every correction, as far as a plan takes them."""
    found = []
    for trainer, correction in itertools.product(_trainers(), _corrections()):
        try:
            plan_of("lora", trainer, correction)
        except PlanError:
            continue
        found.append((trainer, correction))
    return found


def test_passes_written_out() -> None:
    assert passes_of([4, 3, 3, 1, 1], 16) == [5, 3, 3, 1]
    assert passes_of([4, 3, 3, 1, 1], 2) == [2, 2, 1, 2, 1, 2, 1, 1]
    assert passes_of([2, 1], 1, calls=2) == [1, 1, 1, 1, 1, 1]


def test_no_trainer_and_no_correction_is_left_out() -> None:
    tried = _pairs()
    assert {trainer.partition("(")[0] for trainer, _ in tried} == set(names("trainers"))
    assert {correction for _, correction in tried} == set(_corrections())


def _everywhere() -> list[Any]:
    """Every pair on BERT, and on the other models SGD alone and with SCAFFOLD; the rest is slow."""
    found = []
    for (trainer, correction), arena in itertools.product(_pairs(), ARENAS):
        common = "'sgd'" in trainer and correction in ("none", "scaffold")
        marks = () if arena == "bert" or common else pytest.mark.slow
        found.append(pytest.param(trainer, correction, arena, marks=marks))
    return found


@pytest.mark.parametrize(("trainer", "correction", "arena"), _everywhere())
def test_each_client_does_what_it_does_alone(
    camps: Camps, arena: str, trainer: str, correction: str
) -> None:
    camp = camps(arena, trainer, correction)
    moment = second_round(camp)
    together = train(camp, moment, list(SIZES), WIDE)
    steps = sorted((s for s, *_ in together.fit.values()), reverse=True)
    job = camp.watched.job
    assert steps == STEPS
    narrow = train(camp, moment, list(SIZES), Grouping(2))
    alone = train_alone(camp, moment)
    if camp.plan.correction.gradient == "never":  # else one more pass over all records
        calls = len(alone.passes) // sum(steps)
        assert alone.passes == [1] * calls * sum(steps)
        assert together.passes == passes_of(steps, 16, calls)
        assert narrow.passes == passes_of(steps, 2, calls)
    assert_same(together, alone, EXACT)
    assert_same(narrow, alone, EXACT)
    if correction != "none":
        camp.watched.fit(replace(job, adjust=_free))
        free = {k: (v[0] - job.params[k][0]).numpy() for k, v in camp.watched.fitted.params.items()}
        assert apart(free, together.updates["ben"]) > 1e-4  # its term matters


@pytest.mark.parametrize("arena", ARENAS)
def test_in_single_precision_clients_differ_by_rounding(camps: Camps, arena: str) -> None:
    camp = camps(arena, dtype=torch.float32)
    moment = second_round(camp)
    alone = train_alone(camp, moment)
    for width in (16, 2):
        together = train(camp, moment, list(SIZES), Grouping(width))
        assert together.passes == passes_of(STEPS, width)
        assert_same(together, alone, SINGLE)


@pytest.mark.parametrize("arena", ARENAS)
def test_on_a_base_in_bfloat16_clients_differ_less_than_precisions_do(
    camps: Camps, arena: str
) -> None:
    """Padding and neighbours change the order of sums, so each product may round the other way.

    That moves an update by as much as rounding to bfloat16 moves it in the first place.
    """
    camp, exact = (camps(arena, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    moment = second_round(exact)
    fine, alone = train_alone(exact, moment), train_alone(camp, moment)
    together = train(camp, moment, list(SIZES), WIDE)
    assert together.passes == [5, 3, 3, 1]
    assert {v.dtype for v in camp.watched.fitted.params.values()} == {torch.float32}
    for client, update in together.updates.items():
        assert all(np.isfinite(v).all() for v in update.values())
        rounding = apart(alone.updates[client], fine.updates[client])
        assert 1e-5 < rounding < 0.2
        assert apart(update, alone.updates[client]) <= rounding


# --- every field of a trainer -------------------------------------------------------------------


@pytest.mark.parametrize(
    "trainer",
    [
        "plain(optimizer='sgd', lr=0.5, epochs=2, batch=2, schedule='linear', final=0.1)",
        "plain(optimizer='sgd', lr=0.5, epochs=1, batch=3, momentum=0.9, weight_decay=0.1)",
        "plain(optimizer='sgd', lr=0.5, epochs=2, batch=2, clip=0.01, schedule='cosine')",
        "plain(lr=0.05, epochs=2, batch=2, weight_decay=0.3, schedule='cosine')",
        "plain(lr=0.05, epochs=1, batch=3, clip=0.01, schedule='linear')",
        "plain(optimizer='sgd', lr=0.5, steps=3, batch=3)",
        "plain(lr=0.05, records=4, batch=2)",
    ],
)
@pytest.mark.parametrize("arena", ["bert", "gpt2"])
def test_each_client_has_its_own_optimizer_schedule_clipping_and_dropout(
    camps: Camps, trainer: str, arena: str
) -> None:
    camp = camps(arena, trainer, adapter="r=3, alpha=6, dropout=0.3")
    moment = second_round(camp)
    together = train(camp, moment, list(SIZES), WIDE)
    assert together.passes == passes_of([s for s, *_ in together.fit.values()], 16)
    assert_same(together, train_alone(camp, moment), EXACT)


def test_parts_of_a_batch_are_shared_too(camps: Camps) -> None:
    camp = camps("bert", "plain(lr=0.05, epochs=1, batch=2, accumulate=2)")
    moment = second_round(camp)
    together = train(camp, moment, list(SIZES), WIDE)
    assert together.passes == [5, 4, 3, 3, 3, 2, 1]  # carl has one record, and ends are short
    assert_same(together, train_alone(camp, moment), EXACT)


def test_parts_of_a_batch_draw_their_own_masks(camps: Camps) -> None:
    """A client's parts are cut from its own batch, not from the longest one of the group."""
    camp = camps(
        "bert", "plain(lr=0.05, epochs=1, batch=4, accumulate=2)", adapter="r=3, dropout=0.3"
    )
    moment = second_round(camp)
    together = train(camp, moment, list(SIZES), WIDE)
    assert_same(together, train_alone(camp, moment), EXACT)


def test_measured_costs_decide_who_shares_a_pass(camps: Camps) -> None:
    camp = camps("bert")
    moment = second_round(camp)
    dear = Grouping(16, ((1.0, 1.0), (2.0, 1e6)))
    alone = train(camp, moment, list(SIZES), dear)
    assert alone.passes == [1] * sum(STEPS)
    together = train(camp, moment, list(SIZES), Grouping(16, ((1000.0, 1.0),)))
    assert together.passes == [5, 3, 3, 1]
    assert_same(together, alone, EXACT)


def test_replies_come_in_the_order_asked_and_tell_what_was_done(camps: Camps) -> None:
    camp = camps("bert")
    played = train(camp, second_round(camp), list(SIZES), WIDE).played
    for client, records in SIZES.items():
        reply = played[client].reply
        assert isinstance(reply, Message)
        told = peek(reply)
        assert (told["seen"], told["steps"]) == (records, (records + 1) // 2)
        assert told["lr_sum"] == pytest.approx(0.5 * int(told["steps"]))


# --- every kind of LoRA -------------------------------------------------------------------------

LOCAL = "head='local'"
VARIANTS = [
    "r=3, train='A', init='gaussian'",
    "r=3, train='B', init='orthonormal', rslora=True",
    f"r=3, train='A,B', {LOCAL}",
    f"r=3, train='A', {LOCAL}, dropout=0.3",
    "r=3, train='A', head='frozen', rslora=True",
    "r=2, train='B', head='frozen', dropout=0.3",
    f"r=8, alpha=4, rslora=True, init='orthonormal', {LOCAL}, dropout=0.3",
]


@pytest.mark.parametrize(
    ("arena", "adapter"),
    [
        *(("bert all", adapter) for adapter in VARIANTS),
        *(("gpt2 all", adapter) for adapter in VARIANTS[:3]),
        *(("vit", adapter) for adapter in VARIANTS[3:5]),
        ("llama", VARIANTS[-1]),
    ],
)
def test_every_kind_of_lora_can_be_shared(camps: Camps, arena: str, adapter: str) -> None:
    camp = camps(arena, ADAMW, adapter=adapter)
    moment = second_round(camp)
    together = train(camp, moment, list(SIZES), WIDE)
    assert together.passes == [5, 3, 3, 1]
    roles = camp.tables.roles(1)
    assert set(together.updates["ben"]) == roles.train
    job = camp.watched.job
    assert set(job.fixed) == set(camp.tables.shapes) - roles.train
    for name, value in job.params.items():  # what stays with clients differs between them
        assert (name in roles.local) != bool(torch.equal(value[0], value[1])), name
    assert_same(together, train_alone(camp, moment), EXACT)


def test_heads_of_their_own_end_in_their_memories(camps: Camps) -> None:
    camp = camps("bert", adapter=f"r=3, {LOCAL}")
    moment = second_round(camp)
    together, alone = train(camp, moment, list(SIZES), WIDE), train_alone(camp, moment)
    heads = []
    for client in SIZES:
        found, own = (t.played[client].memory.versions[1] for t in (together, alone))
        assert set(found) == {"local/classifier.weight", "local/classifier.bias"}
        for name, value in own.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-9)
        heads.append(found["local/classifier.weight"])
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(heads, 2))


@pytest.mark.parametrize("trainer", [SGD, "plain(lr=0.05, epochs=2, batch=2, weight_decay=0.1)"])
@pytest.mark.parametrize("arena", ["bert all", "gpt2", "vit"])
def test_clients_of_different_ranks_share_a_pass(camps: Camps, arena: str, trainer: str) -> None:
    """A client of rank r < 8 is one of rank 8 whose other rows of A and columns of B are masked."""
    ranks = {"ben": 8, "emma": 2, "dora": 4, "anna": 2, "carl": 8}
    spec = "r={}, alpha={}, dropout=0.3"
    wide = camps(arena, trainer, adapter=spec.format(8, 16))
    train(wide, second_round(wide), list(ranks), WIDE)
    job = wide.watched.job
    masks = {
        name: torch.stack([_ones(v.shape[1:], name, r) for r in ranks.values()])
        for name, v in job.params.items()
        if "lora_" in name
    }
    noise = {k: 0.1 * torch.randn(v.shape, generator=_generator()) for k, v in job.params.items()}
    params = {k: (v + noise[k]) * masks.get(k, torch.ones(1)) for k, v in job.params.items()}
    job = replace(job, params=params, masks=masks, adjust=_pushed)
    wide.spy.clients.clear()
    fit = wide.watched.trainer.fit(job)
    assert wide.spy.clients == passes_of(fit.steps, 16)
    for name, mask in masks.items():
        assert (fit.params[name][mask == 0] == 0).all()
    for at, rank in enumerate(ranks.values()):
        narrow = camps(arena, trainer, adapter=spec.format(rank, 2 * rank))
        start = {k: _cut(v[at : at + 1], k, rank) for k, v in params.items()}
        alone = replace(_only(job, at), learner=narrow.learner, params=start, masks={})
        found = narrow.watched.trainer.fit(alone).params
        together = {k: _cut(v[at : at + 1], k, rank) for k, v in fit.params.items()}
        assert apart(_minus(together, start), _minus(found, start)) <= EXACT


@pytest.mark.parametrize("width", [16, 2])
@pytest.mark.parametrize("arena", ["bert", "gpt2 all"])
def test_what_does_not_train_may_differ_between_clients(
    camps: Camps, arena: str, width: int
) -> None:
    camp = camps(arena, ADAMW, adapter="r=3, train='B'")
    train(camp, second_round(camp), list(SIZES), WIDE)
    job, generator = camp.watched.job, _generator()
    noise = {k: 0.1 * torch.randn(v.shape, generator=generator) for k, v in job.fixed.items()}
    job = replace(job, fixed={k: v + noise[k] for k, v in job.fixed.items()}, adjust=_pushed)
    camp.spy.clients.clear()
    fit = camp.watched.trainer.fit(replace(job, grouping=Grouping(width)))
    assert camp.spy.clients == passes_of(STEPS, width)
    for at in range(len(SIZES)):
        own = _only(job, at)
        found = camp.watched.trainer.fit(own).params
        together = {k: v[at : at + 1] for k, v in fit.params.items()}
        assert apart(_minus(together, own.params), _minus(found, own.params)) <= EXACT


def _free(
    grads: Stacked, params: Stacked, constants: Stacked, there: Stacked
) -> tuple[Stacked, Stacked]:
    """Follow the gradient."""
    return grads, constants


def _pushed(
    grads: Stacked, params: Stacked, constants: Stacked, there: Stacked
) -> tuple[Stacked, Stacked]:
    """Correct every entry of a gradient, also those that would be zero."""
    return {k: g + 0.01 for k, g in grads.items()}, constants


def _only(job: Job, at: int) -> Job:
    """Return the job of one of its clients."""
    params, fixed, masks, constants = (
        {k: v[at : at + 1] for k, v in stacked.items()}
        for stacked in (job.params, job.fixed, job.masks, job.constants)
    )
    return replace(
        job,
        params=params,
        fixed=fixed,
        masks=masks,
        constants=constants,
        examples=[job.examples[at]],
        seeds=[job.seeds[at]],
        grouping=ALONE,
    )


def _minus(a: Stacked, b: Stacked) -> dict[str, np.ndarray]:
    return {k: (a[k] - b[k]).numpy() for k in b}


def _ones(shape: Sequence[int], name: str, rank: int) -> torch.Tensor:
    found = torch.zeros(tuple(shape), dtype=torch.float64)
    found[(slice(rank),) if "lora_A" in name else (slice(None), slice(rank))] = 1
    return found


def _cut(value: torch.Tensor, name: str, rank: int) -> torch.Tensor:
    if "lora_A" in name:
        return value[:, :rank].clone()
    return value[:, :, :rank].clone() if "lora_B" in name else value


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(4)


@pytest.mark.parametrize("arena", ["bert", "vit", "gpt2"])
def test_dropout_reaches_all_that_a_record_has(
    camps: Camps, monkeypatch: pytest.MonkeyPatch, arena: str
) -> None:
    """A kept entry grows and another vanishes, so every one of a record's own must change."""
    rate, drop = 0.3, _stacked.masked

    def watched(x: torch.Tensor, dropout: Dropout, rate: float, module: int) -> torch.Tensor:
        found = drop(x, dropout, rate, module)
        assert dropout.lengths == lengths
        own = x.shape[1] if arena == "vit" else max(lengths)
        assert bool((found != x)[lengths.index(max(lengths)), :own].all())
        return found

    camp = camps(arena, adapter=f"r=3, dropout={rate}")
    records = camp.records["emma"]
    batch = camp.learner.collate(records, [1.0] * len(records))
    lengths = list(batch.lengths)
    monkeypatch.setattr(_stacked, "masked", watched)
    params = {k: torch.from_numpy(v).double()[None] for k, v in camp.initial.items()}
    camp.learner.grads(params, {}, batch, [1])


@pytest.mark.parametrize("arena", ["bert", "vit", "llama", "gpt2"])
def test_layers_that_are_computed_again_can_be_shared(camps: Camps, arena: str) -> None:
    camp = camps(arena, adapter="r=3, dropout=0.3")
    moment = second_round(camp)
    alone = train_alone(camp, moment)
    assert camp.spy.checkpoint()
    together = train(camp, moment, list(SIZES), WIDE)
    assert together.passes == [5, 3, 3, 1]
    assert_same(together, alone, EXACT)


# --- when something is wrong --------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["ben", "dora", "carl"])
@pytest.mark.parametrize("arena", ["bert", "llama", "vit"])
def test_a_record_that_cannot_be_learned_from_harms_nobody_else(
    camps: Camps, bases: Bases, arena: str, bad: str
) -> None:
    base = _poisoned(bases(arena, torch.float64))
    camp = camps(arena, "plain(lr=0.05, epochs=1, batch=2, clip=1.0)", base=base)
    moment = second_round(camp)
    camp.records[bad] = [_spoiled(record) for record in camp.records[bad]]
    together = train(camp, moment, list(SIZES), WIDE)
    assert together.passes == [5, 3, 3, 1]
    failed = together.played[bad].reply
    assert isinstance(failed, TrainError)
    assert "its loss is not finite" in str(failed)
    assert together.played[bad].memory == moment.memories[bad]
    others = [client for client in SIZES if client != bad]
    alone = train_alone(camp, moment, others)
    for client in others:
        assert isinstance(together.played[client].reply, Message), client
        assert apart(together.updates[client], alone.updates[client]) <= EXACT


POISON = 4
"""A token that no record holds by itself."""


def _poisoned(base: Base) -> Base:
    """Return a copy in which one token, or an image all white, has no finite embedding."""
    found = replace(base, model=copy.deepcopy(base.model))
    model: Any = found.model
    if found.head_kind == PICTURES:
        model.base_model.register_forward_pre_hook(_whites_are_not_finite)
    else:
        model.get_input_embeddings().weight.data[POISON] = float("nan")
    return found


def _whites_are_not_finite(_: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    (images,) = args
    white = (images == images[:, :, :1, :1]).flatten(1).all(1)
    return (torch.where(white[:, None, None, None], torch.nan, images),)


def _spoiled(record: Example) -> Example:
    if "pixel_values" in record:
        return {**record, "pixel_values": np.full_like(record["pixel_values"], 255)}
    return {**record, "input_ids": np.full_like(record["input_ids"], POISON)}


@pytest.mark.parametrize("trainer", [SGD, ADAMW])
def test_a_client_that_diverges_does_so_alone(camps: Camps, trainer: str) -> None:
    camp = camps("bert", trainer, adapter=f"r=3, {LOCAL}", dtype=torch.float32)
    moment = second_round(camp)
    kept = {k: np.full_like(v, 3e38) for k, v in moment.memories["ben"].versions[0].items()}
    kept["local/classifier.weight"][1] *= -1
    moment.memories["ben"] = Memory({0: kept})
    together = train(camp, moment, list(SIZES), WIDE)
    assert isinstance(together.played["ben"].reply, TrainError)
    others = [client for client in SIZES if client != "ben"]
    alone = train_alone(camp, moment, others)
    for client in others:
        assert isinstance(together.played[client].reply, Message), client
        assert apart(together.updates[client], alone.updates[client]) <= (
            SINGLE if trainer == SGD else 1e-3
        )


def _player(
    camp: Camp,
    width: int,
    memories: Mapping[str, Memory] | None = None,
    keep: Callable[[Grouping], None] = lambda _: None,
) -> tuple[Player, list[str]]:
    warnings: list[str] = []
    site: Any = camp
    store = InProcess()
    for client, memory in (memories or {}).items():
        store.save(client, memory)
    return Player(site, store, Grouping(width), warnings.append, keep=keep), warnings


def _requests(camp: Camp, moment: Moment) -> list[tuple[str, Any]]:
    return [(asked.client, asked.message) for asked in moment.asked(camp, list(SIZES))]


def test_a_group_that_does_not_fit_into_memory_is_halved(camps: Camps) -> None:
    camp = camps("bert", most=2)
    moment = first_round(camp)
    player, warnings = _player(camp, 16)
    answers = dict(player.exchange(_requests(camp, moment)))
    assert warnings == [
        f"a group does not fit into memory; going on with group={width}" for width in (8, 4, 2)
    ]
    assert camp.spy.clients == [5, 5, 4, *passes_of(STEPS, 2)]
    alone = train_alone(camp, moment)
    order = sorted(SIZES, key=lambda c: -SIZES[c])
    assert list(answers) == list(SIZES)
    assert all(isinstance(answers[c], Message) for c in order)
    camp.spy.clients.clear()
    again = dict(player.exchange(_requests(camp, moment)))
    assert (camp.spy.clients, len(warnings)) == (passes_of(STEPS, 2), 3)  # it is remembered
    for client, message in again.items():
        other: Any = answers[client]
        expected: Any = alone.played[client].reply
        up = camp.tables.up(0)
        found = [_sections(m, up) for m in (message, other, expected)]
        assert all(np.array_equal(found[0][k], found[1][k]) for k in found[0])
        assert apart(found[0], found[2]) <= 1e-6  # what travels is in single precision


def _sections(message: Any, up: Any) -> dict[str, np.ndarray]:
    adapter = unpack(message, up, limit(up)).sections["adapter"]
    return {k: v.astype(np.float64) for k, v in adapter.items()}


def test_one_client_that_does_not_fit_into_memory_is_an_error(camps: Camps) -> None:
    camp = camps("bert", most=0)
    player, warnings = _player(camp, 4)
    moment = first_round(camp)
    with pytest.raises(
        TrainError, match="does not fit into memory; lower the trainer's batch"
    ) as e:
        list(player.exchange(_requests(camp, moment)))
    assert "\n" not in str(e.value)
    assert [w.rpartition("=")[2] for w in warnings] == ["2", "1"]


def test_another_error_is_not_taken_for_a_lack_of_memory(camps: Camps) -> None:
    camp = camps("bert")
    player, warnings = _player(camp, 4)
    moment = first_round(camp)
    camp.records["ben"] = [{"input_ids": np.array([VOCABULARY + 9]), "labels": np.asarray(0)}]
    with pytest.raises(IndexError):
        list(player.exchange(_requests(camp, moment)))
    assert not warnings


def test_a_model_whose_clients_cannot_share_a_pass_says_so(camps: Camps, bases: Bases) -> None:
    base = bases("deberta-v2", torch.float64)
    camp = camps("deberta", base=base, targets="all-linear")
    moment = first_round(camp)
    player, warnings = _player(camp, 16)
    answers = dict(player.exchange(_requests(camp, moment)))
    (warning,) = warnings
    assert warning.startswith(f"{IN_TURN}: lora: ")
    assert "does not take one row per record" in warning
    assert camp.spy.clients == [5, *[1] * sum(STEPS)]
    assert all(isinstance(answer, Message) for answer in answers.values())
    shared = camps("deberta", base=base, targets="query_proj,value_proj")  # only text goes there
    assert train(shared, first_round(shared), list(SIZES), WIDE).passes == [5, 3, 3, 1]


def test_measuring_finds_that_clients_cannot_share_a_pass(camps: Camps, bases: Bases) -> None:
    base = bases("deberta-v2", torch.float32)
    camp = camps("deberta", base=base, targets="all-linear")
    site: Any = camp
    warnings: list[str] = []
    stage = Stage(site, InProcess(), None, warnings.append)
    with build("engine", "inline(group='auto')").start(stage) as running:
        answers = dict(running.exchange(_requests(camp, first_round(camp))))
    assert [warning.partition(":")[0] for warning in warnings] == [IN_TURN]
    assert camp.spy.clients[-sum(STEPS) :] == [1] * sum(STEPS)
    assert all(isinstance(answer, Message) for answer in answers.values())


# --- evaluation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("arena", ["bert", "vit", "llama", "gpt2"])
def test_clients_are_evaluated_together_as_one_by_one(camps: Camps, arena: str) -> None:
    camp = camps(arena, dtype=torch.float32)
    asked = second_round(camp).asked(camp, list(SIZES))
    held = [camp.held(client) for client in SIZES]
    camp.spy.clients.clear()
    together = group_evaluation(camp.plan, camp, asked, held, Grouping(16))
    assert camp.spy.clients == [1, 1]  # all hold the same: their 78 records share batches
    _assert_metrics(together, group_evaluation(camp.plan, camp, asked, held))


@pytest.mark.parametrize("arena", ["bert", "vit", "llama", "gpt2"])
@pytest.mark.parametrize(("width", "passes"), [(16, [5, 3]), (2, [2, 2, 1])])
def test_clients_with_tensors_of_their_own_are_evaluated_together(
    camps: Camps, arena: str, width: int, passes: list[int]
) -> None:
    camp = camps(arena, dtype=torch.float32)
    tensors = [randomised(camp.initial, seed, scale=0.1) for seed in range(len(SIZES))]
    held = [camp.held(client) for client in SIZES]
    together = camp.learner.evaluate(tensors, held, width)
    assert camp.spy.clients == passes
    alone = camp.learner.evaluate(tensors, held)
    _assert_metrics(together, alone)
    assert len({metrics["loss"] for metrics in alone}) == len(SIZES)


def test_heads_of_their_own_are_evaluated_as_they_are_remembered(camps: Camps) -> None:
    camp = camps("bert", adapter=f"r=3, {LOCAL}", dtype=torch.float32)
    moment = second_round(camp)
    player, warnings = _player(camp, 16, moment.memories)
    camp.spy.clients.clear()
    together = dict(player.evaluate(_requests(camp, moment)))
    assert camp.spy.clients == [5, 3]
    assert not warnings
    _assert_metrics([together[client] for client in SIZES], _one_by_one(camp, moment))


@pytest.mark.parametrize("adapter", ["r=3", f"r=3, {LOCAL}"])
@pytest.mark.parametrize("width", [1, 4])
def test_evaluation_that_does_not_fit_takes_fewer_records_and_leaves_the_group(
    camps: Camps, adapter: str, width: int
) -> None:
    camp = camps("bert", adapter=adapter, dtype=torch.float32)
    moment = second_round(camp)
    expected, kept = _one_by_one(camp, moment), list[Grouping]()
    player, warnings = _player(camp, width, moment.memories, kept.append)
    camp.spy.tallest = 3
    together = dict(player.evaluate(_requests(camp, moment)))
    assert camp.warnings
    assert (player.grouping, warnings, kept) == (Grouping(width), [], [])
    _assert_metrics([together[client] for client in SIZES], expected)
    told = len(camp.warnings)
    dict(player.evaluate(_requests(camp, moment)))
    assert len(camp.warnings) == told  # it is remembered


def test_evaluation_never_narrows_the_group(camps: Camps, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(*_: Any) -> Any:
        raise MemoryError

    camp = camps("bert")
    player, warnings = _player(camp, 4)
    monkeypatch.setattr(camp.learner, "evaluate", evaluate)
    with pytest.raises(MemoryError):
        dict(player.evaluate(_requests(camp, first_round(camp))))
    assert (player.grouping.width, warnings) == (4, [])


def test_records_that_do_not_fit_at_all_are_no_fault_of_the_group(camps: Camps) -> None:
    camp = camps("bert", adapter=f"r=3, {LOCAL}", dtype=torch.float32)
    moment = second_round(camp)
    player, warnings = _player(camp, 4, moment.memories)
    camp.spy.tallest = 0
    with pytest.raises(TrainError, match="evaluation: one record does not fit into memory"):
        dict(player.evaluate(_requests(camp, moment)))
    assert (player.grouping.width, warnings) == (4, [])


def test_a_model_whose_clients_cannot_share_a_pass_is_evaluated_in_turn(
    camps: Camps, bases: Bases
) -> None:
    """As after a resume, or in a process that has trained nobody yet."""
    base = bases("deberta-v2", torch.float32)
    adapter = f"r=3, {LOCAL}"
    camp = camps("deberta", adapter=adapter, base=base, targets="all-linear")
    moment = second_round(camp, ALONE)
    player, warnings = _player(camp, 16, moment.memories)
    together = dict(player.evaluate(_requests(camp, moment)))
    assert [warning.partition(":")[0] for warning in warnings] == [IN_TURN]
    _assert_metrics([together[client] for client in SIZES], _one_by_one(camp, moment))


def _one_by_one(camp: Camp, moment: Moment) -> Sequence[Metrics]:
    held = [camp.held(client) for client in SIZES]
    return group_evaluation(camp.plan, camp, moment.asked(camp, list(SIZES)), held)


def _assert_metrics(together: Sequence[Metrics], alone: Sequence[Metrics]) -> None:
    assert len(together) == len(alone) == len(SIZES)
    for found, expected in zip(together, alone, strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if name in ("loss", "perplexity"):
                assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-6)
            else:
                assert found[name] == value, name


# --- whole runs ---------------------------------------------------------------------------------


class Warned(Quiet):
    """Keeps what the user is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def warn(self, text: str) -> None:
        self.told.append(text)


@pytest.mark.parametrize("task", ["classify", "causal_lm(max_length=12)"])
@pytest.mark.parametrize(("group", "clients"), [(16, 20), (2, 5)])
def test_a_simulation_trains_as_many_clients_in_a_pass_as_it_was_told(
    bert: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, task: str, group: int, clients: int
) -> None:
    plan = support_plan(
        bert if task == "classify" else llama,
        task=task,
        clients=clients,
        partition="quantity",
        trainer="plain(optimizer='sgd', lr=0.1, epochs=1, batch=16)",
        rounds=2,
        eval_every=2,
        evaluate="",
    )
    spies: list[Spy] = []
    attach = Lora.attach

    def watched(self: Lora, base: Base) -> Any:
        spies.append(Spy(attach(self, base)))
        return spies[-1]

    monkeypatch.setattr(Lora, "attach", watched)
    watch = Warned()
    found = simulate(plan, engine=f"inline(group={group})", watch=watch)
    assert not watch.told
    steps = sorted(
        (plan.trainer.budget(n)[0] for n in deal(plan).population.values()), reverse=True
    )
    assert len(set(steps)) > 1
    (spy,) = spies
    assert spy.clients == 2 * passes_of(steps, group)
    in_turn = simulate(plan)
    assert spies[1].clients == [1] * 2 * sum(steps)
    with contextlib.closing(Site(plan, deal(plan))) as site:
        update, expected = (
            {k: v.astype(np.float64) - site.initial[k] for k, v in result.tensors.items()}
            for result in (found, in_turn)
        )
    assert apart(update, expected) <= SINGLE


def test_a_simulation_of_whole_models_says_that_clients_train_in_turn(bert: Path) -> None:
    plan = support_plan(bert, adapter="full", rounds=1, evaluate="")
    for group in ("4", "'auto'"):
        watch = Warned()
        simulate(plan, engine=f"inline(group={group})", watch=watch)
        assert watch.told == [f"{IN_TURN}: this adapter has no stacked form"]
