"""The table, from the results files alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from fedpeft.durable import replace_file
from fedpeft.significance import paired
from simulations._study.store import Run, Store
from simulations._study.summary import spread
from simulations.privacy import _plans, _plot
from simulations.privacy._pieces import Piece
from simulations.privacy._plans import BASELINE, BUDGETS, LEVELS, Level, Scale

_NOTES = """\
SST-2 with MiniLM, {rounds} rounds; accuracy in % on the test rows, mean over seeds ± their standard
deviation. Difference: to `{base}` at the same epsilon, paired over seeds, with a 95 % t interval
that is not corrected for there being many. Rate and clip: the best of a grid on the dev rows
with seed {seed}, the same for all methods; † marks an end of it. Noise: its norm in clips, of users
in the mean update, of records in the mean gradient of all steps; values: what gets noise.
Epsilon: spent by PLD at delta 1e-5, and by RDP.
"""
_HEAD = (
    "| method | rate | clip | test | difference | interval | verdict | values | noise | epsilon "
    "| by RDP | seeds |"
)


def write(store: Store, scale: Scale = _plans.FULL) -> str:
    """Write ``table.md`` and ``accuracy.svg``; return the table."""
    text = "\n".join(_text(store, scale))
    replace_file(store.folder / "table.md", [text.encode()], "result")
    _plot.draw(store, scale, store.folder / "accuracy.svg")
    return text


def _text(store: Store, scale: Scale) -> Iterator[str]:
    yield "# Accuracy against epsilon\n"
    yield _NOTES.format(rounds=scale.rounds, base=BASELINE.name, seed=scale.seeds[0])
    for level in LEVELS:
        yield f"## {level.title[0].upper()}{level.title[1:]}\n"
        grid = [level.grid[sorted(level.grid)[place]] for place in scale.places]
        yield f"Rates and clips: {', '.join(f'{rate:g} and {clip:g}' for rate, clip in grid)}.\n"
        for budget, epsilon in sorted(BUDGETS.items(), key=lambda one: -(one[1] or math.inf)):
            yield "### " + ("No promise" if epsilon is None else f"Epsilon {epsilon:g}") + "\n"
            yield _HEAD
            yield "|---" * (_HEAD.count("|") - 1) + "|"
            yield from _rows(store, level, budget, scale)
            yield ""


def _rows(store: Store, level: Level, budget: str, scale: Scale) -> Iterator[str]:
    base = store.best(Piece(level, BASELINE, budget, scale))
    for method in level.methods:
        piece = Piece(level, method, budget, scale)
        yield _row(store, piece, store.scored(piece), base)


def _row(store: Store, piece: Piece, runs: Sequence[Run], base: Mapping[int, Run]) -> str:
    lacks = store.missing(piece).replace("|", "\\|")
    if not runs:
        return f"| {piece.method.name} | **missing**: {lacks} |" + " |" * 9 + " 0 |"
    first = runs[0]
    private = "epsilon" in first
    tried = piece.chooser.rates
    edge = " †" if len(tried) > 1 and first["lr"] in (min(tried), max(tried)) else ""
    cells = [
        f"{first['rate']:g}{edge}",
        f"{first['clip']:g}" if private else "",
        spread([100 * run["metrics"]["test/accuracy"] for run in runs]),
        *_difference(piece, runs, base),
        f"{first['travelling']:,}" if private else "",
        f"{first['noise_norm']:.2f}" if private else "",
        f"{first['epsilon']:.3f}" if private else "",
        f"{first['epsilon_rdp']:.3f}" if private else "",
        f"{len(runs)}" + (f", **missing**: {lacks}" if lacks else ""),
    ]
    return f"| {piece.method.name} | {' | '.join(cells)} |"


def _difference(piece: Piece, runs: Sequence[Run], base: Mapping[int, Run]) -> tuple[str, ...]:
    """Return the paired difference to the baseline, its interval and the verdict."""
    shared = [run for run in runs if run["seed"] in base]
    if piece.method == BASELINE or len(shared) < 2:
        return "", "", ""
    apart = paired([100 * (_test(run) - _test(base[run["seed"]])) for run in shared])
    return f"{apart.mean:+.2f}", f"{apart.low:+.2f} to {apart.high:+.2f}", apart.verdict


def _test(run: Run) -> float:
    return float(run["metrics"]["test/accuracy"])
