"""What a node does with a message, whatever brought it: bytes in, bytes out.

The plan's sorted clients are dealt to the nodes in turn: the node with ``partition-id`` p plays the
p-th and every ``num-partitions``-th after it. A site with records of its own, as its
``client.yaml`` says, plays the one client of its name, and refuses what the site does not allow.
What a client remembers is on disk before its reply leaves.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TypeAlias

import fedpeft
from fedpeft import calibrations, results
from fedpeft.client_rounds import Asked, client_round
from fedpeft.deployment.client_file import ClientFile, Limits
from fedpeft.deployment.here import check_signed, this_site
from fedpeft.deployment.limits import Stopwatch, refusals
from fedpeft.deployment.plan_text import unread_refusals
from fedpeft.deployment.quota import Quota, most_of
from fedpeft.errors import BudgetError, DataError, RunError, WireError
from fedpeft.evaluation import group_evaluation
from fedpeft.federation import Federation, deal
from fedpeft.flower import Hello, log
from fedpeft.flower_config import Settings, home, is_run, read_config
from fedpeft.handing_out import GAIN, LATER
from fedpeft.ledger import OnDiskLedgers
from fedpeft.memory import Memory, OnDisk
from fedpeft.models import _base
from fedpeft.models._outline import outline
from fedpeft.plan import Plan
from fedpeft.replies import Replies
from fedpeft.scattered import common_digest, held_by, is_scattered, nobody, told_of
from fedpeft.site import Site
from fedpeft.spending import Purse, answered, check_evaluation
from fedpeft.tables import Tables
from fedpeft.types import Metrics, Scalar, Scattered
from fedpeft.warm.channel import Place
from fedpeft.wire import peek

_Key: TypeAlias = "tuple[tuple[tuple[str, Scalar], ...], ClientFile | None]"


class Node:
    """The clients that a machine plays. Plan, data and base are kept from one message to the next.

    They are those of one run at a time: two would hook their adapters into one base model. Methods
    raise ``FedPeftError`` with the reason why they do not do what is asked.
    """

    def __init__(self) -> None:
        self._dealt: tuple[_Key, _Dealt] | None = None
        self._site: tuple[str, Site] | None = None

    def hello(self, place: Place) -> Hello:
        """Say which clients this node plays."""
        dealt = self._prepared(place)
        clients = dealt.clients(place)
        return Hello(
            clients=clients,
            records=[told_of(dealt.plan, dealt.federation, client) for client in clients],
            nodes=0 if dealt.own else int(place.node.get("num-partitions", 0)),
            version=fedpeft.__version__,
            plan=common_digest(dealt.plan, dealt.federation),
        )

    def train(self, place: Place, client: str, packet: bytes) -> bytes:
        """Play a round of a client and return its reply; to the same message again, the same."""
        dealt = self._prepared(place)
        dealt.check_plays(place, client)
        run, phase, secret = dealt.run_of(packet), _phase(packet), dealt.plan.privacy.secret
        replies = Replies(dealt.home / "replies" / run, log.warning)
        with _alone(dealt.home / "clients" / run, client):
            memory, holds = dealt.remembered(run, client, packet)
            reply = replies.find(client, packet, phase) if holds else None
            if reply is None:
                reply = self._played(dealt, place, client, packet, memory)
                replies.keep(client, packet, reply, phase, durable=secret)
            answered(dealt.plan, client, run, _purse(place, dealt))
        return reply

    def evaluate(self, place: Place, client: str, packet: bytes) -> Metrics:
        """Evaluate on a client's held-out records.

        No metrics where it has none, or where its site lets none leave.
        """
        dealt = self._prepared(place)
        dealt.check_plays(place, client)
        check_evaluation(dealt.plan, _purse(place, dealt))
        if "clients" not in dealt.plan.evaluations:
            raise RunError("the plan evaluates on no client's records (evaluate), so none are told")
        run = dealt.run_of(packet)
        if not dealt.limits.metrics:
            return {}
        with _alone(dealt.home / "clients" / run, client):
            dealt.count(run, client, "evaluate", packet)
        with self._timed(dealt) as site:
            if not (held := site.held(client)):
                return {}
            keeps = dealt.tables.remembers or dealt.tables.keeps
            memory = dealt.memories(run).load(client) if keeps else Memory()
            asked = [Asked(client, packet, memory)]
            (metrics,) = group_evaluation(dealt.plan, site, asked, [held])
        return metrics

    def keep(self, place: Place, client: str, packet: bytes) -> Metrics:
        """Keep the result of a run (``results.py``).

        Nothing is told of its gain but where the site lets that leave.
        """
        dealt = self._prepared(place)
        dealt.check_plays(place, client)
        if not dealt.own:
            raise RunError("a node without records of its own keeps no results")
        run = dealt.run_of(packet)
        with _alone(dealt.home / "clients" / run, client):
            found = results.held(dealt.home, run, packet)
            if found is None:
                dealt.count(run, client, "keep", packet)
                with self._timed(dealt) as site:
                    memory = partial(dealt.memories(run).load, client)
                    told = dealt.plan, site, client, packet
                    found = results.keep(dealt.home, *told, memory)
                log.info("run %s: its result is in %s", run, found.folder)
        if not _tells_gain(place, dealt) or not found.report["records"]["held out"]:
            return {}
        gain = results.gain_told(found)
        return {LATER: 1.0} if gain is None else {f"{GAIN}{k}": v for k, v in gain.items()}

    def unload(self) -> None:
        """Give back plan, data and base; the next message brings them again."""
        self._let_go()
        self._dealt = None
        getattr(_base.load_base, "cache_clear", lambda: None)()

    def _played(
        self, dealt: _Dealt, place: Place, client: str, packet: bytes, memory: Memory
    ) -> bytes:
        _check_newest(client, packet, memory)
        purse, measures, run = _purse(place, dealt), dealt.limits.metrics, dealt.run_of(packet)
        dealt.count(run, client, "train", packet)
        noise = calibrations.kept(dealt.home / "noise.json", log.warning)
        with self._timed(dealt) as site, noise:
            told = client, packet, memory, purse
            reply, after = client_round(dealt.plan, site, *told, measures=measures)
        if after is not memory:
            dealt.memories(run).save(client, after)
        return bytes(reply)

    @contextlib.contextmanager
    def _timed(self, dealt: _Dealt) -> Iterator[Site]:
        """Work with the model for as long as the site allows; it ends between two batches."""
        watch = Stopwatch(dealt.limits.seconds)
        site = self._loaded(dealt)
        site.learner.before_batch = watch.check
        yield site

    def _let_go(self) -> None:
        if self._site:
            self._site[1].close()
        self._site = None

    def _prepared(self, place: Place) -> _Dealt:
        key = tuple(sorted(place.run.items())), this_site()
        if self._dealt is None or self._dealt[0] != key:
            self._dealt = None
            check_signed(place.run)  # a plan may name code, which reading it would import
            self._dealt = key, _Dealt.of(place.run, key[1])
        return self._dealt[1]

    def _loaded(self, dealt: _Dealt) -> Site:
        import torch

        plan, settings, federation = dealt.plan, dealt.settings, dealt.federation
        key = plan.digest(federation.splits.fingerprint, settings.device)
        if self._site is None or self._site[0] != key:
            self._let_go()
            with _unquoted(dealt.client):
                site = Site(plan, federation, settings.device, leads=False, warn=log.warning)
            self._site = key, site
        torch.set_num_threads(settings.threads)
        return self._site[1]


@dataclass(frozen=True)
class _Dealt:
    """A run's plan and its data; ``client`` is what the site's ``client.yaml`` says, if it has one.

    ``own`` says that the data are the site's own.
    """

    plan: Plan
    settings: Settings
    federation: Federation
    client: ClientFile | None
    own: bool

    @classmethod
    def of(cls, config: Mapping[str, Scalar], client: ClientFile | None) -> _Dealt:
        """Read a run's plan and its data here. Raises ``FedPeftError`` where the site refuses."""
        if client and (reasons := unread_refusals(client, config)):
            raise RunError(f"{client.site} refuses this plan: {'; '.join(reasons)}")
        plan, settings = read_config(dict(config))
        own = is_scattered(plan)
        if client is None or client.data is None:
            if own:
                raise RunError(
                    "this node has no records of its own; start it with fedpeft client and a "
                    "client.yaml that names them (data)"
                )
        elif not own:
            raise RunError(
                f"{client.site} trains on its own records alone, and this plan brings others; say "
                "data: sites(names=...)"
            )
        if client is None:
            return cls(plan, settings, deal(plan), None, own)
        settings = replace(settings, device=client.device, threads=client.threads)
        if isinstance(plan.data, Scattered) and client.site not in plan.data.clients():
            return cls(plan, settings, nobody(), client, own)
        if client.owners is not None and not settings.run:
            raise RunError(
                f"{client.site} takes signed runs alone, and this one has no name that was signed "
                "(run), by which it could be told from others; use fedpeft submit"
            )
        if reasons := refusals(client.limits, plan):
            raise RunError(f"{client.site} refuses this plan: {'; '.join(reasons)}")
        with _unquoted(client):
            federation = held_by(plan, client.site, client.data) if client.data else deal(plan)
        return cls(plan, settings, federation, client, own)

    @property
    def limits(self) -> Limits:
        """What the site lets plans do."""
        return self.client.limits if self.client else Limits()

    @property
    def home(self) -> Path:
        """Where the site keeps what must last."""
        return self.client.home if self.client else home()

    def run_of(self, packet: bytes) -> str:
        """Return the run that a message is of.

        Raises ``RunError`` where it is not the one that was submitted: under other names a server
        could have a plan played again and again. ``WireError`` where it names none.
        """
        said, named = str(peek(packet).get("run", "")), self.settings.run
        if not is_run(said):  # it becomes the name of a folder
            raise WireError("message names no run")
        if named and said != named:
            raise RunError(f"message is of run {said}, and the one that was submitted is {named}")
        return said

    def count(self, run: str, client: str, kind: str, packet: bytes) -> None:
        """Note a message that a site is about to work on. Raises ``RunError`` beyond its share."""
        if self.client:
            most = most_of(self.plan, len(self.tables.phases))
            Quota(self.home / "clients" / run, client, kind, most).take(packet)

    def memories(self, run: str) -> OnDisk:
        """Return where the clients of a run keep their memory."""
        return OnDisk(self.home / "clients" / run)

    @cached_property
    def tables(self) -> Tables:
        """What is expected on the wire, and remembered; read off the model's outline alone."""
        found = outline(self.plan.model, self.plan.task.head, len(self.federation.classes))
        return Tables(self.plan, self.plan.adapter.shapes(found), found.head)

    def remembered(self, run: str, client: str, packet: bytes) -> tuple[Memory, bool]:
        """Return a client's memory, and whether it holds all that playing the packet leaves."""
        if not (self.tables.stores or self.tables.keeps):
            return Memory(), True
        memory = self.memories(run).load(client)
        return memory, peek(packet).get("round") in memory.versions

    def clients(self, place: Place) -> list[str]:
        """Return the clients of a node's partition, or the site itself; there may be none."""
        if self.own:
            return list(self.federation.train)
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


@contextlib.contextmanager
def _unquoted(client: ClientFile | None) -> Iterator[None]:
    """Tell what is wrong with a site's own records in its own log alone: it may quote them."""
    try:
        yield
    except DataError as error:
        if client is None or client.data is None:
            raise
        log.warning("%s: %s", client.site, error)
        raise DataError(
            f"{client.site} cannot use its records for this plan; its own log says why"
        ) from None


def _check_newest(client: str, packet: bytes, memory: Memory) -> None:
    """Refuse a round that came late: its memory would push out that of a newer one."""
    newest, round = max(memory.versions, default=-1), peek(packet).get("round")
    if isinstance(round, int) and round < newest:
        raise RunError(f"round {round} is over: {client} has played round {newest}")


def _purse(place: Place, dealt: _Dealt) -> Purse:
    """Return where this node's clients write down what they spend, in whatever run.

    Its ``max-epsilon``, at its ``max-delta``, is what all runs together may spend of a data set's
    records, ``max-client-epsilon`` what they may of all of them as one client's. The limits of a
    ``client.yaml`` are of all records that the site ever had. With ``promised-only`` runs that
    promised nothing do not count.
    """
    records, client = _limit(place, "max-epsilon"), _limit(place, "max-client-epsilon")
    if dealt.limits.epsilon is not None:
        records = dealt.limits.epsilon, dealt.limits.delta
    if dealt.limits.client_epsilon is not None:
        client = dealt.limits.client_epsilon, dealt.limits.delta
    if not isinstance(promised := place.node.get("promised-only", False), bool):
        raise RunError(f"this node's promised-only={promised!r} must be true or false")
    ledgers, promised = (
        OnDiskLedgers(dealt.home / "ledgers"),
        promised or dealt.limits.promised_only,
    )
    how = {"of_all_data": dealt.own, "promised_only": promised}
    return Purse(ledgers, records, client, is_apart=True, **how)


def _tells_gain(place: Place, dealt: _Dealt) -> bool:
    """Tell whether the gain may leave: it is measured on records, and has no noise."""
    try:
        check_evaluation(dealt.plan, _purse(place, dealt))
    except BudgetError:
        return False
    return dealt.limits.gain and dealt.limits.metrics and not dealt.plan.privacy.secret


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


def _phase(packet: bytes) -> int:
    phase = peek(packet).get("phase", 0)
    return phase if isinstance(phase, int) else 0


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
