"""Count sketch with the largest values unsketched: FetchSGD's code (arXiv 2007.07682)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedpeft.codecs import _arrays, _flat, _mixed, _sparse
from fedpeft.errors import SpecError
from fedpeft.rng import derive_seed
from fedpeft.spec import bounded, method
from fedpeft.types import Rng, Shapes, Tensors

_CELLS = "cells"


@method
class Sketch:
    """Adds every value, with a sign, to one cell in each of ``rows`` rows; ``ratio`` cells a value.

    Decoding estimates a value by the median of its cells and keeps the largest estimates, a
    ``density`` of all; the rest counts as zero. It finds a few values that are far larger than the
    others; where values are alike the estimates are mostly noise, and the error may be larger than
    the update. Cells and signs follow from ``seed``, which all sides read in the plan, so that
    sketches may be added up before they are decoded.
    """

    offers: ClassVar[Mapping[str, str]] = {
        "linear-code": "cells are sums of values",
        "enlarging-code": "estimates hold parts of other values",
    }

    ratio: float = bounded(default=0.2, above=0, high=1)
    rows: int = bounded(default=5, low=1, high=99)
    density: float = bounded(default=0.01, above=0, high=1)
    seed: int = bounded(default=0, low=0)

    def check(self) -> None:
        """Raise ``SpecError`` for an even number of rows: its median is no cell's."""
        if self.rows % 2 == 0:
            raise SpecError(f"sketch: rows={self.rows} must be odd; use {self.rows + 1}")

    def encode(self, tensors: Tensors, rng: Rng) -> Tensors:
        """Return the cells [rows, columns]."""
        vector = _flat.joined(tensors)
        cells = np.zeros((self.rows, self._columns(len(vector))), np.float32)
        for start in range(0, len(vector), _mixed.CHUNK):
            part = vector[start : start + _mixed.CHUNK]
            for row in range(self.rows):
                where, signs = self._hashed(row, start, len(part), cells.shape[1])
                with np.errstate(invalid="ignore", over="ignore"):  # a diverged update may say so
                    np.add.at(cells[row], where, part * signs)
        return {_CELLS: cells}

    def values(self, shapes: Shapes) -> Shapes:
        """Return the cells."""
        return {_CELLS: (self.rows, self._columns(_flat.count(shapes)))}

    def decode(self, arrays: Tensors, shapes: Shapes) -> Tensors:
        """Return float32 tensors, zero but for the largest estimates. Raises ``WireError``."""
        _arrays.check(arrays, self.values(shapes), _arrays.FLOATS)
        cells = np.asarray(arrays[_CELLS], np.float32)
        vector, broken = np.empty(_flat.count(shapes), np.float32), not np.isfinite(cells).all()
        for start in range(0, len(vector), _mixed.CHUNK):
            part = vector[start : start + _mixed.CHUNK]
            found = np.empty((self.rows, len(part)), np.float32)
            for row in range(self.rows):
                where, signs = self._hashed(row, start, len(part), cells.shape[1])
                with np.errstate(invalid="ignore"):  # a NaN of any pattern is one
                    np.multiply(cells[row][where], signs, out=found[row])
            found.partition(self.rows // 2, axis=0)
            part[:] = found[self.rows // 2]
            if broken:
                part[~np.isfinite(found).all(axis=0)] = np.nan
        kept = min(len(vector), max(1, round(self.density * len(vector))))
        lost = np.ones(len(vector), np.bool_)
        lost[_sparse.largest(_sparse.magnitudes(vector), kept)] = False
        vector[lost] = 0
        return _flat.parted(vector, shapes)

    def _columns(self, size: int) -> int:
        return max(1, round(self.ratio * size / self.rows))

    def _hashed(
        self, row: int, start: int, count: int, columns: int
    ) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
        """Return cell and sign of ``count`` positions from ``start``."""
        bits = _mixed.bits(derive_seed(self.seed, "sketch", row), start, count)
        signs = np.float32(1) - np.float32(2) * (bits & np.uint32(1)).astype(np.float32)
        where = (bits >> np.uint32(1)).astype(np.uint64) * np.uint64(columns) >> np.uint64(31)
        return where.astype(np.intp), signs
