"""What server and sites say: lines for people, or one JSON object each (``FEDPEFT_LOG=json``)."""

from __future__ import annotations

import re
import sys
import threading
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from fedpeft.logs import JsonLog

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_WARNING = "warning: "


class Voice:
    """Says what happens: its own events on standard output, what children print on the other.

    With ``log`` both are structured lines. A site's events are ``check``, ``joined``, ``ended`` (a
    process did), ``left``, ``stopped`` and, for each line of a child, ``printed``. A server's are
    ``check``, ``serving``, ``site``, ``run``, ``page``, ``ended``, ``problem`` and ``stopped``.
    """

    def __init__(self, log: JsonLog | None = None) -> None:
        self._log, self._lock = log, threading.Lock()

    def say(self, event: str, text: str, level: str = "info") -> None:
        """Say a line; one that begins with ``warning: `` is one."""
        if text.startswith(_WARNING):
            level, text = "warning", text.removeprefix(_WARNING)
        if self._log:
            self._log.write(event, level=level, text=text)
            return
        before = _WARNING if level == "warning" else ""
        self._print(f"{before}{text}", sys.stderr if before else sys.stdout)

    def fail(self, reason: str) -> None:
        """Log why it stops; where nothing is logged, the command line says so itself."""
        if self._log:
            self._log.write("stopped", level="error", reason=reason)

    def pass_on(self, source: str, line: str) -> None:
        """Pass on what a child printed, without colours; an empty line is none."""
        line = _COLOUR.sub("", line).rstrip()
        if not line:
            return
        if self._log:
            self._log.write("printed", source=source, text=line)
        else:
            self._print(f"{source} | {line}", sys.stderr)

    def _print(self, line: str, stream: TextIO) -> None:
        with self._lock:
            print(line, file=stream, flush=True)
