"""A site's records are looked at before it says that it is ready."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft.deployment.client_file import load_client
from fedpeft.deployment.data_check import DataReport, check_data
from fedpeft.errors import DataError
from tests.test_client_file import written


def checked(folder: Path, data: str = "jsonl(train='a.jsonl')", **lines: Any) -> DataReport:
    return check_data(load_client(written(folder, data=data, **lines)))


def rows(path: Path, *each: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in each), encoding="utf-8")
    return path


def test_a_report_says_what_there_is_and_quotes_nothing(tmp_path: Path) -> None:
    each = [{"text": "private " * (i + 1), "label": "ab"[i % 3 == 0]} for i in range(25)]
    rows(tmp_path / "a.jsonl", *each)
    found = checked(tmp_path)
    assert (found.records, found.form, found.longest) == (25, "text", 25 * 8)
    assert found.labels == {"a": 16, "b": 9}
    assert [found.held_out(share) for share in (0, 0.01, 0.1, 0.5)] == [0, 1, 2, 12]
    assert [*found.lines(0.2)] == [
        "records: 25 (text, the longest of 200 characters)",
        "labels: a 16, b 9",
        "held out at holdout=0.2: 5, trained on: 20",
    ]


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"text": "a"}, "text"),
        ({"prompt": "a", "completion": "b"}, "completion"),
        ({"instruction": "a", "input": None, "output": "b"}, "instruct"),
        ({"messages": [{"role": "assistant", "content": "b"}]}, "chat"),
    ],
)
def test_common_formats_are_known(tmp_path: Path, row: dict[str, Any], form: str) -> None:
    rows(tmp_path / "a.jsonl", row, row)
    assert checked(tmp_path).form == form


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"label": "x"}, "row 2 has no column 'text'"),
        ({"text": 5, "label": "x"}, "row 2: column 'text' is 5, not text; convert it or remove"),
        ({"text": "a"}, "row 2 has no column 'label'"),
        ({"text": "a", "label": None}, "row 2: column 'label' is None, not one label; correct"),
    ],
)
def test_a_bad_record_is_named_by_file_and_row(
    tmp_path: Path, bad: dict[str, Any], reason: str
) -> None:
    rows(tmp_path / "a.jsonl", {"text": "a", "label": "x"})
    rows(tmp_path / "b.jsonl", {"text": "a", "label": "x"}, bad)
    with pytest.raises(DataError) as caught:
        checked(tmp_path, "jsonl(train='a.jsonl,b.jsonl')")
    start = f"{tmp_path}/client.yaml: data: {tmp_path}/b.jsonl: {reason}"
    assert str(caught.value).startswith(start)


def test_files_that_do_not_fit_each_other(tmp_path: Path) -> None:
    rows(tmp_path / "a.jsonl", {"text": "a"})
    rows(tmp_path / "b.jsonl", {"text": "a", "label": "x"})
    rows(tmp_path / "c.jsonl", {"prompt": "a", "completion": "x"})
    with pytest.raises(DataError, match=r"b.jsonl: row 1 has a column 'label', and the files"):
        checked(tmp_path, "jsonl(train='a.jsonl,b.jsonl')")
    with pytest.raises(DataError, match=r"c.jsonl: row 1 reads as completion and the files"):
        checked(tmp_path, "jsonl(train='a.jsonl,c.jsonl')")


@pytest.mark.parametrize(
    ("each", "tasks", "note"),
    [
        ([{"sentence": "a", "y": 1}], None, "a plan has to name one of sentence, y in its task"),
        ([{"text": ""}, {"text": "a"}], None, "1 records have no text to learn"),
        ([{"text": "a"}, {"text": "a"}], ["classify"], "no column 'label'"),
        ([{"text": "a", "label": "x"}] * 2, None, "a plan has to list the classes"),
        ([{"text": "a"}], None, "one record alone: none can be held out"),
    ],
)
def test_what_a_plan_may_stumble_over_is_noted(
    tmp_path: Path, each: list[dict[str, Any]], tasks: list[str] | None, note: str
) -> None:
    rows(tmp_path / "a.jsonl", *each)
    found = checked(tmp_path, limits={"tasks": tasks} if tasks else {})
    assert any(note in text for text in found.notes), found.notes
    assert any(note in text for text in found.lines())


def test_a_missing_file_is_looked_for_beside_the_client_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"client.yaml: data: cannot find .*{tmp_path}/a.jsonl"):
        checked(tmp_path)
    with pytest.raises(DataError, match="names no records of its own"):
        check_data(load_client(written(tmp_path)))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(DataError, match=r"a.jsonl:2: not JSON"):
        checked(tmp_path)


def test_images_are_decoded(tmp_path: Path) -> None:
    images = np.zeros((4, 6, 6), np.uint8)
    np.savez(tmp_path / "a.npz", x_train=images, y_train=np.array([0, 1, 1, 2]))
    found = checked(tmp_path, "npz(file='a.npz')")
    assert (found.records, found.form, found.labels) == (4, "image", {"0": 1, "1": 2, "2": 1})
    folder = tmp_path / "photos" / "cat"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cat/a.png: no image, or a damaged one"):
        checked(tmp_path, "imagefolder(train='photos')")
