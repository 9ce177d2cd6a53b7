"""What a report says of gain against training alone: of the run, of its clients, of sites."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from fedpeft.compare import is_share
from fedpeft.dashboard import shown
from fedpeft.dashboard.ledger import number
from fedpeft.errors import printable
from fedpeft.evaluation import EACH_ALONE, is_better
from fedpeft.reporting import words

Gains: TypeAlias = Mapping[str, Mapping[str, float]]
"""By metric and client, how the shared adapter differs from the one that was trained alone."""

_ROWS = {
    "base": "base model, untrained",
    "alone": "each client alone (mean)",
    "federated": "federated adapter",
    "central": "centralised, pooled data",
}


def of_clients(
    lines: Sequence[Mapping[str, Any]], result: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Return by metric and client how the exported adapter differs from the client's own."""
    best = result.get("best_round")
    shared = [_mapping(line.get("per_client")) for line in lines if best in (None, line["round"])]
    alone, found = _mapping(result.get(EACH_ALONE)), dict[str, dict[str, float]]()
    for client, metrics in next((each for each in reversed(shared) if each), {}).items():
        for name, value in _mapping(metrics).items():
            one, other = number(value), number(_mapping(alone.get(client)).get(name))
            if one is not None and other is not None:
                found.setdefault(name, {})[client] = one - other
    return found


def of_run(result: Mapping[str, Any], gains: Gains) -> Iterator[dict[str, Any]]:
    """Yield tables of the final table's rows, and of how many clients gained."""
    rows = _mapping(result.get("rows"))
    if rows:
        columns = list(dict.fromkeys(name for row in rows.values() for name in _mapping(row)))
        cells = [
            [
                _ROWS.get(str(name), str(name)),
                *(words.shown(c, _mapping(row).get(c)) for c in columns),
            ]
            for name, row in rows.items()
        ]
        alone, shared = (_mapping(rows.get(name)) for name in ("alone", "federated"))
        if alone and shared:
            cells.append(
                ["gain: federated less alone", *(words.less(c, shared, alone) for c in columns)]
            )
        yield {"head": ["test set", *(c.replace("_", " ") for c in columns)], "rows": cells}
    if gains:
        yield {
            "head": ["on clients' held-out records", "better", "worse", "mean", "least", "most"],
            "rows": [_counted(name, each.values()) for name, each in gains.items()],
        }


def of_sites(told: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a table of what sites told of their gain."""
    gains = {str(name): _mapping(about).get("gain") for name, about in told.items()}
    if having := {name: gain for name, gain in gains.items() if isinstance(gain, dict)}:
        columns = list(dict.fromkeys(str(name) for gain in having.values() for name in gain))
        cells = [
            [printable(site), *(words.signed(c, gain.get(c)) for c in columns)]
            for site, gain in having.items()
        ]
        yield {"head": ["site, by its own report", *columns], "rows": cells}


def charts(gains: Gains, axis: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield a chart per metric of what clients gained, the lowest first."""
    for name in gains:
        unit, scale = ("points", 100.0) if is_share(name) else ("", 1.0)
        series = {f"client {name} gain": "shared adapter less training alone"}
        yield {**shown.Chart(f"Gain in {name}", unit, series, scale).told(), **axis}


def _counted(name: str, gains: Collection[float]) -> list[str]:
    """Return a row of how many clients gained, and how much."""
    better = sum(is_better(name, gain, 0.0) for gain in gains)
    worse = sum(is_better(name, 0.0, gain) for gain in gains)
    ends = (statistics.fmean(gains), min(gains), max(gains))
    return [
        f"gain in {name} of {len(gains)} clients",
        *map(str, (better, worse)),
        *(words.signed(name, value) for value in ends),
    ]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
