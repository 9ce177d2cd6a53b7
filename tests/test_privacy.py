"""The mechanism: epsilons, sensitivity and noise, measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from fedpeft.errors import PlanError, SpecError
from fedpeft.privacy import _accountant
from fedpeft.privacy._gaussian import normals
from fedpeft.privacy._losses import Rounds
from fedpeft.privacy._mechanism import Adaptive, Mechanism
from fedpeft.releases import mechanism_of, released
from fedpeft.rng import derive
from fedpeft.spec import build
from fedpeft.state import ServerState, start
from fedpeft.tables import Tables
from fedpeft.tensors import clipped, norm
from fedpeft.types import Sampling, Sent, Tensors, Update
from tests.quadratic import Quadratic, play, quadratic_plan

ALL = Sampling("all", 100)
COINS = Sampling("coins", 100, 0.1)
CAPPED = Sampling("coins", 100, 0.1, 12)
FIXED = Sampling("fixed", 100, 0.1, 10)
SAMPLINGS = (ALL, COINS, CAPPED, FIXED)
KEY = bytes(range(32))
SHAPES = {"a": (3, 4), "b": (5,)}
EVEN = "uniform(denominator='expected')"


# --- the accountant -----------------------------------------------------------------------------


def exact_delta(noise: float, epsilon: float) -> float:
    """Return the Gaussian mechanism's delta (Balle and Wang 2018, arXiv 1805.06530, theorem 8)."""
    a, b = 1 / (2 * noise), epsilon * noise
    return float(stats.norm.cdf(a - b) - math.exp(epsilon) * stats.norm.cdf(-a - b))


def test_reference_epsilons() -> None:
    assert _accountant.epsilon(Sampling("coins", 10, 0.1), 3.0, 512, 1e-6) == pytest.approx(
        3.770, abs=1e-3
    )
    assert _accountant.epsilon(ALL, 1.0, 1, 1e-6) == pytest.approx(4.887, abs=1e-3)


@pytest.mark.parametrize(("noise", "rounds"), [(1.0, 1), (0.5, 1), (3.0, 1), (4.0, 16), (2.0, 9)])
def test_without_sampling_epsilon_is_that_of_one_gaussian(noise: float, rounds: int) -> None:
    for delta in (1e-5, 1e-8):
        found = _accountant.epsilon(ALL, noise, rounds, delta)
        whole = noise / math.sqrt(rounds)
        assert exact_delta(whole, found) <= delta
        assert exact_delta(whole, found * (1 - 1e-4)) > delta


def numeric_delta(rate: float, noise: float, epsilon: float) -> float:
    """Return one round's delta with coins by integration, the larger of both directions."""
    x = np.linspace(-40 * noise, 40 * noise, 200_001)
    without = stats.norm.pdf(x, scale=noise)
    having = (1 - rate) * without + rate * stats.norm.pdf(x, loc=1, scale=noise)
    step = x[1] - x[0]
    pairs = ((having, without), (without, having))
    return max(float(np.maximum(p - math.exp(epsilon) * q, 0).sum() * step) for p, q in pairs)


def test_one_round_of_coins_beside_an_integral() -> None:
    for rate, noise in ((0.1, 1.0), (0.5, 0.8)):
        found = _accountant.epsilon(Sampling("coins", 10, rate), noise, 1, 1e-4)
        assert numeric_delta(rate, noise, found) <= 1e-4 * (1 + 1e-6)
        assert numeric_delta(rate, noise, 0.999 * found) > 1e-4


@pytest.mark.parametrize("sampling", [*SAMPLINGS, replace(COINS, rate=1.0)])
@pytest.mark.parametrize("rounds", [1, 7, 60])
def test_what_rounds_share_changes_no_bit(
    sampling: Sampling, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One round is worked out once; here the library composes them all anew."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    monkeypatch.setattr(_accountant, "_GRIDS", (2.0**-9, 2.0**-9))
    found = _accountant.epsilon.__wrapped__(sampling, 1.5, rounds, 1e-5)
    beside = _accountant.renyi.__wrapped__(sampling, 1.5, rounds, 1e-5)
    event, relation = _accountant._event(sampling, 1.5), NeighboringRelation.ADD_OR_REMOVE_ONE
    if sampling.kind == "fixed":
        relation = NeighboringRelation.REPLACE_ONE
    renyi = RdpAccountant(_accountant._ORDERS, relation)
    if sampling.size is None or sampling.kind == "fixed":
        assert beside == renyi.compose(event, rounds).get_epsilon(1e-5)
    if sampling.kind == "fixed":
        assert found == beside
    else:
        whole = PLDAccountant(relation, value_discretization_interval=2.0**-9)
        assert found == whole.compose(event, rounds).get_epsilon(1e-5)


@pytest.mark.parametrize(
    ("sampling", "noise", "rounds", "delta"),
    [
        (COINS, 0.8, 2, 1e-9),
        (CAPPED, 0.8, 1, 1e-5),
        (CAPPED, 0.8, 2, 1e-5),
        (CAPPED, 1.5, 40, 1e-9),
        (CAPPED, 1.5, 40, 1e-13),
        (CAPPED, 1.5, 3, 0.5),
        (CAPPED, 1.5, 2, 1e-15),
        (COINS, 500.0, 2, 1e-5),
    ],
)
def test_rounds_add_up_to_the_bits_of_the_library(
    sampling: Sampling, noise: float, rounds: int, delta: float
) -> None:
    from dp_accounting.pld import privacy_loss_distribution as losses

    step = 2.0**-8
    one = _accountant._one_round.__wrapped__(sampling, noise, step)
    nothing = losses.identity(value_discretization_interval=step)
    expected = nothing.compose(one.self_compose(rounds)).get_epsilon_for_delta(delta)
    found = Rounds(one)
    assert bool(found._sides) == (noise < 500)
    assert found.epsilon(rounds, delta) == expected
    assert found.epsilon(rounds + 1, delta) >= expected
    assert (expected == math.inf) == (delta == 1e-15)
    assert (expected == 0) == (delta == 0.5)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_epsilon_is_monotone_in_every_argument(sampling: Sampling) -> None:
    def of(**given: Any) -> float:
        full = {"sampling": sampling, "noise_multiplier": 1.0, "rounds": 10, "delta": 1e-5} | given
        return _accountant.epsilon(**full)

    noises = [of(noise_multiplier=z) for z in (0.8, 1.0, 2.0, 8.0)]
    rounds = [of(rounds=t) for t in (0, 1, 2, 10)]
    deltas = [of(delta=d) for d in (1e-9, 1e-6, 1e-3)]
    assert noises == sorted(noises, reverse=True)
    assert rounds == sorted(rounds)
    assert rounds[0] == 0
    assert deltas == sorted(deltas, reverse=True)
    assert len({*noises, *rounds, *deltas}) == 10  # z = 1, 10 rounds is in two of them


def test_epsilon_is_monotone_in_the_rate_and_the_size() -> None:
    rates = [_accountant.epsilon(replace(COINS, rate=q), 1.0, 10, 1e-5) for q in (0.01, 0.1, 0.5)]
    sizes = [
        _accountant.epsilon(Sampling("fixed", 100, k / 100, k), 1.0, 10, 1e-5) for k in (1, 10, 50)
    ]
    assert rates == sorted(rates)
    assert sizes == sorted(sizes)
    whole = _accountant.epsilon(ALL, 1.0, 10, 1e-5)
    assert rates[-1] < whole
    assert _accountant.epsilon(replace(COINS, rate=1.0), 1.0, 10, 1e-5) == whole


def test_the_order_of_the_accountants() -> None:
    for sampling in (ALL, COINS):
        for noise, rounds in ((0.7, 1), (1.0, 20), (3.0, 300)):
            beside = _accountant.renyi(sampling, noise, rounds, 1e-6)
            assert beside is not None
            assert _accountant.epsilon(sampling, noise, rounds, 1e-6) <= beside
    assert _accountant.renyi(CAPPED, 1.0, 1, 1e-6) is None
    assert _accountant.renyi(FIXED, 1.0, 5, 1e-6) == _accountant.epsilon(FIXED, 1.0, 5, 1e-6)


def test_a_cap_costs_more_and_one_that_never_cuts_nothing() -> None:
    free = _accountant.epsilon(COINS, 1.0, 10, 1e-5)
    assert _accountant.epsilon(CAPPED, 1.0, 10, 1e-5) > free
    wide = _accountant.epsilon(replace(COINS, size=100), 1.0, 10, 1e-5)
    assert wide == pytest.approx(free, rel=1e-5)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("target", [0.5, 8.0])
def test_calibration_is_the_least_noise(
    sampling: Sampling, target: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, exact = list[float](), _accountant.epsilon

    def counted(sampling: Sampling, noise: float, rounds: int, delta: float) -> float:
        asked.append(noise)
        return exact(sampling, noise, rounds, delta)

    monkeypatch.setattr(_accountant, "epsilon", counted)
    found = _accountant.calibrated.__wrapped__(sampling, target, 5, 1e-5)
    assert len(asked) <= 8
    assert _accountant.epsilon(sampling, found, 5, 1e-5) <= target
    assert _accountant.epsilon(sampling, 0.998 * found, 5, 1e-5) > target


@pytest.mark.parametrize(
    ("rate", "rounds", "target"),
    [(0.001, 10**6, 3.0), (0.01, 1000, 1.0), (0.25, 20, 8.0), (0.01, 20, 0.2), (0.1, 30_000, 40.0)],
)
def test_calibration_looks_coarsely_and_is_confirmed(
    rate: float, rounds: int, target: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fine losses cost most where steps are many; coarse ones alone promise nothing."""
    monkeypatch.setattr(_accountant, "KNOWN", {})
    asked, exact = list[float](), _accountant.epsilon

    def counted(sampling: Sampling, noise: float, rounds: int, delta: float) -> float:
        asked.append(noise)
        return exact(sampling, noise, rounds, delta)

    monkeypatch.setattr(_accountant, "epsilon", counted)
    sampling = Sampling("coins", 1, rate)
    found = _accountant.calibrated.__wrapped__(sampling, target, rounds, 1e-5)
    assert 1 <= len(asked) <= 3
    assert target * 0.995 < exact(sampling, found, rounds, 1e-5) <= target
    assert exact(sampling, 0.998 * found, rounds, 1e-5) > target


def test_coarse_losses_that_lie_lead_to_no_less_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too low or too high: what counts is confirmed by fine ones."""
    sampling = Sampling("coins", 1, 0.1)
    usual, honest = (
        _accountant.calibrated.__wrapped__(sampling, 3.0, 50, 1e-5),
        _accountant._roughly,
    )
    for factor in (0.5, 0.99, 1.01, 2.0):
        monkeypatch.setattr(_accountant, "KNOWN", {})
        monkeypatch.setattr(_accountant, "_roughly", lambda *of, f=factor: f * honest(*of))
        found = _accountant.calibrated.__wrapped__(sampling, 3.0, 50, 1e-5)
        assert _accountant.epsilon(sampling, found, 50, 1e-5) <= 3.0
        assert found == pytest.approx(usual, rel=2e-3)


@pytest.mark.parametrize("sampling", [*SAMPLINGS, replace(CAPPED, size=3), replace(COINS, size=99)])
def test_the_expected_cohort(sampling: Sampling) -> None:
    counts = np.arange(101)
    chances = stats.binom.pmf(counts, 100, sampling.rate)
    if sampling.kind == "coins":
        sizes = np.minimum(counts, 100 if sampling.size is None else sampling.size)
        assert sampling.expected == pytest.approx(float((chances * sizes).sum()), rel=1e-12)
    else:
        assert sampling.expected == (10 if sampling.kind == "fixed" else 100)


@pytest.mark.parametrize(
    "cohort", ["everyone", "poisson(rate=0.3)", "poisson(rate=0.3, cap=4)", "uniform(size=4)"]
)
def test_cohorts_are_drawn_as_the_accountant_believes(cohort: str) -> None:
    part, names = build("cohorts", cohort), [f"c{i}" for i in range(12)]
    sampling, rounds = part.sampling(12), 4000
    counts, sizes = dict.fromkeys(names, 0), []
    for round in range(rounds):
        chosen = part.choose(names, derive(0, round))
        sizes.append(len(chosen))
        for name in chosen:
            counts[name] += 1
    expected = sampling.expected / 12
    error = 5 * math.sqrt(expected * (1 - expected) / rounds) + 1e-12
    assert all(abs(n / rounds - expected) < error for n in counts.values())
    assert abs(np.mean(sizes) - sampling.expected) <= 5 * np.std(sizes) / math.sqrt(rounds) + 1e-9
    assert max(sizes) <= (sampling.size or 12)
    assert part.expected(12.0) == pytest.approx(sampling.expected)


# --- noise --------------------------------------------------------------------------------------


def test_normals_are_normal() -> None:
    found = normals(KEY, "test", 1_000_000)
    assert stats.kstest(found, "norm").pvalue > 1e-3
    assert abs(found.mean()) < 5e-3
    for quantile in (1e-2, 1e-3, 1e-4, 1e-5):
        for tail in (found, -found):
            count = int((tail < stats.norm.ppf(quantile)).sum())
            assert stats.binomtest(count, len(found), quantile).pvalue > 1e-4
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 5e-3


def test_normals_follow_from_key_and_purpose() -> None:
    long, short = normals(KEY, "sum", 70_000), normals(KEY, "sum", 5)
    assert np.array_equal(long[:5], short) is False  # a chunk's second words follow its first
    assert np.array_equal(long, normals(KEY, "sum", 70_000))
    others = (normals(KEY, "count", 5), normals(KEY[::-1], "sum", 5))
    assert not any(np.array_equal(short, other) for other in others)
    assert normals(KEY, "sum", 0).shape == (0,)


def test_uniform_numbers_near_zero_have_all_their_bits() -> None:
    from fedpeft.privacy._gaussian import _halves

    words = np.array([[0, 2**64 - 1, 0, 0, 0], [2**64 - 1, 2**64 - 1, 1, 0, 2**32]], np.uint64)
    found = _halves(words)
    assert found[0] == pytest.approx(0.25)
    assert 0.5 - 1e-15 < found[1] <= 0.5
    assert np.log2(found[2:]) == pytest.approx([-65, -66, -33])


def mechanism(sampling: Sampling = COINS, **given: Any) -> Mechanism:
    full = {"clip": 0.5, "noise_multiplier": 2.0, "delta": 1e-5} | given
    return Mechanism(sampling, **full)


def update(client: str, delta: Tensors, **given: Any) -> Update:
    return Update(client, delta, given.pop("weight", 1.0), 1.0, **given)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("adaptive", [None, Adaptive(0.5, 0.2, 1.5)])
def test_noise_has_the_declared_deviation(sampling: Sampling, adaptive: Adaptive | None) -> None:
    """Without any update: an empty cohort releases noise, in every coordinate."""
    made = mechanism(sampling, adaptive=adaptive)
    share = 1 / 2.0**2 - (1 / (2 * 1.5) ** 2 if adaptive else 0)
    sigma = (2 if sampling.kind == "fixed" else 1) * 0.5 / math.sqrt(share)
    found = []
    for round in range(2000):
        total, _ = made.release([], SHAPES, 0.5, derive(1, round).bytes(32))
        found.append(np.concatenate([value.reshape(-1) for value in total.values()]))
    squares = (np.array(found) / sigma) ** 2
    low, high = stats.chi2.ppf([1e-5, 1 - 1e-5], 2000)
    assert ((squares.sum(0) > low) & (squares.sum(0) < high)).all()
    assert stats.kstest(np.array(found).reshape(-1) / sigma, "norm").pvalue > 1e-3


def test_all_numbers_lie_on_the_grid_and_the_order_of_updates_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    sent = [
        update(str(i), {k: rng.normal(size=s).astype("f4") for k, s in SHAPES.items()})
        for i in range(9)
    ]
    made = mechanism()
    one, _ = made.release(sent, SHAPES, 0.5, KEY)
    other, _ = made.release(sent[::-1], SHAPES, 0.5, KEY)
    step = 2.0**-20  # the deviation is 1
    for name in SHAPES:
        assert np.array_equal(one[name], other[name])
        assert np.array_equal(one[name] / step, np.rint(one[name] / step))


# --- sensitivity --------------------------------------------------------------------------------

CODECS = (
    *("raw", "half", "half(dtype='bfloat16')", "int8", "int4", "topk(density=0.3)", "sign"),
    *(
        "ternary(density=0.5, scale='std', alpha=3.0)",
        "randk(density=0.2)",
        "randk(density=0.2, unbiased=true)",
    ),
    *("seeds", "sketch(ratio=0.5)", "topk(density=0.3) | int8", "feedback(topk(density=0.2))"),
)


def through(codec: str, delta: Tensors, seed: int) -> Tensors:
    """Return what the server decodes."""
    part = build("codecs", codec)
    with np.errstate(over="ignore", invalid="ignore"):
        found: Tensors = part.decode(part.encode(delta, np.random.default_rng(seed)), SHAPES)
    return found


@st.composite
def attacks(draw: Callable[..., Any]) -> Tensors:
    """Huge, tiny, sign-flipped, all at one coordinate: whatever admission lets through."""
    size = sum(math.prod(s) for s in SHAPES.values())
    values = st.floats(-(2.0**49), 2.0**49, width=32) | st.floats(-2, 2, width=32)
    kind = draw(st.sampled_from(["one", "same", "any"]))
    if kind == "any":
        flat = np.array(draw(st.lists(values, min_size=size, max_size=size)), "f4")
    else:
        flat = np.full(size, draw(values), "f4")
        if kind == "one":
            flat[np.arange(size) != draw(st.integers(0, size - 1))] = 0
    return {"a": flat[:12].reshape(3, 4), "b": flat[12:]}


def apart(one: Tensors, other: Tensors) -> float:
    return norm({k: one[k] - other[k] for k in one})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    attack=attacks(),
    other=attacks(),
    codec=st.sampled_from(CODECS),
    sampling=st.sampled_from(SAMPLINGS),
    weight=st.sampled_from([1.0, 7.0, 1e-3, 0.0]),
    clip=st.sampled_from([0.5, 1e-6, 3e4]),
    inside=st.booleans(),
)
def test_no_client_moves_the_sum_by_more_than_the_noise_covers(
    attack: Tensors,
    other: Tensors,
    codec: str,
    sampling: Sampling,
    weight: float,
    clip: float,
    inside: bool,
) -> None:
    """The noise is the same, and cancels to the last bit: what is left is the client's own."""
    rng = np.random.default_rng(5)
    honest = [update(c, {k: rng.normal(size=s) for k, s in SHAPES.items()}) for c in "xyz"]
    made = mechanism(sampling, clip=clip)
    bad, worse = (
        update("bad", through(codec, sent, i), weight=weight, inside=inside)
        for i, sent in enumerate((attack, other))
    )

    def total(*more: Update) -> Tensors:
        return made.release([*honest, *more], SHAPES, clip, KEY)[0]

    assert apart(total(bad), total()) <= clip
    assert apart(total(bad), total(worse)) <= 2 * clip
    needed = (
        apart(total(bad), total(worse)) if made.sensitivity == 2 else apart(total(bad), total())
    )
    assert needed <= made.sensitivity * clip


def test_the_bound_is_reached() -> None:
    made = mechanism()
    flip = {k: np.full(s, 1e9, "f4") for k, s in SHAPES.items()}
    sums = [
        made.release([update("a", {k: sign * v for k, v in flip.items()})], SHAPES, 0.5, KEY)[0]
        for sign in (1, -1)
    ]
    assert apart(*sums) == pytest.approx(1.0, rel=1e-4)


def test_what_fits_the_clip_is_added_as_it_is() -> None:
    made, small = mechanism(), {"a": np.full((3, 4), 0.01), "b": np.full(5, -0.02)}
    with_it, _ = made.release([update("a", small)], SHAPES, 0.5, KEY)
    without, _ = made.release([], SHAPES, 0.5, KEY)
    for name in SHAPES:
        assert with_it[name] - without[name] == pytest.approx(small[name], abs=2.0**-20)


def test_head_and_factors_are_clipped_as_one() -> None:
    delta = {"a": np.full((3, 4), 3.0, "f4"), "b": np.full(5, -4.0, "f4")}
    found = clipped(delta, 0.5)
    assert norm(found) == pytest.approx(0.5, rel=1e-6)
    assert found["a"][0, 0] / found["b"][0] == pytest.approx(-3 / 4, rel=1e-6)
    assert clipped(found, 1.0) is found
    zero = {"a": np.zeros(3, "f4")}
    assert clipped(zero, 0.5) is zero


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_one_client_moves_the_count_by_one_bit(sampling: Sampling) -> None:
    made = mechanism(sampling, adaptive=Adaptive(0.5, 0.2, 1.5))
    zero = {k: np.zeros(s) for k, s in SHAPES.items()}

    def moved(*insides: bool) -> float:
        sent = [update(str(i), zero, inside=inside) for i, inside in enumerate(insides)]
        _, clip = made.release(sent, SHAPES, 0.5, KEY)
        return -math.log(clip / 0.5) / 0.2 * sampling.expected

    one = moved(True, False)
    assert moved(True, False, True) - one == pytest.approx(0.5)
    assert moved(True, False, False) - one == pytest.approx(-0.5)


# --- the clip that follows ----------------------------------------------------------------------


@pytest.mark.parametrize("first", [0.05, 20.0])
@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
def test_the_clip_finds_the_quantile(first: float, quantile: float) -> None:
    """From below and from above, with norms whose median is 1."""
    made = Mechanism(Sampling("all", 500), first, 1.0, 1e-5, Adaptive(quantile, 0.3, 25.0))
    norms, clip = np.exp(np.linspace(-2, 2, 500)), first
    path = []
    for round in range(120):
        sent = [update(str(i), {"a": np.array([v])}, inside=v <= clip) for i, v in enumerate(norms)]
        _, clip = made.release(sent, {"a": (1,)}, clip, derive(2, round).bytes(32))
        path.append(clip)
    assert np.exp(np.mean(np.log(path[-40:]))) == pytest.approx(
        np.quantile(norms, quantile), rel=0.2
    )


def test_clip_and_count_share_one_budget() -> None:
    """The joint sensitivity over the joint noise is one over the noise multiplier."""
    for sampling in SAMPLINGS:
        made = mechanism(sampling, noise_multiplier=1.3, adaptive=Adaptive(0.5, 0.2, 2.0))
        of_sum = made.sensitivity / made.deviation
        of_count = made.sensitivity * 0.5 / (made.sensitivity * 2.0)
        assert math.hypot(of_sum, of_count) == pytest.approx(1 / 1.3)
        assert made.epsilon(3) == mechanism(sampling, noise_multiplier=1.3).epsilon(3)
        assert made.deviation > 1.3 * made.sensitivity


def test_a_count_that_takes_the_whole_budget_is_refused() -> None:
    part = build("privacy", "user(noise_multiplier=2.0, quantile=0.5)")
    assert part.mechanism(Sampling("all", 100), 3).adaptive == Adaptive(0.5, 0.2, 5.0)
    with pytest.raises(PlanError, match="set bit_noise above 1, or ask more clients"):
        part.mechanism(Sampling("all", 20), 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user", "give epsilon or noise_multiplier, one of the two"),
        ("user(epsilon=1.0, noise_multiplier=1.0)", "one of the two"),
        ("user(epsilon=1.0, bit_noise=1.0)", "set quantile"),
        ("user(epsilon=0)", "must be above 0"),
        ("user(epsilon=1.0, delta=1.0)", "must be above 0 and below 1"),
    ],
)
def test_contradictions(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        build("privacy", text)


# --- whole rounds -------------------------------------------------------------------------------

WIDTH, CLIENTS = 4, 6


def noised_plan(**lines: Any) -> Any:
    privacy = "user(noise_multiplier=1.5, clip=0.25, simulate_noise=true)"
    still = "plain(optimizer='sgd', lr=0.1, steps=1, batch=1)"
    return quadratic_plan(**{"privacy": privacy, "weighting": EVEN, "trainer": still, **lines})


ADAPTIVE = (
    "user(noise_multiplier=1.0, clip=0.25, quantile=0.5, clip_lr=0.01, bit_noise=2.0, "
    "simulate_noise=true)"
)
ROUNDS = {
    "everyone": {},
    "coins": {"cohort": "poisson(rate=0.5)"},
    "mostly empty": {"cohort": "poisson(rate=0.01)"},
    "capped": {"cohort": "poisson(rate=0.6, cap=2)"},
    "fixed": {"cohort": "uniform(size=2)"},
    "adaptive": {"cohort": "poisson(rate=0.5)", "privacy": ADAPTIVE},
    "population": {"weighting": "uniform(denominator='population')", "cohort": "uniform(size=3)"},
    "lossy": {"uplink": "feedback(topk(density=0.5) | int8)", "cohort": "poisson(rate=0.7)"},
}


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("lines", ROUNDS.values(), ids=ROUNDS.keys())
def test_every_round_has_the_declared_noise(lines: Mapping[str, str], dropout: bool) -> None:
    """Updates are zero; whoever is asked, and whoever replies, the noise is the whole one."""
    plan, count = noised_plan(rounds=400, **lines), 400
    places = np.zeros((CLIENTS, WIDTH))
    made = mechanism_of(plan, CLIENTS)
    assert made is not None
    named = "population" in plan.lines()["weighting"]
    denominator = CLIENTS if named else made.sampling.expected
    before, clip, found = np.zeros(WIDTH), 0.25, []

    def replying(round: int, name: str) -> bool:
        return not dropout or (round + int(name[-1])) % 3 > 0

    for state in play(plan, Quadratic(places, places), count, replying=replying):
        moved = state.params["x"].astype(float) - before
        found.append(moved * denominator / (made.deviation * clip))
        before, clip = state.params["x"].astype(float), state.coins.clip
    squares = (np.array(found) ** 2).sum(0)
    low, high = stats.chi2.ppf([1e-5, 1 - 1e-5], count)
    assert ((squares > low) & (squares < high)).all(), squares / count


def test_a_missing_reply_counts_as_zero_and_nothing_is_divided_by_what_came() -> None:
    """The step is sum(clipped) / expected + noise, beside the same without updates."""
    rng = np.random.default_rng(8)
    curves, places = rng.uniform(1, 2, (CLIENTS, WIDTH)), 3 * rng.normal(size=(CLIENTS, WIDTH))
    plan = noised_plan(
        rounds=1,
        cohort="poisson(rate=0.5)",
        seed=3,
    )
    learner = Quadratic(curves, places)
    there = {"client-0", "client-2", "client-3"}
    steps = next(iter(play(plan, learner, 1, replying=lambda _, name: name in there)))
    none = next(iter(play(plan, learner, 1, replying=lambda *_: False)))
    asked = _asked(plan)
    deltas = 0.1 * curves * places
    cut = deltas * np.minimum(1, 0.25 / np.linalg.norm(deltas, axis=1))[:, None]
    came = [i for i in (0, 2, 3) if f"client-{i}" in asked]
    assert 0 < len(came) < 3
    expected = cut[came].sum(0) / 3
    assert steps.params["x"] - none.params["x"] == pytest.approx(expected, abs=1e-6)


def _asked(plan: Any) -> Sequence[str]:
    from fedpeft.releases import chooser

    names = [f"client-{i}" for i in range(CLIENTS)]
    state = start(plan, Tables(plan, {"x": (WIDTH,)}), {"x": np.zeros(WIDTH, np.float32)})
    return chooser(plan, state, names)(names)


def test_who_is_drawn_does_not_depend_on_who_is_there() -> None:
    from fedpeft.releases import chooser

    plan = noised_plan(cohort="uniform(size=3)")
    names = [f"client-{i}" for i in range(CLIENTS)]
    state = start(plan, Tables(plan, {"x": (WIDTH,)}), {"x": np.zeros(WIDTH, np.float32)})
    choose = chooser(plan, state, names)
    whole = choose(names)
    assert len(whole) == 3
    for there in (names[:3], names[3:], names[::2], []):
        assert choose(there) == [name for name in there if name in whole]


@pytest.mark.parametrize("aggregator", ["mean", "fedsvd"])
def test_the_aggregator_sees_the_noised_sum_alone(aggregator: str) -> None:
    """So its step is post-processing, whatever it does."""
    adapter = "lora(r=2)" if aggregator == "mean" else "lora(r=2, train='B', send='both')"
    plan = noised_plan(adapter=adapter, aggregator=aggregator)
    shapes = {"m.lora_A.weight": (2, 3), "m.lora_B.weight": (4, 2)}
    tables = Tables(plan, shapes)
    state = ServerState({}, {}, {}, coins=start(plan, tables, zeros(shapes)).coins)
    rng = np.random.default_rng(0)
    up = tables.up(0)["adapter"]
    sent = [update(c, {k: rng.normal(size=s) for k, s in up.items()}) for c in "ab"]
    found = released(plan, tables, state, {"a": 1, "b": 1}, sent, Sent({}))
    assert found is not None
    alone, _ = found
    assert (alone.client, alone.weight, alone.sent) == ("", 1.0, None)
    assert {k: v.shape for k, v in alone.delta.items()} == up
    assert all(value.dtype == np.float64 for value in alone.delta.values())


def zeros(shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    return {k: np.zeros(s, np.float32) for k, s in shapes.items()}


def test_noise_is_added_where_some_client_may_send_and_nowhere_else() -> None:
    """Ranks that rest in a round have no signal, for all clients alike, and need no noise."""
    shapes = {"m.lora_A.weight": (8, 3), "m.lora_B.weight": (4, 8)}
    ranks = set()
    for round in range(12):
        plan = noised_plan(adapter="lora(r=8, ranks='1..8')")
        tables = Tables(plan, shapes)
        state = replace(start(plan, tables, zeros(shapes)), round=round)
        found = released(plan, tables, state, {"a": 1, "b": 1}, [], Sent({}))
        assert found is not None
        a, b = found[0].delta["m.lora_A.weight"], found[0].delta["m.lora_B.weight"]
        rank = tables.of("a", round).shapes["m.lora_A.weight"][0]
        ranks.add(rank)
        assert a[:rank].all()
        assert b[:, :rank].all()
        assert not a[rank:].any()
        assert not b[:, rank:].any()
    assert len(ranks) > 3
    mixed = noised_plan(adapter="lora(r=8, ranks='a=2,b=5,8')")
    tables = Tables(mixed, shapes)
    found = released(
        mixed, tables, start(mixed, tables, zeros(shapes)), {"a": 1, "b": 1}, [], Sent({})
    )
    assert found is not None
    assert [int(v.any(1).sum()) for v in (found[0].delta["m.lora_A.weight"],)] == [5]
