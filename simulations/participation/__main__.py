"""``python -m simulations.participation``: run what is missing; see ``README.md`` beside this."""

from __future__ import annotations

from simulations._study import command
from simulations._study.command import Study
from simulations.participation import _pieces, _plans, _report, _work


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, report; 0 where nothing went wrong."""
    study = Study(
        name="participation",
        results=_pieces.RESULTS,
        sizes=(_plans.FULL, _plans.QUICK),
        pieces=_pieces.pieces,
        quick=("ag_news_250_bernoulli_labels_mean", "ag_news_250_bernoulli_labels_fedau_50"),
        play=_work.play,
        report=_report.write,
        told=("test/accuracy", "clients/accuracy_worst_decile"),
    )
    return command.main(study, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
