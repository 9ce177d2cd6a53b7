"""Processes of a benchmark: started with a mark in their environment, measured, and ended by it.

What Flower leaves behind (a SuperLink, Ray) carries the mark too, and nothing else does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MARK = "FEDPEFT_BENCHMARK"
_PROC = Path("/proc")
_EVERY = 1.0  # seconds between two looks at the memory; each stops the process for a moment


@dataclass(frozen=True, slots=True)
class Ran:
    """A command that ended: its wall-clock seconds, and the most memory of all its processes.

    Memory is PSS in MB, in which a page that n processes share counts 1/n for each; ``None`` where
    the system does not tell.
    """

    seconds: float
    memory: float | None


def run(command: Sequence[str], env: Mapping[str, str], cwd: Path, log: Path) -> Ran:
    """Run a command to its end, and end what it left; ``RuntimeError`` tells its last words."""
    mark = uuid.uuid4().hex
    done, most = threading.Event(), [0.0]

    def watch() -> None:
        while not done.wait(_EVERY):
            most[0] = max(most[0], sum(_pss(pid) for pid in _marked(mark)))

    watcher = threading.Thread(target=watch, daemon=True)
    began = time.perf_counter()
    try:
        with log.open("w", encoding="utf-8") as file:
            started = subprocess.Popen(
                command, env={**env, MARK: mark}, cwd=cwd, stdout=file, stderr=subprocess.STDOUT
            )
            watcher.start()
            code = started.wait()
        seconds = time.perf_counter() - began
    finally:
        done.set()
        _end(mark)
    watcher.join()
    if code:
        words = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise RuntimeError(f"{' '.join(command)} failed:\n{words}")
    return Ran(seconds, round(most[0], 1) or None)


def _end(mark: str) -> None:
    for kind, patience in ((signal.SIGTERM, 30.0), (signal.SIGKILL, 10.0)):
        for pid in _marked(mark):
            with contextlib.suppress(OSError):
                os.kill(pid, kind)
        until = time.monotonic() + patience
        while _marked(mark) and time.monotonic() < until:
            time.sleep(0.2)


def _marked(mark: str) -> list[int]:
    """Return the processes that were started with the mark in their environment."""
    entry, found = f"{MARK}={mark}".encode(), []
    for path in _PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if entry in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
    return found


def _pss(pid: int) -> float:
    """Return the proportional set size of a process in MB."""
    with contextlib.suppress(OSError):
        for line in (_PROC / str(pid) / "smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0
