"""What is shown of a run: charts, tiles and clients, and of these nothing that its ledger lacks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedpeft.dashboard.ledger import RECENT, Ledger, Standing
from fedpeft.dashboard.runs import Followed
from fedpeft.errors import printable

MOST_CLIENTS = 200
_PERCENT = ("accuracy", "f1")
_FIRST = ("accuracy", "loss", "perplexity")
_PLACES = {"test": "test set", "clients": "held out by clients", "personal": "personal adapters"}
_WORST = "_worst_decile"
_MEGA, _SHARE = 1e-6, 100.0

ORDERS: Mapping[str, Callable[[tuple[str, Standing]], Any]] = {
    "name": lambda item: item[0],
    "refused": lambda item: (-item[1].refused, item[0]),
    "used": lambda item: (item[1].used, item[0]),
}
"""By what clients may be sorted: those with most refusals, or those used least, first."""


@dataclass(frozen=True, slots=True)
class Chart:
    """Columns that share an axis: ``unit`` is its label, values are multiplied by ``scale``.

    ``zero`` says that the axis begins there.
    """

    title: str
    unit: str
    series: Mapping[str, str]
    scale: float = 1.0
    zero: bool = True

    def told(self) -> dict[str, Any]:
        """Return it for the page."""
        series = [{"column": name, "label": label} for name, label in self.series.items()]
        about = {"title": self.title, "unit": self.unit, "scale": self.scale, "zero": self.zero}
        return {**about, "series": series}


_CHARTS = (
    Chart(
        "Participation",
        "clients",
        {
            "reachable": "within reach",
            "asked": "asked",
            "replied": "reply used",
            "refused": "not used",
        },
    ),
    Chart(
        "Traffic of a round",
        "MB",
        {"up_bytes": "up", "down_bytes": "down", "eval_bytes": "evaluation"},
        _MEGA,
    ),
    Chart(
        "Privacy spent",
        "epsilon",
        {"epsilon": "of clients", "epsilon_rdp": "of clients, by RDP", "epsilon_record": "records"},
    ),
    Chart("Time of a round", "s", {"seconds": "round", "server_seconds": "server alone"}),
    Chart(
        "Norm of updates",
        "L2",
        {"update_norm": "mean", "update_norm_max": "largest", "clip": "clip"},
    ),
    Chart("Agreement of updates", "cosine", {"update_cosine": "mean between clients"}, zero=False),
    Chart("Staleness", "versions", {"staleness": "mean", "staleness_most": "most"}),
)


def charts(ledger: Ledger) -> list[Chart]:
    """Return the charts for which the ledger has columns: metrics first."""
    found = [*_metrics(ledger.columns), *_CHARTS]
    kept = [{k: v for k, v in chart.series.items() if k in ledger.columns} for chart in found]
    return [
        replace(chart, series=series) for chart, series in zip(found, kept, strict=True) if series
    ]


def _metrics(columns: Iterable[str]) -> Iterator[Chart]:
    """Yield a chart per metric: where it was measured, and the training loss beside losses."""
    found: dict[str, dict[str, str]] = {"loss": {"loss": "in training"}}
    for column in sorted(columns, key=_place):
        place, slash, name = column.partition("/")
        if not slash:
            continue
        metric, worst = name.removesuffix(_WORST), name.endswith(_WORST)
        label = _PLACES.get(place, place) + (", worst decile" if worst else "")
        found.setdefault(metric, {})[column] = label
    order = {name: i for i, name in enumerate(_FIRST)}
    for metric in sorted(found, key=lambda name: (order.get(name, len(order)), name)):
        percent = metric in _PERCENT
        unit, scale = ("%", _SHARE) if percent else (_unit(metric), 1.0)
        yield Chart(metric.replace("_", " ").capitalize(), unit, found[metric], scale, zero=False)


def _unit(metric: str) -> str:
    return "nats" if metric == "loss" else ""


def _place(column: str) -> tuple[int, str]:
    place = column.partition("/")[0]
    return ([*_PLACES].index(place) if place in _PLACES else len(_PLACES)), column


def summary(run: Followed) -> dict[str, Any]:
    """Return one row of the list of runs."""
    ledger = run.ledger
    return {
        "run": run.key,
        "name": printable(run.name),
        "state": run.state,
        "done": ledger.rounds,
        "rounds": run.planned,
        "score": next(_scores(run), None),
        "epsilon": _epsilon(ledger),
        "written": ledger.written,
        "problems": len(run.problems),
    }


def detail(run: Followed, epoch: str, after: int, order: str) -> dict[str, Any]:
    """Return all about a run; of its columns what has come ``after`` a row of this ``epoch``."""
    ledger = run.ledger
    if epoch != ledger.epoch or after > ledger.length:
        after = 0
    return {
        **summary(run),
        "epoch": ledger.epoch,
        "after": after,
        "length": ledger.length,
        "columns": {k: [_finite(v) for v in c[after:]] for k, c in ledger.columns.items()},
        "charts": [chart.told() for chart in charts(ledger)],
        "tiles": list(_tiles(run)),
        "clients": _clients(run, order),
        "plan": {str(k): printable(str(v)) for k, v in run.lines.items()},
        "told": [printable(text) for text in run.problems],
    }


def _tiles(run: Followed) -> Iterator[dict[str, str]]:
    """Yield the numbers that are read first: label, value, and what the value is of."""
    ledger = run.ledger
    of = f"of {run.planned}" if run.planned else ""
    yield _tile("rounds over", str(ledger.rounds), of)
    for score in list(_scores(run))[:3]:
        yield _tile(score["label"], score["value"], score["of"])
    if (epsilon := _epsilon(ledger)) is not None:
        yield _tile("epsilon spent", f"{epsilon:.3f}", str(run.lines.get("privacy", "")))
    if (participants := ledger.last("participants")) is not None:
        yield _tile("clients that took part", f"{participants:.0f}", _of_clients(run))
    for name, label in (("up_bytes", "MB up"), ("down_bytes", "MB down")):
        if name in ledger.columns:
            yield _tile(label, f"{ledger.total(name) * _MEGA:,.2f}", "all rounds")
    if "refused" in ledger.columns and (refused := ledger.total("refused")):
        yield _tile("replies not used", f"{refused:.0f}", "all rounds")
    if "seconds" in ledger.columns:
        mean = ledger.total("seconds") / max(1, ledger.length)
        yield _tile("seconds per round", f"{mean:,.2f}", "mean")


def _tile(label: str, value: str, of: str = "") -> dict[str, str]:
    return {"label": label, "value": value, "of": printable(of)}


def _of_clients(run: Followed) -> str:
    clients = run.lines.get("clients")
    return f"of {clients}" if isinstance(clients, int) else ""


def _scores(run: Followed) -> Iterator[dict[str, str]]:
    """Yield the newest value of each metric, best known first."""
    for chart in charts(run.ledger):
        for column, label in chart.series.items():
            value = run.ledger.last(column)
            if value is None or not ("/" in column or column == "loss") or _WORST in column:
                continue
            text = f"{value * chart.scale:.1f} %" if chart.unit == "%" else f"{value:.4f}"
            yield {"label": chart.title.lower(), "value": text, "of": label}


def _epsilon(ledger: Ledger) -> float | None:
    """Return what was spent: of clients where that is promised, else of records."""
    return next(
        (v for k in ("epsilon", "epsilon_record") if (v := ledger.last(k)) is not None), None
    )


def _clients(run: Followed, order: str) -> dict[str, Any]:
    known = run.ledger.clients
    first = sorted(known.items(), key=ORDERS.get(order, ORDERS["name"]))[:MOST_CLIENTS]
    return {"total": len(known), "rows": [_client(run.ledger, *item) for item in first]}


def _client(ledger: Ledger, name: str, standing: Standing) -> dict[str, Any]:
    begin = max(0, ledger.rounds - RECENT)
    known = {round: used for round, used in standing.recent if round >= begin}
    marks = "".join(
        {True: "+", False: "x", None: "."}[known.get(r)] for r in range(begin, ledger.rounds)
    )
    metric = next((m for m in _FIRST if m in standing.metrics), "")
    return {
        "name": printable(name),
        "used": standing.used,
        "refused": standing.refused,
        "reason": printable(standing.reason),
        "up": standing.up,
        "down": standing.down,
        "metric": metric,
        "value": standing.metrics.get(metric),
        "recent": marks,
        "begin": begin,
    }


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value
