"""The lines that presets of one family share."""

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


def mixed_ranks(r: int, alpha: float) -> str:
    """Return an adapter whose clients have a quarter of ``r``, half of it, or all."""
    return f"lora(r={r}, alpha={alpha!r}, ranks='{r // 4},{r // 2},{r}')"
