"""What the two forms of ADMM share: the local problem, and what is sent."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedpeft.tensors import prefixed, select
from fedpeft.types import Local, Tensors

NEEDS: Mapping[str, str] = {
    "mean-over-all": "the server's model is the mean of what all clients last sent, and they send "
    "the change of it: say weighting: uniform(denominator='population')",
    "adds-updates": "the server's model is what it adds up, as it is: say optimizer: sgd",
    "linear": "the server's model is a mean of what clients send: say aggregator: mean",
}


def start(received: Tensors, memory: Tensors) -> Tensors:
    """Return where the round began, and the dual, for every tensor that travels."""
    dual = select(memory, "dual")
    held = {k: dual[k] if k in dual else np.zeros_like(v) for k, v in received.items()}
    return {**prefixed("origin", received), **prefixed("own", held)}


def outgoing(local: Local, dual: Tensors, rho: float) -> Tensors:
    """Return the change of ``w_i + z_i / rho`` since the client last sent it."""
    held, found = _held(local), {}
    for k, moved in local.moved.items():
        found[k] = (local.received[k] + moved + dual[k] / np.float32(rho)) - held[k]
    return found


def kept(local: Local, dual: Tensors) -> Tensors:
    """Return the memory: the dual, and what the server has of this client."""
    held = _held(local)
    known = {k: held[k] + v for k, v in local.delta.items()}
    return {**local.memory, **prefixed("dual", dual), **prefixed("known", known)}


def rested(local: Local, dual: Tensors) -> Tensors:
    """Return the memory where nothing was sent: the dual moves, what the server has does not."""
    return {**local.memory, **prefixed("dual", dual)}


def _held(local: Local) -> Tensors:
    """Return what the server has of this client: before its first reply, where the run began."""
    known = select(local.memory, "known")
    return {k: known.get(k, local.initial[k]) for k in local.moved}
