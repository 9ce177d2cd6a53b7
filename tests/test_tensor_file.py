from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from fedpeft.errors import RunError
from fedpeft.tensor_file import read_tensor_file, write_tensor_file
from fedpeft.types import Tensors

DTYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")
BASE = np.arange(24, dtype="<f4").reshape(2, 3, 4)
LAYOUTS: dict[str, np.ndarray] = {
    "plain": BASE,
    "transposed": BASE.T,
    "reversed": BASE[::-1],
    "strided": BASE[:, ::2, 1:3],
    "broadcast": np.broadcast_to(BASE[0], (5, 3, 4)),
    "big-endian": BASE.astype(">f4"),
    "fortran": np.asfortranarray(BASE),
    "scalar": np.array(1.5, "f4"),
    "empty": np.empty((3, 0), "f4"),
    "read-only": np.frombuffer(b"\0\0\x80?", "<f4"),
    "unaligned": np.frombuffer(b"x\0\0\x80?", "<f4", 1, 1),
}


def bits(tensors: Tensors) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    little = {k: v.astype(v.dtype.newbyteorder("<")) for k, v in tensors.items()}
    return [(k, v.dtype.str, v.shape, v.tobytes()) for k, v in little.items()]


def written(path: Path, tensors: Tensors, **note: Any) -> Path:
    write_tensor_file(path, tensors, note, "checkpoint")
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays_survive_however_they_lie_in_memory(tmp_path: Path, layout: str) -> None:
    tensors = {"a": LAYOUTS[layout]}
    found, _ = read_tensor_file(written(tmp_path / "f", tensors), "")
    assert bits(found) == bits(tensors)
    assert found["a"].dtype.isnative


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.sampled_from(DTYPES), st.binary(min_size=48, max_size=48))
def test_every_bit_survives(tmp_path: Path, dtype: str, content: bytes) -> None:
    values = np.frombuffer(content, "u1") & 1 if dtype == "?" else np.frombuffer(content, "u1")
    tensors = {"a": values.view(dtype).reshape(2, -1)}
    found, _ = read_tensor_file(written(tmp_path / "f", tensors), "")
    assert bits(found) == bits(tensors)


def test_the_order_survives(tmp_path: Path) -> None:
    tensors = {"b": np.zeros(3, "f4"), "a": np.zeros(1, "f8"), "": np.zeros(2, "i1"), "ä/b": BASE}
    found, _ = read_tensor_file(written(tmp_path / "f", tensors), "")
    assert list(found) == ["b", "a", "", "ä/b"]


def test_the_note_survives(tmp_path: Path) -> None:
    note = {"round": 3, "best": float("-inf"), "x": 0.1, "who": "zwölf", "acks": {"c": -1}}
    assert read_tensor_file(written(tmp_path / "f", {}, **note), "") == ({}, note)


def test_what_was_read_outlives_the_file(tmp_path: Path) -> None:
    path = written(tmp_path / "f", {"a": np.arange(9)})
    found, _ = read_tensor_file(path, "")
    path.write_bytes(b"\xff" * path.stat().st_size)
    path.unlink()
    assert found["a"].tolist() == list(range(9))


def test_cut_short_at_every_length(tmp_path: Path) -> None:
    content = written(tmp_path / "f", {"a": BASE, "b": np.array(1)}, round=3).read_bytes()
    path = tmp_path / "short"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(RunError, match=r"short: cut short or damaged \(.+\); buy a new disk"):
            read_tensor_file(path, "buy a new disk")
        assert path.read_bytes() == content[:length]


def test_bits_flipped_in_every_byte(tmp_path: Path) -> None:
    tensors = {"a": np.arange(2, dtype="f4"), "b": np.array([7], "i4")}
    content = written(tmp_path / "f", tensors, round=3).read_bytes()
    path = tmp_path / "flipped"
    for at in range(len(content) * 2):
        flipped = bytearray(content)
        flipped[at // 2] ^= 1 << (at * 3 % 8)
        path.write_bytes(flipped)
        with pytest.raises(RunError, match="damaged"):
            read_tensor_file(path, "")


def test_another_program_wrote_it(tmp_path: Path) -> None:
    path = tmp_path / "f"
    for metadata in (None, {"format": "pt"}):
        path.write_bytes(save({"a": BASE}, metadata))
        with pytest.raises(RunError, match=r"f: cut short or damaged \('fedpeft'\)"):
            read_tensor_file(path, "")
    for said in ("", "{}", "0" * 16 + "{}"):
        path.write_bytes(save({"a": BASE}, {"fedpeft": said}))
        with pytest.raises(RunError, match="f: damaged, its checksum does not match"):
            read_tensor_file(path, "")


def test_equal_content_is_an_equal_file(tmp_path: Path) -> None:
    tensors = dict.fromkeys("dcba", BASE)
    written(tmp_path / "first", tensors, round=3, acks={"b": 1, "a": 2})
    for i in range(20):
        path = written(tmp_path / str(i), tensors, round=3, acks={"b": 1, "a": 2})
        assert path.read_bytes() == (tmp_path / "first").read_bytes()


def test_no_file_at_all(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(RunError, match="cannot be read"):
            read_tensor_file(path, "")
