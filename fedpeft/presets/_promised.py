"""The lines that presets with a promise to clients share."""

from __future__ import annotations


def promised(epsilon: float, delta: float, clip: float, rate: float) -> dict[str, str]:
    """Return the lines of a promise to clients, each of whom is asked with probability ``rate``."""
    return {
        "privacy": f"user(epsilon={epsilon!r}, delta={delta!r}, clip={clip!r})",
        "cohort": f"poisson(rate={rate!r})",
        "weighting": "uniform(denominator='expected')",
        "correction": "none",
        "aggregator": "mean",
        "optimizer": "sgd",
        "evaluate": "test",  # what clients have held out is private
    }
