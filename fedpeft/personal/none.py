"""No personal adapters: clients use the shared one."""

from __future__ import annotations

from fedpeft.spec import method
from fedpeft.types import Personal


@method
class None_(Personal):
    """Trains nothing more and keeps nothing."""
