"""``python -m simulations.lora_methods``: run what is missing; see ``README.md`` beside this."""

from __future__ import annotations

from simulations._study import command
from simulations._study.command import Study
from simulations.lora_methods import _pieces, _plans, _report, _work


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, report; 0 where nothing went wrong."""
    study = Study(
        name="lora_methods",
        results=_pieces.RESULTS,
        sizes=(_plans.FULL, _plans.QUICK),
        pieces=_pieces.pieces,
        quick=("fedit_3", "ffa_lora_3"),
        play=_work.play,
        report=_report.write,
        told=("test/accuracy", "held/accuracy"),
    )
    return command.main(study, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
