"""Federated fine-tuning of foundation models with adapters.

>>> from fedpeft import Plan, simulate
>>> result = simulate(Plan.from_yaml("simulations/quickstart.yaml"))  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedpeft.errors import FedPeftError
from fedpeft.plan import Plan

if TYPE_CHECKING:
    from fedpeft.driver import Result, simulate

__all__ = ["FedPeftError", "Plan", "Result", "simulate"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:  # torch is imported only by those who run something
    if name in ("Result", "simulate"):
        from fedpeft import driver

        return getattr(driver, name)
    raise AttributeError(f"module 'fedpeft' has no attribute {name!r}")
