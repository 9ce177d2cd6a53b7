"""Image classification: pixels, labels, collating; scores are those of classification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DeiTImageProcessorPil, ViTImageProcessorPil

from fedpeft.errors import DataError, SpecError
from fedpeft.spec import build
from fedpeft.tasks.classify import Classify
from fedpeft.tasks.classify_images import ClassifyImages
from fedpeft.types import Task
from tests.pictures import LABELS, images

SIZE = {"height": 8, "width": 6}
COLOUR = ViTImageProcessorPil(size=SIZE)
GREY = ViTImageProcessorPil(size=SIZE, image_mean=[0.5], image_std=[0.5])


def rows(count: int = 4) -> list[dict[str, Any]]:
    return [{"image": i, "label": label} for i, label in zip(*images(count, 0), strict=True)]


def test_it_is_a_task_whose_records_have_labels() -> None:
    task: Task = ClassifyImages()
    assert isinstance(task, Task)
    assert task.head == "image-classification"
    assert ClassifyImages.offers == Classify.offers
    assert task.labels(rows()) == ["cat", "dog", "owl", "cat"]
    assert list(task.classes(rows())) == list(LABELS)
    assert task.classes([{"label": n} for n in (10, 9, 2)]) == ["2", "9", "10"]
    assert ClassifyImages(names="owl,dog,cat,bee").classes(rows()) == ("owl", "dog", "cat", "bee")
    with pytest.raises(SpecError, match="classify_images: names='a' must be two or more"):
        build("tasks", "classify_images(names='a')")
    with pytest.raises(DataError, match="row 3: label 'owl' is not a known class"):
        ClassifyImages(names="dog,cat").classes(rows())


def test_images_become_bytes_of_the_processors_size() -> None:
    found = ClassifyImages().encode(rows(), COLOUR, 1, LABELS)
    assert [int(e["labels"]) for e in found] == [0, 1, 2, 0]
    for example, row in zip(found, rows(), strict=True):
        made = example["pixel_values"]
        assert made.dtype == np.uint8
        assert made.shape == (3, 8, 6)
        resized = Image.fromarray(row["image"]).resize((6, 8), Image.Resampling.BILINEAR)
        assert np.array_equal(made, np.moveaxis(np.asarray(resized), -1, 0))
    assert ClassifyImages().encode([], None, 1, LABELS) == []


def test_images_are_cropped_as_the_processor_says() -> None:
    crop = DeiTImageProcessorPil(size={"height": 10, "width": 10}, crop_size=SIZE)
    wide = DeiTImageProcessorPil(size={"height": 4, "width": 4}, crop_size=SIZE)
    for processor in (crop, wide):
        (found, *_) = ClassifyImages().encode(rows(), processor, 1, LABELS)
        assert found["pixel_values"].dtype == np.uint8
        assert found["pixel_values"].shape == (3, 8, 6)


def test_grey_and_colour_follow_the_model() -> None:
    grey = [{"image": row["image"][..., 0], "label": row["label"]} for row in rows()]
    (found, *_) = ClassifyImages().encode(grey, COLOUR, 1, LABELS)
    assert found["pixel_values"].shape == (3, 8, 6)
    assert np.array_equal(found["pixel_values"][0], found["pixel_values"][2])
    (found, *_) = ClassifyImages().encode(rows(), GREY, 1, LABELS)
    assert found["pixel_values"].shape == (1, 8, 6)


def test_other_columns_can_be_named() -> None:
    given = [{"img": row["image"], "fine": row["label"]} for row in rows()]
    task = build("tasks", "classify_images(image='img', label='fine')")
    assert len(task.encode(given, COLOUR, 1, LABELS)) == 4
    with pytest.raises(DataError, match=r"row 1 has no column 'image'"):
        ClassifyImages(label="fine").encode(given, COLOUR, 1, LABELS)


def test_images_of_several_sizes_are_refused() -> None:
    loose = ViTImageProcessorPil(do_resize=False)
    mixed = [*rows(2), {"image": np.zeros((5, 5, 3), np.uint8), "label": "cat"}]
    with pytest.raises(
        DataError, match=r"row 3: .* image of \[3, 5, 5\] of it, and \[3, 11, 9\] of"
    ):
        ClassifyImages().encode(mixed, loose, 1, LABELS)


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(rows()[0]["image"]).save(path)
    path.write_bytes(path.read_bytes()[:-40])
    given = [*rows(2), {"image": str(path), "label": "cat"}]
    with pytest.raises(
        DataError, match=r"row 3: .*a.png: no image, or a damaged one .*take it out"
    ):
        ClassifyImages().encode(given, COLOUR, 1, LABELS)
    lab = Image.fromarray(rows()[0]["image"]).convert("RGB").convert("YCbCr")
    assert ClassifyImages().encode([{"image": lab, "label": "cat"}], COLOUR, 1, LABELS)
    strange = [{"image": Image.new("La", (4, 4)), "label": "cat"}]
    with pytest.raises(DataError, match=r"row 1: .*; convert the image to RGB"):
        ClassifyImages().encode(strange, COLOUR, 1, LABELS)


def test_a_batch_is_stacked_bytes() -> None:
    examples = ClassifyImages().encode(rows(), COLOUR, 1, LABELS)
    inputs, labels = ClassifyImages().collate(examples, 0)
    assert inputs["pixel_values"].dtype == torch.uint8
    assert inputs["pixel_values"].shape == (4, 3, 8, 6)
    assert labels.tolist() == [0, 1, 2, 0]
    assert labels.dtype == torch.int64


def test_scores_are_those_of_classification() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0], [1.0, 0.0, 0.0]])
    labels = torch.tensor([0, 1, 0])
    ours, other = ClassifyImages(), Classify()
    assert torch.equal(ours.losses(logits, labels), other.losses(logits, labels))
    assert ours.tally(logits, labels) == other.tally(logits, labels)
    found = ours.metrics(ours.tally(logits, labels))
    assert found == other.metrics(other.tally(logits, labels))
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert set(found) == set(ours.measures)
    with pytest.raises(DataError, match="there is no record to evaluate"):
        ours.metrics({})
