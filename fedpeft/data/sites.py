"""Records that lie at the sites, each with its own; the server has a test set at most."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from fedpeft.data import _files
from fedpeft.data._site_names import RULE, is_site
from fedpeft.data.csv import Csv
from fedpeft.data.imagefolder import ImageFolder
from fedpeft.data.jsonl import Jsonl
from fedpeft.errors import SpecError
from fedpeft.spec import method
from fedpeft.types import Row, Splits

_COMMAS = (".csv", ".csv.gz")


@method
class Sites:
    """The records of sites on machines of their own, which say in their ``client.yaml`` where.

    ``names`` are those of the sites, with commas between them: each is one client of the plan.
    ``test`` is the server's own test set: a file of JSON lines, a ``.csv`` file, or a folder of
    images; no site is asked for it. A relative path is looked for in the working directory, then in
    ``$FEDPEFT_DATA``. Raises ``SpecError`` for what can be no site's name and for one given twice.
    """

    names: str
    test: str | None = None

    def check(self) -> None:
        """Refuse names that no site can have, and an empty path."""
        _files.check_folders("sites", test=self.test)
        found = [name.strip() for name in self.names.split(",")]
        for name in found:
            if not is_site(name):
                raise SpecError(f"sites: {name[:80]!r} is no name of a site; {RULE}")
            if found.count(name) > 1:
                raise SpecError(f"sites: {name} is there twice")

    def clients(self) -> Sequence[str]:
        """Return the names of the sites, sorted."""
        return sorted(name.strip() for name in self.names.split(","))

    def load(self) -> Splits:
        """Read the test set; there are no training records here, and the fingerprint is the test's.

        Raises ``DataError`` as ``jsonl``, ``csv`` and ``imagefolder`` do.
        """
        rows: Sequence[Row] | None = None
        digest = hashlib.sha256(b"sites\n")
        if self.test is not None:
            loaded = self._test(self.test)
            rows = loaded.train
            digest.update(loaded.fingerprint.encode())
        return Splits(train=[], test=rows, fingerprint=digest.hexdigest())

    def _test(self, name: str) -> Splits:
        if name.lower().endswith(_COMMAS):
            return Csv(train=name).load()
        return (ImageFolder if _files.is_folder(name) else Jsonl)(train=name).load()
