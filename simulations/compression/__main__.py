"""``python -m simulations.compression``: run what is missing; see ``README.md`` beside this."""

from __future__ import annotations

from simulations._study import command
from simulations._study.command import Study
from simulations.compression import _pieces, _plans, _report, _work


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, report; 0 where nothing went wrong."""
    study = Study(
        name="compression",
        results=_pieces.RESULTS,
        sizes=(_plans.TASKS, _plans.QUICK),
        pieces=_pieces.pieces,
        quick=("sst2_raw", "sst2_topk_1_int8", "shakespeare_raw", "shakespeare_int8"),
        play=_work.play,
        report=_report.write,
        told=("test/accuracy", "test/perplexity", "held/accuracy", "held/loss"),
    )
    return command.main(study, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
