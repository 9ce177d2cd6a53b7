"""LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters (Bałazy et al. 2024,
arXiv 2405.17604).
"""

from __future__ import annotations

from collections.abc import Mapping

from fedpeft.spec import bounded, method


@method
class LoraXs:
    """``R`` [r, r] between the leading singular vectors of W trains, travels and is averaged.

    Alpha, the modules (by BERT's names), no dropout and the singular values in ``A`` are those of
    the released code for GLUE, and the rank is one of those it tries. It trains in one place: to
    average is ours, and so is leaving the trainer to the plan.
    """

    r: int = bounded(default=16, low=1)
    alpha: float = bounded(default=16.0, above=0)
    targets: str = "query,value,attention.output.dense,output.dense"

    def lines(self) -> Mapping[str, str]:
        """Return the lines."""
        size = f"r={self.r}, scale={self.alpha / self.r!r}, targets={self.targets!r}"
        return {
            "adapter": f"core({size}, init='svd', sigma_to='A')",
            "correction": "none",
            "weighting": "examples",
            "aggregator": "mean",
            "optimizer": "sgd",
        }
