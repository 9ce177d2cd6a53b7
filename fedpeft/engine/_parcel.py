"""An object as a pickle and, apart from it, the bytes of its tensors and arrays.

Whoever holds the bytes in memory that processes share unpacks the object without a copy of them.
"""

from __future__ import annotations

import io
import pickle
import types
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedpeft.errors import RunError

Bytes = NDArray[np.uint8]

_SMALL = 4096
"""Arrays of fewer bytes stay in the pickle."""


@dataclass(frozen=True, slots=True)
class _Form:
    """What a tensor is beside its bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parameter: bool


@dataclass(frozen=True, slots=True)
class Parcel:
    """A pickle that waits for the bytes of its tensors, then those of its arrays."""

    pickled: bytes
    forms: tuple[_Form, ...]

    def open(self, contents: Sequence[Bytes]) -> Any:
        """Return the object; parameters and arrays lie in ``contents``, buffers are copies."""
        count = len(self.forms)
        tensors = [_tensor(*pair) for pair in zip(self.forms, contents[:count], strict=True)]
        return _Unpickler(self.pickled, contents[count:], tensors).load()


def pack(found: Any) -> tuple[Parcel, list[torch.Tensor], list[Bytes]]:
    """Return ``found`` without the tensors and the arrays, and these.

    What an adapter has put on modules is left out: each process attaches its adapter itself.
    Raises ``RunError`` for what cannot be pickled.
    """
    file, arrays = io.BytesIO(), list[Bytes]()

    def keep(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < _SMALL:
            return True
        arrays.append(np.frombuffer(raw, np.uint8))
        return False

    pickler = _Pickler(file, keep)
    try:
        pickler.dump(found)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise RunError(f"engine: workers cannot be sent {error}; use inline") from error
    forms = [
        _Form(t.dtype, tuple(t.shape), isinstance(t, torch.nn.Parameter)) for t in pickler.tensors
    ]
    return Parcel(file.getvalue(), tuple(forms)), pickler.tensors, arrays


def bytes_of(tensor: torch.Tensor) -> Bytes:
    """Return a tensor's bytes; a view, where it lies in one piece in this machine's memory."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    found: Bytes = flat.view(torch.uint8).numpy()
    return found


def tensor_of(content: Bytes, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """Return the tensor whose bytes ``content`` are; a view."""
    if not content.size:
        return torch.empty(tuple(shape), dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")  # nobody writes to a base
        return torch.from_numpy(content).view(dtype).view(tuple(shape))


def _tensor(form: _Form, content: Bytes) -> torch.Tensor:
    found = tensor_of(content, form.dtype, form.shape)
    return torch.nn.Parameter(found, requires_grad=False) if form.parameter else found.clone()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, keep: Any) -> None:
        super().__init__(file, protocol=5, buffer_callback=keep)
        self.tensors: list[torch.Tensor] = []
        self._places: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, torch.Tensor):
            return None
        place = self._places.setdefault(id(obj), len(self.tensors))
        if place == len(self.tensors):
            self.tensors.append(obj)
        return place

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, torch.nn.Module):
            return NotImplemented
        reduced: tuple[Any, ...] = obj.__reduce_ex__(5)  # type: ignore[assignment]
        make, arguments, state, *rest = reduced
        state = {name: value for name, value in state.items() if not _is_ours(value)}
        hooks = [(k, hook) for k, hook in obj._forward_hooks.items() if not _is_ours(hook)]
        state["_forward_hooks"] = OrderedDict(hooks)
        return make, arguments, state, *rest


class _Unpickler(pickle.Unpickler):
    def __init__(
        self, data: bytes, arrays: Sequence[Bytes], tensors: Sequence[torch.Tensor]
    ) -> None:
        super().__init__(io.BytesIO(data), buffers=arrays)
        self._tensors = tensors

    def persistent_load(self, pid: Any) -> torch.Tensor:
        return self._tensors[int(pid)]


def _is_ours(found: Any) -> bool:
    """Tell whether this is a function or a method of the package's."""
    kinds = types.FunctionType | types.MethodType
    return isinstance(found, kinds) and found.__module__.startswith("fedpeft.")
