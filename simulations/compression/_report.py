"""The tables and what became of the goals, from the results files alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedpeft.durable import replace_file
from simulations._study.store import Store
from simulations._study.summary import spread
from simulations.compression import _plans, _plot
from simulations.compression._figures import Figures, figures
from simulations.compression._pieces import Piece, pieces
from simulations.compression._plans import Task

GOALS = (25, 50, 100)
"""Times fewer uplink bytes than float32. At the first, no loss is to show."""
_NOTES = """\
Each codec on the uplink of one plan, all clients in every round. Mean over seeds ± their standard
deviation, on the same test rows in every run. MB up: all rounds and all clients, as packed. Times
fewer: than the values as float32 and nothing else, and than `raw`, which adds headers. Difference:
to `raw` under the same seeds, with a 95 % t interval that is not corrected for there being many.
All use the rate that is best for `raw` on the clients' held-out records of the first seed.
"""


def write(store: Store, tasks: Sequence[Task] = _plans.TASKS) -> str:
    """Write ``table.md`` and ``uplink.svg``; return the table."""
    text = "\n".join(_text(store, tasks))
    replace_file(store.folder / "table.md", [text.encode()], "result")
    _plot.draw(store, tasks, store.folder / "uplink.svg")
    return text


def _text(store: Store, tasks: Sequence[Task]) -> Iterator[str]:
    yield "# Accuracy against uplink bytes\n"
    yield _NOTES
    for task in tasks:
        found = {piece: figures(store, piece) for piece in pieces([task])}
        rate = store.rate(Piece(task))
        tried = ", ".join(f"{lr:g}" for lr in task.rates)
        chosen = f"{rate:g} of {tried}" if rate else f"**missing**, one of {tried}"
        better = "higher" if task.higher else "lower"
        yield f"## {task.title}\n"
        yield (
            f"{task.rounds} rounds, {len(task.seeds)} seeds, rate {chosen}; "
            f"{better} {task.unit} is better.\n"
        )
        yield (
            f"| uplink | {task.unit} | MB up | times fewer | than `raw` | difference | interval "
            "| verdict | seeds |"
        )
        yield "|---|---|---|---|---|---|---|---|---|"
        raw = found[Piece(task)]
        yield from (_row(store, piece, of, raw) for piece, of in found.items())
        yield ""
        yield from _goals(found, task)


def _row(store: Store, piece: Piece, found: Figures | None, raw: Figures | None) -> str:
    label = "`" + piece.uplink.replace("|", "\\|") + "`"
    lacks = store.missing(piece).replace("|", "\\|")
    if found is None:
        return f"| {label} | **missing**: {lacks} | | | | | | | 0 |"
    fewer = f"{raw.up_bytes / found.up_bytes:.1f}" if raw else ""
    seeds = f"{len(found.scores)}" + (f", **missing**: {lacks}" if lacks else "")
    seeds += f"; {found.refused} replies refused" if found.refused else ""
    cells = [label, spread(found.scores), f"{found.up_bytes / 1e6:.2f}", f"{found.fewer:.1f}"]
    return f"| {' | '.join(cells)} | {fewer} | {_difference(found)} | {seeds} |"


def _difference(found: Figures) -> str:
    """Return three cells: the difference to ``raw``, its interval and the verdict."""
    if (apart := found.difference) is None:
        return " | | "
    return f"{apart.mean:+.2f} | {apart.low:+.2f} to {apart.high:+.2f} | {apart.verdict}"


def _goals(found: dict[Piece, Figures | None], task: Task) -> Iterator[str]:
    """Yield what the best of the codecs lose that send so many times fewer bytes."""
    yield (
        "The best at so many times fewer bytes than float32 or more, of the codecs that have every "
        "seed.\nIt is picked by this very difference, which flatters it where several compete.\n"
    )
    yield "| at least | of | best | times fewer | difference | interval | verdict |"
    yield "|---|---|---|---|---|---|---|"
    whole = {p: f for p, f in found.items() if f and len(f.scores) == len(task.seeds)}
    for goal in GOALS:
        able = {p: f for p, f in whole.items() if f.difference and f.fewer >= goal}
        if not able:
            yield f"| {goal} times | 0 | **missing** | | | | |"
            continue
        piece, best = max(able.items(), key=lambda item: item[1].mean * (1 if task.higher else -1))
        label = "`" + piece.uplink.replace("|", "\\|") + "`"
        yield f"| {goal} times | {len(able)} | {label} | {best.fewer:.1f} | {_difference(best)} |"
    yield ""
