"""Fed-SB (Singhal et al. 2025, arXiv 2502.15436) with a promise to clients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from fedpeft.presets._promised import promised
from fedpeft.spec import bounded, method


@method
class DpFedSb:
    """``R`` [r, r] between two frozen factors trains, travels and gets noise: few values.

    The factors must not follow from clients' records, as they do in the released code. With a data
    line in ``public`` they follow from the gradient of public records (LoRA-SB, arXiv 2411.19557),
    without from the base alone: its singular vectors, or drawn ones. Every value is ours; the
    paper clips and noises steps of single records, here the update of a client is. The trainer is
    left to the plan.
    """

    r: int = bounded(default=16, low=1)
    targets: str = "attention"
    init: Literal["svd", "orthonormal"] = "svd"
    public: str = ""
    epsilon: float = bounded(default=8.0, above=0, high=100)
    delta: float = bounded(default=1e-5, above=0, below=1)
    clip: float = bounded(default=0.5, above=0)
    rate: float = bounded(default=0.1, above=0, high=1)

    def lines(self) -> Mapping[str, str]:
        """Return the lines."""
        init = f"init='gradient', public={self.public!r}" if self.public else f"init={self.init!r}"
        return {
            **promised(self.epsilon, self.delta, self.clip, self.rate),
            "adapter": f"core(r={self.r}, targets={self.targets!r}, {init})",
        }
