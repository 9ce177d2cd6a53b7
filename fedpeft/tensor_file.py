"""Named arrays and a note in one safetensors file: whole and checked, or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedpeft.durable import replace_file
from fedpeft.errors import RunError
from fedpeft.types import Tensors

_DIGITS = 16


def write_tensor_file(path: Path, tensors: Tensors, note: Mapping[str, Any], kind: str) -> None:
    """Put arrays, bit for bit, and a JSON ``note`` in the place of ``path``; see ``durable``."""
    # safetensors takes the buffer as it lies, so a transposed view would be written scrambled
    solid = {name: _solid(value) for name, value in tensors.items()}
    # it also stores in an order of its own, and sums of floats depend on the order
    text = json.dumps({"note": dict(note), "order": list(solid)})
    # one entry, because safetensors writes several in any order
    replace_file(path, [save(solid, {"fedpeft": _checksum(solid, text) + text})], kind)


def read_tensor_file(path: Path, remedy: str) -> tuple[Tensors, dict[str, Any]]:
    """Return the arrays, in the order written, and the note.

    Raises ``RunError`` that ends with ``remedy`` where the file is cut short or damaged.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            about = str((file.metadata() or {})["fedpeft"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise RunError(f"{path}: cut short or damaged ({error}); {remedy}") from None
    checksum, text = about[:_DIGITS], about[_DIGITS:]
    if checksum != _checksum(tensors, text):
        raise RunError(f"{path}: damaged, its checksum does not match; {remedy}")
    told = json.loads(text)
    return {name: tensors[name] for name in told["order"]}, told["note"]


def _solid(value: np.ndarray) -> np.ndarray:
    return np.asarray(value, value.dtype.newbyteorder("<"), order="C")


def _checksum(tensors: Tensors, note: str) -> str:
    table = [[name, tensors[name].dtype.str, *tensors[name].shape] for name in sorted(tensors)]
    digest = xxhash.xxh3_64(json.dumps([note, table]).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
