"""The page of a report: one HTML file that asks nobody for anything.

What runs say is data in it, never markup; a content security policy by digest lets only its own
style and script run.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from typing import Any

from fedpeft.dashboard.document import document, part, policy

_PACKAGE = "fedpeft.reporting"


def page(told: Mapping[str, Any]) -> str:
    """Return the page about a run or a sweep, as its ``kind`` says."""
    kind = str(told["kind"])
    style = part("page.css") + part("report.css", _PACKAGE)
    script = "".join((part("charts.js"), part("run.js"), part("report.js", _PACKAGE)))
    script += part(f"about_{kind}.js", _PACKAGE)
    whole = document(part("report.html", _PACKAGE), style, script)
    body = part(f"about_{kind}.html", _PACKAGE).replace("<!-- run.html -->", part("run.html"))
    return (
        whole.replace("<!-- body -->", body)
        .replace("<!-- policy -->", html.escape(policy([script], [style])))
        .replace("<!-- title -->", html.escape(str(told["name"])))
        .replace("<!-- data -->", as_data(told))
    )


def as_data(told: Mapping[str, Any]) -> str:
    """Return JSON in which nothing can end the element that it is in, or begin another."""
    text = json.dumps(told, allow_nan=False, separators=(",", ":"))  # ASCII: no U+2028 either
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text
