"""Which sites there are: files of public keys at the server, nodes at Flower, names in a roster."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization as coded
from cryptography.hazmat.primitives.asymmetric import ec

from fedpeft.deployment.files import read
from fedpeft.durable import replace_file
from fedpeft.errors import FedPeftError, SiteError
from fedpeft.flower.control import GONE, Control

ROSTER = "FEDPEFT_ROSTER"
"""Environment variable that tells a run's server app where the roster is."""


def read_keys(folder: Path) -> dict[str, bytes]:
    """Return the key (PEM) of each site of which ``folder`` has a ``.pub`` file, by its name.

    Raises ``SiteError`` for a file that is no key of ours, or one key under two names.
    """
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.pub")):
        try:
            key = coded.load_ssh_public_key(read(path))
        except (ValueError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise SiteError(f"{path}: is no site's key that fedpeft certs has made")
        text = key.public_bytes(coded.Encoding.PEM, coded.PublicFormat.SubjectPublicKeyInfo)
        twin = next((name for name, other in found.items() if other == text), None)
        if twin:
            raise SiteError(f"{path}: is the key of {twin}, too; each site has its own")
        found[path.stem] = text
    return found


def enrol(control: Control, keys: Mapping[str, bytes]) -> tuple[dict[int, str], list[str]]:
    """Register the sites of ``keys``, and no others; return the roster and what was done.

    A key that was taken back stays so: Flower remembers it. The site is told of as a problem then,
    the others go on.
    """
    roster, told, wanted = dict[int, str](), list[str](), {key: name for name, key in keys.items()}
    for site in control.sites():
        if site.state == GONE:
            if name := wanted.pop(site.key, None):
                told.append(f"site {name}: its key was taken back; make it another (fedpeft certs)")
        elif site.key in wanted:
            roster[site.node] = wanted.pop(site.key)
        else:
            control.unregister(site.node)
            told.append(f"site {site.name or site.node}: its key is taken back")
    for key, name in wanted.items():
        try:
            roster[control.register(key, name)] = name
            told.append(f"site {name}: registered")
        except FedPeftError as error:
            told.append(f"site {name}: cannot be registered ({error})")
    return roster, told


def write_roster(path: Path, roster: Mapping[int, str]) -> None:
    """Write which node is which site."""
    text = json.dumps({str(node): name for node, name in roster.items()}, indent=1) + "\n"
    replace_file(path, [text.encode()], "roster")


def read_roster(path: Path | None = None) -> dict[int, str]:
    """Return which node is which site, by ``$FEDPEFT_ROSTER``; nothing where it is not set.

    Raises ``SiteError`` where it names no roster: who is who must not be guessed.
    """
    named = path or os.environ.get(ROSTER)
    if not named:
        return {}
    try:
        found = json.loads(Path(named).read_text(encoding="utf-8"))
        return {int(node): str(name) for node, name in found.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise SiteError(f"{named}: is no roster of sites ({error})") from None
