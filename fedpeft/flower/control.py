"""What the SuperLink is asked to do: take sites in and out, start, follow and stop runs."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fedpeft.deployment.files import read
from fedpeft.errors import SiteError
from fedpeft.types import Scalar

if TYPE_CHECKING:
    import httpx
    from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext

ALIVE = 60.0
"""Seconds for which Flower takes a site to be there after it was heard of: two heartbeats."""
GONE = "unregistered"
"""State of a site whose key was taken back."""


@dataclass(frozen=True, slots=True)
class Site:
    """A site as the SuperLink knows it.

    ``state`` is ``registered`` (never seen), ``online``, ``offline`` or :data:`GONE`; ``key`` its
    public key in PEM; ``heard`` when it was last heard of, in seconds since 1970, 0 if never.
    """

    node: int
    name: str
    state: str
    key: bytes
    heard: float


@dataclass(frozen=True, slots=True)
class Standing:
    """How a run of Flower's stands: ``ended`` is ``completed``, ``failed``, ``stopped`` or ""."""

    run: int
    ended: str
    reason: str
    out: str


class Control:
    """Talks to the SuperLink at ``address`` (HOST:PORT). Use it as a context manager.

    ``authority`` is the certificate of who vouches for it; without one nothing is encrypted.
    Methods raise ``SiteError`` where it does not answer, or refuses.
    """

    def __init__(self, address: str, authority: Path | None, token: str) -> None:
        from flwr.supercore.control import ControlHttpClient

        self._client = ControlHttpClient.from_server_address(
            address,
            insecure=authority is None,
            root_certificates=read(authority) if authority else None,
            interceptors=[_Bearer(token)],
        )
        self._address = address

    def __enter__(self) -> Control:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.close()

    def sites(self) -> list[Site]:
        """Return every site that ever was registered."""
        from flwr.proto.control_pb2 import ListNodesRequest

        with self._told():
            found = self._client.ListNodes(ListNodesRequest()).nodes_info
        return [
            Site(n.node_id, n.name, n.status, n.public_key, max(0.0, n.online_until - ALIVE))
            if n.online_until
            else Site(n.node_id, n.name, n.status, n.public_key, 0.0)
            for n in found
        ]

    def register(self, key: bytes, name: str) -> int:
        """Take a site in by its public key (PEM); return its node id."""
        from flwr.proto.control_pb2 import RegisterNodeRequest

        with self._told():
            made = self._client.RegisterNode(RegisterNodeRequest(public_key=key, name=name))
        return int(made.node_id)

    def unregister(self, node: int) -> None:
        """Take a site's key back, for good."""
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        with self._told():
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node))

    def start(self, bundle: bytes, config: Mapping[str, Scalar]) -> int:
        """Start a run of the app in ``bundle`` with this run-config; return its id."""
        from flwr.common.serde import fab_to_proto, user_config_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.supercore.fab import Fab

        fab = Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})
        request = StartRunRequest(
            fab=fab_to_proto(fab), override_config=user_config_to_proto(dict(config))
        )
        with self._told():
            run = int(self._client.StartRun(request).run_id)
        if not run:
            raise SiteError(f"{self._address}: did not take the run; its log says why")
        return run

    def stop(self, run: int) -> None:
        """Stop a run; its server app is told, and ends."""
        from flwr.proto.control_pb2 import StopRunRequest

        with self._told():
            self._client.StopRun(StopRunRequest(run_id=run))

    def runs(self, most: int = 1000) -> dict[int, Standing]:
        """Return how runs stand, the newest ``most``."""
        from flwr.proto.control_pb2 import ListRunsRequest

        with self._told():
            found = self._client.ListRuns(ListRunsRequest(limit=most)).run_dict
        return {run: _standing(about) for run, about in found.items()}

    def output(self, run: int, after: float = 0.0) -> Iterator[tuple[str, float]]:
        """Yield what a run's server app prints ``after`` a time, with times, until the run ends."""
        from flwr.proto.control_pb2 import StreamLogsRequest

        with self._told():
            request = StreamLogsRequest(run_id=run, after_timestamp=after)
            for told in self._client.StreamLogs(request):
                yield told.log_output, told.latest_timestamp

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except httpx.HTTPStatusError as error:
            reason = _reason(error.response)
            raise SiteError(f"{self._address}: {reason}") from None
        except (httpx.HTTPError, ValueError) as error:
            reason = str(error) or type(error).__name__
            raise SiteError(f"{self._address}: does not answer ({reason})") from None


class _Bearer:
    """Shows the token with every request."""

    def __init__(self, token: str) -> None:
        self._token = token

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers["authorization"] = f"Bearer {self._token}"
        return call_next(context)


def _reason(response: httpx.Response) -> str:
    from flwr.supercore.error.base import FlowerError

    known = FlowerError.from_json(response.text)
    details = " ".join(filter(None, [known.message, known.public_details])) if known else ""
    return details or response.text.strip()[:200] or f"status {response.status_code}"


def _standing(about: Any) -> Standing:
    status = about.status
    ended = status.sub_status if status.status == "finished" else ""
    out = about.override_config["out"].string if "out" in about.override_config else ""
    return Standing(int(about.run_id), ended, status.details, out)
