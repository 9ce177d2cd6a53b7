"""What Flower's own commands find in their environment where fedpeft starts them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

QUIET: Mapping[str, str] = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
"""Nothing is told or asked of anybody outside, and nothing is installed."""


def quiet(**own: str) -> dict[str, str]:
    """Return this process' with :data:`QUIET`, this Python's commands first, and ``own``."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {**os.environ, **QUIET, "PATH": path, **own}
