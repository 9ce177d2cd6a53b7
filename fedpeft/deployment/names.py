"""How machines and sites may be called."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from fedpeft.data._site_names import RULE, is_site
from fedpeft.errors import SiteError

_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = re.compile(rf"{_LABEL}(\.{_LABEL})*")
_NUMBERS = re.compile(r"[0-9.]+")


def check_hosts(hosts: Sequence[str]) -> None:
    """Raise ``SiteError`` for what is neither the name of a host nor an address."""
    for host in hosts:
        try:
            ipaddress.ip_address(host)
        except ValueError:
            named = _HOST.fullmatch(host) and len(host) <= 253
            if not named or _NUMBERS.fullmatch(host):
                raise SiteError(
                    f"--server {host[:80]!r} is no name of a host and no address; write it "
                    "without scheme and port, as in fl.example.org,10.0.0.5"
                ) from None


def check_sites(sites: Sequence[str]) -> None:
    """Raise ``SiteError`` for a name that could be no file's on some machine, or is there twice."""
    for site in sites:
        _check_name("--sites", "a site", site)
        if sites.count(site) > 1:
            raise SiteError(f"--sites {site} is there twice")


def check_owner(owner: str) -> None:
    """Raise ``SiteError`` for a name that could be no folder's on some machine."""
    _check_name("--owner", "an owner", owner)


def _check_name(option: str, whose: str, name: str) -> None:
    if not is_site(name):
        raise SiteError(f"{option} {name[:80]!r} is no name of {whose}; {RULE}")
