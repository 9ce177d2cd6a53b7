"""What a SuperNode says, and what its end means: Flower tells it in words, its status is 1."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

from fedpeft.deployment.restarts import how_ended, pause_after
from fedpeft.durable import replace_file
from fedpeft.errors import SiteError

STILL_ONLINE = 75.0
"""Seconds after which Flower 1.41 takes a SuperNode that was killed to be gone, and some more."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_ID = re.compile(r"SuperNode ID: (\d+)")
_EXIT, _CODE = re.compile(r"Exit Code: (\d+)"), re.compile(r"\[code: (\d+)\]")
_FAILED = "Failed to initialize the connection to the SuperLink."
"""Comes before the line that says why."""
_NOT_ACTIVE = 2004
"""Flower's code where a key is unknown, and where its node still counts as online."""
_HOPELESS = {
    302: "the site's key (site.key) is none that Flower takes; have one made with fedpeft certs",
    303: "a key without TLS: name keys with a ca.crt, or say insecure and no keys",
    304: "Flower does not take its trusted entities",
    600: "the server's address cannot be read; write HOST:PORT",
    604: "a file of the site's keys is not where it should be",
    605: "the site's certificates cannot be used",
    606: "this version of Flower does not fit the server's; install the same on both",
}
"""Flower's exit codes that no further try mends."""


@dataclass(slots=True)
class Heard:
    """What a SuperNode has said since it was started: the node that it is, and why it ends."""

    node: int | None = None
    exit: int | None = None
    code: int | None = None
    reason: str = ""
    refusal: str = ""
    _before: str = ""

    def hear(self, line: str) -> str:
        """Take note of a line, and return it without colours."""
        line = _COLOUR.sub("", line)
        if found := _ID.search(line):
            self.node = int(found[1])
        if found := _EXIT.search(line):
            self.exit = int(found[1])
        if found := _CODE.search(line):
            self.code = int(found[1])
        if line.startswith("error: "):
            self.refusal = line.removeprefix("error: ")
        if self._before.endswith(_FAILED):
            self.reason = line.strip()[:300]
        self._before = line.strip()
        return line


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is done after an end: it is started again after ``pause`` seconds; ``text`` says why."""

    text: str
    pause: float


class Presence:
    """Whether the server may still take this site to be online: a file, from joining to leaving.

    After a kill it is left behind. That tells a key that is still taken to be in use from one that
    the server does not know, for which Flower has one answer.
    """

    def __init__(self, home: Path) -> None:
        self._path = home / "online"

    def join(self, node: int) -> None:
        """Note that the server takes the site to be online."""
        replace_file(self._path, [f"{node}\n".encode()], "token", private=True)

    def leave(self) -> None:
        """Note that it does not, or that it is not worth believing."""
        with contextlib.suppress(OSError):  # a disk that fails is no reason not to join again
            self._path.unlink(missing_ok=True)

    @property
    def is_left(self) -> bool:
        """Whether a site joined and did not leave."""
        return self._path.exists()


def judge(status: int, heard: Heard, presence: Presence, ends: int, site: str) -> Verdict:
    """Tell what the end of a SuperNode means that nobody asked for, the ``ends``-th in a row.

    Raises ``SiteError`` where no further try mends it.
    """
    if status == 2 and heard.refusal:
        raise SiteError(heard.refusal)
    if heard.exit in _HOPELESS:
        raise SiteError(f"{_HOPELESS[heard.exit]} (Flower's exit code {heard.exit})")
    pause = pause_after(ends)
    if heard.node is None and heard.code == _NOT_ACTIVE:
        if presence.is_left:
            presence.leave()
            return Verdict("the server still takes this site to be online", STILL_ONLINE)
        return Verdict(
            f"the server does not take this site's key: it has to be given sites/{site}.pub, or "
            "another machine is using the key",
            max(pause, 5.0),
        )
    if status < 0:
        return Verdict(f"the SuperNode {how_ended(status)}", pause)
    if heard.node is not None:
        presence.leave()  # it said goodbye, if only because the server had it do so
        why = "the server does not take its signature any more (its key was taken back, or clocks"
        return Verdict(f"the SuperNode ended: {why} differ), or the connection broke", pause)
    why = heard.reason or f"Flower's exit code {heard.exit}"
    return Verdict(f"the SuperNode could not join ({why})", pause)
