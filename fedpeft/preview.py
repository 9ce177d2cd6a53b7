"""What a plan would cost, before anything is loaded: parameters, bytes, memory. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedpeft import folds, hiding, lowrank, releases, turns, weighing
from fedpeft.attendance import Attendance
from fedpeft.broadcasts import header
from fedpeft.coding import Coding
from fedpeft.conversion import found_bytes
from fedpeft.evaluation import evaluated_clients
from fedpeft.federation import Federation
from fedpeft.models._outline import Outline
from fedpeft.plan import Plan
from fedpeft.preflight import check, check_texts
from fedpeft.scattered import UNTOLD, gathered, is_scattered
from fedpeft.state import start
from fedpeft.tables import Tables
from fedpeft.tensors import size
from fedpeft.types import Compensating, Folding, Scalar, Shapes, Tensors
from fedpeft.wire import body

_RUN = "0" * 32
_SHARING = {
    True: "clients can share passes",
    False: "one client at a time: this adapter has no stacked form",
}


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes of one message; ``exact`` is false where the size depends on the values."""

    bytes: int
    exact: bool


class _Traffic:
    """What single clients are sent and send; those that have the same are measured once."""

    def __init__(self, plan: Plan, tables: Tables, clients: Sequence[str], cohort: float) -> None:
        self._plan, self._tables = plan, tables
        self.edits = _edits(plan, tables, clients, cohort)
        self._share = min(1.0, cohort / len(clients)) if clients else 0.0
        self._found: dict[Tables, tuple[Size, Size]] = {}
        self._used: dict[Tables, Size] = {}
        self.asked, self.answered = _later(tables)
        self.once = 4 * size(tables.once.values())

    def of(self, client: str) -> tuple[Size, Size]:
        """Return the sizes down and up in a first phase, the mean over rounds where they differ.

        ``edits`` of the base, by round, come on top of what goes down.
        """
        own = self._tables.of(client)
        if own not in self._found:
            down = self._missed(range(self._plan.rounds)) or self._mean(_down, client)
            self._found[own] = down, self._mean(_up, client)
        return self._found[own]

    def evaluating(self, client: str) -> Size:
        """Return the size of what a client is sent to evaluate, without ``edits``."""
        own = self._tables.of(client)
        if own not in self._used:
            after = [*_evaluated_after(self._plan)]
            self._used[own] = self._missed(after) or _down(self._plan, own, 0)
        return self._used[own]

    def _missed(self, rounds: Sequence[int]) -> Size | None:
        """Return the mean size of the differences that a client has missed before these rounds.

        All are asked as often; one that was never asked is sent the whole. ``None`` where no
        differences are sent.
        """
        if not self._tables.differs:
            return None
        whole = _down(self._plan, self._tables, 0, whole=True).bytes
        first = _down(self._plan, self._tables, 0).bytes
        adapter = 4 * size(self._tables.down(0)["adapter"].values())
        step, total = first - (whole - adapter), 0.0
        for at in rounds:
            never = (1 - self._share) ** at
            missed = (1 - never) / self._share if self._share else at
            total += never * whole + (1 - never) * min(whole, first + (missed - 1) * step)
        return Size(round(total / max(1, len(rounds))), exact=False)

    def _mean(self, measure: Callable[[Plan, Tables, int], Size], client: str) -> Size:
        """Return the mean over rounds; those in which the same travels are measured once."""
        sizes: dict[tuple[Tables, frozenset[str], frozenset[str]], Size] = {}
        total = 0
        for at in range(self._plan.rounds):
            own = self._tables.of(client, at)
            roles = own.roles(at)
            kind = own, roles.down, roles.up
            if kind not in sizes:
                sizes[kind] = measure(self._plan, own, at)
            total += sizes[kind].bytes
        return Size(round(total / self._plan.rounds), all(s.exact for s in sizes.values()))


def preview(
    plan: Plan,
    federation: Federation | None = None,
    read: Callable[[Plan, Federation, int], None] = check_texts,
) -> dict[str, Any]:
    """Return the plan's costs as plain values. Raises ``FedPeftError`` where it cannot run.

    ``federation`` is given where it is not dealt here; ``read`` reads every text.

    Bytes are measured by packing; a message differs by the digits of the numbers in its header,
    and cohorts that are drawn by chance count with their expected size. ``exact`` is false where
    a codec's output depends on the values, or edits of the base are sent, whose ranks do. What
    follows from how many records clients have is left out where only they know it.
    """
    checked = check(plan, gathered(plan) if is_scattered(plan) else federation)
    federation, found, shapes = checked.federation, checked.outline, checked.shapes
    read(plan, federation, found.limit)
    population = federation.population
    tables = Tables(plan, shapes, found.head)
    attendance = Attendance(plan, federation.crowd(plan.seed))
    usual = attendance.expected
    cohort = min(plan.schedule.asks(usual), float(len(population)))
    replies = plan.schedule.expected(usual) * (1 - plan.availability.dropout)
    traffic = _Traffic(plan, tables, list(population), cohort)
    return {
        "plan": plan.lines(),
        "clients": len(population),
        "reachable": round(sum(attendance.rates.values()), 2),
        "records": _records(federation),
        "classes": list(federation.classes),
        "parameters": _parameters(found, shapes, tables),
        "cohort": cohort,
        "local": _local(plan, federation),
        "personal": _personal(plan, federation),
        "stacked": plan.adapter.max_group != 1,
        "bytes": _bytes(
            plan, federation, traffic, (cohort, replies), found.exact and not tables.folds
        ),
        "weights": {"space": weighing.space(plan)},
        "privacy": _privacy(plan, tables, len(population)),
        "hiding": _hiding(plan, federation, _parameters(found, shapes, tables), replies),
        "memory": {
            **_memory(found, shapes, tables, plan),
            "last_updates_bytes": weighing.kept_bytes(plan, tables, len(population)),
            "found_bytes": found_bytes(plan, tables, len(population)),
        },
        "warnings": list(checked.warnings),
    }


def _bytes(
    plan: Plan,
    federation: Federation,
    traffic: _Traffic,
    counts: tuple[float, float],
    exact: bool,
) -> dict[str, Any]:
    """Return bytes per client (mean, least, most), per round and in total.

    ``counts`` are how many clients a round asks, and how many reply.
    """
    cohort, replies = counts
    each = [traffic.of(client) for client in federation.population]
    found: dict[str, Any] = {}
    edits = round(sum(traffic.edits[: plan.rounds]) / plan.rounds)
    ways = (("down", traffic.asked + edits, cohort), ("up", traffic.answered, replies))
    for way, more, messages in ways:
        sizes = [one[way == "up"] for one in each]
        exact = exact and all(size.exact for size in sizes)
        own = [size.bytes + more for size in sizes]
        mean = sum(own) / len(own)
        found |= {
            f"{way}_per_client": round(mean),
            f"{way}_per_client_least": min(own),
            f"{way}_per_client_most": max(own),
            f"{way}_per_round": round(messages * mean),
            f"{way}_total": round(plan.rounds * messages * mean),
        }
    found["down_total"] += _once(plan, traffic.once, len(each), cohort)
    return {**found, "evaluation_total": _evaluation(plan, federation, traffic), "exact": exact}


def _once(plan: Plan, once: int, clients: int, cohort: float) -> int:
    """Return the bytes of what is sent once to each client that is ever asked, about so many."""
    never = (1 - min(1.0, cohort / clients)) ** plan.rounds
    return round(once * clients * (1 - never))


def _evaluation(plan: Plan, federation: Federation, traffic: _Traffic) -> int:
    """Return the bytes of all that is sent to be evaluated."""
    if "clients" not in plan.evaluations or not plan.holdout:
        return 0
    asked = evaluated_clients(plan, list(federation.train))
    each = sum(traffic.evaluating(client).bytes for client in asked)
    after = _evaluated_after(plan)
    edits: float = sum(traffic.edits[t] for t in after)
    return each * len(after) + round(len(asked) * edits)


def _evaluated_after(plan: Plan) -> set[int]:
    return {*range(plan.eval_every, plan.rounds + 1, plan.eval_every), plan.rounds}


def _down(plan: Plan, tables: Tables, round: int, *, whole: bool = False) -> Size:
    """Return the size of a broadcast; of differences one, unless the ``whole`` is meant."""
    expected = tables.down(round)
    state = start(plan, tables, _filled(tables.shapes, 0))
    told = header(state, _RUN, "")

    def packed(kind: int) -> int:
        sections = _encoded(tables.downlink, expected["adapter"], kind)
        if whole:
            sections = {**tables.downlink.parts(_filled(expected["adapter"], kind))}
        if "control" in expected:
            sections["control"] = _filled(expected["control"], kind)
        if "fold" in expected:
            sections["fold"] = state.fold.since(state.fold.held(round))
        return body(sections, tables.downlink.expected(expected)).seal(told).nbytes

    return _measured(packed)


def _edits(plan: Plan, tables: Tables, clients: Sequence[str], cohort: float) -> Sequence[float]:
    """Return the bytes of edits of the base that a client misses before each round and at the end.

    At most, because products may turn out shorter; and on average, if all are asked as often.
    """
    if not isinstance(plan.aggregator, Folding) or not clients or not cohort:
        return [0.0] * (plan.rounds + 1)
    sums = dict.fromkeys(clients, 0)
    for at in range(plan.rounds):
        sums = {c: rank + _rank(tables.of(c, at).shapes) for c, rank in sums.items()}
    ranks = sorted(round(total / plan.rounds) for total in sums.values())
    asked, share = max(1, round(cohort)), min(1.0, cohort / len(clients))
    usual = [ranks[(2 * k + 1) * len(ranks) // (2 * asked)] for k in range(asked)]
    growth = plan.aggregator.growth(usual)
    missed = [(1 - (1 - share) ** t) / share for t in range(plan.rounds + 1)]
    return [folds.grown(tables.shapes, growth, t, n) for t, n in enumerate(missed)]


def _rank(shapes: Shapes) -> int:
    module = lowrank.modules(shapes)[0]
    return shapes[lowrank.factors(module)[0]][0]


def _up(plan: Plan, tables: Tables, round: int) -> Size:
    expected = tables.up(round)
    told: dict[str, Scalar] = {
        "run": _RUN,
        "round": round,
        "steps": 10,
        "lr_sum": 0.01,
        "seen": 100,
        **({} if plan.privacy.hides else {"loss": 1 / 3}),
        **({"inside": 1} if releases.is_guarded(plan) else {}),
    }

    def packed(kind: int) -> int:
        sections = _encoded(tables.uplink, expected["adapter"], kind)
        rest = [name for name in expected if name != "adapter"]
        sections |= {name: _filled(expected[name], kind) for name in rest}
        return body(sections, tables.uplink.expected(expected)).seal(told).nbytes

    return _measured(packed)


def _later(tables: Tables) -> tuple[int, int]:
    """Return the bytes of the questions and of the answers of all phases but the first."""
    told: dict[str, Scalar] = {"run": _RUN, "round": 0, "phase": 1}
    found = [0, 0]
    for phase in tables.phases[1:]:
        for way, shapes in enumerate(phase):
            expected = {("question", "answer")[way]: shapes}
            filled = {section: _filled(shapes, 0) for section in expected}
            found[way] += body(filled, expected).seal(told).nbytes
    return found[0], found[1]


def _measured(packed: Any) -> Size:
    zeros, values = packed(0), packed(1)
    return Size(values, zeros == values)


def _encoded(coding: Coding, shapes: Shapes, kind: int) -> dict[str, Tensors]:
    return coding.encode(_filled(shapes, kind), np.random.default_rng(0))


def _filled(shapes: Shapes, kind: int) -> Tensors:
    rng = np.random.default_rng(0)
    if kind == 0:
        return {k: np.zeros(s, np.float32) for k, s in shapes.items()}
    return {k: rng.standard_normal(s, np.float32) for k, s in shapes.items()}


def _hiding(
    plan: Plan, federation: Federation, parameters: Mapping[str, int], replies: float
) -> dict[str, Any]:
    if not federation.is_counted:
        return {}
    return hiding.preview(plan, federation.counted, parameters["trained"], replies)


def _records(federation: Federation) -> dict[str, int]:
    if not federation.is_counted:
        return {"test": len(federation.splits.test or [])}
    counts = list(federation.population.values())
    return {
        "train": sum(counts),
        "held_out": sum(len(rows) for rows in federation.held.values()),
        "test": len(federation.splits.test or []),
        "smallest_client": min(counts),
        "largest_client": max(counts),
    }


def _parameters(found: Outline, shapes: Shapes, tables: Tables) -> dict[str, int]:
    roles = tables.roles(0)
    return {
        "base": size(found.parameters.values()),
        "trained": size(s for k, s in shapes.items() if k in roles.train),
        "head": size(s for k, s in found.head.items() if k in roles.train),
        "travelling": size(s for k, s in shapes.items() if k in roles.up),
    }


def _local(plan: Plan, federation: Federation) -> dict[str, int]:
    budgets = [plan.trainer.budget(n) for n in _counts(federation)]
    seen = {"records_seen_per_round": sum(seen for _, seen in budgets)}
    return {
        "steps_least": min(steps for steps, _ in budgets),
        "steps_most": max(steps for steps, _ in budgets),
        **(seen if federation.is_counted else {}),
        "while_away": plan.correction.while_away,
    }


def _counts(federation: Federation) -> Sequence[int]:
    """Return how many units clients have; the least and the most there may be where none say."""
    return list(federation.counted.values()) if federation.is_counted else (1, UNTOLD)


def _personal(plan: Plan, federation: Federation) -> dict[str, Any]:
    """Return the work on personal adapters, beside the shared one's."""
    if plan.personal.when == "never":
        return {"when": "never"}
    trainer = plan.personal.trainer(plan.trainer)
    counts = federation.population.values() if federation.is_counted else (1, UNTOLD)
    budgets = [trainer.budget(n)[0] for n in counts]
    return {"when": plan.personal.when, "steps_least": min(budgets), "steps_most": max(budgets)}


def _privacy(plan: Plan, tables: Tables, population: int) -> dict[str, Any]:
    """Return the promise, what it costs, and how large the noise is beside a whole mean update.

    The noise is that of the round in which most travels.
    """
    mechanism = releases.mechanism_of(plan, population)
    if mechanism is None:
        return {}
    travels = max(size(tables.up(t)["adapter"].values()) for t in range(plan.rounds))
    norm = mechanism.noise_norm(travels)
    return {
        **mechanism.told(),
        "secret": plan.privacy.secret,
        "epsilon_per_round": mechanism.epsilon(1),
        "epsilon": mechanism.epsilon(plan.rounds),
        "epsilon_rdp": mechanism.renyi(plan.rounds),
        "clip": mechanism.clip,
        "noise_norm": norm,
        "participations": turns.allowed(plan),
        "rounds_possible": turns.possible(plan, population),
        "clients_needed": math.ceil(population * norm),
        "replies_needed": math.ceil(mechanism.sampling.expected * norm),
        "parameters_needed": math.floor(travels / norm**2),
        "travelling": travels,
    }


def _memory(found: Outline, shapes: Shapes, tables: Tables, plan: Plan) -> dict[str, int]:
    base, adapter = size(found.parameters.values()), size(shapes.values())
    trained = size(s for k, s in shapes.items() if k in tables.roles(0).train)
    personal = size(s for k, s in shapes.items() if k in tables.trained)
    personal *= plan.personal.when == "rounds"
    owing = range(plan.rounds) if isinstance(plan.uplink, Compensating) else range(0)
    owed = {name: shape for t in owing for name, shape in tables.up(t)["adapter"].items()}
    state = start(plan, tables, _filled(shapes, 0))
    held = [state.params, state.slots, state.control, state.mirror.tensors]
    server = [value for tensors in held for value in tensors.values()]
    return {
        "base_bytes": (2 if plan.precision == "bfloat16" else 4) * base,
        "client_state_bytes": 4 * (adapter + 4 * trained + 2 * personal),
        "server_state_bytes": sum(value.nbytes for value in server),
        "personal_bytes": 4 * personal,
        "residual_bytes": 4 * size(owed.values()),
        "away_bytes": _away_bytes(plan, tables),
    }


def _away_bytes(plan: Plan, tables: Tables) -> int:
    """Return the bytes of a broadcast that a client keeps to train with while it is away."""
    sections = [tables.down(0).get(name, {}) for name in ("adapter", "control")]
    each = 4 * sum(size(shapes.values()) for shapes in sections)
    return each if plan.correction.while_away else 0


def as_text(found: Mapping[str, Any]) -> str:
    """Return the preview for a terminal."""
    traffic, count, memory = found["bytes"], found["parameters"], found["memory"]
    about = "" if traffic["exact"] else " (estimate: sizes depend on the values)"
    rows = [
        *((line, str(value)) for line, value in found["plan"].items()),
        ("", ""),
        (
            "clients",
            f"{found['clients']:,}, {_reach(found)}{round(found['cohort'], 1):g} asked per round",
        ),
        ("records", _counted(found["records"])),
        (
            "parameters",
            f"{count['trained']:,} trained ({count['head']:,} of them the head), "
            f"{count['travelling']:,} travelling, {count['base']:,} in the base",
        ),
        (
            "local work",
            _steps(found["local"])
            + _missed(found["local"]["while_away"])
            + _more_work(found["personal"])
            + _SHARING[found["stacked"]],
        ),
        *(
            (
                f"bytes {way} per client",
                f"{traffic[f'{way}_per_client_least']:,} to {traffic[f'{way}_per_client_most']:,}, "
                f"{traffic[f'{way}_per_client']:,} on average: their ranks differ",
            )
            for way in ("up", "down")
            if traffic[f"{way}_per_client_least"] < traffic[f"{way}_per_client_most"]
        ),
        (
            "bytes per round",
            f"{traffic['up_per_round']:,} up, {traffic['down_per_round']:,} down{about}",
        ),
        (
            "bytes in total",
            f"{traffic['up_total']:,} up, {traffic['down_total']:,} down, "
            f"{traffic['evaluation_total']:,} for federated evaluation{about}",
        ),
        (
            "memory",
            f"{memory['base_bytes'] / 1e6:,.1f} MB base, "
            f"{memory['client_state_bytes'] / 1e6:,.2f} MB per client in training, "
            f"{memory['server_state_bytes'] / 1e6:,.2f} MB server state; activations not counted",
        ),
        *(
            ("kept by a client", f"{kept / 1e6:,.2f} MB {what}, up to three times")
            for what, kept in (
                ("personal adapter", memory["personal_bytes"]),
                ("that encoding has lost", memory["residual_bytes"]),
                ("what came last, to train with while away", memory["away_bytes"]),
            )
            if kept
        ),
        *(
            ("kept by the server", f"{kept / 1e6:,.2f} MB {what}, on disk")
            for what, kept in (
                ("last updates of all clients", memory["last_updates_bytes"]),
                ("to convert stale updates, once all clients had one", memory["found_bytes"]),
            )
            if kept
        ),
        ("weights act on", weighing.SPACES[found["weights"]["space"]]),
        *_promise(found["privacy"]),
        *_hidden(found["hiding"]),
        *(("warning", text) for text in found["warnings"]),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in rows)


def _counted(records: Mapping[str, int]) -> str:
    """Say how many records there are, as far as anybody here knows."""
    known = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in records.items())
    return known if "train" in records else f"each site's own, {known}"


def _steps(local: Mapping[str, int]) -> str:
    least, most = local["steps_least"], local["steps_most"]
    if least < most and "records_seen_per_round" not in local:
        return "as many steps per round as a site's records make, "
    return f"{least} to {most} steps per round, "


def _promise(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Say what is promised, and how much noise that takes."""
    if not found:
        return []
    beside = found["epsilon_rdp"]
    more = "" if beside is None or found["accountant"] == "RDP" else f" ({beside:.3f} by RDP)"
    rows = [
        (
            "epsilon",
            f"{found['epsilon']:.3f} in total by {found['accountant']}{more}, "
            f"{found['epsilon_per_round']:.3f} a round; delta {found['delta']:g}",
        ),
        ("privacy of", f"one {found['unit']}; neighbours: {found['relation']}"),
        ("privacy against", found["adversary"]),
        ("sampler", found["sampler"]),
        (
            "noise",
            f"multiplier {found['noise_multiplier']:g}; in the mean update its norm is "
            f"{found['noise_norm']:.3g} clips of {found['clip']:g}",
        ),
    ]
    remedy = f"{found['clients_needed']:,} clients asked as often"
    if (most := found["participations"]) is not None:
        told = f"each client is asked at most {most} times, enough for"
        rows.append(("participations", f"{told} {found['rounds_possible']} rounds at most"))
        remedy = f"size={found['replies_needed']} in the schedule"
    if found["noise_norm"] > 1:
        rows.append(
            (
                "warning",
                f"privacy: the noise is {found['noise_norm']:.3g} times a mean update at most: "
                "accuracy will be near chance; it would be 1 times with "
                f"{remedy}, or with "
                f"{found['parameters_needed']:,} of the {found['travelling']:,} parameters that "
                "travel",
            )
        )
    return rows


def _hidden(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Say what clients hide, and how."""
    if not found:
        return []
    beside = f" ({found['epsilon_rdp']:.3f} by RDP)" if found["epsilon_rdp"] is not None else ""
    rows = [
        (
            "epsilon of records",
            f"{found['epsilon']:.3f} in {found['rounds']} rounds by {found['accountant']}{beside}, "
            f"{found['epsilon_per_round']:.3f} in one; delta {found['delta']:g}; of the "
            "client that spends most",
        ),
        ("hidden", f"{found['unit']}; neighbours: {found['relation']}"),
        ("hidden from", found["adversary"]),
        ("batches", f"{found['sampler']}, {found['expected']:.3g} on average"),
        (
            "noise of steps",
            f"multiplier {found['noise_multiplier']:g}; its norm is {found['noise_norm']:.3g} "
            f"clips of {found['clip']:g} in the mean gradient of a step, "
            f"{found['noise_norm_all']:.2g} in that of all steps of all clients",
        ),
    ]
    if found["noise_norm_all"] > 1:
        rows.append(
            (
                "warning",
                f"privacy: the noise is {found['noise_norm_all']:.3g} times all gradients "
                "together at most: accuracy will be near chance; more clients, larger batches or "
                "fewer parameters would lower it",
            )
        )
    return rows


def _reach(found: Mapping[str, Any]) -> str:
    """Say how many clients can be reached in a round, where not all can."""
    if found["reachable"] == found["clients"]:
        return ""
    return f"{found['reachable']:g} of them within reach on average, "


def _missed(most: int) -> str:
    """Say what clients make up for."""
    return f"and as many for each of up to {most} rounds missed, " if most else ""


def _more_work(personal: Mapping[str, Any]) -> str:
    """Say what personal adapters take beside the shared one."""
    if personal["when"] == "never":
        return ""
    when = {"rounds": "", "evaluation": " before each evaluation"}[personal["when"]]
    return f"and {personal['steps_least']} to {personal['steps_most']} for a personal one{when}, "
