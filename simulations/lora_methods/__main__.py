"""``python -m simulations.lora_methods``: run what is missing; see ``README.md`` beside this."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from fedpeft.durable import locked
from fedpeft.errors import FedPeftError
from simulations.lora_methods import _pieces, _plans, _report, _work
from simulations.lora_methods._pieces import Piece, Store


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, report; 0 where nothing went wrong."""
    options = _options().parse_args(arguments)
    for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE"):
        os.environ.setdefault(name, "1")
    with tempfile.TemporaryDirectory() as temporary:
        quick = options.quick and options.results == _pieces.RESULTS
        folder = Path(temporary) if quick else options.results
        store = Store(folder, _plans.QUICK if options.quick else _plans.FULL)
        try:
            return _do(store, options)
        except FedPeftError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("\nstopped; every finished run is kept")
            return 130


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m simulations.lora_methods")
    parser.add_argument("--list", action="store_true", help="what is done and what is missing")
    parser.add_argument("--report", action="store_true", help="only write table and plot")
    parser.add_argument("--piece", action="append", default=[], help="run this one, or several")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no run after so many")
    parser.add_argument("--jobs", type=int, default=1, help="pieces at once, a core each")
    parser.add_argument("--results", type=Path, default=_pieces.RESULTS, help="the folder")
    parser.add_argument("--quick", action="store_true", help="two methods, a few seconds a run")
    return parser


def _do(store: Store, options: argparse.Namespace) -> int:
    wanted = [_pieces.named(name) for name in options.piece] or _pieces.pieces()
    if options.quick and not options.piece:
        wanted = [_pieces.named("fedit_3"), _pieces.named("ffa_lora_3")]
    if options.list:
        _list(store, wanted)
        return 0
    failed = False
    if not options.report:
        with locked(store.folder, "set of results"):
            end = time.time() + 60 * options.minutes
            failed = _run(store, wanted, end, options.jobs)
    text = _report.write(store)
    if options.quick:
        print(text)
    return int(failed)


def _run(store: Store, wanted: Sequence[Piece], end: float, jobs: int) -> bool:
    """Make the missing runs, ``jobs`` pieces at once; True where some piece could not be run."""
    failed = False
    for contrast in (False, True):  # both write the same files
        part = [piece for piece in wanted if piece.contrast is contrast]
        if jobs == 1:
            failed |= sum(_work.advance(store, piece, end) for piece in part) > 0
            continue
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            found = pool.map(
                _work.advance, *zip(*((store, piece, end) for piece in part), strict=True)
            )
            failed |= sum(found) > 0
    return failed


def _list(store: Store, wanted: Sequence[Piece]) -> None:
    for piece in {p.name: p for p in wanted}.values():
        lacks = _pieces.missing(store, [piece]).get(piece.name)
        rate = store.rate(piece)
        done = f"{len(store.runs(piece))} runs" + (f", best rate {rate:g}" if rate else "")
        print(f"{piece.name}: {done}; " + (f"missing: {lacks}" if lacks else "complete"))


if __name__ == "__main__":
    raise SystemExit(main())
