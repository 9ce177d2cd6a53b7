"""Processes that are started again when they die."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedpeft.deployment.restarts import Restarts, how_ended
from fedpeft.durable import make_folder, move

_LONG = 20 << 20
"""Bytes of a log after which the next start begins another; one older is kept."""


class Child:
    """A process of ours: ``command`` in ``env``, what it prints appended to ``log``.

    ``tell`` is told of each start after a death. Nothing is started before :meth:`look`.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str],
        log: Path,
        tell: Callable[[str], None],
    ) -> None:
        self.name, self._command, self._env, self._log = name, list(command), dict(env), log
        self._tell = tell
        self._process: subprocess.Popen[bytes] | None = None
        self._restarts, self._begun = Restarts(), 0.0

    @property
    def pid(self) -> int | None:
        """Its number while it lives."""
        alive = self._process is not None and self._process.poll() is None
        return self._process.pid if self._process and alive else None

    def look(self, now: float) -> bool:
        """Start it where it is not there and it is time; tell whether that was done.

        ``now`` is in seconds of a clock that never goes back.
        """
        if self._process and self._process.poll() is None:
            return False
        if self._process:
            self._bury(self._process.returncode, now)
        if now < self._restarts.due:
            return False
        self._start(now)
        return True

    def stop(self, seconds: float = 10.0) -> None:
        """End it: kindly, and after some ``seconds`` not so."""
        if not self._process:
            return
        self._process.terminate()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def kill(self) -> None:
        """End it at once; the next :meth:`look` notes its death."""
        if self._process:
            self._process.kill()
            self._process.wait()

    def _bury(self, status: int, now: float) -> None:
        self._process = None
        self._restarts.note_end(self._begun, now)
        wait, how = self._restarts.wait(now), how_ended(status)
        last = _last_line(self._log)
        self._tell(f"{self.name} {how}; it is started again in {wait:g} s; {self._log}: {last}")

    def _start(self, now: float) -> None:
        make_folder(self._log.parent)
        if self._log.exists() and self._log.stat().st_size > _LONG:
            move(self._log, self._log.with_name(f"{self._log.name}.old"))
        with self._log.open("ab") as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {self.name}\n".encode())
            log.flush()
            self._process = subprocess.Popen(
                self._command,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for who supervises
            )
        self._begun = now


def _last_line(log: Path) -> str:
    """Return the end of what was printed: often the reason."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2000))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
