"""Bayesian optimisation by Optuna's samplers (Akiba et al. 2019, arXiv 1907.10902)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from fedpeft.errors import PlanError
from fedpeft.rng import derive_seed
from fedpeft.search._goal import check_goal, settled
from fedpeft.spec import bounded, method
from fedpeft.types import Point, Range, Space, Trial

if TYPE_CHECKING:
    import optuna


@method
class Optuna:
    """Points where those before let expect good values.

    The ``sampler`` is ``tpe`` (tree-structured Parzen estimators) or ``gp`` (Gaussian processes);
    the first ``startup`` trials are drawn by chance. A ``batch`` of points is asked for at once,
    knowing of each other: with several workers, or several seeds, these run side by side. So the
    points follow from ``seed`` and the results alone, and not from who finishes first. No study is
    stored: it is made anew from the results before each batch.
    """

    trials: int = bounded(default=40, low=1)
    maximize: str | None = None
    minimize: str | None = None
    batch: int = bounded(default=4, low=1)
    startup: int = bounded(default=10, low=0)
    sampler: Literal["tpe", "gp"] = "tpe"
    seed: int = bounded(default=0, low=0)

    def check(self) -> None:
        """Raise ``SpecError`` without a goal."""
        check_goal("optuna", self.maximize, self.minimize)

    def ask(self, space: Space, trials: Sequence[Trial], count: int) -> Sequence[Point]:
        """Return the next points. Raises ``PlanError`` where Optuna is not installed."""
        study = self._study(space, trials)
        asked = [study.ask(_distributions(space)) for _ in range(count)]
        return [{name: _number(of, trial.params[name]) for name, of in space.items()}
                for trial in asked]  # fmt: skip

    def _study(self, space: Space, trials: Sequence[Trial]) -> optuna.Study:
        made = _optuna()
        seed = derive_seed(self.seed, "search", len(trials)) % 2**32
        sampler: Any = {
            "tpe": lambda: made.samplers.TPESampler(seed=seed, n_startup_trials=self.startup),
            "gp": lambda: made.samplers.GPSampler(seed=seed, n_startup_trials=self.startup),
        }[self.sampler]()
        direction = "maximize" if self.maximize else "minimize"
        study: optuna.Study = made.create_study(sampler=sampler, direction=direction)
        state = made.trial.TrialState
        for trial in trials:
            known = trial.value is not None
            found = made.trial.create_trial(
                state=state.COMPLETE if known else state.FAIL,
                value=trial.value,
                params=dict(trial.point),
                distributions=_distributions(space),
                user_attrs={} if known else {"problem": trial.problem},
            )
            study.add_trial(found)
        return study


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise PlanError(
            "search: optuna is not installed; pip install 'fedpeft[search]', or use "
            "search: random(trials=...)"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _distributions(space: Space) -> dict[str, Any]:
    made = _optuna().distributions
    found = dict[str, Any]()
    for name, of in space.items():
        if isinstance(of, int):
            found[name] = made.CategoricalDistribution(list(range(of)))
        elif of.whole:
            step = int(of.step or 1)
            found[name] = made.IntDistribution(int(of.low), int(of.high), log=of.log, step=step)
        else:
            found[name] = made.FloatDistribution(of.low, of.high, log=of.log, step=of.step)
    return found


def _number(of: Range | int, value: Any) -> float | int:
    return int(value) if isinstance(of, int) else settled(of, float(value))
