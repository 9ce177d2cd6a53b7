"""No correction: local steps follow the local gradient (McMahan et al. 2017, arXiv 1602.05629)."""

from __future__ import annotations

from fedpeft.spec import method
from fedpeft.types import Correction


@method
class None_(Correction):
    """Keeps nothing and sends nothing."""
