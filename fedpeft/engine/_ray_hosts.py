"""Whole calls in actors of Ray, one at a time in each, without Ray itself."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

from fedpeft.engine._actor import Code
from fedpeft.engine._cluster import first_line
from fedpeft.errors import RunError


class Host:
    """What is done in the process of an actor."""

    def __init__(self, code: Code, folder: str, threads: int) -> None:
        import torch

        code.install()
        torch.set_num_threads(threads)
        if os.path.isdir(folder):  # plans may name files from there
            os.chdir(folder)

    def call(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Return what a function returns."""
        return work(*arguments)


class RayHosts:
    """See ``_base.Hosts``; ``make`` starts an actor."""

    def __init__(self, ray: Any, make: Callable[[], Any], size: int) -> None:
        self._ray, self._make, self.size = ray, make, size
        self._actors = [make() for _ in range(size)]
        self._tasks: dict[Any, int] = {}

    def call(self, number: int, work: Callable[..., Any], *arguments: Any) -> None:
        """Submit a task to an actor."""
        self._tasks[self._actors[number].call.remote(work, *arguments)] = number

    def ended(self, seconds: float) -> list[tuple[int, Any]]:
        """Return what tasks have returned; see ``_base.Hosts``."""
        ended, _ = self._ray.wait(list(self._tasks), timeout=seconds)
        return [(self._tasks[task], self._returned(task)) for task in ended]

    def close(self) -> None:
        """End the actors, whatever they are at."""
        for actor in self._actors:
            self._kill(actor)

    def _returned(self, task: Any) -> Any:
        number, errors = self._tasks[task], self._ray.exceptions
        try:
            return self._ray.get(task)
        except errors.RayTaskError as error:
            return error.cause
        except errors.RayError as error:
            self._kill(self._actors[number])
            self._actors[number] = self._make()
            return RunError(f"its worker died: {first_line(error)}")
        finally:
            del self._tasks[task]

    def _kill(self, actor: Any) -> None:
        with contextlib.suppress(Exception):  # it is gone already
            self._ray.kill(actor)
