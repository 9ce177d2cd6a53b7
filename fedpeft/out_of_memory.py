"""What to do when an allocation fails: tell it from other errors, and go on with less at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from fedpeft.errors import TrainError

if TYPE_CHECKING:
    import torch

_T = TypeVar("_T")


def evaluated_in_parts(
    work: Callable[[int], _T], rows: int, device: torch.device, warn: Callable[[str], None]
) -> tuple[_T, int]:
    """Return ``work(rows)`` and ``rows``, halved with a warning until a pass fits into memory.

    ``work`` evaluates from the start, with at most so many records in a pass. Raises ``TrainError``
    where not even one fits.
    """
    while True:
        try:
            return work(rows), rows
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if rows == 1:  # the error no longer holds the tensors of the failed pass
            raise TrainError(
                "evaluation: one record does not fit into memory; lower the task's max_length, if "
                "it has one, or set precision: bfloat16"
            )
        release(device)
        rows //= 2
        warn(f"evaluation does not fit into memory; going on with {rows} records in a pass")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an allocation failed, on a CPU or a GPU."""
    import torch

    told = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in str(error).lower() for words in told
    )


def release(device: torch.device) -> None:
    """Give cached blocks back to the device."""
    import gc

    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
