"""The tables, from the results files alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedpeft.durable import replace_file
from fedpeft.significance import paired
from simulations._study.store import Run, Store
from simulations._study.summary import spread
from simulations.participation import _plans, _plot
from simulations.participation._pieces import Piece
from simulations.participation._plans import BASELINE, SETTINGS, TARGETS, Scale, Setting

_NOTES = """\
{trained}, mean over seeds ± their standard deviation. `test`: accuracy in % on {test}
test rows at the end; difference: to `{base}`, the mean of those who take part, paired over seeds,
with a 95 % t interval that is not corrected for there being many. Worst decile: mean accuracy of
the worst tenth of clients on their held-out records. Rounds and hours: until the test accuracy
first reaches the target, by a simulated clock ({latency}), median over the
seeds that reach it. Server: what it keeps between rounds, last updates of all clients on disk among
it. Each method has the rate of {rates} that is best on the clients' held-out records of seed
{seed}; † marks one at an edge of these. Bias: total variation between the labels behind a step and
those of all records, mean over rounds.
"""
_HEAD = (
    "| method | rate | test | difference | interval | verdict | worst decile | rounds to target "
    "| hours | reached | bias | server KB | seeds |"
)


def write(store: Store, scale: Scale = _plans.FULL) -> str:
    """Write ``table.md``, ``lora.md`` and ``accuracy.svg``; return the tables."""
    tables = {
        "table.md": [setting for setting in SETTINGS if not setting.lora],
        "lora.md": [setting for setting in SETTINGS if setting.lora],
    }
    texts = {name: "\n".join(_text(store, scale, own)) for name, own in tables.items()}
    for name, text in texts.items():
        replace_file(store.folder / name, [text.encode()], "result")
    _plot.draw(store, scale, store.folder / "accuracy.svg")
    return "\n".join(texts.values())


def reached(course: Sequence[Sequence[float]], target: float) -> tuple[float, float] | None:
    """Return rounds and hours at the first point with the target's accuracy, if there is one."""
    found = next((point for point in course if point[2] >= target), None)
    return None if found is None else (found[0], found[1] / 3600)


def _text(store: Store, scale: Scale, settings: Sequence[Setting]) -> Iterator[str]:
    own = _plans.scaled(settings[0], scale)
    yield "# Who takes part\n"
    yield _NOTES.format(
        base=BASELINE.name,
        trained=_plans.TRAINED[settings[0].lora],
        test="all" if own.test is None else f"{own.test:,}",
        latency=_plans.LATENCY,
        rates=", ".join(f"{lr:g}" for lr in own.rates),
        seed=own.seeds[0],
    )
    for setting in settings:
        here = _plans.scaled(setting, scale)
        pieces = [Piece(setting, method.name, here) for method in _plans.methods(setting)]
        found = {piece: store.scored(piece) for piece in pieces}
        yield f"## {setting.title}\n"
        if here.rates != own.rates:
            yield f"Rates here: {', '.join(f'{lr:g}' for lr in here.rates)}.\n"
        yield from _facts(setting, [run for runs in found.values() for run in runs])
        yield _HEAD
        yield "|---" * (_HEAD.count("|") - 1) + "|"
        base = store.best(Piece(setting, BASELINE.name, here))
        for piece, runs in found.items():
            yield _row(store, piece, runs, base)
        yield ""


def _facts(setting: Setting, runs: Sequence[Run]) -> Iterator[str]:
    """Yield what is the same for all methods of a setting."""
    if not runs:
        return
    majority = spread([100 * run["majority"]["test"] for run in runs[:1]])
    asked = statistics.fmean(run["asked"] for run in runs)
    yield (
        f"Majority class {majority} %; target {100 * TARGETS[setting.data]:g} %; "
        f"{asked:.1f} clients a round on average.\n"
    )


def _row(store: Store, piece: Piece, runs: Sequence[Run], base: Mapping[int, Run]) -> str:
    lacks = store.missing(piece).replace("|", "\\|")
    if not runs:
        return f"| {piece.method} | **missing**: {lacks} |" + " |" * 10 + " 0 |"
    rate = runs[0]["lr"]
    ends = (min(piece.rates), max(piece.rates))
    edge = " †" if len(piece.rates) > 1 and rate in ends else ""
    biases = [run["label_bias"] for run in runs if run["label_bias"] is not None]
    cells = [
        f"{rate:g}{edge}",
        spread([100 * run["metrics"]["test/accuracy"] for run in runs]),
        *_difference(piece, runs, base),
        spread([100 * run["metrics"]["clients/accuracy_worst_decile"] for run in runs]),
        *_time(piece, runs),
        f"{statistics.fmean(biases):.2f}" if biases else "",
        f"{runs[0]['server_bytes'] / 1e3:,.1f}",
        f"{len(runs)}" + (f", **missing**: {lacks}" if lacks else ""),
    ]
    return f"| {piece.method} | {' | '.join(cells)} |"


def _difference(piece: Piece, runs: Sequence[Run], base: Mapping[int, Run]) -> tuple[str, ...]:
    """Return the paired difference to the baseline, its interval and the verdict."""
    shared = [run for run in runs if run["seed"] in base]
    if piece.method == BASELINE.name or len(shared) < 2:
        return "", "", ""
    apart = paired([100 * (_test(run) - _test(base[run["seed"]])) for run in shared])
    return f"{apart.mean:+.2f}", f"{apart.low:+.2f} to {apart.high:+.2f}", apart.verdict


def _time(piece: Piece, runs: Sequence[Run]) -> tuple[str, str, str]:
    """Return rounds and hours to the target, and how many seeds reach it."""
    target = TARGETS[piece.setting.data]
    found = [at for run in runs if (at := reached(run["course"], target))]
    if not found:
        return "", "", f"0 of {len(runs)}"
    rounds, hours = (statistics.median(each) for each in zip(*found, strict=True))
    return f"{rounds:.0f}", f"{hours:.1f}", f"{len(found)} of {len(runs)}"


def _test(run: Mapping[str, Any]) -> float:
    return float(run["metrics"]["test/accuracy"])
