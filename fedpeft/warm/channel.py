"""What the ClientApp and the warm trainer share: a socket, a token, and frames. No torch.

The folder is ``$FEDPEFT_WARM``, else ``warm`` in ``$FEDPEFT_HOME``. Only its owner may enter it. It
holds the Unix ``socket`` and a ``token``, which every call carries: gRPC does not tell a server
whose process is at the other end. A frame is the length of a JSON header, the header and a packet.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import grpc

from fedpeft.durable import locked
from fedpeft.errors import FedPeftError, RunError, WireError
from fedpeft.flower.config import home
from fedpeft.flower.messages import Hello
from fedpeft.types import Metrics, Scalar

SERVICE = "fedpeft.Trainer"
PROTOCOL = 2
"""Raised with every change of what frames hold."""
LARGEST = 1 << 30
"""Bytes of a frame. gRPC takes no more than twice as many."""
LIMITS = [("grpc.max_send_message_length", LARGEST), ("grpc.max_receive_message_length", LARGEST)]
_LONGEST_PATH = 107
"""What Linux takes as the path of a Unix socket, in bytes."""
_PREFIX, _MOST_HEADER = 4, 1 << 22
_WAIT = 10.0
"""Seconds in which a trainer that was killed may be started again."""


@dataclass(frozen=True, slots=True)
class Place:
    """For which run, and as which node, something is asked: Flower's two configurations."""

    run: Mapping[str, Scalar]
    node: Mapping[str, Scalar]


class Trainer(Protocol):
    """What plays clients, in this process or in another.

    Methods raise ``FedPeftError`` with the reason why they do not do what is asked.
    """

    def hello(self, place: Place) -> Hello:
        """Say which clients this node plays."""
        ...

    def train(self, place: Place, client: str, packet: bytes) -> bytes:
        """Play a round of a client and return its reply."""
        ...

    def evaluate(self, place: Place, client: str, packet: bytes) -> Metrics:
        """Evaluate on a client's held-out records; no metrics where it has none."""
        ...


@runtime_checkable
class Keeping(Trainer, Protocol):
    """A trainer whose clients keep the result of a run."""

    def keep(self, place: Place, client: str, packet: bytes) -> Metrics:
        """Keep it, whole or not at all; say of the gain what the client's site lets leave."""
        ...


class Gone(FedPeftError):
    """No warm trainer answers; ``broken`` where one was there and did not end as it should."""

    def __init__(self, why: str, *, broken: bool = False) -> None:
        super().__init__(why)
        self.broken = broken


def folder() -> Path:
    """Return where the socket lies."""
    given = os.environ.get("FEDPEFT_WARM")
    return Path(given).expanduser().absolute() if given else home() / "warm"


def address(where: Path) -> str:
    """Return the socket's address. Raises ``RunError`` where its path is too long for one."""
    path = where / "socket"
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise RunError(
            f"{path}: a socket's path has at most {_LONGEST_PATH} bytes; set FEDPEFT_WARM to a "
            "shorter folder"
        )
    return f"unix:{path}"


def token_of(where: Path) -> str | None:
    """Return the token of the trainer that runs or last ran there; ``None`` where there is none.

    Raises ``RunError`` for a folder that others may enter: somebody else could answer.
    """
    try:
        about = where.stat()
        if about.st_uid != os.geteuid() or about.st_mode & 0o077:
            raise RunError(f"{where}: others may enter this folder; 'chmod 700' it")
        return (where / "token").read_text(encoding="ascii").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None


def frame(header: Mapping[str, Any], packet: bytes = b"") -> bytes:
    """Return a header and a packet as one message."""
    head = json.dumps(header).encode()
    return b"".join([len(head).to_bytes(_PREFIX, "big"), head, packet])


def unframe(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return header and packet. Raises ``WireError`` for what is no frame."""
    length = int.from_bytes(data[:_PREFIX], "big")
    end = _PREFIX + length
    if len(data) < end or length > _MOST_HEADER:
        raise WireError("is no frame of the warm trainer")
    try:
        header = json.loads(data[_PREFIX:end])
    except ValueError:
        raise WireError("is no frame of the warm trainer") from None
    if not isinstance(header, dict):
        raise WireError("is no frame of the warm trainer")
    return header, data[end:]


class Warm:
    """The warm trainer, over its socket. Methods raise ``Gone`` where none answers."""

    def __init__(self, where: Path | None = None, wait: float | None = None) -> None:
        self._where, self._wait = where or folder(), _WAIT if wait is None else wait

    def hello(self, place: Place) -> Hello:
        """See :class:`Trainer`."""
        return Hello(**self._asked("hello", place)[0]["hello"])

    def train(self, place: Place, client: str, packet: bytes) -> bytes:
        """See :class:`Trainer`."""
        return self._asked("train", place, client, packet)[1]

    def evaluate(self, place: Place, client: str, packet: bytes) -> Metrics:
        """See :class:`Trainer`."""
        found: Metrics = self._asked("evaluate", place, client, packet)[0]["metrics"]
        return found

    def keep(self, place: Place, client: str, packet: bytes) -> Metrics:
        """See :class:`Keeping`."""
        found: Metrics = self._asked("keep", place, client, packet)[0]["metrics"]
        return found

    def state(self) -> dict[str, Any]:
        """Return how the trainer is: its version, process, age, calls, and what it holds."""
        return dict(self._call("state", frame({"protocol": PROTOCOL}))[0]["state"])

    def _asked(
        self, method: str, place: Place, client: str = "", packet: bytes = b""
    ) -> tuple[dict[str, Any], bytes]:
        header = {"protocol": PROTOCOL, **asdict(place), "client": client}
        return self._call(method, frame(header, packet))

    def _call(self, method: str, data: bytes) -> tuple[dict[str, Any], bytes]:
        """Call; again, while a trainer that was killed may be started again.

        A round that was broken off changed nothing, or is played again to the same reply.
        """
        failed: float | None = None
        while True:
            try:
                return self._once(method, data)
            except Gone as why:
                now = time.monotonic()
                failed = failed or now
                if why.broken and now - failed > self._wait:
                    self._forget()
                if not why.broken or now - failed > self._wait:
                    raise
            time.sleep(0.2)

    def _forget(self) -> None:
        """Have later calls not wait for a trainer that was killed and did not come back.

        Its token is taken away under the lock that a trainer holds, so it is never a living one's.
        """
        with contextlib.suppress(RunError, OSError), locked(self._where, "socket"):
            (self._where / "token").unlink(missing_ok=True)

    def _once(self, method: str, data: bytes) -> tuple[dict[str, Any], bytes]:
        token = token_of(self._where)
        if token is None:
            raise Gone(f"{self._where}: no warm trainer runs here; 'fedpeft warm' starts one")
        credentials = grpc.local_channel_credentials(grpc.LocalConnectionType.UDS)
        with grpc.secure_channel(address(self._where), credentials, LIMITS) as channel:
            call: Callable[..., bytes] = channel.unary_unary(f"/{SERVICE}/{method}")
            try:
                answer = call(data, metadata=[("token", token)])
            except grpc.RpcError as error:
                raise self._failed(error) from None
        header, packet = unframe(answer)
        if "refused" in header:
            raise RunError(str(header["refused"]))
        return header, packet

    def _failed(self, error: grpc.RpcError) -> Exception:
        code, details = error.code(), error.details()
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
            return Gone(f"{self._where}: the warm trainer is gone", broken=True)
        if code is grpc.StatusCode.UNAUTHENTICATED:  # of the trainer before this one
            return Gone(f"{self._where}: the warm trainer takes another token", broken=True)
        return RuntimeError(f"the warm trainer failed ({code.name}): {details}")
