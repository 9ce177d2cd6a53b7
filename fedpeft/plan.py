"""A run, fully described: one choice for each part, checked as a whole before anything is loaded.

The parts declare what they offer, need and refuse (see ``types/``); this module compares the
declarations and knows no method by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fedpeft import directions
from fedpeft.defaults import DEFAULTS
from fedpeft.errors import FedPeftError, PlanError
from fedpeft.spec import build, describe, digest_of, nearest
from fedpeft.types import (
    Adapter,
    Aggregator,
    Availability,
    Codec,
    Cohort,
    Correction,
    Latency,
    Observing,
    Partition,
    Personal,
    Privacy,
    Scattered,
    Schedule,
    ServerOptimizer,
    Source,
    Task,
    Tracker,
    Trainer,
    Weighting,
)
from fedpeft.yaml_file import read_mapping

PARTS: Mapping[str, str] = {
    "task": "tasks",
    "data": "data",
    "partition": "partitions",
    "adapter": "adapters",
    "trainer": "trainers",
    "correction": "corrections",
    "personal": "personal",
    "uplink": "codecs",
    "downlink": "codecs",
    "privacy": "privacy",
    "cohort": "cohorts",
    "weighting": "weighting",
    "aggregator": "aggregators",
    "optimizer": "optimizers",
    "schedule": "schedules",
    "availability": "availability",
    "latency": "latency",
    "track": "track",
}
"""Plan line to its family of methods; a new family is one more row."""

COMPARISONS = ("base", "alone", "central")
EVALUATIONS = ("test", "clients")
PRECISIONS = ("float32", "bfloat16")
_LISTS = ("evaluate", "compare")
"""Lines that are lists of words, and so may be empty."""
SIMULATED = ("availability", "latency")
"""Lines about what machines do, which real ones do by themselves."""
_ADDED = ("precision", "personal", "schedule", "availability", "latency", "privacy")
"""Lines added since runs were first kept; their defaults say what was before."""
_REPORTING = ("compare", "track")
"""Lines that do not change the adapter, and so are not part of a run's identity."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One choice for each part of a run.

    ``clients`` is how many a simulation deals the data to (natural partitions bring their own).
    ``holdout`` is the share of each client's records kept for federated evaluation. Every
    ``eval_every`` rounds the adapter is evaluated on ``evaluate``: the server's ``test`` set, the
    ``clients``' held-out records (of ``eval_clients`` of them, drawn once), or both.
    ``keep_best`` names a metric such as ``test/accuracy``; the best round is exported, and after
    ``patience`` evaluations without progress the run ends. ``warm_start`` is an adapter folder to
    start from. ``compare`` lists what the final table sets beside the federated adapter: ``base``,
    ``alone``, ``central``. ``precision`` is that of the frozen base and of the products with it;
    what trains, its gradients and the losses stay float32.
    """

    model: str
    task: Task
    data: Source
    partition: Partition
    adapter: Adapter
    trainer: Trainer
    correction: Correction
    personal: Personal
    uplink: Codec
    downlink: Codec
    privacy: Privacy
    cohort: Cohort
    weighting: Weighting
    aggregator: Aggregator
    optimizer: ServerOptimizer
    schedule: Schedule
    availability: Availability
    latency: Latency
    track: Tracker
    rounds: int
    clients: int | None = None
    seed: int = 0
    holdout: float = 0.1
    eval_every: int = 1
    eval_clients: int | None = None
    evaluate: str = "clients,test"
    keep_best: str | None = None
    patience: int | None = None
    warm_start: str | None = None
    compare: str = ""
    precision: str = "float32"

    def __post_init__(self) -> None:
        problems = [*_scalar_problems(self), *_part_problems(self), *_scattered_problems(self)]
        problems += directions.problems(self.uplink, self.downlink)
        if problems:
            raise PlanError(*problems)

    @classmethod
    def from_lines(cls, lines: Mapping[str, Any]) -> Plan:
        """Build a plan from its lines. Raises ``PlanError`` that lists every problem found."""
        lines = expanded(lines)
        known = [*PARTS, *_SCALARS, "preset"]
        problems = [f"unknown line {k!r}{nearest(k, known)}" for k in lines if k not in known]
        chosen: dict[str, Any] = {}
        for line, family in PARTS.items():
            spec = lines.get(line)
            spec = DEFAULTS.get(line) if spec is None else spec
            if spec is None:
                problems.append(f"the plan has no line {line!r}")
                continue
            if isinstance(spec, list):
                spec = " | ".join(map(str, spec))
            if not isinstance(spec, str):
                read_as = type(spec).__name__
                problems.append(f"{line}: this is a {read_as}; write name(field=value, ...)")
                continue
            try:
                chosen[line] = build(family, str(spec))
            except FedPeftError as error:
                problems.append(f"{line}: {error}")
        for line, (kind, required) in _SCALARS.items():
            try:
                value = _scalar(lines.get(line), kind)
            except ValueError as error:
                problems.append(f"{line}: {error}")
                continue
            if value is not None:
                chosen[line] = ",".join(sorted(_words(value))) if line in _LISTS else value
            elif required:
                problems.append(f"the plan has no line {line!r}")
            elif line in lines and line in _LISTS:
                chosen[line] = ""
        if problems:
            raise PlanError(*problems)
        return cls(**chosen)

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> Plan:
        """Read a plan file; ``overrides`` replace whole lines, a preset among them all it says.

        Raises ``PlanError`` that lists every problem found.
        """
        given = dict(overrides or {})
        return cls.from_lines({**read_lines(path), **expanded(given)})

    def parts(self) -> Iterator[tuple[str, Any]]:
        """Yield (line, part)."""
        for line in PARTS:
            yield line, getattr(self, line)

    def lines(self) -> dict[str, Any]:
        """Return the resolved plan: canonical specs, every scalar that is set."""
        found: dict[str, Any] = {"model": self.model}
        found |= {line: describe(part, full=True) for line, part in self.parts()}
        scalars = {f.name: getattr(self, f.name) for f in fields(self) if f.name in _SCALARS}
        return found | {k: v for k, v in scalars.items() if v is not None}

    def identity(self) -> dict[str, Any]:
        """Return the lines that decide the adapter; one newer than a run counts if it is set."""
        found = {k: v for k, v in self.lines().items() if k not in _REPORTING}
        return {k: v for k, v in found.items() if k not in _ADDED or v != _default(k)}

    def digest(self, *inputs: str) -> str:
        """Return the content address of this plan on ``inputs`` (digests of data and model).

        The source of parts from outside the package counts, since it may change under a name.
        """
        sources = [digest_of(part) for line, part in self.parts() if line not in _REPORTING]
        text = json.dumps([self.identity(), *inputs, *filter(None, sources)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def comparisons(self) -> tuple[str, ...]:
        """What the final table compares with."""
        return _words(self.compare)

    @property
    def evaluations(self) -> tuple[str, ...]:
        """What is evaluated during the run."""
        return _words(self.evaluate)


def check_real(plan: Plan) -> None:
    """Raise ``PlanError`` where a plan says what machines do that do it by themselves."""
    raise_for = [line for line in SIMULATED if plan.lines()[line] != _default(line)]
    if raise_for:
        raise PlanError(
            *(
                f"{line}: {describe(getattr(plan, line))} is for simulations: real clients come "
                f"and go by themselves; say {line}: {DEFAULTS[line]}, or use fedpeft run"
                for line in raise_for
            )
        )


def read_lines(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of plan lines. Raises ``PlanError`` naming the file and the place."""
    return read_mapping(path, PlanError, "a plan")


_SCALARS: Mapping[str, tuple[type, bool]] = {
    "model": (str, True),
    "rounds": (int, True),
    "clients": (int, False),
    "seed": (int, False),
    "holdout": (float, False),
    "eval_every": (int, False),
    "eval_clients": (int, False),
    "evaluate": (str, False),
    "keep_best": (str, False),
    "patience": (int, False),
    "warm_start": (str, False),
    "compare": (str, False),
    "precision": (str, False),
}
"""Plan line to its type and whether it must be given."""


def _default(line: str) -> Any:
    """Return what :meth:`Plan.lines` has of a line that says nothing."""
    if line in PARTS:
        return describe(build(PARTS[line], DEFAULTS[line]), full=True)
    return next(f.default for f in fields(Plan) if f.name == line)


def _scalar(value: Any, kind: type) -> Any:
    if value is None or value in ("none", ""):
        return None
    if kind is str:
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)
    words = {int: "a whole number", float: "a number"}
    if isinstance(value, bool):
        raise ValueError(f"{value!r} is not {words[kind]}")
    try:
        number = kind(value)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{value!r} is not {words[kind]}") from None
    if kind is int and isinstance(value, float) and value != number:
        raise ValueError(f"{value!r} is not a whole number")
    return number


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(w.strip() for w in (text or "").split(",") if w.strip() not in ("", "none"))


def expanded(lines: Mapping[str, Any]) -> dict[str, Any]:
    """Return lines with those of their preset, if they name one. Raises ``PlanError``."""
    if "preset" not in lines:
        return dict(lines)
    try:
        preset = build("presets", str(lines["preset"]))
    except FedPeftError as error:
        raise PlanError(f"preset: {error}") from None
    given = {k: v for k, v in lines.items() if k != "preset" and v is not None}
    return {**preset.lines(), **given}


def _scalar_problems(plan: Plan) -> Iterator[str]:
    low = {"rounds": 1, "clients": 1, "seed": 0, "eval_every": 1, "eval_clients": 1, "patience": 1}
    for line, least in low.items():
        value = getattr(plan, line)
        if value is not None and value < least:
            yield f"{line}: {value} must be at least {least}"
    if not 0 <= plan.holdout < 1:
        yield f"holdout: {plan.holdout} must be at least 0 and below 1"
    yield from _choice_problems("compare", plan.comparisons, COMPARISONS)
    yield from _choice_problems("evaluate", plan.evaluations, EVALUATIONS)
    yield from _choice_problems("precision", [plan.precision], PRECISIONS)
    if plan.patience is not None and plan.keep_best is None:
        yield "patience: needs keep_best, the metric that should improve"
    yield from _personal_problems(plan)
    yield from _privacy_problems(plan)
    where = (plan.keep_best or "").partition("/")[0]
    if where == "personal":
        yield (
            f"keep_best: {plan.keep_best!r} is of adapters that stay with the clients, and what is "
            "kept is the shared one; use a metric of clients/ or test/"
        )
    elif plan.keep_best and where not in plan.evaluations:
        yield (
            f"keep_best: {plan.keep_best!r} must be a metric of {' or '.join(plan.evaluations)}, "
            "such as test/accuracy"
        )
    elif plan.keep_best:
        name = plan.keep_best.partition("/")[2].removesuffix("_worst_decile")
        if name not in plan.task.measures:
            yield f"keep_best: the task has no metric {name!r}{nearest(name, plan.task.measures)}"
    if "clients" in plan.evaluations and plan.holdout == 0 and where == "clients":
        yield "keep_best: the clients have no held-out records; set holdout above 0"


def _personal_problems(plan: Plan) -> Iterator[str]:
    if plan.personal.when != "never" and not ("clients" in plan.evaluations and plan.holdout):
        yield (
            f"personal: {describe(plan.personal)} is evaluated on the clients' held-out records "
            "alone; set holdout above 0 and have evaluate name clients"
        )


def _privacy_problems(plan: Plan) -> Iterator[str]:
    """Yield what would tell of clients' records without noise."""
    yield from _hiding_problems(plan)
    if not plan.privacy.secret:
        return
    where = "clients" if plan.privacy.hides else "the server"
    promise = f"privacy: {describe(plan.privacy)} covers what leaves {where}, and"
    if "clients" in plan.evaluations and plan.holdout:
        yield (
            f"{promise} metrics on the clients' held-out records are not noised; say "
            "evaluate: test, or simulate_noise=true for an experiment"
        )
    if known := [word for word in plan.comparisons if word != "base"]:
        yield (
            f"{promise} compare: {known[0]} trains on the clients' records without noise; leave it "
            "out, or say simulate_noise=true for an experiment"
        )


def _hiding_problems(plan: Plan) -> Iterator[str]:
    """Yield what looks at a client's records besides its steps, where these hide them."""
    if not plan.privacy.hides:
        return
    own, default = type(plan.correction), Correction
    looks = own.elsewhere is not default.elsewhere or own.anchor is not default.anchor
    if looks or plan.correction.gradient != "never":
        yield (
            f"correction: {describe(plan.correction)} takes gradients of a client's records "
            "besides those of its steps, and no noise covers these; use scaffold, feddyn, fedprox "
            "or none"
        )
    if plan.correction.while_away:
        yield (
            f"correction: {describe(plan.correction)} takes steps for rounds that a client has no "
            "part in, and its ledger counts those of one round; set while_away=0"
        )
    if isinstance(plan.aggregator, Observing):
        yield (
            f"aggregator: {describe(plan.aggregator)} has clients tell what their records look "
            "like inside the model, and no noise covers that; use aggregator: mean"
        )


def _choice_problems(line: str, given: Sequence[str], allowed: Sequence[str]) -> Iterator[str]:
    for word in given:
        if word not in allowed:
            yield f"{line}: {word!r} is unknown{nearest(word, allowed)}"


def _scattered_problems(plan: Plan) -> Iterator[str]:
    """Yield what follows from everybody's records, where each client has its own."""
    if not isinstance(plan.data, Scattered):
        return
    lie = f"and the records of {describe(plan.data)} lie at its sites"
    lines, default = plan.lines(), _default("partition")
    if lines["partition"] != default:
        yield (
            f"partition: {describe(plan.partition)} deals records to clients, {lie}: each has its "
            "own; leave the line out"
        )
    if plan.clients is not None:
        yield f"clients: the data line names them; leave clients={plan.clients} out"
    for line in (line for line in SIMULATED if lines[line] != _default(line)):
        yield (
            f"{line}: {describe(getattr(plan, line))} is for simulations, {lie}: real machines "
            f"come and go by themselves; say {line}: {DEFAULTS[line]}"
        )
    if pooled := [word for word in plan.comparisons if word != "base"]:
        yield (
            f"compare: {pooled[0]} trains on the clients' records in one place, {lie}; leave it out"
        )


def _part_problems(plan: Plan) -> Iterator[str]:
    parts = dict(plan.parts())
    offers = {line: _offered(line, part) for line, part in parts.items()}
    for line, part in parts.items():
        others = {t: other for other in offers if other != line for t in offers[other]}
        for trait, reason in dict(getattr(part, "needs", {})).items():
            if trait not in others:
                yield f"{line}: {describe(part)} {reason}"
        for trait, reason in dict(getattr(part, "refuses", {})).items():
            if trait in others:
                other = others[trait]
                yield f"{line}: {describe(part)} does not fit {other}: {reason}"


def _offered(line: str, part: Any) -> dict[str, str]:
    """Return what a part offers: each trait by its name, and as that of its line."""
    found = dict(getattr(part, "offers", {}))
    return {**found, **{f"{line}-{trait}": reason for trait, reason in found.items()}}
