"""Parts that fail where they are told to: plans name them, worker processes import them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from fedpeft.aggregators.fedask import FedAsk
from fedpeft.errors import PlanError
from fedpeft.spec import method
from fedpeft.trainers.plain import Plain
from fedpeft.types import Fit, Job, Tensors, Trainer

_PLAIN = Plain(optimizer="sgd", lr=0.1, steps=2, batch=4)


@method
class Failing(Trainer):
    """Trains as plain SGD does, but fails first.

    Only one process fails, the first to make the file ``once``, if that is given. Each process that
    trains leaves its id in the folder ``pids``.
    """

    how: Literal["kill", "exit", "raise", "refuse", "sleep"] = "kill"
    once: str = ""
    round: float = 0.0
    pids: str = ""

    @property
    def offers(self) -> Mapping[str, str]:
        return _PLAIN.offers

    def fit(self, job: Job) -> Fit:
        if self.pids:
            (Path(self.pids) / str(os.getpid())).touch()
        if job.progress[0] >= self.round and self._first():
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.how == "exit":
                os._exit(3)
            elif self.how == "raise":
                raise KeyError("no such thing")
            elif self.how == "refuse":
                raise PlanError("trainer: will not", "trainer: cannot")
            else:
                time.sleep(100_000)
        return _PLAIN.fit(job)

    def budget(self, records: int) -> tuple[int, int]:
        return _PLAIN.budget(records)

    def seeing(self, records: int) -> Trainer:
        return _PLAIN.seeing(records)

    def _first(self) -> bool:
        if not self.once:
            return True
        try:
            Path(self.once).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


@method
class FailingAsk(FedAsk):
    """Asks as FedASK does; the first to answer in a second phase and to make ``once`` is killed."""

    once: str = ""

    def answer(self, phase: int, trained: Tensors, question: Tensors, seed: int) -> Tensors:
        if phase and self.once:
            try:
                Path(self.once).touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return FedAsk.answer(self, phase, trained, question, seed)
