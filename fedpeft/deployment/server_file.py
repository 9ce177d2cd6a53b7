"""``server.yaml``: where a federation's server listens, and what it keeps where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedpeft.addresses import is_loopback, split_address
from fedpeft.deployment.settings import Reader
from fedpeft.errors import PlanError, SiteError
from fedpeft.plan import read_lines

PORT = 9092
"""Where a server listens that is not told where; it is Flower's SuperLink's, too."""
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Addresses of every interface, and how this machine reaches them."""
_KEYS = ("ca.crt", "server.crt", "server.key")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFile:
    """What ``server.yaml`` says, its paths absolute.

    ``host`` and ``port`` are where sites reach the server, ``keys`` is the folder from ``fedpeft
    certs``, or nothing where connections are ``insecure``, ``home`` is where all is kept that must
    outlive the process, ``dashboard`` where the page for reading is served, if anywhere;
    ``threads`` are torch's in a run's server app.
    """

    host: str = "0.0.0.0"
    port: int = PORT
    keys: Path | None
    home: Path
    dashboard: tuple[str, int] | None = None
    threads: int = 1

    @property
    def authority(self) -> Path | None:
        """The certificate by which the server is known to be itself."""
        return self.keys / "ca.crt" if self.keys else None

    @property
    def local(self) -> str:
        """How this machine reaches the server, as HOST:PORT."""
        return _joined(_ANY.get(self.host, self.host), self.port)

    @property
    def runs(self) -> Path:
        """Where the folders of runs are."""
        return self.home / "runs"


def load_server(path: Path) -> ServerFile:
    """Read ``server.yaml``, or that of a home which a server has kept it in.

    Paths are relative to the file. Raises ``PlanError`` listing every mistake in it, ``SiteError``
    where there is none.
    """
    if not path.is_file():
        raise SiteError(f"{path}: no such file; give a server.yaml (docs/deployment.md)")
    lines, base = Reader(read_lines(path)), path.absolute().parent
    listen, page = lines.text("listen"), lines.text("dashboard")
    keys, home = lines.text("keys"), lines.text("home", "state")
    insecure, threads = lines.flag("insecure", False), lines.whole("threads", 1)
    lines.unknown()
    host, port = _address(lines, "listen", listen or f"0.0.0.0:{PORT}")
    dashboard = _address(lines, "dashboard", page) if page else None
    folder = _below(base, keys) if keys else None
    if insecure and keys:
        lines.wrong("insecure", "true goes without keys; take one of the two lines away")
    elif insecure and listen and not is_loopback(host):
        lines.wrong("insecure", f"true only on this machine; listen: {_joined('127.0.0.1', port)}")
    elif not insecure and folder is None:
        lines.wrong("keys", "is missing: the folder server/ that fedpeft certs has made")
    elif folder is not None:
        for name in _KEYS:
            if not (folder / name).is_file():
                lines.wrong("keys", f"{folder}/{name} is not there; see fedpeft certs")
    if lines.problems:
        raise PlanError(*(f"{path}: {problem}" for problem in lines.problems))
    return ServerFile(
        host="127.0.0.1" if insecure and not listen else host,
        port=port,
        keys=folder,
        home=_below(base, home or "state"),
        dashboard=dashboard,
        threads=threads or 1,
    )


def _below(base: Path, text: str) -> Path:
    return (base / Path(text).expanduser()).absolute()


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _address(lines: Reader, name: str, text: str) -> tuple[str, int]:
    try:
        return split_address(text)
    except SiteError as error:
        lines.wrong(name, str(error))
        return "", 0
