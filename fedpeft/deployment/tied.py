"""Processes that end with the one that has started them, in whatever way that one ended.

The child's standard input is a pipe whose other end only its parent holds: the end of input is the
parent's. A SuperNode then leaves as at SIGTERM, so that the server knows at once that it is gone.
``python -m fedpeft.deployment.tied warm|supernode|superexec ARGUMENT...`` is such a child.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

REFUSES = 2
"""Exit status of a child that said in a line why it cannot be; starting it again would not help."""
_GRACE = 15.0
"""Seconds for an end in order, after which there is one at once."""


class Tied:
    """A child, started; ``heard`` is told each line that it and its own children print.

    It is a group of its own, so that Ctrl-C is for its parent alone.
    """

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        folder: Path,
        heard: Callable[[str], None],
    ) -> None:
        self._process = subprocess.Popen(
            command,
            env=dict(env),
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.begun = time.monotonic()
        self._reader = threading.Thread(target=self._read, args=(heard,), daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Its number, which is its group's as well."""
        return self._process.pid

    def status(self) -> int | None:
        """Return how it ended, with all that it printed heard; ``None`` while it lives."""
        found = self._process.poll()
        if found is not None:
            self._bury()
        return found

    def stop(self, seconds: float = _GRACE) -> int:
        """End it and its own children: kindly, and after some ``seconds`` not so."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.terminate()
            self._process.wait(seconds)
        self._bury()
        return self._process.wait()

    def _bury(self) -> None:
        """Leave none of its children behind. They end with it, so they are given a moment."""
        self._reader.join(1.0)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(1.0)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe and not (pipe is self._process.stdout and self._reader.is_alive()):
                with contextlib.suppress(OSError):
                    pipe.close()

    def _read(self, heard: Callable[[str], None]) -> None:
        with contextlib.suppress(ValueError, OSError):
            for line in self._process.stdout or ():
                heard(line.rstrip("\n"))


def tie() -> None:
    """Have this process and its group ended, by SIGTERM, when its standard input is."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.killpg(0, signal.SIGTERM)  # its own children as well: they look for it by its number
        time.sleep(_GRACE)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="tied", daemon=True).start()


def main(arguments: Sequence[str]) -> None:
    """Be the child that is named first; exit with :data:`REFUSES` and a line where it cannot be."""
    from fedpeft.errors import FedPeftError

    tie()
    what, *given = arguments
    try:
        if what == "warm":
            from fedpeft.warm.channel import folder
            from fedpeft.warm.service import serve

            serve(folder(), float(given[0]))
        elif what == "superexec":
            from fedpeft.flower.executor import superexec

            superexec(given)
        else:
            from fedpeft.deployment.here import is_pinned, owners
            from fedpeft.flower.site import supernode

            supernode(given, owners, is_pinned)
    except FedPeftError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(REFUSES)


if __name__ == "__main__":
    main(sys.argv[1:])
