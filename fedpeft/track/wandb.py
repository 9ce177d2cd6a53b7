"""Weights & Biases: a run of a project, sent or kept in the run's folder to be sent later."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from fedpeft.errors import SpecError
from fedpeft.spec import method
from fedpeft.types import Tracked

_SECONDS = 60.0
"""How long it may take to begin."""


@method
class Wandb:
    """Rounds as a run's history, the plan's lines as its configuration.

    With ``mode='offline'`` it lies in ``wandb/`` of the run's folder, and ``wandb sync`` sends it;
    by default ``WANDB_MODE`` says so. The key is that of ``wandb login``, or ``WANDB_API_KEY``.
    Nothing is told of the machine, its processes or the working folder.
    """

    project: str = "fedpeft"
    entity: str | None = None
    group: str | None = None
    mode: Literal["online", "offline"] | None = None

    def open(self, run: Tracked) -> Following:
        """Go on with the W&B run of the same id, at the first round that is not done."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            import wandb
        except ImportError:
            raise SpecError("not installed; pip install 'fedpeft[track]'") from None
        online = (self.mode or os.environ.get("WANDB_MODE") or "online") == "online"
        if online and not wandb.login(prompt=False, verify=False):
            raise SpecError("nobody is logged in; say wandb login, or mode='offline'")
        settings = wandb.Settings(
            silent=True, console="off", disable_git=True, save_code=False, x_disable_stats=True,
            x_disable_meta=True, init_timeout=_SECONDS,
        )  # fmt: skip
        return Following(
            wandb.init(
                project=self.project, entity=self.entity, group=self.group, mode=self.mode,
                id=run.run, name=run.folder.name, resume="allow", dir=str(run.folder),
                config=dict(run.lines), settings=settings,
            ),
            len(run.history),
        )  # fmt: skip


class Following:
    """A run at W&B. Rounds before the ``first`` have been told by whoever ran them."""

    def __init__(self, run: Any, first: int) -> None:
        self._run, self._first = run, first

    def write(self, round: int, values: Mapping[str, float]) -> None:
        """Add the numbers of a round."""
        if round >= self._first:
            self._run.log(dict(values), step=round)

    def close(self, *, done: bool) -> None:
        """Say how it ended; what is not sent yet is sent."""
        self._run.finish(exit_code=0 if done else 1)
