"""What the wire benchmark measures against, and the size of a small update beside Flower's."""

from __future__ import annotations

import numpy as np
import pytest

from fedpeft.rng import derive
from simulations.benchmarks.wire import SMALL, TARGETS, Trained, entropy, flower, golomb, ours


def normal(count: int) -> Trained:
    return Trained("normal", {"w": derive(0, "test").standard_normal(count, np.float32)})


@pytest.mark.parametrize(("density", "bits"), [(0.05, 0.339), (0.1, 0.576), (0.2, 0.939)])
def test_golomb_coding_costs_what_compeft_says(density: float, bits: float) -> None:
    found = golomb(normal(200_000), density, 0.0)["bits_per_parameter"]
    assert found == pytest.approx(bits, rel=0.01)


def test_the_entropy_of_symbols() -> None:
    assert entropy(np.array([0, 1, 2, 3] * 5, np.uint8)) == pytest.approx(40)
    assert entropy(np.array([7] * 9, np.uint8)) == 0
    assert entropy(np.array([0, 0, 0, 1], np.uint8)) == pytest.approx(3.2451124978)


@pytest.mark.parametrize("spec", ["raw", "int8", "topk(density=0.1) | int8"])
def test_a_million_values_cost_their_entropy(spec: str) -> None:
    assert ours(normal(1_000_000), spec, 0.0)["to_entropy"] <= 1.01


def test_a_small_update_after_int8_beside_flower() -> None:
    rng = derive(0, "small")
    delta = {k: (3e-3 * rng.standard_normal(s)).astype(np.float32) for k, s in SMALL.items()}
    update = Trained("small", delta)
    wanted = TARGETS["28 small tensors after int8, times smaller than Flower"]
    assert isinstance(wanted, float)
    mine, theirs = ours(update, "int8", 0.0)["bytes"], flower(update, 0.0)["bytes"]
    assert theirs > 4 * 1792  # its float32 values are in it
    assert theirs / mine > wanted
