"""FFA-LoRA (Sun et al. 2024, arXiv 2403.12313) with a promise to clients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from fedpeft.presets._promised import promised
from fedpeft.spec import bounded, method


@method
class DpFfaLora:
    """``B`` alone trains, travels and gets noise: half of what LoRA of this rank would need.

    Noise on two factors would be multiplied; beside a frozen ``A`` it is not. Every value is ours,
    and so is the start with orthonormal rows, where noise on ``B`` is noise of the same size on the
    product. The paper clips and noises steps of single records; here the update of a client is. The
    trainer is left to the plan.
    """

    r: int = bounded(default=8, low=1)
    alpha: float = bounded(default=16.0, above=0)
    targets: str = "attention"
    init: Literal["kaiming", "orthonormal", "gaussian"] = "orthonormal"
    epsilon: float = bounded(default=8.0, above=0, high=100)
    delta: float = bounded(default=1e-5, above=0, below=1)
    clip: float = bounded(default=0.5, above=0)
    rate: float = bounded(default=0.1, above=0, high=1)

    def lines(self) -> Mapping[str, str]:
        """Return the lines."""
        size = f"r={self.r}, alpha={self.alpha!r}, targets={self.targets!r}"
        return {
            **promised(self.epsilon, self.delta, self.clip, self.rate),
            "adapter": f"lora({size}, train='B', init={self.init!r})",
        }
