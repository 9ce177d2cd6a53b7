"""Addresses of machines: what is one, whose it is, and a port that nobody has."""

from __future__ import annotations

import ipaddress
import socket

from fedpeft.errors import SiteError


def split_address(address: str) -> tuple[str, int]:
    """Return host and port. Raises ``SiteError`` for anything but ``host:port``."""
    host, _, port = address.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise SiteError(f"{address[:80]!r} is no address; write HOST:PORT or [IPV6]:PORT")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Tell whether a host is this machine and nobody else's way to it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def free_port() -> int:
    """Return a port of this machine on which nobody listens at the moment."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])
