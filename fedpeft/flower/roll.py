"""Who plays whom: the nodes of a Flower federation and the clients of a plan."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from fedpeft.errors import RunError
from fedpeft.flower.messages import Hello, log
from fedpeft.scattered import UNTOLD
from fedpeft.types import Population


@dataclass
class Roll:
    """The clients that the plan has, and which node plays each of those that were met.

    The population is the plan's: a node may leave, come back or be replaced by another that plays
    its clients, but nobody joins whom the plan does not have. ``version`` and ``plan`` are those
    that every node must have. A client that has records of its own (``None`` are expected) says how
    many, and then they are as many for the rest of the run. ``roster`` says which site a node is,
    by its key: where the plan has a client for a site, that site alone plays it, and nobody else.
    """

    expected: Mapping[str, int | None]
    version: str
    plan: str
    nodes: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    heard: int = 0
    total: int = 0
    roster: Callable[[], Mapping[int, str]] = dict
    records: dict[str, int] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)
    strangers: dict[str, str] = field(default_factory=dict)
    """Nodes that play nobody, and why; until the ledger has them."""

    def turn_away(self, node: int, problem: str) -> None:
        """Note why a node plays nobody."""
        self.refused.add(node)
        self.strangers[f"node {node}"] = f"plays nobody: {problem}"
        self.problems.append(problem)
        log.warning("%s", problem)

    @property
    def missing(self) -> list[str]:
        """Clients that no node has said to play."""
        return [client for client in self.expected if client not in self.nodes]

    @property
    def _own(self) -> bool:
        """Whether clients have records of their own."""
        return None in self.expected.values()

    @property
    def hopeless(self) -> bool:
        """Whether clients are missing and those who could play them have spoken."""
        if not self._own:
            return 0 < self.total <= self.heard
        nodes = {site: node for node, site in self.roster().items()}
        if nodes:  # another site's refusal is not that of one that may still come
            return any(nodes.get(client) in self.refused for client in self.missing)
        return bool(self.refused) and len(self.nodes) + len(self.refused) >= len(self.expected)

    @property
    def population(self) -> Population:
        """Every client that was met, with its training records."""
        return {client: self.records[client] for client in sorted(self.nodes)}

    def welcome(self, hello: Hello, node: int, present: Collection[int]) -> None:
        """Note what a node says of itself; ``present`` are those that are there.

        Raises ``RunError`` for one that does not fit the plan, or the others.
        """
        self.total = max(self.total, hello.nodes)
        self._check_site(hello, node)
        if hello.version != self.version:
            raise RunError(f"has fedpeft {hello.version}, the server has {self.version}")
        if hello.plan != self.plan:
            what = "its lines otherwise" if self._own else "other data"
            raise RunError(f"reads {what} than the server for this plan")
        if not hello.clients:
            log.warning("node %d is left out: the plan has no client for it", node)
            self.strangers[f"node {node}"] = "plays nobody: the plan has no client for it"
        said = dict(zip(hello.clients, hello.records, strict=True))
        if self._own:
            said = {client: records or UNTOLD for client, records in said.items()}
        for client, records in said.items():
            if client not in self.expected:
                raise RunError(f"says that it plays {client[:80]!r}, which the plan does not have")
            if self.nodes.get(client) in present:
                raise RunError(f"says that it plays {client}, as another node did")
            known = self.records.get(client, self.expected[client])
            if known not in (None, records):
                before = "before, in this run," if self._own else "in the plan"
                raise RunError(f"{client} has {records} records, {before} {known}")
        self.records |= said
        for client in said:
            if client in self.nodes:
                log.info("%s is played by node %d now", client, node)
            self.nodes[client] = node

    def _check_site(self, hello: Hello, node: int) -> None:
        """Raise ``RunError`` where a site plays another's client."""
        roster = self.roster()
        if not roster or not (self._own or any(s in self.expected for s in roster.values())):
            return  # a plan whose clients are no sites
        site = roster.get(node)
        for client in hello.clients:
            if client != site:
                whose = f"is site {site}" if site else "is no site of the roster"
                raise RunError(f"says that it plays {client[:80]!r}, and {whose} by its key")

    def absent(self, asked: int, wait: float) -> str:
        """Return who is missing after ``wait`` seconds and what the ``asked`` nodes said."""
        missing = self.missing
        names = ", ".join(missing[:5])
        names += f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        remedy = "; ".join(self.problems[:3])
        remedy = remedy or f"they did not answer within {wait:g} seconds (wait)"
        return (
            f"{len(missing)} of {len(self.expected)} clients are missing ({names}); {asked} nodes: "
            f"{remedy}"
        )
