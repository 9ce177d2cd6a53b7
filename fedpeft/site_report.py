"""How adapters do on a site's held-out records, and what the federation has gained it.

The comparison is paired: of each held-out record, which adapter does better on it. Chance is in
which of the site's records are held out; the sign test asks how often a fair coin would give as
uneven a count or a more uneven one, records on which both do the same left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedpeft.errors import TrainError
from fedpeft.evaluation import is_better
from fedpeft.tensors import is_finite
from fedpeft.types import Metrics, Tensors

if TYPE_CHECKING:
    from fedpeft.plan import Plan
    from fedpeft.site import Site

ROWS = {
    "base": "base model, untrained",
    "alone": "this site alone",
    "federated": "federated adapter",
    "personal": "personal adapter",
}
"""Rows of the table, as they are called there."""
_PIECE = 64
"""Records that are evaluated one by one in one call: each has a reference to the adapter."""


@dataclass(frozen=True, slots=True)
class Adapters:
    """What a site has at the end of a run; ``personal`` is empty where it has none."""

    federated: Tensors
    personal: Tensors = field(default_factory=dict)


def measured(site: Site, client: str, adapters: Adapters) -> dict[str, Metrics]:
    """Return the metrics on the client's held-out records, row by row; none without any."""
    if not (records := site.held(client)):
        return {}
    each = {"base": site.initial, "federated": adapters.federated, "personal": adapters.personal}
    each = {name: tensors for name, tensors in each.items() if tensors}
    found = {k: site.learner.evaluate([v], [records])[0] for k, v in each.items()}
    return {name: finite(metrics) for name, metrics in found.items()}


def trained_alone(
    plan: Plan,
    site: Site,
    client: str,
    federated: Tensors,
    rounds: int,
    seen: Callable[[int, int], None],
) -> Tensors:
    """Return the adapter that the client trains on its own records, with nobody else.

    It does the local work of all ``rounds`` in one go, whether or not the client was asked in each,
    from where the federation began: what never changes is that of the ``federated`` adapter.
    ``seen`` is told how many records it has seen, and of how many. Raises ``TrainError`` where
    it does not stay finite.
    """
    from fedpeft.baselines import train

    records, tables = site.train(client), site.tables
    most = max(1, rounds * plan.trainer.budget(len(records))[1])
    start = {**tables.of(client).part(site.initial), **{k: federated[k] for k in tables.once}}
    told = [("alone", client)]
    (found,) = train(plan, site, [records], [start], most, told, lambda n: seen(n, most))
    if not is_finite(found):
        raise TrainError("training alone diverged at the plan's lr, so nothing can be compared")
    return found


def paired(
    site: Site, client: str, measures: Sequence[str], one: Tensors, other: Tensors
) -> dict[str, Any]:
    """Return by how much ``one`` does ``better`` than ``other``, and on how many records.

    ``by`` has the differences of the metrics; ``measure`` is what records are compared by, ``p`` of
    a two-sided sign test.
    """
    from scipy.stats import binomtest

    records = site.held(client)
    measure = "accuracy" if "accuracy" in measures else "loss"
    whole = [finite(site.learner.evaluate([t], [records])[0]) for t in (one, other)]
    a, b = (_each(site, tensors, records, measure) for tensors in (one, other))
    pairs = list(zip(a, b, strict=True))
    better = sum(is_better(measure, x, y) for x, y in pairs)
    worse = sum(is_better(measure, y, x) for x, y in pairs)
    p = binomtest(better, better + worse).pvalue if better + worse else 1.0
    by = {name: whole[0][name] - whole[1][name] for name in whole[0] if name in whole[1]}
    return {
        "by": by,
        "measure": measure,
        "records": len(records),
        "better": better,
        "worse": worse,
        "p": float(p),
    }


def as_text(report: Mapping[str, Any]) -> str:
    """Return a report for reading: a table, and what it says."""
    counts = report["records"]
    title = f"# {report['name']} at {report['site']}"
    of = f"{counts['held out']} held-out records of {counts['training'] + counts['held out']}"
    lines = [title, "", f"Run {report['run']}, {report['rounds']} rounds; {of}.", ""]
    lines += [*table(report), ""]
    told = {**report["missing"]}
    if not counts["held out"]:
        told["rows"] = "no records were held out; the plan's holdout says how many are"
    lines += [f"- {_WHAT[name]}: {why}" for name, why in told.items()]
    lines += [f"- {text}" for text in statements(report)]
    if report["rows"] and not report["gain"]:
        lines += ["- `fedpeft gain` trains alone on this site's records, and compares."]
    return "\n".join([*lines, ""])


_WHAT = {"personal": "personal adapter", "rows": "evaluation"}


def table(report: Mapping[str, Any]) -> list[str]:
    """Return the rows as a table, as in Markdown; no lines where nothing was measured."""
    rows = {name: report["rows"][name] for name in ROWS if name in report["rows"]}
    if not rows:
        return []
    columns = list(next(iter(rows.values())))
    cells = [["held-out records", *columns]]
    cells += [[ROWS[name], *(_cell(k, row.get(k)) for k in columns)] for name, row in rows.items()]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    shown = [
        "| "
        + " | ".join(_set(text, width, i) for i, (text, width) in _numbered(line, widths))
        + " |"
        for line in cells
    ]
    rule = "|".join(f"{'-' * (w + 1)}{':' if i else '-'}" for i, w in enumerate(widths))
    return [shown[0], f"|{rule}|", *shown[1:]]


def statements(report: Mapping[str, Any]) -> list[str]:
    """Return what comes out of the comparisons, a sentence each."""
    found = []
    for whose, about in report["gain"].items():
        by = ", ".join(difference(name, value) for name, value in about["by"].items())
        same = about["records"] - about["better"] - about["worse"]
        found.append(
            f"{ROWS[whose]} against this site alone: {by}; by {about['measure']} better on "
            f"{about['better']} records, worse on {about['worse']}, the same on {same} "
            f"(sign test p = {about['p']:.2g})"
        )
    return found


def finite(metrics: Metrics) -> dict[str, float]:
    """Return the metrics that are numbers."""
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def _each(site: Site, tensors: Tensors, records: Sequence[Any], measure: str) -> list[float]:
    """Return a metric of every record by itself."""
    found = list[float]()
    for start in range(0, len(records), _PIECE):
        part = [[record] for record in records[start : start + _PIECE]]
        metrics = site.learner.evaluate([tensors] * len(part), part, len(part))
        found += [float(each[measure]) for each in metrics]
    return found


def _numbered(line: Sequence[str], widths: Sequence[int]) -> list[tuple[int, tuple[str, int]]]:
    return list(enumerate(zip(line, widths, strict=True)))


def _set(text: str, width: int, column: int) -> str:
    return f"{text:>{width}}" if column else f"{text:{width}}"


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f} %" if _is_share(name) else f"{value:.4f}"


def difference(name: str, value: float) -> str:
    """Return a difference of a metric for reading."""
    return f"{name} {100 * value:+.1f} points" if _is_share(name) else f"{name} {value:+.4f}"


def _is_share(name: str) -> bool:
    return name.rpartition("/")[2] in ("accuracy", "f1", "token_accuracy")
