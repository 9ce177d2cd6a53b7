"""FedAMD: anchor sampling under partial participation (Wu et al. 2023, arXiv 2206.05891)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from fedpeft.corrections import _control
from fedpeft.errors import SpecError
from fedpeft.rng import derive
from fedpeft.spec import bounded, method
from fedpeft.tensors import prefixed, zeros_like
from fedpeft.types import Correction, Local, Stacked, Tensors, Update

_P = 0.2


@method
class FedAmd(Correction):
    """Anchors send their mean gradient and take no step; miners go on from the mean of all these.

    A client is an anchor with probability ``p``, or every client is in one round out of ``every``
    and none in the others; all are in round 0. A miner follows ``u``, first the mean ``g`` of what
    the N clients last sent as anchors (zero before), and adds at each step the gradient of its
    batch where it is, minus that of the same batch where it was a step before. The aggregate is of
    miners alone; where there are none, the adapter stays where it is. The server keeps ``g``
    alone, since anchors, who remember it, send the change of theirs.

    ``g`` is of models before the present one, and a server optimizer with momentum adds to that
    delay: quadratics that ``sgd`` brings to rest diverge with a momentum of 0.8.
    """

    p: float = bounded(default=_P, above=0, below=1)
    every: int | None = bounded(default=None, low=2)

    offers: ClassVar[Mapping[str, str]] = _control.READS
    refuses: ClassVar[Mapping[str, str]] = {
        **_control.UNTOUCHED,
        "remembering-code": "what an update lost is added to the client's next, and one may be a "
        "gradient, the other steps: use the codec without feedback",
    }
    remembers: ClassVar[bool] = True

    def check(self) -> None:
        """Raise ``SpecError`` for two rules of who is an anchor."""
        if self.every is not None and self.p != _P:
            raise SpecError("fedamd: p draws anchors, every has all be ones at times; give one")

    def server_init(self, params: Tensors) -> Tensors:
        """``g`` = 0."""
        return zeros_like(params)

    def broadcast(self, control: Tensors) -> Tensors:
        """``g`` travels down."""
        return control

    def anchor(self, client: str, round: int, seed: int) -> bool:
        """Tell whether ``client`` looks at its gradient only."""
        if round == 0 or self.every is not None:
            return round % (self.every or 1) == 0
        return bool(derive(seed, round, client, "anchor").random() < self.p)

    def start(self, received: Tensors, extras: Tensors, memory: Tensors) -> Tensors:
        """``u = g``, and where the client is."""
        first = {k: extras[k] for k in received}
        return {**prefixed("u", first), **prefixed("before", received)}

    def elsewhere(self, params: Stacked, constants: Stacked) -> Stacked:
        """Return where the client was a step before."""
        return {k: constants.get(f"before/{k}", v) for k, v in params.items()}

    def adjust(
        self, gradient: Stacked, params: Stacked, constants: Stacked, there: Stacked
    ) -> tuple[Stacked, Stacked]:
        """Return ``u + g - there`` for every tensor that travels; it is the next ``u``."""
        has = {k for k in gradient if f"u/{k}" in constants}
        found = {
            k: constants[f"u/{k}"] + (g - there[k]) if k in has else g for k, g in gradient.items()
        }
        moved = {f"u/{k}": found[k] for k in has} | {f"before/{k}": params[k] for k in has}
        return found, {**constants, **moved}

    def outgoing(self, local: Local) -> Tensors:
        """Return, of an anchor, minus the change of its gradient since it last was one."""
        if not local.anchor:
            return local.moved
        return {k: v + local.memory.get(k, np.float32(0)) for k, v in local.moved.items()}

    def client_update(self, local: Local) -> tuple[Tensors, Tensors]:
        """Keep the gradient as the server has it."""
        if not local.anchor:
            return {}, local.memory
        old = local.memory
        return {}, {**old, **{k: old.get(k, np.float32(0)) - v for k, v in local.delta.items()}}

    def server_update(
        self, control: Tensors, before: Tensors, update: Update, population: int
    ) -> Tensors:
        """``g += change / N`` for an anchor."""
        if not update.anchor:
            return control
        share = np.float32(1 / population)
        return {**control, **{k: control[k] - share * v for k, v in update.delta.items()}}
