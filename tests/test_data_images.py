"""Images as data: folders of files, archives, hub rows, and what is said of those that are none."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedpeft.data._images import picture
from fedpeft.data.imagefolder import ImageFolder
from fedpeft.data.npz import Npz
from fedpeft.errors import DataError, SpecError
from fedpeft.spec import build
from tests.pictures import LABELS, image_archive, image_folder, images


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """A folder of a train and a test split."""
    image_folder(tmp_path / "train", 7, 0)
    image_folder(tmp_path / "test", 3, 1)
    return tmp_path


def load(folder: Path) -> Any:
    return ImageFolder(train=str(folder / "train"), test=str(folder / "test")).load()


def encoded(array: Any, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(
        file, kind, **options
    )
    return file.getvalue()


# --- folders ------------------------------------------------------------------------------------


def test_a_folder_has_its_images_by_label_and_name(pets: Path) -> None:
    splits = load(pets)
    assert [row["label"] for row in splits.train] == ["cat"] * 3 + ["dog"] * 2 + ["owl"] * 2
    assert [Path(row["image"]).name for row in splits.train[:3]] == [
        "000.png",
        "003.png",
        "006.png",
    ]
    assert len(splits.test) == 3
    assert np.array_equal(np.asarray(Image.open(splits.train[3]["image"])), images(7, 0)[0][1])
    assert splits.train[-1] == splits.train[6] == list(splits.train)[6]
    assert ImageFolder(train=str(pets / "train")).load().test is None


def test_what_is_no_image_is_left_out_and_deeper_ones_are_found(pets: Path) -> None:
    before = load(pets)
    (pets / "train" / "cat" / "Thumbs.db").write_bytes(b"x")
    (pets / "train" / "cat" / "._000.png").write_bytes(b"x")
    (pets / "train" / ".cache").mkdir()
    (pets / "train" / "README.md").write_text("x")
    assert load(pets).fingerprint == before.fingerprint
    (pets / "train" / "owl" / "deep").mkdir()
    shutil.copy(pets / "train" / "cat" / "000.png", pets / "train" / "owl" / "deep" / "A.PNG")
    assert [row["label"] for row in load(pets).train].count("owl") == 3


def test_the_fingerprint_is_that_of_the_content(pets: Path, tmp_path: Path) -> None:
    before = load(pets).fingerprint
    shutil.copytree(pets / "train", tmp_path / "moved" / "train")
    shutil.copytree(pets / "test", tmp_path / "moved" / "test")
    assert load(tmp_path / "moved").fingerprint == before
    (tmp_path / "moved" / "train" / "owl").rename(tmp_path / "moved" / "train" / "own")
    renamed = load(tmp_path / "moved").fingerprint
    path = pets / "train" / "owl" / "002.png"
    path.write_bytes(encoded(255 - np.asarray(Image.open(path))))
    assert len({before, renamed, load(pets).fingerprint}) == 3


def test_a_folder_is_looked_for_like_a_file(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDPEFT_DATA", str(pets))
    assert len(ImageFolder(train="train").load().train) == 7
    with pytest.raises(DataError, match=r"cannot find the folder 'trian': looked for .*'train'\?"):
        ImageFolder(train="trian").load()
    with pytest.raises(DataError, match=r"000.png is a file; name a folder"):
        ImageFolder(train="train/cat/000.png").load()
    with pytest.raises(SpecError, match=r"imagefolder: test=' ' must name"):
        build("data", "imagefolder(train='a', test=' ')")


def _empty(train: Path) -> None:
    shutil.rmtree(train)
    train.mkdir()


def _bare(train: Path) -> None:
    for path in (train / "dog").iterdir():
        path.unlink()


def _loose(train: Path) -> None:
    shutil.copy(train / "cat" / "000.png", train)


def _text(train: Path) -> None:
    (train / "owl" / "002.png").write_text("no image")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_empty, r"train: no folder in it; put the images of each label into a folder of its name"),
        (_bare, r"train/dog: no image in it \(.jpg .*\); add one or remove the folder"),
        (_loose, r"train/000.png: lies in no label's folder; move it into one"),
        (_text, r"owl/002.png: no image, or a damaged one \(.*\); copy it again or take it out"),
    ],
)
def test_a_folder_that_cannot_be_used_is_named(pets: Path, damage: Any, message: str) -> None:
    damage(pets / "train")
    with pytest.raises(DataError, match=message):
        load(pets)


# --- archives -----------------------------------------------------------------------------------


def test_an_archive_has_images_and_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = image_archive(tmp_path / "pets.npz")
    splits = Npz(file=str(path)).load()
    assert (len(splits.train), len(splits.test or [])) == (36, 12)
    assert splits.train[4]["label"] == "dog"
    assert np.array_equal(splits.train[4]["image"], images(36, 0)[0][4])
    monkeypatch.setenv("FEDPEFT_DATA", str(tmp_path))
    assert Npz(file="pets.npz").load().fingerprint == splits.fingerprint
    with pytest.raises(DataError, match=r"cannot find the file 'pet.npz'.*'pets.npz'\?"):
        Npz(file="pet.npz").load()


IMAGES = np.zeros((4, 5, 6), np.uint8)
NUMBERS = np.arange(4)


@pytest.mark.parametrize("labels", [NUMBERS, NUMBERS[:, None], NUMBERS.astype(np.uint8)])
@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 5, 6, 1), (4, 5, 6, 3)])
def test_grey_and_coloured_images_as_keras_has_them(
    tmp_path: Path, shape: tuple[int, ...], labels: Any
) -> None:
    np.savez(tmp_path / "a.npz", x_train=np.zeros(shape, np.uint8), y_train=labels)
    splits = Npz(file=str(tmp_path / "a.npz")).load()
    assert splits.test is None
    assert [row["label"] for row in splits.train] == [0, 1, 2, 3]
    mode = "RGB" if shape[3:] == (3,) else "L"
    found = picture(splits.train[0]["image"], 1, "image")
    assert (found.mode, found.size) == (mode, (6, 5))


def test_the_fingerprint_of_an_archive_is_that_of_its_arrays(tmp_path: Path) -> None:
    def digest(save: Any = np.savez, **changed: Any) -> str:
        arrays = {"x_train": IMAGES, "y_train": NUMBERS} | changed
        save(tmp_path / "a.npz", **arrays)
        return Npz(file=str(tmp_path / "a.npz")).load().fingerprint

    assert digest() == digest(np.savez_compressed, note=np.arange(3))
    others: list[dict[str, Any]] = [
        {"x_train": IMAGES + 1},
        {"x_train": IMAGES.swapaxes(1, 2)},
        {"y_train": -NUMBERS},
    ]
    assert len({digest(), *(digest(**other) for other in others)}) == 4


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x_train": IMAGES}, r"a.npz: has no array 'y_train'; write np.savez"),
        ({"images": IMAGES}, r"has no array 'x_train'"),
        ({"x_train": IMAGES, "y_train": NUMBERS, "y_test": NUMBERS}, r"has no array 'x_test'"),
        (
            {"x_train": IMAGES / 255, "y_train": NUMBERS},
            r"x_train is float64 \[4, 5, 6\]; save uint8",
        ),
        (
            {"x_train": np.zeros((4, 5, 6, 2), np.uint8), "y_train": NUMBERS},
            r"x_train is uint8 \[4, 5, 6, 2\]",
        ),
        ({"x_train": IMAGES[0], "y_train": NUMBERS}, r"x_train is uint8 \[5, 6\]"),
        (
            {"x_train": IMAGES, "y_train": np.eye(4, dtype=np.int64)},
            r"y_train is int64 \[4, 4\]; save one whole number or text for each image",
        ),
        ({"x_train": IMAGES, "y_train": NUMBERS / 2}, r"y_train is float64"),
        ({"x_train": IMAGES, "y_train": NUMBERS[:3]}, r"has 4 images and y_train 3 labels"),
        ({"x_train": IMAGES[:0], "y_train": NUMBERS[:0]}, r"x_train holds no images"),
        (
            {"x_train": np.asarray([{}], dtype=object), "y_train": NUMBERS},
            r"not arrays of numbers or text only",
        ),
    ],
)
def test_arrays_that_are_no_images_are_named(
    tmp_path: Path, arrays: dict[str, Any], message: str
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        Npz(file=str(tmp_path / "a.npz")).load()


def test_an_archive_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x_train=IMAGES, y_train=NUMBERS)
    whole = path.read_bytes()
    for content in (b"text", b"", whole[:-30]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a.npz: no NumPy archive, or cut short; write np.s"):
            Npz(file=str(path)).load()
    for at in range(0, len(whole) - 30, 7):
        path.write_bytes(whole[:at] + b"\xff\xff\xff" + whole[at + 3 :])
        with contextlib.suppress(DataError):
            Npz(file=str(path)).load()
    path.write_bytes(whole[:100] + b"\0" * 20 + whole[120:])
    with pytest.raises(DataError, match=r"a.npz: a damaged archive \(.*\); copy it again"):
        Npz(file=str(path)).load()


# --- decoding -----------------------------------------------------------------------------------

ARRAY = images(1, 0)[0][0]


def test_all_that_a_row_may_hold_is_the_same_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(ARRAY))
    held = [
        ARRAY,
        Image.fromarray(ARRAY),
        encoded(ARRAY),
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        {"bytes": encoded(ARRAY), "path": None},
        {"bytes": None, "path": str(tmp_path / "a.png")},
    ]
    for value in held:
        assert np.array_equal(np.asarray(picture(value, 1, "image")), ARRAY)


def test_an_image_is_turned_as_its_camera_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert picture(encoded(ARRAY, exif=exif), 1, "image").size == (11, 9)
    assert picture(encoded(ARRAY), 1, "image").size == (9, 11)


def test_a_transparent_palette_needs_no_warning() -> None:
    made = Image.fromarray(ARRAY).quantize(4)
    found = picture(encoded(made, transparency=b"\0\1\2\3"), 1, "image")
    assert np.array_equal(np.asarray(found.convert("RGB")), np.asarray(made.convert("RGB")))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (encoded(ARRAY)[:-30], r"row 3: no image, or a damaged one"),
        (b"text", r"row 3: no image, or a damaged one"),
        ({"bytes": b"text", "path": "x.png"}, r"row 3 \(x.png\): no image"),
        ("nowhere.png", r"cannot find the file 'nowhere.png'"),
        (7, r"row 3: column 'image' is a int, not an image"),
        (None, r"row 3: column 'image' is a NoneType"),
        (ARRAY / 255, r"row 3: an array float64 \[11, 9, 3\] is no image; give uint8"),
        (ARRAY[..., :2], r"row 3: an array uint8 \[11, 9, 2\]"),
        (encoded(ARRAY[..., 0].astype(np.uint16)), r"row 3: more than 8 bits a channel"),
    ],
)
def test_what_is_no_image_is_named(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        picture(value, 3, "image")


def test_hub_rows_hold_the_bytes_of_images(pets: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    splits = build("data", f"hub(name={str(pets)!r})").load()
    assert {row["label"] for row in splits.train} == set(LABELS)
    assert all(isinstance(row["image"], bytes) for row in splits.train)
    assert picture(splits.train[0]["image"], 1, "image").size == (9, 11)
    path = pets / "train" / "cat" / "000.png"
    path.write_bytes(encoded(255 - np.asarray(Image.open(path))))
    assert build("data", f"hub(name={str(pets)!r})").load().fingerprint != splits.fingerprint
