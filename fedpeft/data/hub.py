"""Data sets from the Hugging Face hub, or from a local folder that ``datasets`` understands."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpeft.data import _files
from fedpeft.errors import DataError, SpecError
from fedpeft.spec import method
from fedpeft.types import Row, Splits


@method
class Hub:
    """Records that ``datasets.load_dataset`` reads.

    ``name`` is a hub id (``"nyu-mll/glue"``) or a folder; ``config`` names one of its subsets.
    ``train`` and ``test`` are splits, or slices of them (``"train[:1000]"``); ``test=None`` where
    there is none. ``revision`` is a branch, tag or commit of the hub. Raises ``SpecError`` where
    one is empty.
    """

    name: str
    config: str | None = None
    train: str = "train"
    test: str | None = "test"
    revision: str | None = None

    def check(self) -> None:
        """Refuse empty names."""
        for field in ("name", "config", "train", "test", "revision"):
            if getattr(self, field) == "":
                raise SpecError(f"hub: {field} must not be empty")

    @property
    def hub_id(self) -> str | None:
        """The name, where it is no folder's."""
        return None if _is_folder(self.name) else self.name

    @classmethod
    def paths(cls, given: Mapping[str, Any]) -> Sequence[str]:
        """Return the name, where it is that of a folder."""
        name = given.get("name")
        return [name] if isinstance(name, str) and _is_folder(name) else []

    def load(self) -> Splits:
        """Download (or find in the cache) and read the splits.

        A column of class labels becomes a column of their names, and ``None`` where a record has
        none (-1). Images become the bytes of their files. Raises ``DataError`` where ``datasets``
        is not installed, the hub cannot be reached, the data set, config or split does not exist,
        or a split is empty.
        """
        wanted = [self.train] if self.test is None else [self.train, self.test]
        train, *held_out = [self._rows(split) for split in self._fetch(wanted)]
        test = held_out[0] if held_out else None
        return Splits(train=train, test=test, fingerprint=_files.fingerprint_rows(train, test))

    def _fetch(self, splits: list[str]) -> list[Any]:
        datasets = _library()
        path = os.path.expanduser(self.name)
        try:
            found: list[Any] = datasets.load_dataset(
                path, self.config, split=splits, revision=self.revision
            )
        except ConnectionError as error:
            raise DataError(
                f"hub: cannot reach {self.name!r} ({_line(error)}); check the network, "
                "or name a local folder"
            ) from error
        except Exception as error:  # the library raises many kinds, and its own change by version
            raise DataError(
                f"hub: cannot read {self.name!r} (config={self.config!r}, train={self.train!r}, "
                f"test={self.test!r}): {_line(error)}"
            ) from error
        return found

    def _rows(self, split: Any) -> list[Row]:
        names = {
            column: feature.names
            for column, feature in split.features.items()
            if type(feature).__name__ == "ClassLabel"
        }
        images = [c for c, feature in split.features.items() if type(feature).__name__ == "Image"]
        rows: list[dict[str, Any]] = split.to_list()
        for row in rows if names or images else ():
            row |= {column: _named(row[column], known) for column, known in names.items()}
            row |= {column: _bytes(row[column]) for column in images}
        return list(rows)


def _is_folder(name: str) -> bool:
    path = os.path.expanduser(name)
    return os.path.isabs(path) or path.startswith(".") or os.path.exists(path)


def _named(value: int | None, names: list[str]) -> str | None:
    return None if value is None or value < 0 else names[value]


def _bytes(image: dict[str, Any] | None) -> bytes | None:
    """Return an image's file, of which ``datasets`` may hold only the path."""
    if image is None:
        return None
    if image.get("bytes") is not None:
        return bytes(image["bytes"])
    try:
        return Path(image["path"]).read_bytes()
    except OSError as error:
        raise DataError(f"hub: {image['path']}: cannot be read ({error.strerror})") from error


def _library() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"hub: needs the datasets library ({error}); pip install 'fedpeft[hub]'"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
