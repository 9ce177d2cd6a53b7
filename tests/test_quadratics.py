"""``simulations/quadratics``: gradients, the optimum, and that rounds are the algorithm."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from simulations.quadratics.__main__ import main
from simulations.quadratics._cells import AWAY, CORRECTIONS, LINKS, cells
from simulations.quadratics.bowls import bowls
from simulations.quadratics.rounds import after, plan, play, tail


@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_records_are_their_client_plus_noise_that_sums_to_nothing(noise: float) -> None:
    made = bowls(clients=3, width=4, noise=noise, records=8, seed=1)
    point = np.array([1.0, -2.0, 0.5, 3.0], np.float32)
    held = list(made.records().values())
    found = made.mean_gradients([{"w": point}] * 3, ["w"], held, 3)
    for i, (gradient, loss) in enumerate(found):
        np.testing.assert_allclose(
            gradient["w"], made.curves[i] @ (point - made.optima[i]), rtol=1e-5
        )
        assert loss >= 0
    way = point - made.places
    each = np.einsum("nij,nrj->nri", made.curves, way)
    spread = np.sqrt(((each - each.mean(1, keepdims=True)) ** 2).mean((1, 2)))
    np.testing.assert_allclose(spread, noise, atol=1e-9)
    np.testing.assert_allclose(made.slope(made.minimum), 0, atol=1e-12)
    values = np.linalg.eigvalsh(made.curves)
    assert values.min() >= 0.5
    assert values.max() <= 5.0


def test_rounds_are_the_algorithm_written_out() -> None:
    made, lr = bowls(clients=5, width=3, seed=2), 0.01
    given = plan(4, cohort="uniform(size=2)")
    x = np.zeros(3)
    for round, state in enumerate(play(given, made, lambda r: made.clients[r : r + 2])):
        ends = []
        for i in (round, round + 1):
            y = x.copy()
            for _ in range(16):
                y = y - lr * made.curves[i] @ (y - made.optima[i])
            ends.append(y)
        x = np.mean(ends, axis=0)
        np.testing.assert_allclose(after(state), x, rtol=1e-5, atol=1e-6)


def test_scaffold_has_no_bias_and_local_sgd_has() -> None:
    made = bowls(clients=6, width=3)
    biased = tail(plan(60), made)
    exact = tail(plan(60, correction="scaffold"), made)
    assert exact["slope"] < 1e-3 < 0.05 < biased["slope"]
    assert exact["rms"] < 1e-3
    assert biased["bias"] == pytest.approx(biased["rms"], rel=1e-3)  # at rest


def test_the_tables_are_made_and_finished_cells_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--quick", "--results", str(tmp_path), "--only", "4_of_20__no_noise"]
    assert main(given) == 0
    made = sorted(tmp_path.glob("*.json"))
    assert len(made) == len(CORRECTIONS)
    text = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in CORRECTIONS)
    slope = json.loads(made[0].read_text(encoding="utf-8"))["tail"]["slope"]
    assert f"{slope:.1e}" in text
    made[0].write_text(made[0].read_text(encoding="utf-8").replace(str(slope), "7.0"), "utf-8")
    assert main(given) == 0
    assert "7.0e+00" in (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert "7.0e+00" in capsys.readouterr().out


@pytest.mark.parametrize(("table", "rows"), [("links", LINKS), ("away", AWAY)])
def test_links_play(table: str, rows: Sequence[str]) -> None:
    found = [c for c in cells() if c.table == table and c.column == "noisy, 100 rounds"]
    assert [cell.row for cell in found] == [*rows]
    for cell in found:
        assert 0 < replace(cell, rounds=2).play()["tail"]["rms"] < 100


def test_who_trains_while_away_is_nearer_after_as_many_rounds() -> None:
    """Of 8 clients 2 take part; the local problems are all but solved."""
    rests, trains = (
        tail(
            plan(
                60,
                correction=f"admm_robust(rho=1.0, while_away={most})",
                trainer="plain(optimizer='sgd', lr=0.15, steps=40, batch=1)",
                weighting="uniform(denominator='population')",
                cohort="uniform(size=2)",
            ),
            bowls(clients=8, width=3, seed=5),
        )["rms"]
        for most in (0, 4)
    )
    assert trains < rests / 2
