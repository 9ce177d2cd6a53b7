"""A tiny random ViT and images that can be told apart by their brightness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.plan import Plan
from tests.architectures import checkpoint

LABELS = ("cat", "dog", "owl")
TRAIN, TEST = 36, 12


def images(count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.str_]]:
    """Return images [N, 11, 9, 3], the labels of which are told by their brightness, and these."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % len(LABELS)
    noisy = rng.normal(50 + 75 * labels[:, None, None, None], 20, (count, 11, 9, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8), np.asarray(LABELS)[labels]


def image_folder(folder: Path, count: int, seed: int) -> Path:
    """Write :func:`images` as ``<folder>/<label>/<number>.png``."""
    from PIL import Image

    for number, (image, label) in enumerate(zip(*images(count, seed), strict=True)):
        (folder / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / label / f"{number:03}.png")
    return folder


def image_archive(path: Path) -> Path:
    """Write both splits of :func:`images` under Keras's names."""
    (x_train, y_train), (x_test, y_test) = images(TRAIN, 0), images(TEST, 1)
    np.savez_compressed(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return path


def image_lines(folder: Path, **lines: Any) -> dict[str, Any]:
    """Return the lines of a plan of 4 clients and 2 rounds; all that it names is in ``folder``."""
    model, data = folder / "vit", folder / "pictures"
    if not model.exists():
        checkpoint("vit", model)
        image_folder(data / "train", TRAIN, 0)
        image_folder(data / "test", TEST, 1)
    return {
        "model": str(model),
        "task": "classify_images",
        "data": f"imagefolder(train={str(data / 'train')!r}, test={str(data / 'test')!r})",
        "clients": 4,
        "adapter": "lora(r=4, targets='all-linear')",
        "trainer": "plain(lr=1e-2, steps=2, batch=2)",
        "rounds": 2,
    } | lines


def image_plan(folder: Path, **lines: Any) -> Plan:
    """Return the plan of :func:`image_lines`."""
    return Plan.from_lines(image_lines(folder, **lines))
