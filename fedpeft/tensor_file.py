"""Named arrays and a note in one safetensors file: whole and checked, or refused."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors.numpy import save

from fedpeft.durable import replace_file
from fedpeft.errors import DamagedError, RunError
from fedpeft.types import Tensors

_DIGITS = 16
_LARGE = 1 << 20
_DTYPES = {
    "BOOL": "?",
    **{f"{kind}{8 * size}": f"<{kind.lower()}{size}" for kind in "IU" for size in (1, 2, 4, 8)},
    **{f"F{8 * size}": f"<f{size}" for size in (2, 4, 8)},
}
"""The names that safetensors gives to the types of numpy."""


def write_tensor_file(
    path: Path, tensors: Tensors, note: Mapping[str, Any], kind: str, *, private: bool = False
) -> None:
    """Put arrays, bit for bit, and a JSON ``note`` in the place of ``path``; see ``durable``."""
    replace_file(path, [tensor_bytes(tensors, note)], kind, private=private)


def tensor_bytes(tensors: Tensors, note: Mapping[str, Any]) -> bytes:
    """Return the file that holds arrays, bit for bit, and a JSON ``note``."""
    # safetensors takes the buffer as it lies, so a transposed view would be written scrambled
    solid = {name: _solid(value) for name, value in tensors.items()}
    # it also stores in an order of its own, and sums of floats depend on the order
    text = json.dumps({"note": dict(note), "order": list(solid)})
    # one entry, because safetensors writes several in any order
    return bytes(save(solid, {"fedpeft": _checksum(solid, text) + text}))


def read_tensor_file(path: Path, remedy: str) -> tuple[Tensors, dict[str, Any]]:
    """Return the arrays, only to be read, in the order written, and the note.

    Raises ``DamagedError`` that ends with ``remedy`` where the file is cut short or damaged,
    ``RunError`` where the system cannot read it.
    """
    try:
        about, tensors = _parsed(_content(path))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{path}: cut short or damaged ({error}); {remedy}") from None
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    checksum, text = about[:_DIGITS], about[_DIGITS:]
    if checksum != _checksum(tensors, text):
        raise DamagedError(f"{path}: damaged, its checksum does not match; {remedy}")
    told = json.loads(text)
    return {name: tensors[name] for name in told["order"]}, told["note"]


def _content(path: Path) -> memoryview:
    """Return a file's bytes: a large one is mapped, a small one is faster to read."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < _LARGE:
            return memoryview(file.read())
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _parsed(content: memoryview) -> tuple[str, dict[str, np.ndarray]]:
    """Return the metadata and the arrays of a safetensors file, which share its memory.

    The library's reader copies every array.
    """
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(bytes(content[8:start]))
    about = str(header.pop("__metadata__", {})["fedpeft"])
    tensors, end = {}, start
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        low, high = (start + offset for offset in entry["data_offsets"])
        if low != end:
            raise ValueError(f"{name} does not follow what is before it")
        tensors[name] = np.frombuffer(content[low:high], _DTYPES[entry["dtype"]]).reshape(
            entry["shape"]
        )
        end = high
    if end != len(content):
        raise ValueError(f"{len(content)} bytes instead of {end}")
    return about, tensors


def _solid(value: np.ndarray) -> np.ndarray:
    return np.asarray(value, value.dtype.newbyteorder("<"), order="C")


def _checksum(tensors: Tensors, note: str) -> str:
    table = [[name, tensors[name].dtype.str, *tensors[name].shape] for name in sorted(tensors)]
    digest = xxhash.xxh3_64(json.dumps([note, table]).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
