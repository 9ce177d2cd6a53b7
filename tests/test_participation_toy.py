"""The toy comparison of weightings: its command runs, and its federation is what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from simulations.quadratics import participation


def test_the_command_plays_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(participation, "CLIENTS", 12)
    given = ["--quick", "--results", str(tmp_path), "--seeds", "1"]
    assert participation.main([*given, "--only", "fedau"]) == 0
    assert "fedau" not in (tmp_path / "participation.md").read_text()  # nothing to compare with
    assert participation.main(given) == 0
    said = capsys.readouterr().out
    assert said.count("fedau(cutoff=50), seed 0") == 1
    lines = (tmp_path / "participation.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    assert lines[-1].startswith("| 0 | ")
    assert len(rows) == len(participation.WEIGHTINGS)
    assert rows[0].endswith("| 0.0 % |")


def test_rates_go_with_where_clients_pull() -> None:
    from fedpeft.availability.bernoulli import Bernoulli

    bowls, crowd = participation.federation(0)
    rates = Bernoulli().true_rates(crowd)
    assert len(crowd.names) == 250
    assert crowd.mix.sum(1) == pytest.approx(1)
    drawn = (rates @ bowls.optima) / rates.sum()
    assert float(np.linalg.norm(drawn - bowls.minimum)) > 0.3
    assert rates.min() == 0.02


@pytest.mark.parametrize("weighting", participation.WEIGHTINGS)
def test_the_arithmetic_is_that_of_the_real_rounds(
    weighting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(participation, "CLIENTS", 30)
    real, plain = participation.measure(weighting, 1, 24), participation.compute(weighting, 1, 24)
    assert real == pytest.approx(plain, rel=1e-4)


def test_what_a_cutoff_leaves_is_what_its_mean_weights_say() -> None:
    """And what averaging leaves is what the rates say."""
    for seed in (0, 1):
        uniform, cut = participation.expected(seed)
        assert 0 < cut < uniform
        for weighting, value in (("uniform", uniform), ("fedau(cutoff=50)", cut)):
            found = participation.compute(weighting, seed, participation.ROUNDS)["bias"]
            assert found == pytest.approx(value, rel=0.1), weighting
