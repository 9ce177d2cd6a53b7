"""A site's SuperExec, whose processes for messages are forked from one that has imported Flower.

Flower 1.41 starts a program for each message, which imports Flower before it looks at the message:
more than a second. Here a process that has imported it and does nothing else (the fork server of
``multiprocessing``, one thread) is forked instead. A message has a process of its own as before;
its token, which others could read off a command line, comes by a pipe.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedpeft.flower.inside import hasten, unknown
from fedpeft.flower.messages import log

_NAME, _PULL = "flwr-clientapp", "pull_and_inflate_object_from_tree"
_IMPORTED = (
    "flwr.supernode.runtime.run_clientapp",
    "fedpeft.flower.messages",
    "fedpeft.warm.channel",
)
"""Modules of every message's process. None of them starts a thread, which a fork would lose."""


def superexec(arguments: Sequence[str]) -> None:
    """Be a SuperExec with the arguments of ``flower-superexec``, until it ends.

    Raises ``SiteError`` where this version of Flower is not known.
    """
    from flwr.supercore.cli import flower_superexec
    from flwr.supercore.superexec import run_superexec as flower
    from flwr.supernode.runtime import run_clientapp

    fork(flower)
    hasten(run_clientapp, _PULL)  # as the messages' processes will
    sys.argv = ["flower-superexec", *arguments]
    flower_superexec()


def fork(flower: Any) -> None:
    """Have ``flower``, the module of SuperExec's loop, launch messages by :class:`Forks`.

    Raises ``SiteError`` where the module is not as it was in the versions that are known.
    """
    make = getattr(flower, "get_executor", None)
    if make is None:
        raise unknown("starts processes")
    flower.get_executor = lambda *given, **named: Forks(make(*given, **named))


class Forks:
    """An executor of Flower's that forks the processes of messages; ``other`` launches the rest."""

    def __init__(self, other: Any) -> None:
        self._other = other
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(_IMPORTED))

    def launch(self, spec: Any) -> Any:
        """Start a process as Flower's ``ExecutionSpec`` says; return Flower's ``LaunchResult``."""
        from flwr.supercore.constant import TaskType
        from flwr.supercore.superexec.executor import LaunchResult

        if spec.task_type != TaskType.CLIENT_APP or spec.runtime_dependency_install:
            return self._other.launch(spec)
        given = {
            "runtime_api_address": spec.runtime_api_address,
            "token": spec.token,
            "insecure": spec.insecure,
            "certificates": _read(spec.root_certificates_path),
            "parent_pid": spec.parent_pid,
            "runtime_dependency_install": False,
        }
        try:
            self._context.Process(target=play, args=(given,), name=_NAME, daemon=True).start()
        except (OSError, EOFError) as error:
            log.warning("a message's process cannot be forked (%s); it is started", error)
            return self._other.launch(spec)
        return LaunchResult.accepted()

    def reconcile(self) -> None:
        """Let go of processes that have ended."""
        multiprocessing.active_children()
        self._other.reconcile()

    def __getattr__(self, name: str) -> Any:
        """Return what else an executor of Flower's has."""
        return getattr(self._other, name)


def play(given: dict[str, Any]) -> None:
    """Be ``flwr-clientapp`` with these arguments of Flower's ``run_clientapp``."""
    from flwr.supernode.runtime import run_clientapp as flower

    hasten(flower, _PULL)
    sys.argv = [_NAME]
    with contextlib.suppress(OSError):  # its name among the machine's processes
        Path(f"/proc/{os.getpid()}/comm").write_text(_NAME)
    flower.run_clientapp(**given)


def _read(path: str | None) -> bytes | None:
    return Path(path).read_bytes() if path else None
