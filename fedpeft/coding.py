"""An adapter as sections of a packet: the codec encodes its head apart from the rest of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedpeft.types import Codec, Rng, Shapes, Tensors

_Value = TypeVar("_Value")
_ADAPTER = "adapter"
HEAD = "head"
"""The section that there is where any of the head travels."""


@dataclass(frozen=True, slots=True)
class Coding:
    """A codec, and which tensors are the ``head``: what they say is on a scale of its own."""

    codec: Codec
    head: Collection[str] = ()

    def expected(self, sections: Mapping[str, Shapes]) -> dict[str, Shapes]:
        """Return what travels where the adapter is whole in ``sections``."""
        rest = {name: shapes for name, shapes in sections.items() if name != _ADAPTER}
        return self.parts(sections[_ADAPTER]) | rest

    def encode(self, tensors: Tensors, rng: Rng) -> dict[str, Tensors]:
        """Return the sections to send."""
        return {name: self.codec.encode(part, rng) for name, part in self.parts(tensors).items()}

    def decode(self, sections: Mapping[str, Tensors], shapes: Shapes) -> Tensors:
        """Return the float32 tensors of these shapes. Raises ``WireError``."""
        found = dict[str, NDArray[Any]]()
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused later
            for name, part in self.parts(shapes).items():
                found |= self.codec.decode(sections[name], part)
        return {name: found[name] for name in shapes}

    def parts(self, whole: Mapping[str, _Value]) -> dict[str, dict[str, _Value]]:
        """Return the sections of what is not encoded."""
        head = {name: value for name, value in whole.items() if name in self.head}
        rest = {name: value for name, value in whole.items() if name not in head}
        return {_ADAPTER: rest, **({HEAD: head} if head else {})}
