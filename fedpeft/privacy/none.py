"""No promise: updates are added up as they are."""

from __future__ import annotations

from fedpeft.spec import method
from fedpeft.types import Privacy


@method
class None_(Privacy):
    """Clips nothing, adds no noise and keeps nothing secret."""
