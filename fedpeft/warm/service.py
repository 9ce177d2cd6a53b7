"""The process that keeps the base loaded between Flower's messages.

gRPC on a Unix socket (``channel.py``). It plays one message at a time, of whatever run;
others wait. What it holds goes when nothing was asked for a while, and comes back with the next
message. It may be killed at any moment: what counts is on disk.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

import fedpeft
from fedpeft.durable import acquire, replace_file
from fedpeft.errors import FedPeftError, RunError
from fedpeft.flower.messages import log
from fedpeft.warm.channel import (
    LIMITS,
    PROTOCOL,
    SERVICE,
    Keeping,
    Place,
    Trainer,
    address,
    unframe,
)
from fedpeft.warm.channel import frame as framed

IDLE = 1800.0
_GRACE, _WAITING, _LOOK = 5.0, 16, 30.0
_Answer = tuple[dict[str, Any], bytes]


class Service:
    """Answers the calls of ClientApps with one trainer, one at a time.

    ``make`` makes the trainer, whose imports take seconds. It is let go of after ``idle`` seconds
    in which nothing was asked.
    """

    def __init__(self, make: Callable[[], Any], idle: float, token: str) -> None:
        self.idle, self._make, self._token = idle, make, token
        self._alone, self._begun, self._calls = threading.Lock(), time.monotonic(), 0
        self._trainer: Any = None
        self._last = time.monotonic()
        self._busy = ""

    def handler(self) -> grpc.GenericRpcHandler:
        """Return what gRPC calls."""
        does = {"hello": self._hello, "train": self._train, "evaluate": self._evaluate}
        does["keep"] = self._keep
        found = {name: self._method(name, do) for name, do in does.items()}
        found["state"] = grpc.unary_unary_rpc_method_handler(self._state)
        return grpc.method_handlers_generic_handler(SERVICE, found)

    @property
    def busy(self) -> str:
        """What is being done, if anything."""
        return self._busy

    def unload_if_idle(self) -> None:
        """Let go of what is loaded where it is time."""
        idle = time.monotonic() - self._last
        if self._trainer is None or idle < self.idle or not self._alone.acquire(blocking=False):
            return
        try:
            log.info("idle for %.0f s: model and data are given back", idle)
            self._trainer.unload()
            self._trainer = None
        finally:
            self._alone.release()

    def _method(
        self, name: str, do: Callable[[Trainer, dict[str, Any], bytes], _Answer]
    ) -> grpc.RpcMethodHandler[bytes, bytes]:
        def answer(data: bytes, context: grpc.ServicerContext) -> bytes:
            self._check(context)
            try:
                header, packet = unframe(data)
                _check_protocol(header)
                with self._alone:
                    self._busy, self._calls = name, self._calls + 1
                    try:
                        if self._trainer is None:
                            self._trainer = self._make()
                        told, reply = do(self._trainer, header, packet)
                    finally:
                        self._busy, self._last = "", time.monotonic()
            except FedPeftError as error:
                return framed({"refused": str(error)})
            return framed(told, reply)

        return grpc.unary_unary_rpc_method_handler(answer)

    def _check(self, context: grpc.ServicerContext) -> None:
        given = dict(context.invocation_metadata()).get("token", "")
        if not hmac.compare_digest(str(given), self._token):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is another's")

    def _state(self, _: bytes, context: grpc.ServicerContext) -> bytes:
        self._check(context)
        return framed(
            {
                "state": {
                    "version": fedpeft.__version__,
                    "pid": os.getpid(),
                    "seconds": round(time.monotonic() - self._begun, 1),
                    "calls": self._calls,
                    "busy": self._busy,
                    "loaded": self._trainer is not None,
                }
            }
        )

    def _hello(self, trainer: Trainer, header: dict[str, Any], _: bytes) -> _Answer:
        return {"hello": asdict(trainer.hello(_place(header)))}, b""

    def _train(self, trainer: Trainer, header: dict[str, Any], packet: bytes) -> _Answer:
        return {}, trainer.train(_place(header), str(header["client"]), packet)

    def _evaluate(self, trainer: Trainer, header: dict[str, Any], packet: bytes) -> _Answer:
        found = trainer.evaluate(_place(header), str(header["client"]), packet)
        return {"metrics": dict(found)}, b""

    def _keep(self, trainer: Trainer, header: dict[str, Any], packet: bytes) -> _Answer:
        if not isinstance(trainer, Keeping):
            raise RunError("what plays this node's clients keeps no results")
        found = trainer.keep(_place(header), str(header["client"]), packet)
        return {"metrics": dict(found)}, b""


def _place(header: dict[str, Any]) -> Place:
    return Place(dict(header["run"]), dict(header["node"]))


def _check_protocol(header: dict[str, Any]) -> None:
    if header.get("protocol") != PROTOCOL:
        raise RunError(
            f"the warm trainer is of fedpeft {fedpeft.__version__} and the ClientApp of another "
            "version; install the same and start the trainer again"
        )


@contextlib.contextmanager
def serving(where: Path, make: Callable[[], Any], idle: float = IDLE) -> Iterator[Service]:
    """Serve in ``where`` for a while, which is made for its owner alone.

    Raises ``RunError`` where another trainer serves, or nothing can be written.
    """
    at = address(where)
    with contextlib.suppress(OSError):
        where.mkdir(mode=0o700, parents=True, exist_ok=True)
        where.chmod(0o700)
    lock = acquire(where, "socket: a warm trainer runs already")
    try:
        token = secrets.token_hex(32)
        service = Service(make, idle, token)
        server = grpc.server(ThreadPoolExecutor(_WAITING), [service.handler()], options=LIMITS)
        healthy = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
        healthy.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        (where / "socket").unlink(missing_ok=True)  # of one that was killed
        replace_file(where / "token", [token.encode()], "token", private=True)
        server.add_secure_port(at, grpc.local_server_credentials(grpc.LocalConnectionType.UDS))
        server.start()
        try:
            yield service
        finally:
            healthy.enter_graceful_shutdown()
            server.stop(_GRACE).wait()
            (where / "token").unlink(missing_ok=True)
    finally:
        os.close(lock)


def node() -> Any:
    """Return what plays this machine's clients; its imports take seconds."""
    from fedpeft.node import Node

    return Node()


def serve(where: Path, idle: float = IDLE, make: Callable[[], Any] = node) -> None:
    """Serve until SIGTERM or SIGINT comes. Raises ``RunError`` as :func:`serving` does."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with serving(where, make, idle) as service:
        print(f"warm trainer: {where}", flush=True)
        while not stop.wait(min(idle / 4, _LOOK)):
            service.unload_if_idle()
    if service.busy:  # Python would wait for the round under way, which may take hours
        os._exit(0)
