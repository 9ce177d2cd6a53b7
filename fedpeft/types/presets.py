"""Papers by their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable


@runtime_checkable
class Preset(Protocol):
    """``presets/``: a paper by its name."""

    def lines(self) -> Mapping[str, str]:
        """Return the plan lines it fills; explicit lines win."""
        ...
