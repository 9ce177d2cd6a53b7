"""Names and arrays: what everything else is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Tensors: TypeAlias = Mapping[str, NDArray[Any]]
"""Named arrays. Outside torch code nothing else is passed around."""
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""What a receiver expects before it reads a packet: names and shapes, in order."""
Stacked: TypeAlias = "dict[str, torch.Tensor]"
"""Parameters of K clients trained in one pass: every tensor has a leading dimension K."""
Metrics: TypeAlias = Mapping[str, float]
Row: TypeAlias = Mapping[str, Any]
"""One record as it came from its source: column name to value."""
Example: TypeAlias = Mapping[str, NDArray[Any]]
"""One encoded record: ``input_ids`` [T] int64, or ``pixel_values`` [C, H, W] uint8; ``labels`` ([T]
or scalar, int64), perhaps more."""
FEATURES = "features"
"""The field of an encoded record that is what a frozen base makes of it: see :class:`Probing`."""
Scalar: TypeAlias = int | float | str
Rng: TypeAlias = np.random.Generator
Population: TypeAlias = Mapping[str, int]
"""Every client that could be asked, with its number of training records."""
