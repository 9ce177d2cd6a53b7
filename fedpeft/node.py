"""What a node does with a message, whatever brought it: bytes in, bytes out.

Which clients are this node's, and what its site allows, says ``dealt.py``. What a client remembers
is on disk before its reply leaves.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TypeAlias

import fedpeft
from fedpeft import calibrations, results
from fedpeft.client_rounds import Asked, client_round
from fedpeft.dealt import Dealt, unquoted
from fedpeft.deployment.client_file import ClientFile
from fedpeft.deployment.here import check_signed, this_site
from fedpeft.deployment.limits import Stopwatch
from fedpeft.errors import RunError
from fedpeft.evaluation import group_evaluation
from fedpeft.flower.messages import Hello, log
from fedpeft.handing_out import GAIN, LATER
from fedpeft.memory import Memory
from fedpeft.models import _base
from fedpeft.replies import Replies
from fedpeft.scattered import common_digest, told_of
from fedpeft.site import Site
from fedpeft.spending import answered, check_evaluation
from fedpeft.types import Metrics, Scalar
from fedpeft.warm.channel import Place
from fedpeft.wire import peek

_Key: TypeAlias = "tuple[tuple[tuple[str, Scalar], ...], ClientFile | None]"


class Node:
    """The clients that a machine plays. Plan, data and base are kept from one message to the next.

    They are those of one run at a time: two would hook their adapters into one base model. Methods
    raise ``FedPeftError`` with the reason why they do not do what is asked.
    """

    def __init__(self) -> None:
        self._dealt: tuple[_Key, Dealt] | None = None
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
            answered(dealt.plan, client, run, dealt.purse(place))
        return reply

    def evaluate(self, place: Place, client: str, packet: bytes) -> Metrics:
        """Evaluate on a client's held-out records.

        No metrics where it has none, or where its site lets none leave.
        """
        dealt = self._prepared(place)
        dealt.check_plays(place, client)
        check_evaluation(dealt.plan, dealt.purse(place))
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
        if not dealt.tells_gain(place) or not found.report["records"]["held out"]:
            return {}
        gain = results.gain_told(found)
        return {LATER: 1.0} if gain is None else {f"{GAIN}{k}": v for k, v in gain.items()}

    def unload(self) -> None:
        """Give back plan, data and base; the next message brings them again."""
        self._let_go()
        self._dealt = None
        getattr(_base.load_base, "cache_clear", lambda: None)()

    def _played(
        self, dealt: Dealt, place: Place, client: str, packet: bytes, memory: Memory
    ) -> bytes:
        _check_newest(client, packet, memory)
        purse, measures, run = dealt.purse(place), dealt.limits.metrics, dealt.run_of(packet)
        dealt.count(run, client, "train", packet)
        noise = calibrations.kept(dealt.home / "noise.json", log.warning)
        with self._timed(dealt) as site, noise:
            told = client, packet, memory, purse
            reply, after = client_round(dealt.plan, site, *told, measures=measures)
        if after is not memory:
            dealt.memories(run).save(client, after)
        return bytes(reply)

    @contextlib.contextmanager
    def _timed(self, dealt: Dealt) -> Iterator[Site]:
        """Work with the model for as long as the site allows; it ends between two batches."""
        watch = Stopwatch(dealt.limits.seconds)
        site = self._loaded(dealt)
        site.learner.before_batch = watch.check
        yield site

    def _let_go(self) -> None:
        if self._site:
            self._site[1].close()
        self._site = None

    def _prepared(self, place: Place) -> Dealt:
        key = tuple(sorted(place.run.items())), this_site()
        if self._dealt is None or self._dealt[0] != key:
            self._dealt = None
            check_signed(place.run)  # a plan may name code, which reading it would import
            self._dealt = key, Dealt.of(place.run, key[1])
        return self._dealt[1]

    def _loaded(self, dealt: Dealt) -> Site:
        import torch

        plan, settings, federation = dealt.plan, dealt.settings, dealt.federation
        key = plan.digest(federation.splits.fingerprint, settings.device)
        if self._site is None or self._site[0] != key:
            self._let_go()
            with unquoted(dealt.client):
                site = Site(plan, federation, settings.device, leads=False, warn=log.warning)
            self._site = key, site
        torch.set_num_threads(settings.threads)
        return self._site[1]


def _check_newest(client: str, packet: bytes, memory: Memory) -> None:
    """Refuse a round that came late: its memory would push out that of a newer one."""
    newest, round = max(memory.versions, default=-1), peek(packet).get("round")
    if isinstance(round, int) and round < newest:
        raise RunError(f"round {round} is over: {client} has played round {newest}")


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
