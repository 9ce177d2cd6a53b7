"""Arrays of single clients and tensors of many: between ``Tensors`` and ``Stacked``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch

from fedpeft.types import Stacked, Tensors


def stack(each: Sequence[Tensors], device: torch.device) -> Stacked:
    """Return the arrays of K clients as tensors with a leading dimension K.

    An array that all clients share is not copied but seen K times (stride 0), and on a CPU it
    stays the array's own memory, so nothing here may be written to.
    """
    found: Stacked = {}
    for name, first in each[0].items():
        if all(tensors[name] is first for tensors in each):
            value = torch.from_numpy(first[None]).to(device).expand(len(each), *first.shape)
        else:
            value = torch.from_numpy(np.stack([tensors[name] for tensors in each])).to(device)
        found[name] = value
    return found


def taken(stacked: Stacked, members: Sequence[int]) -> Stacked:
    """Return the rows of these clients; no copy where they are the first ones, in order."""
    if list(members) == list(range(len(members))):
        return {name: value[: len(members)] for name, value in stacked.items()}
    found: Stacked = {}
    for name, value in stacked.items():
        if value.stride(0) == 0:  # the same for all
            found[name] = value[:1].expand(len(members), *value.shape[1:])
        else:
            found[name] = value.index_select(0, torch.tensor(members, device=value.device))
    return found


def unstack(stacked: Stacked) -> list[Tensors]:
    """Return the arrays of each client, as views of memory that they share."""
    arrays = {name: value.cpu().numpy() for name, value in stacked.items()}
    clients = len(next(iter(arrays.values()), ()))
    return [{name: value[k] for name, value in arrays.items()} for k in range(clients)]


with warnings.catch_warnings():  # torch tells once per process that these are not for writing
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(bytes(4), np.float32))
