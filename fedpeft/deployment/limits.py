"""What a site refuses of a plan, by its ``client.yaml``, and for how long it works on a message."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic

from fedpeft.deployment.client_file import Limits
from fedpeft.errors import RunError
from fedpeft.plan import Plan
from fedpeft.releases import is_guarded
from fedpeft.spec import describe
from fedpeft.types import Ranked


def refusals(limits: Limits, plan: Plan) -> list[str]:
    """Return why a site with these limits does not play a plan; empty where it does.

    Nothing of the plan is loaded for it. What all runs together may spend, and how long a message
    may take, is seen while the run goes on.
    """
    found = list[str]()
    if limits.models is not None and plan.model not in limits.models:
        found.append(f"model: {plan.model} is none of {_listed(limits.models)}")
    task = describe(plan.task).partition("(")[0]
    if limits.tasks is not None and task not in limits.tasks:
        found.append(f"task: {task} is none of {_listed(limits.tasks)}")
    if limits.rank is not None:
        adapter = describe(plan.adapter)
        if not isinstance(plan.adapter, Ranked):
            found.append(f"adapter: {adapter} has no rank, and the highest here is {limits.rank}")
        elif (rank := plan.adapter.highest_rank) > limits.rank:
            found.append(f"adapter: rank {rank}, and the highest here is {limits.rank}")
    if limits.rounds is not None and plan.rounds > limits.rounds:
        found.append(f"rounds: {plan.rounds}, and the most here are {limits.rounds}")
    if limits.epsilon is not None and not (plan.privacy.hides and plan.privacy.secret):
        found.append(
            f"privacy: {describe(plan.privacy)} hides no records, and what they may spend here is "
            f"epsilon {limits.epsilon:g}; say privacy: record(epsilon=...)"
        )
    if limits.client_epsilon is not None and not (is_guarded(plan) and plan.privacy.secret):
        found.append(
            f"privacy: {describe(plan.privacy)} hides no clients, and what this one may spend is "
            f"epsilon {limits.client_epsilon:g}; say privacy: user(epsilon=...)"
        )
    return found


class Stopwatch:
    """How long the work on one message has taken, from now on; ``None`` is without end."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds, self._begun = seconds, monotonic()

    def check(self) -> None:
        """Raise ``RunError`` once it was too long. Called between batches: nothing is half-done."""
        if self._seconds is not None and monotonic() - self._begun > self._seconds:
            raise RunError(
                f"gave up after {self._seconds:g} seconds, the most that this site works on one "
                "message (limits.seconds); ask for fewer steps"
            )


def _listed(allowed: Sequence[str]) -> str:
    return f"those allowed here ({', '.join(allowed) or 'none'})"
