"""ADMM without a dual (Lari, Arablouei, Gogineni & Werner 2025, arXiv 2409.13451)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from fedpeft.corrections import _admm, _control
from fedpeft.spec import bounded, method
from fedpeft.types import Correction, Local, Stacked, Tensors


@method
class AdmmRobust(Correction):
    """As ``admm``, with minus the client's mean gradient where it trained in the place of ``z_i``.

    The dual is a function of where the client is, so errors of the links and of unsolved local
    problems do not add up in it; one pass more over the records, without dropout. Experimental: the
    paper's own recursions could not be read, and this is what follows from what it says of them.

    In the first ``while_away`` rounds in a row that a client has no part in, it trains as it would
    have, with the adapter that it last received, and sends nothing. It makes up for them when it is
    next asked, so its reply takes as much longer; a client that was never asked has nothing to
    train with.
    """

    rho: float = bounded(default=0.1, above=0)
    while_away: int = bounded(default=0, low=0)

    needs: ClassVar[Mapping[str, str]] = _admm.NEEDS
    offers: ClassVar[Mapping[str, str]] = _control.READS
    refuses: ClassVar[Mapping[str, str]] = _control.UNTOUCHED
    remembers: ClassVar[bool] = True
    gradient: ClassVar[Literal["never", "received", "trained"]] = "trained"

    def start(self, received: Tensors, extras: Tensors, memory: Tensors) -> Tensors:
        """Where the round began, and minus the last gradient, for every tensor that travels."""
        return _admm.start(received, memory)

    def adjust(
        self, gradient: Stacked, params: Stacked, constants: Stacked, there: Stacked
    ) -> tuple[Stacked, Stacked]:
        """Return ``g + z_i + rho (w - received)`` for every tensor that travels."""
        return _control.pulled(gradient, params, constants, 1.0, self.rho), constants

    def outgoing(self, local: Local) -> Tensors:
        """Return the change of ``w_i - gradient / rho``."""
        return _admm.outgoing(local, self._dual(local), self.rho)

    def client_update(self, local: Local) -> tuple[Tensors, Tensors]:
        """Keep minus the gradient, and what the server has of this client."""
        return {}, _admm.kept(local, self._dual(local))

    def away_update(self, local: Local) -> Tensors:
        """Keep minus the gradient; the server has what it had."""
        return _admm.rested(local, self._dual(local))

    def _dual(self, local: Local) -> Tensors:
        return {k: -v for k, v in local.gradient.items()}
