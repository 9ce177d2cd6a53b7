"""FedSVD: Adaptive Orthogonalization for Private Federated LoRA (Lee 2025, arXiv 2505.12805)."""

from __future__ import annotations

from collections.abc import Mapping

from fedpeft.spec import bounded, method


@method
class FedSvd:
    """``B`` trains and is averaged; the server makes ``A`` orthonormal again after every round.

    The values are those of the released code: query and value projections, rank and alpha 8,
    dropout 0.05, 10 steps of SGD with 0.5 on batches of 64 x 2, clipped at 1, heads frozen.
    """

    r: int = bounded(default=8, low=1)
    alpha: float = bounded(default=8.0, above=0)
    dropout: float = bounded(default=0.05, low=0, below=1)
    targets: str = "attention"
    lr: float = bounded(default=0.5, above=0)
    steps: int = bounded(default=10, low=1)
    batch: int = bounded(default=128, low=1)

    def lines(self) -> Mapping[str, str]:
        """Return the lines."""
        size = f"r={self.r}, alpha={self.alpha!r}, dropout={self.dropout!r}"
        work = f"lr={self.lr!r}, steps={self.steps}, batch={self.batch}, accumulate=2, clip=1.0"
        roles = "train='B', send='both', head='frozen'"
        return {
            "adapter": f"lora({size}, targets={self.targets!r}, {roles})",
            "trainer": f"plain(optimizer='sgd', {work})",
            "correction": "none",
            "weighting": "examples",
            "aggregator": "fedsvd",
            "optimizer": "sgd",
        }
