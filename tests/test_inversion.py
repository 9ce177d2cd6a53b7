"""Conversion of stale updates against softmax regression on the real records, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedpeft import Plan, simulate
from fedpeft.cohorts.everyone import Everyone
from fedpeft.conversion import Conversion
from fedpeft.errors import PlanError, SpecError
from fedpeft.memory import InProcess, Memory
from fedpeft.preview import as_text, preview
from fedpeft.schedules import _unrolled
from fedpeft.schedules._staleness import compensated
from fedpeft.schedules._unrolled import Dummies
from fedpeft.schedules.inversion import Inversion
from fedpeft.spec import build
from fedpeft.tensor_file import read_tensor_file
from fedpeft.types import Correction, Stale, Tensors, Update
from fedpeft.watching import Quiet
from tests.tiny import support_plan

F64 = NDArray[np.float64]
CLASSES, WIDTH, RECORDS, STEPS, LR = 5, 20, 12, 5, 0.1
SEEDS = range(6)
CPU = torch.device("cpu")


def trained(begun: Tensors, x: F64, y: F64, steps: int = STEPS, lr: float = LR) -> Tensors:
    """Softmax regression on all records at once, written down; the update."""
    w, b = begun["head.weight"].copy(), begun["head.bias"].copy()
    for _ in range(steps):
        logits = x @ w.T + b
        shares = np.exp(logits - logits.max(1, keepdims=True))
        error = (shares / shares.sum(1, keepdims=True) - y) / len(x)
        w, b = w - lr * error.T @ x, b - lr * error.sum(0)
    return {"head.weight": w - begun["head.weight"], "head.bias": b - begun["head.bias"]}


@dataclass
class World:
    """A client with two of five classes, and a model that others have moved far meanwhile."""

    x: F64
    y: F64
    then: Tensors
    now: Tensors

    @classmethod
    def of(cls, seed: int, own: int = 0) -> World:
        rng = np.random.default_rng(seed)
        means = rng.normal(size=(CLASSES, WIDTH))

        def drawn(count: int, classes: Any) -> tuple[F64, F64]:
            labels = rng.choice(classes, count)
            return means[labels] + rng.normal(size=(count, WIDTH)), np.eye(CLASSES)[labels]

        everybody = drawn(200, np.arange(CLASSES))
        weight = 0.1 * rng.normal(size=(CLASSES, WIDTH))
        then = {"head.weight": weight, "head.bias": np.zeros(CLASSES)}
        moved = trained(then, *everybody, steps=20, lr=0.3)
        for _ in range(own + 1):
            mine = drawn(RECORDS, rng.choice(CLASSES, 2, replace=False))
        return cls(*mine, then, {name: value + moved[name] for name, value in then.items()})

    def stale(self, correction: str = "none", kept: Tensors | None = None) -> Stale:
        part: Correction = build("corrections", correction)
        update = Update("c", trained(self.then, self.x, self.y), 1.0, STEPS * LR)
        return Stale(update, 3, self.then, self.now, STEPS, LR, part, kept or {}, 7, CPU)


def apart(a: Tensors, b: Tensors) -> float:
    """The distance of two updates, as a share of the second's length."""
    over = sum(float(np.square(a[k] - b[k]).sum()) for k in b)
    return float(np.sqrt(over / sum(float(np.square(v).sum()) for v in b.values())))


def inversion(**fields: Any) -> Inversion:
    return Inversion(schedule=build("schedules", "buffered(size=2)"), **fields)


def exact(dummies: World) -> Dummies:
    """The client's own records as dummies: labels so sure that they are no longer soft."""
    return Dummies(torch.from_numpy(dummies.x), torch.from_numpy(100 * dummies.y))


@pytest.mark.parametrize("correction", ["none", "fedprox(mu=0.7)"])
def test_local_training_is_that_of_softmax_regression(correction: str) -> None:
    world = World.of(0)
    found = _unrolled.made(world.stale(correction), world.then, exact(world))
    if correction == "none":
        expected = trained(world.then, world.x, world.y)
    else:
        at = dict(world.then)
        for _ in range(STEPS):
            step = trained(at, world.x, world.y, steps=1)
            at = {k: v + step[k] - LR * 0.7 * (v - world.then[k]) for k, v in at.items()}
        expected = {k: v - world.then[k] for k, v in at.items()}
    assert apart(found, expected) < 1e-12


@pytest.mark.parametrize("correction", ["none", "fedprox(mu=0.7)"])
def test_the_gradient_through_all_steps_is_that_of_finite_differences(correction: str) -> None:
    stale, rng = World.of(1).stale(correction), np.random.default_rng(0)
    weights = {k: torch.from_numpy(rng.normal(size=(1, *v.shape))) for k, v in stale.then.items()}

    def value(dummies: Dummies) -> torch.Tensor:
        made = _unrolled.moved(stale, stale.then, dummies)
        return torch.stack([(made[k] * weights[k]).sum() for k in weights]).sum()

    given = Dummies.drawn(stale, 4, 1.0)
    leaves = [v.clone().requires_grad_() for v in (given.features, given.labels)]
    found = torch.autograd.grad(value(Dummies(*leaves)), leaves)
    assert torch.equal(value(given), value(Dummies(*leaves)))
    for at, gradient in enumerate(found):
        for row, column in [(0, 0), (1, 3), (3, 2)]:
            step = 1e-6
            ends = []
            for sign in (1, -1):
                moved = [given.features.clone(), given.labels.clone()]
                moved[at][row, column] += sign * step
                ends.append(value(Dummies(*moved)).item())
            slope = (ends[0] - ends[1]) / (2 * step)
            assert gradient[row, column].item() == pytest.approx(slope, rel=1e-6, abs=1e-10)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_converted_is_nearer_to_the_fresh_update_than_the_stale_one(seed: int) -> None:
    world = World.of(seed)
    stale, schedule = world.stale(), inversion()
    delta, kept = schedule.converted(stale)
    assert delta is not None
    dummies = Dummies.read(stale, {k: kept[f"dummies/{k}"] for k in ("features", "labels")})
    assert len(dummies.features) > len(world.x)
    again = _unrolled.made(stale, stale.then, dummies)
    assert apart(again, stale.update.delta) < 0.25
    fresh, untouched = trained(world.now, world.x, world.y), stale.update.delta
    assert apart(untouched, fresh) > 1.5, "the model has not moved much"
    assert apart(delta, fresh) < 0.8 * apart(untouched, fresh)
    for strength in (0.04, 0.5, 2.0):
        change = strength / stale.update.lr_sum
        instead = compensated(untouched, change, world.then, world.now)
        assert apart(delta, fresh) < 0.9 * apart(instead, fresh)


def test_more_iterations_and_a_warm_start_come_nearer_to_the_update() -> None:
    world = World.of(2)
    stale = world.stale()

    def missed(schedule: Inversion, kept: Tensors | None = None) -> float:
        _, found = schedule.converted(replace(stale, kept=kept or {}))
        read = Dummies.read(stale, {k: found[f"dummies/{k}"] for k in ("features", "labels")})
        again = _unrolled.made(stale, stale.then, read)
        return apart(again, stale.update.delta)

    few, many = inversion(iterations=30), inversion(iterations=300)
    _, kept = few.converted(stale)
    warm = {k: 0 * v if k.startswith("update/") else v for k, v in kept.items()}
    assert missed(many) < 0.6 * missed(few)
    assert missed(few, warm) < missed(few)


def test_a_share_of_the_entries_fits_those_alone() -> None:
    stale = World.of(3).stale()
    _, kept = inversion(density=0.2).converted(stale)
    read = Dummies.read(stale, {k: kept[f"dummies/{k}"] for k in ("features", "labels")})
    again = _unrolled.made(stale, stale.then, read)
    flat, target = (
        np.concatenate([v[k].ravel() for k in ("head.weight", "head.bias")])
        for v in (again, stale.update.delta)
    )
    order = np.argsort(-abs(target))
    large, small = order[: len(order) // 5], order[len(order) // 5 :]
    assert abs(flat - target)[large].sum() < 0.25 * abs(target)[large].sum()
    assert abs(flat - target)[small].sum() > 0.5 * abs(target)[small].sum()


def test_a_client_whose_dummies_were_wrong_is_not_converted_until_they_are_right() -> None:
    schedule, first = inversion(iterations=100), World.of(4)
    delta, kept = schedule.converted(first.stale())
    assert delta is not None
    later = replace(first, then=first.now)
    delta, _ = schedule.converted(later.stale(kept=kept))
    assert delta is not None
    wrong = {k: 30 * v if k == "dummies/features" else v for k, v in kept.items()}
    refused, kept = schedule.converted(later.stale(kept=wrong))
    assert refused is None
    update = later.stale().update.delta
    assert all(kept[f"update/{name}"].tobytes() == v.tobytes() for name, v in update.items())
    delta, _ = schedule.converted(first.stale(kept=kept))
    assert delta is not None


# --- in rounds ----------------------------------------------------------------------------------

SGD = "plain(optimizer='sgd', lr=0.5, steps=3, batch=8)"
LATE = {
    "adapter": "head",
    "trainer": SGD,
    "weighting": "uniform",
    "schedule": "inversion(buffered(size=2, concurrency=4), dummies=6, iterations=60)",
    "latency": "lognormal(median=60, sigma=1.0)",
    "rounds": 8,
}


def plan_of(bert: Path, **lines: Any) -> Plan:
    return support_plan(bert, **{**LATE, **lines})


def test_it_counts_as_fresh_and_what_is_not_converted_by_its_age() -> None:
    world = World.of(0)
    stale = world.stale()

    trainer = f"plain(optimizer='sgd', lr={LR}, steps={STEPS})"
    lines = {
        **LATE,
        "schedule": "inversion(buffered, iterations=150, beyond=2)",
        "trainer": trainer,
        "task": "classify",
    }
    plan = Plan.from_lines({**lines, "model": "m", "data": "jsonl(train='a')"})
    store = InProcess()
    conversion = Conversion(plan, CPU, store, 6, {"c": RECORDS})
    narrow = [{k: v.astype("f4") for k, v in each.items()} for each in (world.then, world.now)]
    update = replace(stale.update, delta={k: v.astype("f4") for k, v in stale.update.delta.items()})
    young = conversion.aged(update, 2, *narrow)
    assert (young.weight, conversion.count) == (3**-0.5, 0)
    assert not store.load("c").versions
    found = conversion.aged(update, 3, *narrow)
    assert (found.weight, conversion.count) == (1.0, 1)
    assert apart(found.delta, update.delta) > 0.05
    assert {*store.load("c").versions} == {6}
    store.save("c", Memory({**store.load("c").versions, 9: {}}))  # of a course that was given up
    again = conversion.aged(update, 3, *narrow)
    assert {k: v.tobytes() for k, v in again.delta.items()} == {
        k: v.tobytes() for k, v in found.delta.items()
    }
    huge = replace(update, delta={k: v * np.float32(1e30) for k, v in update.delta.items()})
    aged = conversion.aged(huge, 3, *narrow)
    assert aged.weight == 0.5
    assert aged.delta is huge.delta
    assert conversion.count == 2


class _Stopped(Exception):
    pass


class _Stops(Quiet):
    """Ends the run after its fifth round."""

    def round(self, line: Mapping[str, Any]) -> None:
        if line["round"] == 4:
            raise _Stopped


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*")}


def test_a_run_that_is_resumed_is_the_run_that_never_stopped(bert: Path, tmp_path: Path) -> None:
    plan = plan_of(bert)
    whole = simulate(plan, out=tmp_path / "whole")
    assert sum(line["converted"] for line in whole.history) > 1
    with pytest.raises(_Stopped):
        simulate(plan, out=tmp_path / "run", watch=_Stops())
    (tmp_path / "run/checkpoints/state-000005.safetensors").unlink()
    found = simulate(plan, out=tmp_path / "run", resume=True)
    assert {k: v.tobytes() for k, v in found.tensors.items()} == {
        k: v.tobytes() for k, v in whole.tensors.items()
    }
    assert [line["converted"] for line in found.history] == [
        line["converted"] for line in whole.history
    ]
    kept = files(tmp_path / "whole/found")
    assert files(tmp_path / "run/found") == kept
    assert len(kept) > 1


def test_the_preview_counts_what_lies_on_disk(bert: Path, tmp_path: Path) -> None:
    """Of a client that had three stale updates or more; of others there is less."""
    plan = plan_of(bert, rounds=14)
    simulate(plan, out=tmp_path / "run")
    found = preview(plan)
    most = found["memory"]["found_bytes"] / found["clients"]
    each = dict[int, set[int]]()
    for path in (tmp_path / "run/found").glob("*.safetensors"):
        held, note = read_tensor_file(path, "")
        values = sum(value.nbytes for value in held.values())
        each.setdefault(len(note["versions"]), set()).add(values)
        assert 0 < path.stat().st_size - values < 2000  # names, shapes and a checksum
    assert each.pop(3) == {most}
    assert all(values == {most * count / 3} for count, values in each.items())
    assert "to convert stale updates, once all clients had one, on disk" in as_text(found)
    assert preview(plan_of(bert, schedule="sync"))["memory"]["found_bytes"] == 0


def test_engines_agree_and_the_model_is_another_than_without(bert: Path) -> None:
    one, apart_, without = (
        simulate(plan_of(bert, schedule=schedule), engine=engine).tensors
        for schedule, engine in [
            (LATE["schedule"], "inline"),
            (LATE["schedule"], "inline(group=4)"),
            ("buffered(size=2, concurrency=4)", "inline"),
        ]
    )
    assert all(np.array_equal(one[k], apart_[k]) for k in one)
    assert any(not np.array_equal(one[k], without[k]) for k in one)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ({"adapter": "lora"}, "through a whole model that takes too long: say adapter: head"),
        ({"trainer": "plain(lr=0.1, steps=2)"}, "simulates local steps, which only SGD"),
        ({"trainer": "plain(optimizer='sgd', momentum=0.9)"}, "simulates local steps"),
        ({"correction": "scaffold"}, "this correction's state is of the newest"),
        ({"uplink": "feedback(topk)"}, "would take what earlier updates lost for local training"),
        ({"weighting": "fedau"}, "has no rounds that a client takes part in"),
        (
            {"weighting": "uniform", "privacy": "record(noise_multiplier=1.0)"},
            "hides what a client's records are like, and the schedule means to find it",
        ),
        ({"privacy": "user(noise_multiplier=1.0)"}, "single ones would be kept or looked into"),
    ],
)
def test_what_cannot_be_simulated_is_refused(
    bert: Path, lines: dict[str, str], reason: str
) -> None:
    with pytest.raises(PlanError, match=reason):
        plan_of(bert, **lines)


@pytest.mark.parametrize(
    "lines",
    [
        {},
        {"schedule": "buffered(size=2, compensation=0.1)"},
        {"schedule": "sync", "weighting": "mifa"},
    ],
)
def test_what_hides_updates_has_one_name_for_all_that_reads_them(
    bert: Path, lines: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = {"reads-single-updates": "the server is to see sums alone"}
    monkeypatch.setattr(Everyone, "refuses", hidden, raising=False)
    plan_of(bert, schedule="buffered(size=2)")
    with pytest.raises(PlanError, match="the server is to see sums alone"):
        plan_of(bert, **lines)


@pytest.mark.parametrize("inner", ["sync", "inversion(buffered)"])
def test_only_a_schedule_with_stale_updates_is_wrapped(inner: str) -> None:
    with pytest.raises(SpecError, match=r"say inversion\(buffered\(size=10\)\)"):
        build("schedules", f"inversion({inner})")
