"""Ditto: Fair and Robust Federated Learning Through Personalization (Li 2021, arXiv 2012.04221)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from fedpeft.spec import bounded, method
from fedpeft.types import Personal, Stacked


@method
class Ditto(Personal):
    """Each client's ``v`` follows ``g + lam (v - w)``, ``w`` being what it was sent this round.

    ``v`` is trained by the plan's trainer in the rounds that its client plays, with batches of its
    own (in the released code both have the same), and starts as the adapter before round 0 (as
    there). ``lam=0`` is local training that the federation has no part in.
    What trains but is not sent down (a local head) is not pulled. Corrections, codecs and what an
    adapter does before it sends are of the shared adapter alone. ``v`` is part of the client's
    memory: a round whose reply was not used does not count for it.
    """

    lam: float = bounded(default=0.1, low=0)

    when: ClassVar[Literal["never", "rounds", "evaluation"]] = "rounds"

    @property
    def refuses(self) -> Mapping[str, str]:
        """What leaves ``v - w`` without a meaning; with ``lam=0`` nothing does."""
        if not self.lam:
            return {}
        return {
            "sent-at-rest": "the server may make anew a factor that clients are sent and never "
            "train, while theirs stays as it was; use lora(train='A,B') or lora(train='B/A'), or "
            "personal: tuned",
            "edits-base": "part of what clients share goes into the base, where nothing can be "
            "pulled to it; use personal: tuned, or lam=0",
        }

    def adjust(self, gradient: Stacked, params: Stacked, shared: Stacked) -> Stacked:
        """Return ``g + lam (v - w)`` for every tensor that was sent."""
        return {
            k: g + self.lam * (params[k] - shared[k]) if k in shared else g
            for k, g in gradient.items()
        }
