"""Images as rows hold them: a path, a file's bytes, an array or a picture. PIL decodes them."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from fedpeft.data import _files
from fedpeft.errors import DataError
from fedpeft.types import Row

if TYPE_CHECKING:
    from PIL.Image import Image

_MODES = {1: "L", 3: "RGB"}
_DEEP = ("I", "F")
"""PIL's modes, or how they begin, of more than 8 bits; converting cuts their values off."""


class Pictures(Sequence[Row]):
    """Rows of an ``image`` (a path or an array) and a ``label``; each is made when asked for."""

    def __init__(self, images: Sequence[Any] | NDArray[np.uint8], labels: Sequence[Any]) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    @overload
    def __getitem__(self, i: int) -> Row: ...
    @overload
    def __getitem__(self, i: slice) -> list[Row]: ...
    def __getitem__(self, i: int | slice) -> Row | list[Row]:
        if isinstance(i, slice):
            return [self[at] for at in range(len(self))[i]]
        return {"image": self.images[i], "label": self.labels[i]}


def channels_of(processor: Any) -> int:
    """Return how many channels the images of an image processor have: 1 (grey) or 3 (RGB)."""
    mean = getattr(processor, "image_mean", None)
    return len(mean) if isinstance(mean, Sequence) else 3


def pixels(processor: Any, image: Image) -> NDArray[np.uint8]:
    """Return what ``processor`` cuts out of an image, uint8 [C, H, W], neither rescaled nor normal.

    Raises ``ValueError`` for a processor that makes something else.
    """
    shaped = image.convert(_MODES[channels_of(processor)])
    made = processor(shaped, do_rescale=False, do_normalize=False)["pixel_values"]
    found = np.ascontiguousarray(made[0])
    if found.ndim != 3 or found.dtype.kind not in "iuf":
        raise ValueError(f"images become {found.dtype} {found.shape}, not [C, H, W]")
    if found.dtype != np.uint8:
        whole = found.astype(np.uint8)
        if not np.array_equal(whole, found):
            raise ValueError(f"images become {found.dtype}, not bytes")
        found = whole
    return found


def picture(value: Any, number: int, column: str) -> Image:
    """Decode the image that a row holds, turned as its camera says.

    A relative path is looked for in the working directory, then in ``$FEDPEFT_DATA``. Raises
    ``DataError`` naming the row, and the file where there is one.
    """
    from PIL import Image, ImageOps

    where, source = _source(value, number, column)
    try:
        found: Any = source if isinstance(source, Image.Image) else Image.open(source)
        found = ImageOps.exif_transpose(found)
        found.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: no image, or a damaged one ({error}); {REMEDY}") from None
    if found.mode.startswith(_DEEP):
        raise DataError(f"{where}: more than 8 bits a channel; save it with 8")
    decoded: Image.Image = found.convert("RGBA") if found.mode in ("P", "PA") else found
    return decoded


REMEDY = "copy it again or take it out"


def _source(value: Any, number: int, column: str) -> tuple[str, Any]:
    """Return what to call an image in messages, and what PIL opens."""
    from PIL import Image

    row = f"row {number}"
    if isinstance(value, Mapping):  # as the datasets library keeps images
        path = value.get("path")
        value = value.get("bytes") or path
        row = f"{row} ({path})" if path else row
    if isinstance(value, str | Path):
        path = _files.find(str(value))
        return f"{row}: {path}", io.BytesIO(path.read_bytes())
    if isinstance(value, bytes):
        return row, io.BytesIO(value)
    if isinstance(value, Image.Image):
        return row, value
    if isinstance(value, np.ndarray):
        return row, _of_array(value, row)
    raise DataError(
        f"{row}: column {column!r} is a {type(value).__name__}, not an image; "
        "give a path, a picture or an array [H, W, 3]"
    )


def _of_array(value: NDArray[Any], row: str) -> Image:
    from PIL import Image

    flat = value[..., 0] if value.ndim == 3 and value.shape[2] == 1 else value
    if value.dtype != np.uint8 or not (flat.ndim == 2 or (flat.ndim == 3 and flat.shape[2] == 3)):
        raise DataError(
            f"{row}: an array {value.dtype} {list(value.shape)} is no image; "
            "give uint8 [H, W], [H, W, 1] or [H, W, 3]"
        )
    return Image.fromarray(np.ascontiguousarray(flat))


def is_image(name: str) -> bool:
    """Tell by its ending whether a file is an image, as torchvision's ImageFolder does."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in ENDINGS


ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
