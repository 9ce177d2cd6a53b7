"""The lines that the federated averaging family shares."""

from __future__ import annotations


def local_sgd(lr: float, epochs: int, batch: int, weighting: str = "examples") -> dict[str, str]:
    """Return the lines of local SGD under a mean of updates that the server adds as it is."""
    return {
        "trainer": f"plain(optimizer='sgd', lr={lr!r}, epochs={epochs}, batch={batch})",
        "correction": "none",
        "weighting": weighting,
        "aggregator": "mean",
        "optimizer": "sgd",
    }
