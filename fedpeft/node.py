"""What a node does with a message, whatever brought it: bytes in, bytes out.

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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import fedpeft
from fedpeft.client_rounds import Asked, client_round
from fedpeft.deployment.here import check_signed
from fedpeft.errors import RunError, WireError
from fedpeft.evaluation import group_evaluation
from fedpeft.federation import Federation, deal
from fedpeft.flower import Hello, log
from fedpeft.flower_config import Settings, home, read_config
from fedpeft.ledger import OnDiskLedgers
from fedpeft.memory import Memory, OnDisk
from fedpeft.models import _base
from fedpeft.plan import Plan
from fedpeft.replies import Replies
from fedpeft.site import Site
from fedpeft.spending import Purse, check_evaluation
from fedpeft.types import Metrics, Scalar
from fedpeft.warm.channel import Place
from fedpeft.wire import peek

_RUN_NAME = re.compile(r"[A-Za-z0-9-]{1,64}")


class Node:
    """The clients that a machine plays. Plan, data and base are kept from one message to the next.

    They are those of one run at a time: two would hook their adapters into one base model. Methods
    raise ``FedPeftError`` with the reason why they do not do what is asked.
    """

    def __init__(self) -> None:
        self._dealt: tuple[tuple[tuple[str, Scalar], ...], _Dealt] | None = None
        self._site: tuple[str, Site] | None = None

    def hello(self, place: Place) -> Hello:
        """Say which clients this node plays."""
        dealt = self._prepared(place)
        clients, population = dealt.clients(place), dealt.federation.population
        return Hello(
            clients=clients,
            records=[population[client] for client in clients],
            nodes=int(place.node.get("num-partitions", 0)),
            version=fedpeft.__version__,
            plan=dealt.plan.digest(dealt.federation.splits.fingerprint),
        )

    def train(self, place: Place, client: str, packet: bytes) -> bytes:
        """Play a round of a client and return its reply; to the same message again, the same."""
        dealt = self._prepared(place)
        dealt.check_plays(place, client)
        run = _run(packet)
        replies = Replies(home() / "replies" / run, log.warning)
        with _alone(home() / "clients" / run, client):
            memory, holds = self._remembered(dealt, client, packet)
            reply = replies.find(client, packet) if holds else None
            if reply is None:
                reply = self._played(dealt, place, client, packet, memory)
                replies.keep(client, packet, reply)
        return reply

    def evaluate(self, place: Place, client: str, packet: bytes) -> Metrics:
        """Evaluate on a client's held-out records; no metrics where it has none."""
        dealt = self._prepared(place)
        dealt.check_plays(place, client)
        check_evaluation(dealt.plan, _purse(place))
        site = self._loaded(dealt)
        if not (held := site.held(client)):
            return {}
        keeps = site.tables.remembers or site.tables.keeps
        memory = OnDisk(home() / "clients" / _run(packet)).load(client) if keeps else Memory()
        (metrics,) = group_evaluation(dealt.plan, site, [Asked(client, packet, memory)], [held])
        return metrics

    def unload(self) -> None:
        """Give back plan, data and base; the next message brings them again."""
        self._let_go()
        self._dealt = None
        getattr(_base.load_base, "cache_clear", lambda: None)()

    def _remembered(self, dealt: _Dealt, client: str, packet: bytes) -> tuple[Memory, bool]:
        """Return a client's memory, and whether it holds all that playing the packet leaves."""
        tables = self._loaded(dealt).tables
        if not (tables.stores or tables.keeps):
            return Memory(), True
        memory = OnDisk(home() / "clients" / _run(packet)).load(client)
        return memory, peek(packet).get("round") in memory.versions

    def _played(
        self, dealt: _Dealt, place: Place, client: str, packet: bytes, memory: Memory
    ) -> bytes:
        _check_newest(client, packet, memory)
        plan, site, purse = dealt.plan, self._loaded(dealt), _purse(place)
        reply, after = client_round(plan, site, client, packet, memory, purse)
        if after is not memory:
            OnDisk(home() / "clients" / _run(packet)).save(client, after)
        return bytes(reply)

    def _let_go(self) -> None:
        if self._site:
            self._site[1].close()
        self._site = None

    def _prepared(self, place: Place) -> _Dealt:
        key = tuple(sorted(place.run.items()))
        if self._dealt is None or self._dealt[0] != key:
            self._dealt = None
            check_signed(place.run)  # a plan may name code, which reading it would import
            self._dealt = key, _Dealt.of(place.run)
        return self._dealt[1]

    def _loaded(self, dealt: _Dealt) -> Site:
        import torch

        plan, settings, federation = dealt.plan, dealt.settings, dealt.federation
        key = plan.digest(federation.splits.fingerprint, settings.device)
        if self._site is None or self._site[0] != key:
            self._let_go()
            site = Site(plan, federation, settings.device, leads=False, warn=log.warning)
            self._site = key, site
        torch.set_num_threads(settings.threads)
        return self._site[1]


@dataclass(frozen=True, slots=True)
class _Dealt:
    """A run's plan and its data."""

    plan: Plan
    settings: Settings
    federation: Federation

    @classmethod
    def of(cls, config: Mapping[str, Scalar]) -> _Dealt:
        plan, settings = read_config(dict(config))
        return cls(plan, settings, deal(plan))

    def clients(self, place: Place) -> list[str]:
        """Return the clients of a node's partition; there may be none."""
        at, nodes = (place.node.get(k) for k in ("partition-id", "num-partitions"))
        if not isinstance(at, int) or at < 0:
            raise RunError(
                "this node has no partition-id; start it with "
                "--node-config 'partition-id=N num-partitions=M'"
            )
        names = list(self.federation.population)
        step = nodes if isinstance(nodes, int) and nodes > 0 else len(names)
        return names[at::step]

    def check_plays(self, place: Place, client: str) -> None:
        """Raise ``RunError`` where another node plays this client."""
        if client not in self.clients(place):
            raise RunError(f"this node does not play {client[:80]!r}")


def _check_newest(client: str, packet: bytes, memory: Memory) -> None:
    """Refuse a round that came late: its memory would push out that of a newer one."""
    newest, round = max(memory.versions, default=-1), peek(packet).get("round")
    if isinstance(round, int) and round < newest:
        raise RunError(f"round {round} is over: {client} has played round {newest}")


def _purse(place: Place) -> Purse:
    """Return where this node's clients write down what they spend, in whatever run.

    Its ``max-epsilon``, at its ``max-delta``, is what all runs together may spend of a data set's
    records, ``max-client-epsilon`` what they may of all of them as one client's.
    """
    records, client = _limit(place, "max-epsilon"), _limit(place, "max-client-epsilon")
    return Purse(OnDiskLedgers(home() / "ledgers"), records, client, is_apart=True)


def _limit(place: Place, name: str) -> tuple[float, float] | None:
    """Return the epsilon that a node allows, and its delta. Raises ``RunError``."""
    most, delta = place.node.get(name), place.node.get("max-delta", 1e-5)
    if most is None:
        return None
    if not isinstance(most, int | float) or isinstance(most, bool) or not 0 < most < math.inf:
        raise RunError(f"this node's {name}={most!r} is no number above 0")
    if not isinstance(delta, float) or not 0 < delta < 1:
        raise RunError(f"this node's max-delta={delta!r} is no number between 0 and 1")
    return float(most), delta


def _run(packet: bytes) -> str:
    run = str(peek(packet).get("run", ""))
    if not _RUN_NAME.fullmatch(run):  # it becomes the name of a folder
        raise WireError("message names no run")
    return run


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
