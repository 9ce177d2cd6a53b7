"""Joins a Ray cluster, or starts one here; whatever fails is one line, and soon."""

from __future__ import annotations

import os
import socket
import warnings
from contextlib import closing
from typing import Any

from fedpeft.errors import PlanError, RunError

_ANSWER = 10.0
"""Seconds in which a cluster must answer."""


def imported() -> Any:
    """Return Ray. Raises ``PlanError`` where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # a Ray that is started here passes it on
    try:
        import ray
    except ImportError:
        raise PlanError("engine: ray is not installed; pip install 'fedpeft[simulation]'") from None
    return ray


def join(ray: Any, address: str | None) -> None:
    """Connect to a cluster, or start one. Raises ``RunError`` where that fails."""
    from fedpeft.engine._worker import cores

    where = f"no Ray cluster answers at {address}" if address else "Ray cannot be started here"
    remedy = "; start one with `ray start --head`, or leave address out" if address else ""
    if address and not address.startswith("ray://"):
        _await(_resolved(address, f"engine: {where}{remedy}"), f"engine: {where}{remedy}")
    local: dict[str, Any] = {} if address else {"num_cpus": cores(), "include_dashboard": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **local)
    except (Exception, SystemExit) as error:
        raise RunError(f"engine: {where} ({first_line(error)}){remedy}") from None


def _resolved(address: str, refusal: str) -> str:
    """Return the host and port that ``auto`` stands for."""
    from ray._private.services import canonicalize_bootstrap_address_or_die as resolve

    try:
        return str(resolve(address))
    except Exception:
        raise RunError(refusal) from None


def _await(address: str, refusal: str) -> None:
    """Raise ``RunError`` unless a server of gRPC answers. Ray itself would wait for minutes."""
    import grpc

    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER):
            pass
        if os.environ.get("RAY_USE_TLS", "0") in ("", "0"):
            with closing(grpc.insecure_channel(address)) as channel:
                grpc.channel_ready_future(channel).result(timeout=_ANSWER)
    except (OSError, ValueError, OverflowError, grpc.FutureTimeoutError):
        raise RunError(refusal) from None


def first_line(error: BaseException) -> str:
    """Return an error in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
