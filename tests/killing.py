"""Runs that are killed: a process that has imported everything forks one child per run.

A kill then costs a fraction of a second, and every run starts from the same warm process.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from fedpeft.driver import simulate
from fedpeft.errors import FedPeftError
from fedpeft.types import Tensors
from fedpeft.watching import Line, Quiet
from tests.tiny import support_plan
from tests.waiting import HANGS

ROOT = Path(__file__).resolve().parent.parent
LINES = {
    "adapter": "lora(r=2, alpha=4, head='local')",
    "trainer": "plain(optimizer='sgd', lr=0.05, steps=2, batch=4)",
    "correction": "scaffold",
    "cohort": "uniform(size=3)",
    "optimizer": "adam(lr=0.05)",
    "keep_best": "clients/loss",
    "compare": "base,central",
    "rounds": 3,
}
"""A plan that writes every kind of file, and clients that are not in every cohort."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a child ended: the signal (0 for none), what it returned, the error it raised.

    ``tensors`` is a digest of the adapter that was returned; ``calls`` what a watch was told.
    """

    signal: int
    table: dict[str, Any] | None = None
    history: list[dict[str, Any]] | None = None
    tensors: str = ""
    calls: tuple[str, ...] = ()
    error: str = ""


class Runs:
    """The forking process, seen from a test. Use it as a context manager."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.killing", str(model)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=HANGS)

    def __call__(
        self,
        out: Path | None,
        *,
        resume: bool = False,
        fault: str = "",
        interrupt: str = "",
        **lines: Any,
    ) -> Ended:
        """Run :data:`LINES` with ``lines`` in a child.

        ``fault`` is what ``FEDPEFT_FAULT`` says; ``interrupt`` is ``callback:nth``, where a watch
        raises ``KeyboardInterrupt``.
        """
        asked = {
            "out": str(out) if out else None,
            "resume": resume,
            "fault": fault,
            "interrupt": interrupt,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({**asked, "lines": {**LINES, **lines}}) + "\n")
        self._process.stdin.flush()
        found = json.loads(self._process.stdout.readline())
        return Ended(**{**found, "calls": tuple(found.get("calls", ()))})


class Interrupting(Quiet):
    """Writes down what it is told, and raises ``KeyboardInterrupt`` at one of the calls."""

    def __init__(self, at: str) -> None:
        self._name, _, nth = at.partition(":")
        self._left = int(nth or 0)
        self.calls: list[str] = []

    def client(self, done: int, cohort: int) -> None:
        self._told("client")

    def round(self, line: Line) -> None:
        self._told("round")

    def compare(self, name: str, done: int, total: int) -> None:
        self._told("compare")

    def _told(self, name: str) -> None:
        self.calls.append(name)
        self._left -= name == self._name
        if name == self._name and self._left == 0:
            raise KeyboardInterrupt


def run(model: Path, asked: dict[str, Any]) -> dict[str, Any]:
    os.environ["FEDPEFT_FAULT"] = asked["fault"]
    watch = Interrupting(asked["interrupt"])
    try:
        plan = support_plan(model, **asked["lines"])
        result = simulate(plan, out=asked["out"], resume=asked["resume"], watch=watch)
    except (FedPeftError, KeyboardInterrupt) as error:
        return {"error": f"{type(error).__name__}: {error}", "calls": watch.calls}
    history = [dict(line) for line in result.history]
    told = {"table": dict(result.table), "history": history, "calls": watch.calls}
    return {**told, "tensors": digest(result.tensors)}


def digest(tensors: Tensors) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        value = np.ascontiguousarray(tensors[name])
        found.update(f"{name} {value.dtype} {value.shape}".encode() + value.tobytes())
    return found.hexdigest()


def child(model: Path, asked: dict[str, Any], pipe: int) -> NoReturn:
    signal.alarm(HANGS)
    try:
        told = json.dumps(run(model, asked)).encode()
    except BaseException as error:
        told = json.dumps({"error": f"{type(error).__name__}: {error}"}).encode()
    with os.fdopen(pipe, "wb") as file:
        file.write(told)
    os._exit(0)


def serve(model: Path) -> None:
    import torch

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    warm(model)
    for text in sys.stdin:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            child(model, json.loads(text), writer)
        os.close(writer)
        with os.fdopen(reader, "rb") as file:
            told = file.read()
        _, status = os.waitpid(pid, 0)
        found = json.loads(told) if told else {}
        found["signal"] = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        replies.write(json.dumps(found) + "\n")
        replies.flush()


def warm(model: Path) -> None:
    """Import and load all that a run needs, so that children need not."""
    import dp_accounting.pld  # noqa: F401
    import peft  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

    simulate(support_plan(model, **LINES | {"rounds": 1}))


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
    os._exit(0)
