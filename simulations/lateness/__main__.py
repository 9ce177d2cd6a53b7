"""``python -m simulations.lateness``: run what is missing; see ``README.md`` beside this."""

from __future__ import annotations

from simulations._study import command
from simulations._study.command import Study
from simulations.lateness import _pieces, _report, _work


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, report; 0 where nothing went wrong."""
    study = Study(
        name="lateness",
        results=_pieces.RESULTS,
        sizes=(False, True),
        pieces=_pieces.pieces,
        quick=("head_sync", "head_fedbuff"),
        play=_work.play,
        report=_report.write,
        told=("test/accuracy", "test/f1", "test/recall", "held/accuracy"),
    )
    return command.main(study, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
