"""What a report says of a sweep: its points, fronts and comparisons, as plain values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedpeft import compare
from fedpeft.errors import printable
from fedpeft.evaluation import is_better
from fedpeft.json_lines import mapping
from fedpeft.past_run import PastRun
from fedpeft.reporting import again, scores
from fedpeft.reporting.points import Point, Sweep, final, problems, reason
from fedpeft.reporting.scores import Comparison
from fedpeft.sweep import tuning

_PAIRED = 3
"""Metrics of which the page has comparisons of single points; the tables have all."""
_DIGITS = 5
_PLACES = {
    "": "in training",
    "test": "test set",
    "clients": "held out by clients",
    "personal": "personal adapters",
}
_LISTED = 12
"""Combinations that are named for one reason."""


_READING = (
    "A point is a combination of values; its score is the mean over the seeds that have finished, "
    "its band the 95 % confidence interval of that mean (Student's t).",
    "Lines join, for each colour, the points that no other of that colour beats both in score and "
    "in what the axis below counts; which points these are was chosen by the same scores, so the "
    "best of many is somewhat flattered. All other points are faint.",
    "Filled marks and ★: the Pareto front of all points, by every objective named above; where "
    "nothing is promised epsilon counts as infinite. Filters change what is shown, not the front.",
    "Epsilon of users hides a client, of records what the plan's privacy line says; the whole "
    "promise, with its neighbours and from whom it hides, is in the report of a run.",
    "p is of paired t-tests: the same seed shares data, partition and start. With few seeds they "
    "find large differences only, and no difference found is not shown to be none.",
    "Plots for papers are in figures/ (PNG and SVG), the tables in tables/ (CSV and Parquet).",
)


def told(sweep: Sweep) -> dict[str, Any]:
    """Return all that the page shows."""
    names, plans = scores.metrics(sweep), [point.lines for point in sweep.points]
    known = [lines for lines in plans if lines]
    base = {k: v for k, v in (known or [{}])[0].items() if all(p.get(k) == v for p in known)}
    return {
        "kind": "sweep",
        "name": printable(sweep.name),
        "folder": str(sweep.path),
        "counts": _counts(sweep),
        "notes": list(_notes(sweep)),
        "axes": list(sweep.axes),
        "metrics": [_metric(name) for name in names],
        "protected": scores.protected(sweep),
        "base": base,
        "points": [_point(point, base, names, scores.protected(sweep)) for point in sweep.points],
        "fronts": {name: _front(sweep, name) for name in names},
        "effects": {n: [_told(sweep, c) for c in scores.effects(sweep, n)] for n in names},
        "pairs": {n: [_told(sweep, c) for c in scores.pairs(sweep, n)] for n in names[:_PAIRED]},
        "problems": list(_problems(sweep)),
        "command": _command(sweep),
        "reading": list(_READING),
    }


def _counts(sweep: Sweep) -> dict[str, int]:
    states = [trial.status for _, trial in sweep.trials]
    return {
        "runs": len(states),
        "finished": states.count("finished"),
        "unfinished": states.count("unfinished"),
        "failed": states.count("failed"),
        "points": len(sweep.points),
    }


def _notes(sweep: Sweep) -> Iterator[str]:
    yield from sweep.notes
    yield from _cost_of_choosing(sweep)
    promises = [point.promise for point in sweep.points]
    if count := promises.count("simulated"):
        yield (
            f"{count} of {len(promises)} points simulate their noise from the plan's seed: their "
            "epsilon is what a real run would spend, and nothing is promised"
        )
    if any(scores.megabytes(p) is None for p in sweep.points if p.finished):
        yield "megabytes of private runs are not told, so the front is not by megabytes"
    if all(len(point.finished) < 2 for point in sweep.points):
        yield "one seed for each point: there are no bands and no tests; say seeds: [0, 1, 2, ...]"


def _cost_of_choosing(sweep: Sweep) -> Iterator[str]:
    """Yield what ``fedpeft sweep`` has kept of it."""
    path = sweep.path / tuning.COSTS
    kept = (mapping(path.read_bytes()) or {}) if path.exists() else {}
    try:
        yield from map(str.strip, tuning.as_text([tuning.Cost(**each) for each in kept["costs"]]))
    except (KeyError, TypeError, ValueError):
        if kept:
            yield f"{tuning.COSTS} is of another version; fedpeft sweep writes it anew"


def _metric(name: str) -> dict[str, Any]:
    share = compare.is_share(name)
    place, _, metric = name.rpartition("/")
    metric, worst, _ = metric.partition("_worst_decile")
    label = f"{metric.replace('_', ' ')}, {_PLACES.get(place, place)}"
    return {
        "name": name,
        "label": label + (", worst decile" if worst else ""),
        "unit": "%" if share else "",
        "scale": 100.0 if share else 1.0,
        "higher": is_better(name, 1.0, 0.0),
    }


def _point(
    point: Point, base: Mapping[str, str], names: Sequence[str], protected: Sequence[str]
) -> dict[str, Any]:
    runs = list(point.finished.values())
    found = {name: scores.score(point.scores(name)) for name in names}
    return {
        "values": [printable(value) for value in point.values.values()],
        "scores": {
            name: [_short(s.mean), *(map(_short, s.band) if s.band else (None, None))]
            for name, s in found.items()
            if s is not None
        },
        "seeds": [[t.seed, t.status, t.name, _own(t.run, names)] for t in point.trials],
        "epsilon": [_short(scores.epsilon(point, whom)) for whom in protected],
        "mb": _short(scores.megabytes(point)),
        "up": _short(scores.uplink(point)),
        "seconds": _short(scores.mean([run.seconds for run in runs])),
        "rounds": max((run.rounds for run in runs), default=0),
        "promise": point.promise,
        "lines": {k: v for k, v in point.lines.items() if base.get(k) != v},
        "curves": {name: _curve(runs, name) for name in names[:_PAIRED]},
    }


def _own(run: PastRun | None, names: Sequence[str]) -> list[float | None]:
    return [_short(final(run, name)) for name in names] if run else []


def _curve(runs: Sequence[PastRun], name: str) -> list[list[float | None]]:
    found = [(at, _short(m), _short(half)) for at, m, half in scores.curve(runs, name)]
    return [list(column) for column in zip(*found, strict=True)]


def _front(sweep: Sweep, name: str) -> dict[str, Any]:
    found = scores.front(sweep, name)
    return {
        "objectives": list(found.objectives),
        "members": [at for at, member in enumerate(found.members) if member],
    }


def _told(sweep: Sweep, made: Comparison) -> list[Any]:
    by = [_short(value) for value in (made.by.mean, made.by.low, made.by.high)]
    axis = list(sweep.axes).index(made.axis)
    points = list(made.points) if isinstance(made.points, tuple) else made.points
    values = [] if isinstance(points, list) else [printable(made.one), printable(made.other)]
    return [axis, points, *values, made.seeds, *by, _short(made.p), _short(made.corrected)]


def _problems(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Yield each reason with the combinations it is of."""
    found: dict[str, dict[str, list[str]]] = {}
    for point, trial in problems(sweep):
        where = ", ".join(f"{axis}={value}" for axis, value in point.values.items() if value)
        seeds = found.setdefault(reason(trial), {}).setdefault(where or trial.name or "all", [])
        seeds.append(trial.seed)
    for why, places in found.items():
        count = sum(map(len, places.values()))
        named = [_where(*each) for each in list(places.items())[:_LISTED]]
        rest = len(places) - len(named)
        named += [f"and {rest} more; all are in tables/runs.csv"] if rest else []
        yield {"reason": why, "runs": count, "where": list(map(printable, named))}


def _where(combination: str, seeds: Sequence[str]) -> str:
    return f"{combination} (seed {', '.join(seeds)})" if any(seeds) else combination


def _command(sweep: Sweep) -> dict[str, Any]:
    """Return the command that repeats a run, with ``RUN`` and ``SEED`` in the place of both."""
    found = next((run for _, t in sweep.trials if (run := t.run) is not None), None)
    if found is None:
        return {}
    path = found.path / "versions.json"
    made_with = mapping(path.read_bytes()) if path.exists() else {}
    words = again.words(sweep.path / "RUN", made_with or {})
    return {"words": words, "made_with": {str(k): str(v) for k, v in (made_with or {}).items()}}


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{_DIGITS}g}")
