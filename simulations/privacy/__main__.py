"""``python -m simulations.privacy``: run what is missing; see ``README.md`` beside this."""

from __future__ import annotations

from collections.abc import Sequence

from simulations._study import command
from simulations._study.command import Study
from simulations._study.store import Piece, Store
from simulations.privacy import _pieces, _plans, _report, _work


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, report; 0 where nothing went wrong."""
    study = Study(
        name="privacy",
        results=_pieces.RESULTS,
        pieces=_all,
        quick=("users_8_lora", "users_8_fed_sb"),
        play=_work.play,
        report=_write,
        told=("test/accuracy", "held/accuracy"),
    )
    return command.main(study, arguments)


def _all(quick: bool) -> Sequence[Piece]:
    return _pieces.pieces(_plans.QUICK if quick else _plans.FULL)


def _write(store: Store, quick: bool) -> str:
    return _report.write(store, _plans.QUICK if quick else _plans.FULL)


if __name__ == "__main__":
    raise SystemExit(main())
