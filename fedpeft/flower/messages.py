"""Packets as Flower messages, at both ends.

A message carries one array of bytes, because Flower's cost is per array. A node says which clients
it plays when it is greeted: the grid itself knows only random node numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedpeft.errors import FedPeftError, WireError
from fedpeft.types import Metrics
from fedpeft.wire import Message as Packed

log = logging.getLogger("flwr.fedpeft")  # below Flower's own, so that --stream shows it

REFUSED = 100
"""Error code of a client that says why it does not answer; Flower's own are below."""
KEEP = "query.keep"
"""Type of the message that brings a site the result of its run."""
_STYPE = "fedpeft.packet"


@dataclass(frozen=True, slots=True)
class Hello:
    """What a node says of itself.

    ``clients`` are those it plays, with their ``records``; none where the plan has none for this
    node. ``nodes`` is how many there are in all, 0 if unknown. ``plan`` is a digest of the plan and
    the data as the node sees them.
    """

    clients: list[str]
    records: list[int]
    nodes: int
    version: str
    plan: str


def packet_record(message: Packed | bytes, client: str = "") -> RecordDict:
    """Wrap a packet as one opaque array; to a node it says which of its clients is meant."""
    data = bytes(message)
    array = Array(dtype="uint8", shape=(len(data),), stype=_STYPE, data=data)
    content = RecordDict({"packet": ArrayRecord({"bytes": array})})
    if client:
        content["to"] = ConfigRecord({"client": client})
    return content


def addressee(content: RecordDict) -> str:
    """Return which client a message to a node is for. Raises ``WireError`` where it says none."""
    found = dict(content.config_records.get("to", {})).get("client")
    if not isinstance(found, str):
        raise WireError("message names no client")
    return found


def read_packet(content: RecordDict) -> bytes:
    """Return the packet's bytes. Raises ``WireError`` for any other content."""
    records = content.array_records
    if list(records) != ["packet"] or list(records["packet"]) != ["bytes"]:
        raise WireError("message holds no packet")
    array = records["packet"]["bytes"]
    if array.stype != _STYPE or array.shape != (len(array.data),):
        raise WireError("message holds an array that is no packet")
    return array.data


def metrics_record(metrics: Metrics) -> RecordDict:
    """Wrap metrics; empty ones say that there was nothing to evaluate on."""
    return RecordDict({"metrics": MetricRecord({k: float(v) for k, v in metrics.items()})})


def read_metrics(content: RecordDict) -> Metrics:
    """Return metrics. Raises ``WireError`` for any other content."""
    found = dict(content.metric_records.get("metrics", {"?": ""}))
    if not all(isinstance(value, float) for value in found.values()):
        raise WireError("message holds no metrics")
    return {name: float(value) for name, value in found.items()}  # type: ignore[arg-type]


def hello_record(hello: Hello) -> RecordDict:
    """Wrap what a node says of itself."""
    return RecordDict({"hello": ConfigRecord(asdict(hello))})


def read_hello(content: RecordDict) -> Hello:
    """Return what a node says of itself. Raises ``WireError`` for any other content."""
    found = dict(content.config_records.get("hello", {}))
    found = {"clients": [], "records": [], **found}  # Flower drops empty lists
    kinds = {name: type(value) for name, value in found.items()}
    if kinds != {"clients": list, "records": list, "nodes": int, "version": str, "plan": str}:
        raise WireError("message is no hello of this version")
    hello = Hello(**found)  # type: ignore[arg-type]
    fits = all(isinstance(c, str) for c in hello.clients) and all(
        isinstance(n, int) for n in hello.records
    )
    if not fits or len(hello.clients) != len(hello.records):
        raise WireError("message is no hello of this version")
    return hello


def answer(message: Message, make: Callable[[], RecordDict]) -> Message:
    """Reply with what ``make`` returns, or with the reason it gives for not answering."""
    try:
        return Message(make(), reply_to=message)
    except FedPeftError as error:
        log.warning("refused: %s", error)
        return Message(Error(REFUSED, str(error)), reply_to=message)
