"""LoRA-FA (Zhang et al. 2023, arXiv 2308.03303) after the noise of a promise to clients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from fedpeft.presets._promised import promised
from fedpeft.spec import bounded, method


@method
class DpLoraFa:
    """``B`` trains beside a fixed ``A``; the server multiplies the noised mean by ``(A A^T)^-1``.

    After the noise this is post-processing and costs nothing. What it changes is gone where the
    rows of ``A`` are orthonormal, so ``A`` starts as PEFT draws it. Every value is ours. The
    trainer is left to the plan.
    """

    r: int = bounded(default=8, low=1)
    alpha: float = bounded(default=16.0, above=0)
    targets: str = "attention"
    init: Literal["kaiming", "orthonormal", "gaussian"] = "kaiming"
    epsilon: float = bounded(default=8.0, above=0, high=100)
    delta: float = bounded(default=1e-5, above=0, below=1)
    clip: float = bounded(default=0.5, above=0)
    rate: float = bounded(default=0.1, above=0, high=1)

    def lines(self) -> Mapping[str, str]:
        """Return the lines."""
        size = f"r={self.r}, alpha={self.alpha!r}, targets={self.targets!r}"
        return {
            **promised(self.epsilon, self.delta, self.clip, self.rate),
            "adapter": f"lora({size}, train='B', send='both', init={self.init!r})",
            "aggregator": "lora_fa",
        }
