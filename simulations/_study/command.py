"""The command of a study: run what is missing, one piece or several at once, and report."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Generic, TypeVar

from fedpeft.durable import locked
from fedpeft.errors import FedPeftError, PlanError, RunError
from simulations._study import store as stores
from simulations._study.store import Piece, Play, Store

Size = TypeVar("Size")


@dataclass(frozen=True, slots=True)
class Study(Generic[Size]):
    """What studies differ in.

    ``pieces`` and ``report`` are given one of the ``sizes``: that of the study, or of a quick look,
    which runs the pieces of ``quick``. ``play`` lies outside of a ``__main__``, whose functions no
    spawned process finds. ``told`` are the metrics said of each run.
    """

    name: str
    results: Path
    sizes: tuple[Size, Size]
    pieces: Callable[[Size], Sequence[Piece]]
    quick: tuple[str, ...]
    play: Play
    report: Callable[[Store, Size], str]
    told: tuple[str, ...]


def main(study: Study[Any], arguments: list[str] | None = None) -> int:
    """Parse, run, report; 0 where nothing went wrong."""
    options = _options(study).parse_args(arguments)
    for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE"):
        os.environ.setdefault(name, "1")
    with tempfile.TemporaryDirectory() as temporary:
        quick = options.quick and options.results == study.results
        store = Store(Path(temporary) if quick else options.results)
        try:
            return _do(study, store, options)
        except FedPeftError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("\nstopped; every finished run is kept")
            return 130


def advance(store: Store, piece: Piece, play: Play, told: Sequence[str], end: float) -> bool:
    """Make the runs that are missing until ``end``; True where the piece cannot be run.

    Raises ``RunError`` where its finished runs had other settings.
    """
    store.runs(piece)
    try:
        for run in stores.advance(store, piece, play, lambda: time.time() < end):
            said = run.get("problem") or ", ".join(
                f"{k} {run['metrics'][k]:.4f}" for k in told if k in run["metrics"]
            )
            print(f"{piece.name} lr={run['lr']:g} seed={run['seed']}: {said}", flush=True)
    except (PlanError, RunError) as error:  # one piece that does not fit must not cost the others
        print(f"{piece.name}: {error}", file=sys.stderr)
        return True
    return False


def follow() -> None:
    """Have this process end when the one that started it does, however that ends.

    Otherwise one of a pool goes on when the command is killed, and runs what the next one runs too.
    """
    parent = parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _at_least_one(text: str) -> int:
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{count} is less than one")
    return count


def _options(study: Study[Any]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m simulations.{study.name}")
    parser.add_argument("--list", action="store_true", help="what is done and what is missing")
    parser.add_argument("--report", action="store_true", help="only write table and plot")
    parser.add_argument("--piece", action="append", default=[], help="run this one, or several")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no run after so many")
    parser.add_argument("--jobs", type=_at_least_one, default=1, help="pieces at once, a core each")
    parser.add_argument("--results", type=Path, default=study.results, help="the folder")
    parser.add_argument("--quick", action="store_true", help="a few pieces, seconds a run")
    return parser


def _do(study: Study[Size], store: Store, options: argparse.Namespace) -> int:
    size = study.sizes[options.quick]
    every = study.pieces(size)
    asked = options.piece or (study.quick if options.quick else [])
    wanted = [stores.named(every, name) for name in asked] or every
    if options.list:
        _list(store, wanted)
        return 0
    failed = False
    if not options.report:
        with locked(store.folder, "set of results"):
            end = time.time() + 60 * options.minutes
            failed = _run(study, store, wanted, end, options.jobs)
    text = study.report(store, size)
    print(text if options.quick else f"runs and report: {store.folder}")
    return int(failed)


def _run(study: Study[Any], store: Store, wanted: Sequence[Piece], end: float, jobs: int) -> bool:
    """Make the missing runs, ``jobs`` pieces at once; True where some piece could not be run.

    What chooses a piece's rate runs too.
    """
    every = list(dict.fromkeys(one for piece in wanted for one in (piece.chooser, piece)))
    failed = False
    for stage in sorted({piece.stage for piece in every}):
        part = [piece for piece in every if piece.stage == stage]
        given = (repeat(store), part, repeat(study.play), repeat(study.told), repeat(end))
        if jobs == 1:
            failed |= sum(map(advance, *given)) > 0
            continue
        with ProcessPoolExecutor(jobs, get_context("spawn"), follow) as pool:
            failed |= sum(pool.map(advance, *given)) > 0
    return failed


def _list(store: Store, wanted: Sequence[Piece]) -> None:
    for piece in {p.name: p for p in wanted}.values():
        lacks, rate = store.missing(piece), store.rate(piece)
        done = f"{len(store.runs(piece))} runs" + (f", best rate {rate:g}" if rate else "")
        print(f"{piece.name}: {done}; " + (f"missing: {lacks}" if lacks else "complete"))
