"""How a site may be called: the name is that of files, of a client and of a line in plans."""

from __future__ import annotations

import re

RULE = "write small letters, digits, - and _, beginning with a letter or digit"
_SITE = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")


def is_site(name: str) -> bool:
    """Tell whether a site may be called so."""
    return _SITE.fullmatch(name) is not None
