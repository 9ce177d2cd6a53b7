"""Pages in one piece: script and style inside, and a policy that lets nothing else run."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files


def part(name: str, package: str = "fedpeft.dashboard") -> str:
    """Return a file of a package that pages are made of."""
    return files(package).joinpath(name).read_text(encoding="utf-8")


def document(page: str, style: str, script: str) -> str:
    """Return ``page`` with its style and its script inside."""
    return page.replace("/* style */", style).replace("/* script */", script)


def policy(scripts: Sequence[str], styles: Sequence[str], *, connect: str = "'none'") -> str:
    """Return a content security policy under which these texts run, and nothing else at all.

    ``connect`` says whom they may ask.
    """
    script, style = (" ".join(f"'{_digest(t)}'" for t in texts) for texts in (scripts, styles))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src {connect}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
