"""Image classification: one image and one label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from fedpeft.data._formats import cell
from fedpeft.data._images import picture, pixels
from fedpeft.errors import DataError
from fedpeft.spec import method
from fedpeft.tasks import _classes
from fedpeft.types import Example, Metrics, Row

if TYPE_CHECKING:
    import torch


@method
class ClassifyImages:
    """Classification with cross entropy.

    ``image`` and ``label`` name columns; an image is a path, a file's bytes, an array or a PIL
    image. ``names`` lists the classes where the training rows may not show all of them: a list, or
    text with commas. The model's image processor resizes, crops and normalises; grey images become
    RGB, and the other way round, as the model takes them.
    """

    image: str = "image"
    label: str = "label"
    names: tuple[str, ...] | list[str] | str | None = None

    offers: ClassVar[Mapping[str, str]] = {
        "labels": "every record has one",
        "cross-entropy": "a record's loss is that of its label",
    }
    measures: ClassVar[Sequence[str]] = ("loss", "accuracy", "f1")

    def check(self) -> None:
        """Refuse explicit classes that are fewer than two or not distinct."""
        _classes.check_names("classify_images", self.names)

    @property
    def head(self) -> Literal["image-classification"]:
        """The ``transformers`` auto class to load."""
        return "image-classification"

    def labels(self, rows: Sequence[Row]) -> Sequence[str]:
        """Return each row's label as text. Raises ``DataError`` naming row and column."""
        return _classes.labels_of(rows, self.label)

    def classes(self, rows: Sequence[Row]) -> Sequence[str]:
        """Return ``names``, or the labels of ``rows``: by number if all are whole, else by letter.

        Raises ``DataError`` for a label outside ``names``, and for fewer than two classes.
        """
        return _classes.classes_of(self.labels(rows), self.names, self.label)

    def encode(
        self, rows: Sequence[Row], tokenizer: Any, limit: int, classes: Sequence[str]
    ) -> Sequence[Example]:
        """Decode, resize and crop: ``pixel_values`` uint8 [C, H, W] and ``labels`` [], int64.

        ``tokenizer`` is the model's image processor. Raises ``DataError`` naming the row (and file)
        of a missing column, an image that cannot be decoded or has another size than the first in
        the end, and a label not in ``classes``.
        """
        targets = _classes.places(self.labels(rows), classes)
        found: list[Example] = []
        for number, (row, target) in enumerate(zip(rows, targets, strict=True), 1):
            image = picture(cell(row, number, self.image), number, self.image)
            try:
                made = pixels(tokenizer, image)
            except ValueError as error:
                raise DataError(f"row {number}: {error}; convert the image to RGB") from None
            if found and made.shape != found[0]["pixel_values"].shape:
                raise DataError(
                    f"row {number}: the model's image processor makes an image of "
                    f"{list(made.shape)} of it, and {list(found[0]['pixel_values'].shape)} of row "
                    "1; set its size to a height and a width"
                )
            found.append({"pixel_values": made, "labels": np.asarray(target, dtype=np.int64)})
        return found

    def collate(
        self, examples: Sequence[Example], pad: int
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Stack the images, uint8 [b, C, H, W]; labels [b] are int64. Nothing is padded."""
        import torch

        images = np.stack([example["pixel_values"] for example in examples])
        labels = torch.tensor([int(e["labels"]) for e in examples], dtype=torch.int64)
        return {"pixel_values": torch.from_numpy(images)}, labels

    def positions(self, labels: torch.Tensor) -> None:
        """Return ``None``: a record has one row of logits."""

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the cross entropy [b], in nats, of ``logits`` [b, C]; at least float32."""
        return _classes.cross_entropy(logits, labels)

    def tally(self, logits: torch.Tensor, labels: torch.Tensor) -> Metrics:
        """Return sums over the batch, and ``true/c``, ``guessed/c``, ``hit/c`` for each class c."""
        return _classes.tally(logits, labels)

    def metrics(self, tally: Metrics) -> Metrics:
        """Return ``loss`` in nats per record, ``accuracy``, and ``f1``.

        ``f1`` is the mean over the classes that occur or were guessed (macro average). Raises
        ``DataError`` where nothing was tallied.
        """
        return _classes.scores(tally)
