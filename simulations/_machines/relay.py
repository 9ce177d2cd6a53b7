"""A wire between machines on which the bytes are counted, both ways."""

from __future__ import annotations

import contextlib
import socket
import threading


class Relay:
    """Passes on what comes to its ``port`` to ``to`` on this machine.

    ``up`` and ``down`` are the bytes that it has passed on, TLS and all, towards ``to`` and back.
    """

    def __init__(self, to: int) -> None:
        self._to = to
        self.up, self.down = 0, 0
        self._lock = threading.Lock()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])

    def begin(self) -> None:
        """Pass on from now on."""
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no further connection."""
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # wakes who waits for one
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._to), timeout=60)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            threading.Thread(target=self._join, args=(near, far), daemon=True).start()

    def _join(self, near: socket.socket, far: socket.socket) -> None:
        with near, far:
            back = threading.Thread(target=self._pass, args=(far, near, False), daemon=True)
            back.start()
            self._pass(near, far, True)
            back.join()

    def _pass(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        """Pass on until the end of ``source``, which is then that of what goes into ``sink``."""
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
                with self._lock:
                    self.up += len(data) * up
                    self.down += len(data) * (not up)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
