"""Small data sets that fedpeft makes itself, so that a first run needs no files and no network."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import fedpeft.data
from fedpeft.data import _files
from fedpeft.errors import SpecError
from fedpeft.spec import method, nearest
from fedpeft.types import Splits


@method
class Embedded:
    """Records from ``fedpeft/data/_<name>.py``, whose ``rows()`` returns (train, test).

    Raises ``SpecError`` listing what there is where no such module has ``rows``.
    """

    name: str

    def check(self) -> None:
        """Refuse a name that no module provides."""
        if self.name not in _private() or not _has_rows(self.name):
            raise SpecError(
                f"embedded: there is no data set {self.name!r}{nearest(self.name, names())}"
            )

    def load(self) -> Splits:
        """Make the records; the fingerprint is that of the rows as canonical JSON."""
        train, test = _module(self.name).rows()
        held_out = test or None
        digest = _files.fingerprint_rows(train, held_out)
        return Splits(train=train, test=held_out, fingerprint=digest)


def names() -> list[str]:
    """List the embedded data sets: the private modules of this folder that have ``rows``."""
    return sorted(name for name in _private() if _has_rows(name))


def _private() -> list[str]:
    modules = pkgutil.iter_modules(fedpeft.data.__path__)
    return [m.name.removeprefix("_") for m in modules if m.name.startswith("_")]


def _has_rows(name: str) -> bool:
    return callable(getattr(_module(name), "rows", None))


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"fedpeft.data._{name}")
