"""The audit by canaries: its arithmetic, what it says of private runs, and of broken ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fedpeft import Plan
from fedpeft.errors import PlanError, RunError
from fedpeft.privacy import _accountant
from fedpeft.privacy._mechanism import Mechanism
from fedpeft.tensors import norm
from fedpeft.types import Sampling
from simulations.privacy import audit as audits
from simulations.privacy._canaries import Sphere
from simulations.privacy._gaussians import Normal, epsilon
from simulations.privacy.audit import Audit, Estimate, audit
from tests.tiny import support_lines

EVEN = "uniform(denominator='expected')"
ADAPTIVE = "user(noise_multiplier=0.5, clip=0.1, quantile=0.5, bit_noise=20.0, simulate_noise=true)"


def integrated(one: Normal, other: Normal, value: float) -> float:
    """Return delta at an epsilon by adding up densities, both ways round."""
    ends = [n.mean + s * 14 * n.deviation for n in (one, other) for s in (-1, 1)]
    x, step = np.linspace(min(ends), max(ends), 400_001, retstep=True)
    p, q = (stats.norm.pdf(x, n.mean, n.deviation) for n in (one, other))
    pairs = ((p, q), (q, p))
    return max(float(np.maximum(a - math.exp(value) * b, 0).sum() * step) for a, b in pairs)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Normal(0, 1), Normal(1, 1)),
        (Normal(0, 1), Normal(1, 1.3)),
        (Normal(0, 1), Normal(1, 0.8)),
        (Normal(0.3, 0.01), Normal(0.3, 0.02)),
        (Normal(-2, 0.5), Normal(1, 0.5 + 1e-9)),
    ],
)
def test_the_epsilon_of_two_normal_distributions(one: Normal, other: Normal) -> None:
    for delta in (1e-2, 1e-5):
        found = epsilon(one, other, delta)
        assert found == epsilon(other, one, delta) > 0
        assert integrated(one, other, found) == pytest.approx(delta, rel=1e-3)


def test_of_equal_deviations_it_is_the_gaussian_mechanism_s() -> None:
    for noise in (0.2, 1.0, 3.0):
        claimed = _accountant.epsilon(Sampling("all", 9), noise, 1, 1e-5)
        assert epsilon(Normal(0, noise), Normal(1, noise), 1e-5) == pytest.approx(claimed, rel=1e-3)
    assert epsilon(Normal(0, 1), Normal(0, 1), 1e-5) == 0
    assert epsilon(Normal(0, 1), Normal(1e-9, 1), 1e-5) == 0
    assert 1e5 < epsilon(Normal(0, 1), Normal(1000, 1), 1e-5) < 1e6


def test_statistics_that_are_all_the_same_have_no_deviation() -> None:
    with pytest.raises(RunError, match="use more canaries"):
        Normal.of([1.0, 1.0])


def test_directions_are_unit_vectors_of_their_names() -> None:
    sphere = Sphere({"a": (30, 40), "b": (300,)}, seed=1)
    one, other = sphere.vector("one"), sphere.vector("other")
    assert norm({"": one}) == pytest.approx(1, rel=1e-6)
    assert abs(float(one @ other)) < 0.2
    assert np.array_equal(one, sphere.vector("one"))
    again = sphere.tensors(one)
    assert {k: v.shape for k, v in again.items()} == sphere.shapes
    assert sphere.cosines({k: 3.0 * v for k, v in again.items()}, ["one"]) == pytest.approx([1.0])


@pytest.mark.parametrize("noise", [0.7, 1.5])
def test_of_the_gaussian_mechanism_the_estimate_is_right(noise: float) -> None:
    """A sum of canaries in 20,000 dimensions: other canaries are a little noise, too."""
    sphere, rng, count = Sphere({"x": (20_000,)}, seed=2), np.random.default_rng(0), 800
    names = [f"c{i}" for i in range(count)]
    total = noise * rng.normal(size=sphere.dimensions)
    total += np.sum([sphere.vector(name) for name in names], axis=0, dtype=np.float64)
    seen = Normal.of(sphere.cosines({"x": total}, names))
    null = Normal(0.0, sphere.dimensions**-0.5)
    wide = math.sqrt(noise**2 + count / sphere.dimensions)
    expected = _accountant.epsilon(Sampling("all", 9), wide, 1, 1e-5)
    assert epsilon(seen, null, 1e-5) == pytest.approx(expected, rel=0.15)


# --- whole runs ---------------------------------------------------------------------------------


def lines(model: Path, **more: Any) -> dict[str, Any]:
    """Return a plan of which a canary's part is small, and its claim the sum over all rounds."""
    return support_lines(
        model,
        data="embedded(name='support')",
        partition="iid",
        clients=1000,
        holdout=0,
        adapter="lora(r=8, targets='all-linear')",
        trainer="plain(optimizer='sgd', lr=0.01, steps=1, batch=1)",
        privacy="user(noise_multiplier=0.5, clip=0.1, simulate_noise=true)",
        cohort="poisson(rate=0.2)",
        weighting=EVEN,
        rounds=10,
        evaluate="test",
        eval_every=10,
    ) | dict(more)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"uplink": "feedback(topk(density=0.3) | int8)", "downlink": "half"},
        {"adapter": "lora(r=16, targets='all-linear', train='B')", "optimizer": "sgd(lr=0.5)"},
        {"cohort": "uniform(size=200)"},
        {"privacy": ADAPTIVE},
    ],
    ids=str,
)
def test_private_runs_give_away_less_than_they_claim(bert: Path, more: dict[str, str]) -> None:
    """And one whose noise is ten times too small more, however it is set up."""
    plan = Plan.from_lines(lines(bert, **more))
    found = audit(plan, canaries=500, engine="inline(group=16)")
    assert found.final.epsilon < found.claimed
    if more != {"privacy": ADAPTIVE}:  # there rounds differ, and the largest cosine is not normal
        assert found.largest.epsilon < found.claimed
    deviation = Mechanism.deviation.fget  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mechanism, "deviation", property(lambda own: deviation(own) / 10))
        broken = audit(plan, canaries=500, engine="inline(group=16)")
    assert broken.claimed == found.claimed
    assert max(broken.final.epsilon, broken.largest.epsilon) > broken.claimed


# --- the command --------------------------------------------------------------------------------


def small(model: Path, **more: Any) -> dict[str, Any]:
    few = {"clients": 24, "rounds": 2, "eval_every": 2, "cohort": "everyone"}
    return lines(model, **{**few, **more})


def test_the_command(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in small(bert).items()))
    status = audits.main([str(path), "rounds=3", "--canaries", "12", "--unseen", "40", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["canaries"] == 12
    assert found["claimed"] == _accountant.epsilon(Sampling("all", 24), 0.5, 3, 1e-5)
    worst = max(found["final"]["epsilon"], found["largest"]["epsilon"])
    assert status == int(worst > found["claimed"])
    assert found["final"]["seen"]["mean"] > 3 * found["dimensions"] ** -0.5
    assert found["final"]["unseen"] == {"mean": 0, "deviation": found["dimensions"] ** -0.5}
    assert audits.main([str(path), "privacy=none"]) == 2
    assert "promises nothing" in capsys.readouterr().err


def test_a_run_that_gives_away_more_than_it_claims_fails_the_command(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    same = Estimate(9.0, Normal(0.1, 0.01), Normal(0.0, 0.01))
    monkeypatch.setattr(audits, "audit", lambda *_, **__: Audit(3.0, 1e-5, 2000, 9, same, same))
    path = tmp_path / "plan.yaml"
    path.write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in small(bert).items()))
    assert audits.main([str(path)]) == 1
    assert "final model: estimated epsilon 9.000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "canaries", "message"),
    [
        ({"adapter": "head"}, 4, "random directions are nearly orthogonal from about 1000"),
        ({}, 40, "24 are fewer than 40 canaries"),
    ],
)
def test_what_cannot_be_audited_says_so(
    bert: Path, more: dict[str, str], canaries: int, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        audit(Plan.from_lines(small(bert, **more)), canaries=canaries, unseen=10)
