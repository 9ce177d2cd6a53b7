"""Tables of a report, as CSV and Parquet: a row for each run, point, comparison, round, client."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpeft.dashboard.ledger import Standing
from fedpeft.dashboard.runs import Followed
from fedpeft.evaluation import is_better
from fedpeft.reporting import scores
from fedpeft.reporting.points import SEED, Point, Sweep, Trial, reason
from fedpeft.reporting.scores import Comparison

Table = Sequence[Mapping[str, Any]]
"""Rows; a column that a row lacks is empty there."""


def of_sweep(sweep: Sweep) -> dict[str, Table]:
    """Return the tables of a sweep by their names; bands and intervals are of 95 %."""
    names = scores.metrics(sweep)
    found: dict[str, Table] = {"runs": [_trial(*each) for each in sweep.trials]}
    found["points"] = list(_points(sweep, names))
    effects = [_compared(sweep, m, c) for m in names for c in scores.effects(sweep, m)]
    pairs = [_compared(sweep, m, c) for m in names for c in scores.pairs(sweep, m)]
    return {**found, "effects": effects, "pairs": pairs}


def of_run(run: Followed, gains: Mapping[str, Mapping[str, float]]) -> dict[str, Table]:
    """Return the tables of a run by their names; ``gains`` are by metric and client."""
    ledger = run.ledger
    names = list(ledger.columns)
    rounds = [
        dict(zip(names, row, strict=True)) for row in zip(*ledger.columns.values(), strict=True)
    ]
    found: dict[str, Table] = {
        "rounds": [{k: v for k, v in row.items() if v == v} | _whole(row) for row in rounds],
        "plan": [{"line": k, "value": str(v)} for k, v in run.lines.items()],
    }
    clients = [
        _client(name, standing)
        | {f"{metric} gain": own[name] for metric, own in gains.items() if name in own}
        for name, standing in sorted(ledger.clients.items())
    ]
    return {**found, "clients": clients} if clients else found


def _whole(row: Mapping[str, float]) -> dict[str, int]:
    return {"round": int(row["round"]) + 1}


def _client(name: str, standing: Standing) -> dict[str, Any]:
    sent = {"up_bytes": standing.up, "down_bytes": standing.down}
    used = {"used": standing.used, "not_used": standing.refused, "last_reason": standing.reason}
    return {"client": name, **used, **sent, **standing.metrics}


def _trial(point: Point, trial: Trial) -> dict[str, Any]:
    row: dict[str, Any] = {**point.values, SEED: trial.seed, "status": trial.status}
    row["run"] = trial.name
    if (run := trial.run) is not None:
        row |= {**run.metrics, "rounds": run.rounds, **run.spent}
        told = {"up_bytes": run.up_bytes, "down_bytes": run.down_bytes, "seconds": run.seconds}
        row |= {name: value for name, value in told.items() if value is not None}
    return row | {"problem": "" if trial.status == "finished" else reason(trial)}


def _points(sweep: Sweep, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    fronts = {name: scores.front(sweep, name) for name in names[:1]}
    for at, point in enumerate(sweep.points):
        row: dict[str, Any] = {**point.values, "runs": len(point.trials)}
        row["finished"] = len(point.finished)
        for name in names:
            if (found := scores.score(point.scores(name))) is not None:
                row[name] = found.mean
                if found.band:
                    row |= {f"{name} low": found.band[0], f"{name} high": found.band[1]}
        for whom in scores.protected(sweep):
            row[whom] = scores.epsilon(point, whom)
        row |= {"megabytes": scores.megabytes(point), "megabytes up": scores.uplink(point)}
        row |= {f"front by {name}": found.members[at] for name, found in fronts.items()}
        yield {name: value for name, value in row.items() if value is not None}


def _compared(sweep: Sweep, metric: str, made: Comparison) -> dict[str, Any]:
    row: dict[str, Any] = {
        "metric": metric,
        "axis": made.axis,
        "one": made.one,
        "other": made.other,
    }
    if isinstance(made.points, tuple):
        values = sweep.points[made.points[0]].values
        row |= {f"at {axis}": value for axis, value in values.items() if axis != made.axis}
    else:
        row["settings"] = made.points
    by = {"difference": made.by.mean, "low": made.by.low, "high": made.by.high}
    better = "higher" if is_better(metric, 1.0, 0.0) else "lower"
    told = {"better is": better, "seeds": made.seeds, **by, "p": made.p, "p (Holm)": made.corrected}
    return row | told


def as_csv(table: Table) -> bytes:
    """Return a table as CSV, UTF-8."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(table), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue().encode()


def write_parquet(table: Table, path: Path) -> None:
    """Write a table as Parquet: a column of numbers alone is numbers, any other text."""
    import pyarrow as pa
    from pyarrow import parquet

    columns = {name: _column([row.get(name) for row in table]) for name in _columns(table)}
    parquet.write_table(pa.table(columns), path)


def _columns(table: Table) -> list[str]:
    return list(dict.fromkeys(name for row in table for name in row))


def _column(values: Sequence[Any]) -> list[Any]:
    known = [value for value in values if value is not None]
    if all(isinstance(value, bool) for value in known):
        return list(values)
    if all(isinstance(value, int | float) for value in known):
        whole = all(isinstance(value, int) for value in known)
        return list(values) if whole else [None if v is None else float(v) for v in values]
    return [None if value is None else str(value) for value in values]
