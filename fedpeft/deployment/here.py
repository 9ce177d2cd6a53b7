"""Which site this process works for, as ``fedpeft client`` told it by ``$FEDPEFT_CLIENT``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedpeft.deployment.client_file import ClientFile, load_client
from fedpeft.types import Scalar

CLIENT = "FEDPEFT_CLIENT"
"""The path of a client.yaml; no run can set it, as the site's processes have it from the start."""


def this_site() -> ClientFile | None:
    """Return the site's settings; ``None`` where this process works for none.

    Raises ``SiteError`` for a file that cannot be used: a site whose rules are gone does nothing.
    """
    given = os.environ.get(CLIENT)
    return load_client(given) if given else None


def owners() -> Sequence[Path] | None:
    """Return the files of the keys of those who may submit runs; ``None`` is anybody.

    Raises ``SiteError`` as :func:`this_site` does.
    """
    site = this_site()
    return site.owners if site else None


def is_pinned() -> bool:
    """Tell whether this site takes no app but that of its own fedpeft (``limits.bundle``).

    Raises ``SiteError`` as :func:`this_site` does.
    """
    site = this_site()
    return site is not None and site.limits.pinned


def check_signed(config: Mapping[str, Scalar]) -> None:
    """Raise ``SiteError`` where this site has owners and none of them signed this run-config.

    That the app is the signed one was checked before it was unpacked (``fedpeft/flower/site.py``).
    """
    known = owners()
    if known is None:
        return
    from fedpeft.deployment.signing import verify

    verify(config, None, known)
