"""FlexLoRA: Fine-tuning of LLMs under Heterogeneous Tasks (Bai et al. 2024, arXiv 2402.11505)."""

from __future__ import annotations

from collections.abc import Mapping

from fedpeft.spec import bounded, method


@method
class FlexLora:
    """The products are averaged and cut to the rank by their singular values, all in ``B``.

    Alpha, dropout and targets are those of the released code, which trains with AdamW; it gives
    clients ranks of 8 to 200, ours all have ``r``. The trainer is left to the plan.
    """

    r: int = bounded(default=8, low=1)
    alpha: float = bounded(default=16.0, above=0)
    dropout: float = bounded(default=0.05, low=0, below=1)
    targets: str = "all-linear"

    def lines(self) -> Mapping[str, str]:
        """Return the lines."""
        size = f"r={self.r}, alpha={self.alpha!r}, dropout={self.dropout!r}"
        return {
            "adapter": f"lora({size}, targets={self.targets!r})",
            "correction": "none",
            "weighting": "examples",
            "aggregator": "flexlora",
            "optimizer": "sgd",
        }
