"""What a report says of one run, and why it says nothing of something."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpeft import hiding, releases
from fedpeft.compare import Column, is_share
from fedpeft.dashboard import shown
from fedpeft.dashboard.ledger import number
from fedpeft.dashboard.runs import Followed
from fedpeft.errors import FedPeftError, RunError, printable
from fedpeft.json_lines import mapping, read_lines
from fedpeft.past_run import read_run
from fedpeft.plan import Plan
from fedpeft.reporting import again, gains

_WHOSE = {"per_client": "shared adapter", "personal_per_client": "personal adapter"}
_BY_RANK = {"across": "client, lowest first", "key": "client rank"}
_UNITS = 1000
"""Records of the client that is asked what its steps promise: the words do not depend on it."""


@dataclass(frozen=True)
class OneRun:
    """A run that has begun: how it stands, the last evaluation of clients, and files beside it.

    ``held_out`` has by adapter and metric the values of all clients, the lowest first; ``gains`` by
    metric how much better each client's shared adapter does than the one it trained alone.
    """

    followed: Followed
    plan: Plan | None
    held_out: Mapping[str, Mapping[str, Sequence[float]]]
    beside: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    gains: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def tells_of_clients(self) -> bool:
        """Whether its ledger says who took part: it does not where coins are secret."""
        return "replied" in self.followed.ledger.columns


def read(path: Path) -> OneRun:
    """Read a run's folder. Raises ``RunError`` where a file is damaged, or no round is over."""
    past = read_run(path)
    lines = read_lines(path / "rounds.jsonl")
    if not lines:
        raise RunError(f"{path}: no round is over yet, so there is nothing to report")
    followed = Followed(path, ".", path.resolve().name)
    followed.look()
    followed.lines = Column([past]).lines
    try:
        plan = Plan.from_yaml(path / "plan.yaml")
    except FedPeftError:  # code that is not here, or lines of another version
        plan = None
    found = {name: mapping(_bytes(path / name)) or {} for name in ("versions.json", "kept.json")}
    return OneRun(followed, plan, _held_out(lines), found, gains.of_clients(lines, followed.result))


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b"{}"


def _held_out(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {}
    for key, whose in _WHOSE.items():
        told = [line[key] for line in lines if isinstance(line.get(key), dict)]
        last: Mapping[str, Any] = told[-1] if told else {}
        values: dict[str, list[float]] = {}
        for metrics in last.values():
            for name, value in metrics.items():
                if (known := number(value)) is not None:
                    values.setdefault(name, []).append(known)
        if values:
            found[whose] = {name: sorted(each) for name, each in values.items()}
    return found


def told(run: OneRun) -> dict[str, Any]:
    """Return all that the page shows."""
    about = shown.detail(run.followed, "", 0, "name")
    return {
        "kind": "run",
        **about,
        "charts": [*about["charts"], *_ranked(run), *gains.charts(run.gains, _BY_RANK)],
        "columns": {**about["columns"], **_ranks(run)},
        "sections": [
            {"id": "gain", "title": "Gain against training alone", "tables": list(_gain(run))},
            {"id": "promise", "title": "Privacy promise", "tables": list(_promise(run))},
            {"id": "versions", "title": "Made with", "tables": list(_versions(run))},
        ],
        "command": again.command(run.followed.path, run.beside.get("versions.json", {})),
        "again": again.NOTE,
        "missing": list(missing(run)),
    }


def _ranked(run: OneRun) -> Iterator[dict[str, Any]]:
    """Yield a chart per metric on held-out records, clients side by side, the lowest first."""
    names = dict.fromkeys(name for each in run.held_out.values() for name in each)
    for name in sorted(names, key=lambda name: (name != "accuracy", name)):
        series = {f"client {name} {whose}": whose for whose in run.held_out}
        unit, scale = ("%", 100.0) if is_share(name) else ("", 1.0)
        chart = shown.Chart(f"{name.capitalize()} of each client", unit, series, scale, zero=False)
        yield {**chart.told(), **_BY_RANK}


def _ranks(run: OneRun) -> dict[str, list[float]]:
    found = {
        f"client {name} {whose}": list(values)
        for whose, metrics in run.held_out.items()
        for name, values in metrics.items()
    }
    for name, each in run.gains.items():
        found[f"client {name} gain"] = sorted(each.values())
    most = max(map(len, found.values()), default=0)
    return {**found, "client rank": list(range(most))} if found else {}


def _gain(run: OneRun) -> Iterator[dict[str, Any]]:
    yield from gains.of_run(run.followed.result, run.gains)
    if run.tells_of_clients:
        yield from gains.of_sites(run.beside.get("kept.json", {}))


def _promise(run: OneRun) -> Iterator[dict[str, Any]]:
    """Yield what is promised to whom, against whom, in the words of the model card."""
    plan, rounds = run.plan, run.followed.ledger.rounds
    if plan is None or not (plan.privacy.hides or releases.is_guarded(plan)):
        return
    clients = int(number(run.followed.result.get("clients")) or plan.clients or 1)
    try:
        facts = _of_users(plan, clients, rounds) | _of_records(plan)
    except FedPeftError as error:
        facts = {"promise": f"cannot be worked out here: {printable(str(error))}"}
    yield {"head": ["", ""], "rows": [[name, text] for name, text in facts.items()]}


def _of_users(plan: Plan, clients: int, rounds: int) -> dict[str, str]:
    mechanism = releases.mechanism_of(plan, clients)
    if mechanism is None:
        return {}
    facts, told = dict(releases.card(plan, clients, rounds)), mechanism.told()
    return facts | {
        "Unit of privacy": f"{told['unit']}; neighbours: {told['relation']}",
        "Sampler": str(told["sampler"]),
        "Accountant": f"{told['accountant']}, noise multiplier {told['noise_multiplier']:g}",
        "Delta": f"{told['delta']:g}",
        "Adversary": str(told["adversary"]),
    }


def _of_records(plan: Plan) -> dict[str, str]:
    step = hiding.worst(plan, {"": _UNITS}) if plan.privacy.hides else None
    if step is None:
        return {}
    told = step.told()
    return {
        "Privacy of records": f"epsilon as in the chart, at delta {told['delta']:g}; of a client "
        "that took part in every round"
        if plan.privacy.secret
        else "NOT private: noise and batches follow from the plan's seed",
        "Unit hidden": f"{told['unit']}; neighbours: {told['relation']}",
        "Batches": f"each {step.column or 'record'} is in a step's batch by a coin of its own "
        f"(Poisson); accountant {told['accountant']}",
        "Hidden from": str(told["adversary"]),
    }


def _versions(run: OneRun) -> Iterator[dict[str, Any]]:
    if made := run.beside.get("versions.json", {}):
        yield {"head": ["", ""], "rows": [[str(k), printable(str(v))] for k, v in made.items()]}


def missing(run: OneRun) -> Iterator[str]:
    """Yield in a line each what the report does not have, and why."""
    ledger, plan = run.followed.ledger, run.plan
    if not run.tells_of_clients:
        yield (
            "Clients, bytes, participation, update norms and times: coins are secret, so the "
            "ledger tells nothing of clients, and neither does this report."
        )
    elif not run.held_out:
        yield "Accuracy of each client: none was measured; holdout and evaluate: clients do that."
    if not run.followed.result.get("rows"):
        asked = plan is not None and plan.comparisons
        why = (
            "the run has not finished"
            if asked
            else "the plan compares with nothing; say compare: alone"
        )
        yield f"Gain against training alone: {why}."
    if not {"epsilon", "epsilon_record"} & {*ledger.columns}:
        yield "Epsilon: the plan promises nothing (privacy: none)."
    if run.tells_of_clients and "update_norm" not in ledger.columns:
        yield "Update norms and cosines: the ledger has none; this run hides single updates."
    if (
        plan is not None
        and plan.privacy.secret
        and (plan.privacy.hides or releases.is_guarded(plan))
    ):
        yield "The same result again: noise and cohorts are secret and drawn anew by every run."
