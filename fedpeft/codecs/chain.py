"""Several codecs as one: ``a | b`` encodes with a, then b."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from fedpeft.errors import SpecError, WireError
from fedpeft.spec import describe, method
from fedpeft.tensors import shapes_of
from fedpeft.types import Codec, Compensating, Differing, Rng, Shapes, Tensors

_OF_ALL = ("linear-code", "unbiased-code")
"""What a chain is where every stage is; all else it is where one is."""


@method
class Chain:
    """``stages`` in the order of encoding: each encodes the values of the one before it.

    What a stage sends beside values is sent as it is, its names after the number of the stage.
    """

    stages: tuple[Codec, ...]

    def check(self) -> None:
        """Raise ``SpecError`` for a stage that can only come last: it leaves no values."""
        if len(self.stages) < 2 or not all(isinstance(s, Codec) for s in self.stages):
            raise SpecError("chain: write codec | codec")
        if any(isinstance(stage, Chain) for stage in self.stages):
            raise SpecError("chain: a chain is no stage of another; write all stages in one")
        for stage in self.stages:
            if isinstance(stage, Compensating | Differing):
                name = describe(stage).partition("(")[0]
                raise SpecError(f"chain: {name} wraps the whole chain: write {name}(codec | codec)")
        for stage in self.stages[:-1]:
            if not stage.values({"probe": (8, 8)}):
                raise SpecError(f"chain: {describe(stage)} must come last")

    @property
    def offers(self) -> Mapping[str, str]:
        """Return what the whole is, from what its stages are."""
        each = [dict(getattr(stage, "offers", {})) for stage in self.stages]
        found = {trait: reason for one in each for trait, reason in one.items()}
        return {
            trait: reason
            for trait, reason in found.items()
            if trait not in _OF_ALL or all(trait in one for one in each)
        }

    def encode(self, tensors: Tensors, rng: Rng) -> Tensors:
        """Encode first to last."""
        sent, shapes = dict[str, NDArray[Any]](), shapes_of(tensors)
        for at, stage in enumerate(self.stages):
            made = stage.encode(tensors, rng)
            shapes = stage.values(shapes) if at + 1 < len(self.stages) else {}
            tensors = {name: made[name] for name in shapes}
            sent |= {f"{at}.{name}": value for name, value in made.items() if name not in shapes}
        return sent

    def decode(self, arrays: Tensors, shapes: Shapes) -> Tensors:
        """Decode last to first. Raises ``WireError``."""
        expected, own = [shapes], [dict[str, NDArray[Any]]() for _ in self.stages]
        for stage in self.stages[:-1]:
            expected.append(stage.values(expected[-1]))
        for name, value in arrays.items():
            at, _, rest = name.partition(".")
            if at not in {str(n) for n in range(len(own))}:
                raise WireError(f"array {name[:80]!r} is of no codec of {describe(self)}")
            own[int(at)][rest] = value
        values: Tensors = {}
        for stage, of, kept in reversed([*zip(self.stages, expected, own, strict=True)]):
            if both := [name for name in kept if name in values]:
                raise WireError(f"array {both[0][:80]!r} comes beside the values of that name")
            values = stage.decode({**kept, **values}, of)
        return values

    def values(self, shapes: Shapes) -> Shapes:
        """Return those of the last stage."""
        for stage in self.stages:
            shapes = stage.values(shapes)
        return {f"{len(self.stages) - 1}.{name}": shape for name, shape in shapes.items()}
