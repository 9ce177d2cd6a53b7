"""The table and the plot, from the results files alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

from fedpeft.durable import replace_file
from fedpeft.significance import paired
from simulations._study.store import Run, Store
from simulations._study.summary import spread
from simulations.lateness import _pieces, _plot
from simulations.lateness._pieces import SETTINGS, Piece, Setting

SHARE = 0.9
"""The target is this share of what ``sync`` reaches, seed by seed."""
HOURS = 12
"""Simulated time after which methods are compared."""
LAST = 5
"""Evaluations at the end of a run over which its figures are averaged."""
SYNC, BUFFER = "sync", "fedbuff_constant"
"""What the others are compared with."""
_NOTES = f"""\
As many replies in each run, the same clients and latencies. Macro F1, the recall of the rare label
and accuracy on all test rows, of which each label has as many, in percent: mean over the last
{LAST} evaluations, then mean over seeds ± their standard deviation. Hours are those of the
simulated clock: of the whole run, and until an evaluation first reaches {100 * SHARE:.0f} % of the
macro F1 at which `{SYNC}` ends under the same seed, with how many seeds reach it. After {HOURS} h:
macro F1 of the last {LAST} evaluations by then; nothing where the run ended before. Staleness: in
versions, mean over updates and the largest. Differences: macro F1 at the end, to `{SYNC}` and to
`{BUFFER}` under the same seeds, with a 95 % t interval that is not corrected for there being many.
"""
COLUMNS = (
    *("method", "rate", "macro F1", "recall", "accuracy", "hours", f"after {HOURS} h"),
    *("to the target", "staleness", f"to `{SYNC}`", f"to `{BUFFER}`", "seeds"),
)


def write(store: Store, quick: bool = False) -> str:
    """Write ``table.md`` and ``curves.svg``; return the table."""
    text = "\n".join(_text(store, _pieces.pieces(quick))) + "\n"
    replace_file(store.folder / "table.md", [text.encode()], "result")
    _plot.draw(store, _pieces.pieces(quick), store.folder / "curves.svg")
    return text


def ended(run: Run, hours: float | None = None) -> tuple[float, float, float] | None:
    """Return macro F1, accuracy and recall at the end of a run, or after so many ``hours``.

    The mean over the last evaluations until then; ``None`` where the run was over before.
    """
    curve = [one for one in run["curve"] if hours is None or one[0] <= 3600 * hours]
    if hours is not None and (len(curve) == len(run["curve"]) or not curve):
        return None
    _, f1, accuracy, recall = zip(*curve[-LAST:], strict=True)
    return statistics.fmean(f1), statistics.fmean(accuracy), statistics.fmean(recall)


def reached(run: Run, target: float) -> float | None:
    """Return the simulated hours until the macro F1 is first at ``target``, if it ever is."""
    return next((clock / 3600 for clock, f1, *_ in run["curve"] if f1 >= target), None)


def _text(store: Store, pieces: Sequence[Piece]) -> Iterator[str]:
    yield "# Schedules where clients are late, with and without the rare label\n"
    yield _NOTES
    for setting in SETTINGS:
        yield from _table(store, setting, [p for p in pieces if p.setting == setting])


def _table(store: Store, setting: Setting, pieces: Sequence[Piece]) -> Iterator[str]:
    rates = ", ".join(f"{lr:g}" for lr in pieces[0].rates)
    yield f"## {setting.title}\n"
    yield (
        f"Each method has the rate of {rates} that is best on the clients' held-out records of "
        f"seed {pieces[0].seeds[0]}; † marks one at an edge of these.\n"
    )
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "|---" * len(COLUMNS) + "|"
    bases = {name: _ends(store, pieces, name) for name in (SYNC, BUFFER)}
    for piece in pieces:
        yield _row(store, piece, bases)
    yield ""


def _ends(store: Store, pieces: Sequence[Piece], method: str) -> Mapping[int, float]:
    """Return the macro F1 at which a method's runs end, by seed."""
    (piece,) = (p for p in pieces if p.method == method)
    return {run["seed"]: end[0] for run in store.scored(piece) if (end := ended(run))}


def _row(store: Store, piece: Piece, bases: Mapping[str, Mapping[int, float]]) -> str:
    runs, lacks = store.scored(piece), store.missing(piece)
    if not runs:
        return f"| `{piece.method}` | missing: {lacks} |" + " |" * (len(COLUMNS) - 3) + " 0 |"
    rate, ends = runs[0]["lr"], [end for run in runs if (end := ended(run))]
    edge = " †" if rate in (min(piece.rates), max(piece.rates)) and len(piece.rates) > 1 else ""
    by_then = [100 * then[0] for run in runs if (then := ended(run, HOURS))]
    cells = [
        f"`{piece.method}`",
        f"{rate:g}{edge}",
        *(spread([100 * end[k] for end in ends]) for k in (0, 2, 1)),
        spread([run["curve"][-1][0] / 3600 for run in runs]),
        spread(by_then) if len(by_then) == len(runs) else "",
        _times(runs, bases[SYNC]),
        _ages(runs),
        *(_difference(piece, runs, name, base) for name, base in bases.items()),
        f"{len(runs)}" + (f", missing: {lacks}" if lacks else ""),
    ]
    return "| " + " | ".join(cells) + " |"


def _times(runs: Sequence[Run], base: Mapping[int, float]) -> str:
    """Return the hours to the target, and how many seeds reach it."""
    when = [reached(run, SHARE * base[run["seed"]]) for run in runs if run["seed"] in base]
    found = [hours for hours in when if hours is not None]
    return f"{spread(found)} ({len(found)} of {len(when)})".strip()


def _ages(runs: Sequence[Run]) -> str:
    """Return the mean staleness of updates, and the largest."""
    counts: list[Mapping[str, int]] = [run["staleness"] for run in runs]
    total = sum(n for each in counts for n in each.values())
    mean = sum(int(age) * n for each in counts for age, n in each.items()) / max(1, total)
    return f"{mean:.1f}, {max(int(age) for each in counts for age in each)}"


def _difference(piece: Piece, runs: Sequence[Run], name: str, base: Mapping[int, float]) -> str:
    overlaps = "buffered(" in piece.settings["schedule"]
    if piece.method == name or (name == BUFFER and not overlaps):
        return ""
    apart = [
        100 * (end[0] - base[run["seed"]])
        for run in runs
        if run["seed"] in base and (end := ended(run))
    ]
    if len(apart) < 2:
        return ""
    found = paired(apart)
    return f"{found.mean:+.1f} ({found.low:+.1f} to {found.high:+.1f})"
