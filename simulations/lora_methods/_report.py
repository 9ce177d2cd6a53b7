"""The table and the contrasts, from the results files alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from fedpeft.durable import replace_file
from fedpeft.significance import paired
from simulations._study.store import Store, missing
from simulations._study.summary import spread
from simulations.lora_methods import _plans, _plot
from simulations.lora_methods._pieces import CONTRASTS, Contrast, Piece
from simulations.lora_methods._plans import CENTRAL, CLIENTS, METHODS, Scale

_NOTES = """\
Accuracy in %, mean over seeds ± their standard deviation. `test`: the same {rows} test rows in
every run (one accuracy of 85 % has a standard error of {error:.1f}); `held-out`: the records that
clients keep from training, pooled. The rate is the best of {rates} on the held-out
records of seed {seed}, so the test rows took no part in the choice; † marks one at an edge of
these. MB in all rounds and of all clients; server: CPU time a round without what clients do.
\\* A personalised method: clients keep tensors, and what counts is `held-out`, where the majority
is the label that each client sees most.
"""


def write(store: Store, scale: Scale = _plans.FULL) -> str:
    """Write ``table.md`` and ``accuracy.svg``; return the table."""
    text = "\n".join(_text(store, scale))
    replace_file(store.folder / "table.md", [text.encode()], "result")
    _plot.draw(store, scale, store.folder / "accuracy.svg")
    return text


def _text(store: Store, scale: Scale) -> Iterator[str]:
    yield "# LoRA methods on AG News\n"
    yield _NOTES.format(
        rows=scale.test_rows,
        error=100 * math.sqrt(0.85 * 0.15 / scale.test_rows),
        rates=", ".join(f"{lr:g}" for lr in scale.rates),
        seed=scale.seeds[0],
    )
    for clients in CLIENTS:
        yield f"## {clients} clients ({_plans.CLIENTS[clients]})\n"
        yield "| method | rate | test | held-out | MB up | MB down | server ms | seeds |"
        yield "|---|---|---|---|---|---|---|---|"
        yield from _references(store, scale, clients)
        for method in METHODS:
            yield _row(store, Piece(method.name, clients, False, scale), method.name)
        yield ""
    yield "## Contrasts\n"
    yield (
        f"Accuracy of the left method minus that of the right one, in points, paired over "
        f"{len(scale.more_seeds)} seeds, with a 95 % t interval; each side has its own best rate. "
        "The intervals are not corrected for there being several.\n"
    )
    yield "| clients | left | right | papers say of left | difference | interval | verdict |"
    yield "|---|---|---|---|---|---|---|"
    for contrast in CONTRASTS:
        for clients in CLIENTS:
            yield _contrast_row(store, scale, contrast, clients)
    yield ""


def _references(store: Store, scale: Scale, clients: int) -> Iterator[str]:
    """Yield the rows of the majority class and of the adapter trained on all records."""
    found = [store.scored(Piece(m.name, clients, False, scale)) for m in METHODS]
    by_seed = {run["seed"]: run["majority"] for runs in found for run in runs}
    test, held = (spread([100 * m[k] for m in by_seed.values()]) for k in ("test", "held"))
    yield f"| majority class | | {test} | {held} | | | | {len(by_seed)} |"
    yield _row(store, Piece(CENTRAL, clients, False, scale), "centralised", travels=False)


def _row(store: Store, piece: Piece, label: str, travels: bool = True) -> str:
    lacks = store.missing(piece)
    runs = store.scored(piece)
    if not runs:
        return f"| {label} | **missing**: {lacks} | | | | | | 0 |"
    label += " \\*" if any(run["personalised"] for run in runs) else ""
    test, held = (spread([100 * run["metrics"][f"{k}/accuracy"] for run in runs]) for k in _SETS)
    rate = f"{runs[0]['lr']:g}" + _edge(piece, runs[0]["lr"])
    up, down, server = ("", "", "")
    if travels:
        up, down = (f"{statistics.fmean(r[k] for r in runs) / 1e6:.2f}" for k in _BYTES)
        times = [r["server_cpu_s"] for r in runs if r["server_cpu_s"] is not None]
        server = f"{1000 * statistics.median(times):.1f}" if times else ""
    seeds = f"{len(runs)}" + (f", **missing**: {lacks}" if lacks else "")
    return f"| {label} | {rate} | {test} | {held} | {up} | {down} | {server} | {seeds} |"


_SETS = ("test", "held")
_BYTES = ("up_bytes", "down_bytes")


def _contrast_row(store: Store, scale: Scale, contrast: Contrast, clients: int) -> str:
    sides = [Piece(name, clients, True, scale) for name in (contrast.left, contrast.right)]
    head = f"| {clients} | {contrast.left} | {contrast.right} | {contrast.claims} |"
    left, right = (store.best(side) for side in sides)
    shared = sorted({*left} & {*right} & {*scale.more_seeds})
    lacks = "; ".join(f"{k}: {v}" for k, v in missing(store, sides).items())
    if len(shared) < 2:
        return f"{head} | | **missing**: {lacks} |"
    which = "held" if any(r["personalised"] for r in (*left.values(), *right.values())) else "test"
    name = f"{which}/accuracy"
    interval = paired(
        [100 * (left[s]["metrics"][name] - right[s]["metrics"][name]) for s in shared]
    )
    ends = f"{interval.low:+.2f} to {interval.high:+.2f}"
    told = interval.verdict
    if lacks:
        told = f"{len(shared)} of {len(scale.more_seeds)} seeds; **missing**: {lacks}"
    return f"{head} {interval.mean:+.2f} | {ends} | {told} |"


def _edge(piece: Piece, rate: float) -> str:
    rates = piece.rates
    return " †" if len(rates) > 1 and rate in (min(rates), max(rates)) else ""
