"""Ferret: coefficients on directions drawn from seeds (Shu et al. 2024, arXiv 2409.06277)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedpeft.codecs import _arrays, _bases, _budget, _flat
from fedpeft.errors import SpecError
from fedpeft.spec import bounded, method
from fedpeft.types import Rng, Shapes, Tensors

_SEED, _NORMS, _COEFFICIENTS = "seed", "norms", "coefficients"


@method
class Seeds:
    """Sends what an update is along random directions: a ``density`` of its values in number.

    Tensors are cut into blocks of powers of two, up to ``block`` values, each with directions of
    its own and at least one coefficient; by ``norm`` of the block, as in the paper, or ``even``ly.
    With K coefficients of d values, directions of one block are ``orthogonal``: the cosine to the
    update is sqrt(K / d) in the root of its mean square; or ``independent``, as in the paper:
    sqrt(K / (K + d - 1)), and the work is d times that of the coefficients.

    ``least-squares`` gives the nearest update that the coefficients allow (for independent
    directions by one factor, in the mean): its mean over seeds is the update times K / d, or times
    K / (K + d - 1). ``unbiased`` divides by that. A 64-bit seed travels, so that each update has
    other directions; with ``shared`` all have the same for good: coefficients can be added up, and
    what these directions miss never arrives. A block that is not finite decodes to no finite value.
    """

    density: float = bounded(default=0.01, above=0, high=1)
    block: int = bounded(default=4096, low=2, high=65536)
    basis: _bases.Kind = "orthogonal"
    budget: Literal["norm", "even"] = "norm"
    scale: Literal["least-squares", "unbiased"] = "least-squares"
    shared: bool = False

    def check(self) -> None:
        """Raise ``SpecError`` for blocks of other sizes than powers of two."""
        if self.block & (self.block - 1):
            raise SpecError(f"seeds: block={self.block} must be a power of two")

    @property
    def offers(self) -> Mapping[str, str]:
        """What follows from its choices."""
        found = dict[str, str]()
        if self.shared and self.budget == "even":
            found["linear-code"] = "coefficients on the same directions add up"
        if self.scale == "unbiased" and not self.shared:
            found["unbiased-code"] = "the mean over directions is the update"
        if self.scale == "unbiased" or self.basis == "independent":
            found["enlarging-code"] = "what lies along its directions comes out larger"
        if self.budget == "norm":
            found["telling-code"] = "sends the norm of each block"
        return found

    def encode(self, tensors: Tensors, rng: Rng) -> Tensors:
        """Return coefficients, and beside them what decides their directions."""
        shapes = {name: value.shape for name, value in tensors.items()}
        vector, sizes = _flat.joined(tensors), _budget.blocks(shapes, self.block)
        parts = [vector[start:end] for start, end in _ranges(sizes)]
        sent = dict[str, NDArray[np.generic]]()
        if not self.shared:
            sent[_SEED] = rng.integers(0, 1 << 64, 1, np.uint64)
        if self.budget == "norm":
            sent[_NORMS] = _budget.codes(np.array([_norm(part) for part in parts], np.float64))
        counts = self._counts(sent, sizes)
        found = np.empty(int(counts.sum()), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            for stream, (start, end) in enumerate(_ranges(counts)):
                found[start:end] = _bases.projected(
                    parts[stream], end - start, self.basis, _key(sent), stream
                )
        return {**sent, _COEFFICIENTS: found}

    def values(self, shapes: Shapes) -> Shapes:
        """Return the one vector of coefficients."""
        return {_COEFFICIENTS: (self._total(_budget.blocks(shapes, self.block)),)}

    def decode(self, arrays: Tensors, shapes: Shapes) -> Tensors:
        """Return float32 tensors. Raises ``WireError``."""
        sizes = _budget.blocks(shapes, self.block)
        own: dict[str, tuple[tuple[int], str]] = {}
        if not self.shared:
            own[_SEED] = (1,), "uint64"
        if self.budget == "norm":
            own[_NORMS] = (len(sizes),), "uint8"
        (found,) = _flat.values(arrays, self.values(shapes), own)
        for name, (shape, dtype) in own.items():
            _arrays.check({name: arrays[name]}, {name: shape}, (dtype,))
        vector = np.empty(int(sizes.sum()), np.float32)
        counts = self._counts(arrays, sizes)
        spans = zip(_ranges(sizes), _ranges(counts), strict=True)
        with np.errstate(over="ignore", invalid="ignore"):
            for stream, ((start, end), (first, last)) in enumerate(spans):
                block = _bases.back(
                    found[first:last], end - start, self.basis, _key(arrays), stream
                )
                vector[start:end] = block * self._factor(last - first, end - start)
        return _flat.parted(vector, shapes)

    def _total(self, sizes: _budget.Counts) -> int:
        return max(len(sizes), _flat.share(self.density, int(sizes.sum())))

    def _counts(self, arrays: Tensors, sizes: _budget.Counts) -> _budget.Counts:
        weights = _budget.weights(arrays[_NORMS]) if _NORMS in arrays else sizes
        return _budget.counts(weights, sizes, self._total(sizes))

    def _factor(self, count: int, size: int) -> np.float32:
        """Return what ``V^T V`` is multiplied with."""
        if self.scale == "unbiased":
            return np.float32(size / count)
        return np.float32(1 if self.basis == "orthogonal" else size / (count + size - 1))


def _key(arrays: Tensors) -> int:
    """Return what directions are drawn from: the same for good where no seed travels."""
    return int(arrays[_SEED][0]) if _SEED in arrays else 0


def _ranges(sizes: _budget.Counts) -> Iterator[tuple[int, int]]:
    """Yield start and end of parts of these sizes."""
    ends = np.cumsum(sizes)
    return zip((ends - sizes).tolist(), ends.tolist(), strict=True)


def _norm(values: NDArray[np.float32]) -> float:
    wide = values.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return float(np.sqrt(wide @ wide))
