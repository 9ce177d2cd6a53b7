"""Images and labels in one NumPy archive, under the names that Keras uses."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedpeft.data import _files
from fedpeft.data._images import Pictures
from fedpeft.errors import DataError
from fedpeft.spec import method
from fedpeft.types import Splits

_SAVE = "np.savez_compressed(file, x_train=..., y_train=..., x_test=..., y_test=...)"


@method
class Npz:
    """Images ``x_train`` uint8 [N, H, W], [N, H, W, 1] or [N, H, W, 3] with labels ``y_train``.

    Labels are numbers or text, [N] or [N, 1]. ``x_test`` and ``y_test`` are the test split where
    there are both. A relative ``file`` is looked for in the working directory, then in
    ``$FEDPEFT_DATA``. Raises ``SpecError`` where it is empty.
    """

    file: str

    files: ClassVar[Sequence[str]] = ("file",)

    def check(self) -> None:
        """Refuse an empty name."""
        _files.check_folders("npz", file=self.file)

    def load(self) -> Splits:
        """Read the arrays; the fingerprint is the sha256 of their types, shapes and bytes.

        Raises ``DataError`` with the file where it is missing or damaged, an array is missing or
        no image or label, or there are not as many labels as images.
        """
        path = _files.find(self.file)
        arrays = _read(path)
        train = _split(path, arrays, "train")
        test = _split(path, arrays, "test") if {"x_test", "y_test"} & set(arrays) else None
        return Splits(train=train, test=test, fingerprint=_fingerprint(arrays))


def _read(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of the splits."""
    names = [f"{kind}_{split}" for split in ("train", "test") for kind in "xy"]
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path}: no NumPy archive, or cut short; write {_SAVE}")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
            return {name: np.asarray(found[name]) for name in names if name in found.files}
    except Exception as error:  # damage makes zipfile, zlib and NumPy raise a dozen kinds
        if "allow_pickle" in str(error):
            raise DataError(f"{path}: not arrays of numbers or text only; write {_SAVE}") from None
        raise DataError(f"{path}: a damaged archive ({error}); copy it again") from None


def _split(path: Path, arrays: Mapping[str, NDArray[Any]], split: str) -> Pictures:
    for name in (f"x_{split}", f"y_{split}"):
        if name not in arrays:
            raise DataError(f"{path}: has no array {name!r}; write {_SAVE}")
    images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
    if images.dtype != np.uint8 or not (images.ndim == 3 or images.shape[3:] in ((1,), (3,))):
        raise DataError(
            f"{path}: x_{split} is {images.dtype} {list(images.shape)}; "
            "save uint8 [N, H, W], [N, H, W, 1] or [N, H, W, 3], with values from 0 to 255"
        )
    flat = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if flat.ndim != 1 or flat.dtype.kind not in "iubU":
        raise DataError(
            f"{path}: y_{split} is {labels.dtype} {list(labels.shape)}; "
            "save one whole number or text for each image, [N]"
        )
    if len(flat) != len(images):
        raise DataError(
            f"{path}: x_{split} has {len(images)} images and y_{split} {len(flat)} labels; "
            "save one label for each image"
        )
    if not images.size:
        raise DataError(f"{path}: x_{split} holds no images; save some, or leave {split} out")
    return Pictures(images, flat.tolist())


def _fingerprint(arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
