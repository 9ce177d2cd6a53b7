"""Methods from outside the package: one file each, used from a plan by their import path."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedpeft import Plan, simulate
from fedpeft.admission import admit
from fedpeft.errors import PlanError, WireError
from fedpeft.spec import build, describe
from fedpeft.tables import Tables
from fedpeft.types import Packet, Scalar, Sent, Update, Weights
from fedpeft.wire import pack
from tests.quadratic import Quadratic, play, quadratic_plan
from tests.tiny import support_plan

ROBUST = '''"""Coordinate-wise median (Yin et al. 2018, arXiv 1803.01498)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import numpy as np

from fedpeft.spec import bounded, method
from fedpeft.types import Sent, Step, Update, Weights


@method
class Median:
    """The middle of what the clients say, ``scale`` times; weights are not used."""

    scale: float = bounded(default=1.0, above=0)

    offers: ClassVar[dict[str, str]] = {"reads-single-updates": "sorts them"}

    def reduce(self, updates: Iterable[Update], sent: Sent, weights: Weights) -> Step:
        held = list(updates)
        if not held:
            return Step({k: np.zeros_like(v) for k, v in sent.moving.items()})
        return Step({
            k: np.float32(self.scale) * np.median([u.delta[k] for u in held], axis=0)
            .astype(np.float32)
            for k in sent.moving
        })
'''

LEASH = '''"""A toy: clients are pulled to where the federation moved, and count their rounds."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from fedpeft.spec import bounded, method
from fedpeft.tensors import prefixed, select, zeros_like
from fedpeft.types import Correction, Local, Shapes, Stacked, Tensors, Update


@method
class Leash(Correction):
    """Sends its own drift up and counts its rounds in memory; the mean drift comes down."""

    strength: float = bounded(default=0.1, low=0)

    remembers: ClassVar[bool] = True

    def server_init(self, params: Tensors) -> Tensors:
        drift, played = prefixed("drift", zeros_like(params)), np.zeros(1, np.float32)
        return {**drift, "played": played, "replies": played.copy()}

    def broadcast(self, control: Tensors) -> Tensors:
        return prefixed("drift", select(control, "drift"))

    def start(self, received: Tensors, extras: Tensors, memory: Tensors) -> Tensors:
        return prefixed("pull", select(extras, "drift"))

    def adjust(
        self, gradient: Stacked, params: Stacked, constants: Stacked, there: Stacked
    ) -> tuple[Stacked, Stacked]:
        pulled = {k for k in gradient if f"pull/{k}" in constants}
        found = {
            k: g - self.strength * constants[f"pull/{k}"] if k in pulled else g
            for k, g in gradient.items()
        }
        return found, constants

    def client_update(self, local: Local) -> tuple[Tensors, Tensors]:
        played = local.memory.get("played", np.zeros(1, np.float32)) + np.float32(1)
        return {**prefixed("own", local.delta), "played": played}, {"played": played}

    def extras_up(self, shapes: Shapes) -> Shapes:
        return {**{f"own/{k}": s for k, s in shapes.items()}, "played": (1,)}

    def server_update(
        self, control: Tensors, before: Tensors, update: Update, population: int
    ) -> Tensors:
        own, share = select(update.extras, "own"), np.float32(1 / population)
        moved = {
            f"drift/{k}": control[f"drift/{k}"] + share * (v - before[f"drift/{k}"])
            for k, v in own.items()
        }
        return {
            **control,
            **moved,
            "played": np.maximum(control["played"], update.extras["played"]),
            "replies": control["replies"] + np.float32(1),
        }
'''


@pytest.fixture(autouse=True)
def toypkg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put a package with the two methods on the path."""
    folder = tmp_path / "toypkg"
    folder.mkdir()
    (folder / "__init__.py").write_text("", encoding="utf-8")
    (folder / "robust.py").write_text(ROBUST, encoding="utf-8")
    (folder / "leash.py").write_text(LEASH, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [n for n in sys.modules if n.partition(".")[0] == "toypkg"]:
        del sys.modules[name]


@pytest.fixture
def bowls() -> Quadratic:
    rng = np.random.default_rng(5)
    return Quadratic(rng.uniform(0.5, 2.0, (6, 3)), rng.normal(0, 3, (6, 3)))


def test_a_median_from_outside() -> None:
    median = build("aggregators", "toypkg.robust:Median()")
    params = {"a": np.zeros(2, np.float32)}
    said = [[1, 10], [2, 20], [1000, -1000]]
    updates = [Update(str(i), {"a": np.array(v, np.float32)}, 1, 1.0) for i, v in enumerate(said)]
    assert median.reduce(updates, Sent(params), Weights({}, 3)).delta["a"].tolist() == [2.0, 10.0]
    assert median.reduce([], Sent(params), Weights({}, 0)).delta["a"].tolist() == [0.0, 0.0]


def test_its_fields_are_checked_and_spelled_like_any_other() -> None:
    part = build("aggregators", "toypkg.robust:Median(scale=2)")
    assert describe(part) == "toypkg.robust:Median(scale=2.0)"
    assert build("aggregators", describe(part, full=True)) == part
    for text, message in (
        ("toypkg.robust:Median(scale=0)", r"robust: scale=0 must be above 0"),
        ("toypkg.robust:Median(scal=1)", "did you mean 'scale'"),
        ("toypkg.robust:Mode", "no dataclass with the letters of 'Mode'"),
        ("toypkg.robots:Median", "there is no module 'toypkg.robots'"),
    ):
        with pytest.raises(PlanError, match=f"aggregator: .*{message}"):
            quadratic_plan(aggregator=text)


def test_it_is_used_from_a_plan(bert: Path, tmp_path: Path) -> None:
    plan = support_plan(bert, aggregator="toypkg.robust:Median()")
    result = simulate(plan, out=tmp_path / "run")
    assert len(result.history) == 2
    again = Plan.from_yaml(tmp_path / "run" / "plan.yaml")
    assert again == plan
    assert "toypkg.robust:Median" in (tmp_path / "run" / "adapter" / "fedpeft.json").read_text()


def test_it_shields_from_one_client_that_runs_away() -> None:
    curves, places = np.ones((5, 2)), np.array([[1.0, 2.0]] * 4 + [[1e6, -1e6]])
    plan = quadratic_plan(aggregator="toypkg.robust:Median()")
    *_, last = play(plan, Quadratic(curves, places), 8)
    np.testing.assert_allclose(last.params["x"], [1.0, 2.0], atol=0.05)
    *_, mean = play(quadratic_plan(), Quadratic(curves, places), 8)
    assert abs(mean.params["x"][0]) > 1e5


def test_a_correction_from_outside_talks_in_both_directions(bowls: Quadratic) -> None:
    plan = quadratic_plan(
        correction="toypkg.leash:Leash(strength=0.5)", cohort="uniform(size=2)", uplink="half"
    )
    tables = Tables(plan, {"x": (3,)})
    assert tables.remembers
    assert tables.down(0)["control"] == {"drift/x": (3,)}
    assert tables.up(0)["control"] == {"own/x": (3,), "played": (1,)}
    states = list(play(plan, bowls, 12))
    played = [float(s.control["played"][0]) for s in states]
    assert [float(s.control["replies"][0]) for s in states] == [2.0 * (r + 1) for r in range(12)]
    counts = dict[str, int]()
    for round, each in enumerate(states):
        for client, latest in each.acks.items():
            counts[client] = counts.get(client, 0) + (latest == round)
        assert played[round] == max(counts.values())  # memory has survived every absence
    assert max(counts.values()) > 2
    assert np.abs(states[-1].control["drift/x"]).max() > 0
    free = list(play(quadratic_plan(cohort="uniform(size=2)", uplink="half"), bowls, 12))
    assert not np.array_equal(free[-1].params["x"], states[-1].params["x"])
    idle = quadratic_plan(
        correction="toypkg.leash:Leash(strength=0)", cohort="uniform(size=2)", uplink="half"
    )
    *_, last = play(idle, bowls, 12)
    assert np.array_equal(free[-1].params["x"], last.params["x"])


def test_it_runs_on_a_model_and_pays_for_what_it_sends(bert: Path, tmp_path: Path) -> None:
    lines = {"trainer": "plain(optimizer='sgd', lr=0.05, steps=2, batch=4)"}
    plain = simulate(support_plan(bert, **lines))
    leash = simulate(
        support_plan(bert, correction="toypkg.leash:Leash()", **lines), out=tmp_path / "run"
    )
    for key in ("up_bytes", "down_bytes"):  # each direction carries the adapter's size once more
        ratio = leash.history[0][key] / plain.history[0][key]
        assert 1.8 < ratio < 2.2
    assert leash.history[0]["loss"] == plain.history[0]["loss"]  # the first pull is zero
    assert not any("refused" in line for line in leash.history)


def test_extras_of_another_shape_are_refused() -> None:
    plan = quadratic_plan(correction="toypkg.leash:Leash()")
    tables = Tables(plan, {"x": (3,)})
    expected = tables.up(0)
    (state,) = play(plan, Quadratic(np.ones((1, 3)), np.ones((1, 3))), 1)
    state = type(state)(state.params, state.slots, state.control)
    told: dict[str, Scalar] = {
        "run": "run",
        "round": 0,
        "steps": 1,
        "lr_sum": 1.0,
        "seen": 1,
        "loss": 0.0,
    }
    good = {
        "adapter": {"x": np.zeros(3, np.float32)},
        "control": {"own/x": np.zeros(3, np.float32), "played": np.ones(1, np.float32)},
    }
    weights = Weights({"a": 1.0}, 1.0)
    message = pack(Packet(good, told), expected)
    assert admit(plan, tables, ("run", 0), "a", message, {"a": 8}, weights).extras["played"] == 1
    for control in (
        {"own/x": np.zeros(4, np.float32), "played": np.ones(1, np.float32)},
        {"own/x": np.zeros(3, np.float32)},
        {**good["control"], "more": np.ones(1, np.float32)},
        {"own/x": np.full(3, np.nan, np.float32), "played": np.ones(1, np.float32)},
    ):
        bad = pack(Packet({**good, "control": control}, told), expected)
        with pytest.raises(WireError, match=r"other names or shapes|not finite"):
            admit(plan, tables, ("run", 0), "a", bad, {"a": 8}, weights)
