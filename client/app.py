"""Flower ClientApp: a message in, one client's round or evaluation, a message out.

The plan's sorted clients are dealt to the nodes in turn: the node with ``partition-id`` p plays the
p-th and every ``num-partitions``-th after it. What a client remembers is on disk before its reply
leaves.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

import fedpeft
from fedpeft.client_rounds import Asked, client_round
from fedpeft.errors import RunError, WireError
from fedpeft.evaluation import group_evaluation
from fedpeft.federation import Federation, deal
from fedpeft.flower import (
    Hello,
    addressee,
    answer,
    hello_record,
    log,
    metrics_record,
    packet_record,
    read_packet,
)
from fedpeft.flower_config import Settings, home, read_config
from fedpeft.hiding import Purse, check_evaluation
from fedpeft.ledger import OnDiskLedgers
from fedpeft.memory import Memory, OnDisk
from fedpeft.plan import Plan
from fedpeft.site import Site
from fedpeft.types import Scalar
from fedpeft.wire import peek

app = ClientApp()

_RUN = re.compile(r"[A-Za-z0-9-]{1,64}")
_sites: dict[str, Site] = {}  # at most one: two would hook their adapters into one base model


@app.query()
def hello(message: Message, context: Context) -> Message:
    """Say which clients this node plays."""

    def make() -> RecordDict:
        plan, _, federation = _prepared(context)
        clients = _clients(federation, context)
        told = Hello(
            clients=clients,
            records=[federation.population[client] for client in clients],
            nodes=int(context.node_config.get("num-partitions", 0)),
            version=fedpeft.__version__,
            plan=plan.digest(federation.splits.fingerprint),
        )
        return hello_record(told)

    return answer(message, make)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Play one round."""

    def make() -> RecordDict:
        plan, settings, federation = _prepared(context)
        client = _addressed(message, federation, context)
        site = _site(plan, settings, federation)
        packet = read_packet(message.content)
        purse = _purse(context)
        if not (site.tables.stores or site.tables.keeps):
            reply, _ = client_round(plan, site, client, packet, Memory(), purse)
            return packet_record(reply)
        folder = _memory(packet)
        with _alone(folder, client):
            memory = OnDisk(folder).load(client)
            _check_newest(client, packet, memory)
            reply, after = client_round(plan, site, client, packet, memory, purse)
            if after is not memory:
                OnDisk(folder).save(client, after)
        return packet_record(reply)

    return answer(message, make)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate on the held-out records; without any, reply with nothing."""

    def make() -> RecordDict:
        plan, settings, federation = _prepared(context)
        client = _addressed(message, federation, context)
        check_evaluation(plan, _purse(context))
        site = _site(plan, settings, federation)
        if not (held := site.held(client)):
            return metrics_record({})
        packet = read_packet(message.content)
        keeps = site.tables.remembers or site.tables.keeps
        memory = OnDisk(_memory(packet)).load(client) if keeps else Memory()
        (metrics,) = group_evaluation(plan, site, [Asked(client, packet, memory)], [held])
        return metrics_record(metrics)

    return answer(message, make)


def _prepared(context: Context) -> tuple[Plan, Settings, Federation]:
    """Return the plan and its dealt data, which a process that lives on keeps."""
    return _deal(tuple(sorted(context.run_config.items())))


@lru_cache(maxsize=1)
def _deal(config: tuple[tuple[str, Scalar], ...]) -> tuple[Plan, Settings, Federation]:
    plan, settings = read_config(dict(config))
    return plan, settings, deal(plan)


def _site(plan: Plan, settings: Settings, federation: Federation) -> Site:
    import torch

    key = plan.digest(federation.splits.fingerprint, settings.device)
    if key not in _sites:
        for digest in list(_sites):
            _sites.pop(digest).close()
        _sites[key] = Site(plan, federation, settings.device, leads=False, warn=log.warning)
    torch.set_num_threads(settings.threads)
    return _sites[key]


def _clients(federation: Federation, context: Context) -> list[str]:
    """Return the clients of this node's partition; there may be none."""
    place, nodes = (context.node_config.get(k) for k in ("partition-id", "num-partitions"))
    if not isinstance(place, int) or place < 0:
        raise RunError(
            "this node has no partition-id; start it with "
            "--node-config 'partition-id=N num-partitions=M'"
        )
    names = list(federation.population)
    step = nodes if isinstance(nodes, int) and nodes > 0 else len(names)
    return names[place::step]


def _addressed(message: Message, federation: Federation, context: Context) -> str:
    client = addressee(message.content)
    if client not in _clients(federation, context):
        raise RunError(f"this node does not play {client[:80]!r}")
    return client


def _check_newest(client: str, packet: bytes, memory: Memory) -> None:
    """Refuse a round that came late: its memory would push out that of a newer one."""
    newest, round = max(memory.versions, default=-1), peek(packet).get("round")
    if isinstance(round, int) and round < newest:
        raise RunError(f"round {round} is over: {client} has played round {newest}")


def _purse(context: Context) -> Purse:
    """Return where this node's clients write down what they spend, in whatever run.

    Its ``max-epsilon``, at its ``max-delta``, is what all runs together may spend of a data set.
    """
    most, delta = (context.node_config.get(k) for k in ("max-epsilon", "max-delta"))
    ledgers = OnDiskLedgers(home() / "ledgers")
    if most is None:
        return Purse(ledgers)
    if not isinstance(most, int | float) or isinstance(most, bool) or not 0 < most < math.inf:
        raise RunError(f"this node's max-epsilon={most!r} is no number above 0")
    delta = 1e-5 if delta is None else delta
    if not isinstance(delta, float) or not 0 < delta < 1:
        raise RunError(f"this node's max-delta={delta!r} is no number between 0 and 1")
    return Purse(ledgers, (float(most), delta))


def _memory(packet: bytes) -> Path:
    run = str(peek(packet).get("run", ""))
    if not _RUN.fullmatch(run):  # it becomes the name of a folder
        raise WireError("message names no run")
    return home() / "clients" / run


@contextlib.contextmanager
def _alone(folder: Path, client: str) -> Iterator[None]:
    """Let no other process play ``client``: a late message may still be at work."""
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.blake2b(client.encode(), digest_size=6).hexdigest()
    lock = os.open(folder / f".{digest}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
