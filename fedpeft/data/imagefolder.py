"""Folders of images, one per label, as torchvision's ImageFolder and ``datasets`` read them."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from fedpeft.data import _files
from fedpeft.data._images import ENDINGS, REMEDY, Pictures, is_image
from fedpeft.errors import DataError
from fedpeft.spec import method
from fedpeft.types import Splits

if TYPE_CHECKING:
    from hashlib import _Hash


@method
class ImageFolder:
    """Images from ``<folder>/<label>/<file>``, or deeper below the label; rows hold their paths.

    ``train`` and ``test`` are folders; a relative one is looked for in the working directory, then
    in ``$FEDPEFT_DATA``. Files that end in no known way, and those that start with a dot, are left
    out. Raises ``SpecError`` where a name is empty.
    """

    train: str
    test: str | None = None

    files: ClassVar[Sequence[str]] = ("train", "test")

    def check(self) -> None:
        """Refuse empty names."""
        _files.check_folders("imagefolder", train=self.train, test=self.test)

    def load(self) -> Splits:
        """List the images, by label and then by name, and read every file for the fingerprint.

        That is the sha256 of the split's name and each image's label, length and bytes. Raises
        ``DataError`` where a folder is missing or holds no label's folder, a label's folder holds
        no image, an image lies in no label's folder, or a file is no image by its first bytes.
        """
        digest = hashlib.sha256()
        train = _read("train", self.train, digest)
        test = None if self.test is None else _read("test", self.test, digest)
        return Splits(train=train, test=test, fingerprint=digest.hexdigest())


def _read(split: str, name: str, digest: _Hash) -> Pictures:
    folder = _files.find_folder(name)
    digest.update(f"{split}\n".encode())
    paths, labels = list[str](), list[str]()
    for label in _labels(folder):
        before = len(paths)
        for path in _images(folder / label):
            raw = _checked(path)
            digest.update(f"{label}\n{len(raw)}\n".encode())
            digest.update(raw)
            paths.append(str(path))
            labels.append(label)
        if len(paths) == before:
            raise DataError(
                f"{folder / label}: no image in it ({' '.join(ENDINGS)}); "
                "add one or remove the folder"
            )
    return Pictures(paths, labels)


def _labels(folder: Path) -> list[str]:
    """Return the names of the labels' folders, sorted."""
    found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    labels = [name for name in found if not name.startswith(".")]
    if not labels:
        raise DataError(
            f"{folder}: no folder in it; put the images of each label into a folder of its name"
        )
    if lost := sorted(entry.name for entry in os.scandir(folder) if is_image(entry.name)):
        raise DataError(f"{folder / lost[0]}: lies in no label's folder; move it into one")
    return labels


def _images(folder: Path) -> Iterator[Path]:
    """Yield the images below ``folder``, in an order that no file system decides."""
    for place, inner, names in os.walk(folder, followlinks=True):
        inner.sort()
        yield from (Path(place).absolute() / name for name in sorted(names) if is_image(name))


def _checked(path: Path) -> bytes:
    """Return a file's bytes, the first of which say that it is an image."""
    from PIL import Image

    try:
        raw = path.read_bytes()
        Image.open(io.BytesIO(raw)).close()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: no image, or a damaged one ({error}); {REMEDY}") from None
    return raw
