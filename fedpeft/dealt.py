"""What a node is dealt of a run: its plan, its data, its clients, and what the site allows.

The plan's sorted clients are dealt to the nodes in turn: the node with ``partition-id`` p plays the
p-th and every ``num-partitions``-th after it. A site with records of its own, as its
``client.yaml`` says, plays the one client of its name, and refuses what the site does not allow.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from fedpeft.deployment.client_file import ClientFile, Limits
from fedpeft.deployment.limits import refusals
from fedpeft.deployment.plan_text import unread_refusals
from fedpeft.deployment.quota import Quota, most_of
from fedpeft.errors import BudgetError, DataError, RunError, WireError
from fedpeft.federation import Federation, deal
from fedpeft.flower.config import Settings, home, is_run, read_config
from fedpeft.flower.messages import log
from fedpeft.ledger import OnDiskLedgers
from fedpeft.memory import Memory, OnDisk
from fedpeft.models._outline import outline
from fedpeft.plan import Plan
from fedpeft.scattered import held_by, is_scattered, nobody
from fedpeft.spending import Purse, check_evaluation
from fedpeft.tables import Tables
from fedpeft.types import Scalar, Scattered
from fedpeft.warm.channel import Place
from fedpeft.wire import peek


@dataclass(frozen=True)
class Dealt:
    """A run's plan and its data; ``client`` is what the site's ``client.yaml`` says, if it has one.

    ``own`` says that the data are the site's own.
    """

    plan: Plan
    settings: Settings
    federation: Federation
    client: ClientFile | None
    own: bool

    @classmethod
    def of(cls, config: Mapping[str, Scalar], client: ClientFile | None) -> Dealt:
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
        with unquoted(client):
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

    def purse(self, place: Place) -> Purse:
        """Return where this node's clients write down what they spend, in whatever run.

        Its ``max-epsilon``, at its ``max-delta``, is what all runs together may spend of a data
        set's records, ``max-client-epsilon`` what they may of all of them as one client's. The
        limits of a ``client.yaml`` are of all records that the site ever had. With
        ``promised-only`` runs that promised nothing do not count.
        """
        records, client = _limit(place, "max-epsilon"), _limit(place, "max-client-epsilon")
        if self.limits.epsilon is not None:
            records = self.limits.epsilon, self.limits.delta
        if self.limits.client_epsilon is not None:
            client = self.limits.client_epsilon, self.limits.delta
        if not isinstance(promised := place.node.get("promised-only", False), bool):
            raise RunError(f"this node's promised-only={promised!r} must be true or false")
        return Purse(
            OnDiskLedgers(self.home / "ledgers"),
            records,
            client,
            is_apart=True,
            of_all_data=self.own,
            promised_only=promised or self.limits.promised_only,
        )

    def tells_gain(self, place: Place) -> bool:
        """Tell whether the gain may leave: it is measured on records, and has no noise."""
        try:
            check_evaluation(self.plan, self.purse(place))
        except BudgetError:
            return False
        return self.limits.gain and self.limits.metrics and not self.plan.privacy.secret


@contextlib.contextmanager
def unquoted(client: ClientFile | None) -> Iterator[None]:
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
