"""The adapter as clients hold it, where the downlink sends differences.

All hold the same: ``d_0`` is the adapter before round 0, and ``d_t`` is ``d_(t-1)`` plus what the
encoded difference of the adapter to it decodes to. So what one difference loses is in the next. A
client that has decoded ``d_v`` is sent the differences after ``v``, or ``d_t`` itself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.coding import Coding
from fedpeft.errors import RunError, WireError
from fedpeft.tensors import is_finite, is_float32, shapes_of, size
from fedpeft.types import Rng, Shapes, Tensors
from fedpeft.wire import body

Sections = Mapping[str, Tensors]


@dataclass(frozen=True, slots=True)
class Mirror:
    """``tensors`` are ``d_t``, float32; ``steps`` the encoded differences that led there.

    ``steps`` maps a version to its sections, ``sizes`` to the bytes that these take. There are only
    those that some client may be sent: together they are shorter than ``d_t``, and decode to no
    more than twice its bytes.
    """

    tensors: Tensors = field(default_factory=dict)
    steps: Mapping[int, Sections] = field(default_factory=dict)
    sizes: Mapping[int, int] = field(default_factory=dict)

    def plus(
        self, coding: Coding, params: Tensors, version: int, rng: Rng, known: Collection[int]
    ) -> Mirror:
        """Return what clients hold once they have the difference to ``params``, ``version``.

        ``known`` are the versions that some client holds. Raises ``RunError`` where the difference
        is not finite.
        """
        shapes = shapes_of(self.tensors)
        with np.errstate(over="ignore", invalid="ignore"):
            change = {k: params[k] - value for k, value in self.tensors.items()}
            step = coding.encode(change, rng)
            tensors = _moved(self.tensors, coding.decode(step, shapes))
        if not is_finite(tensors):
            raise RunError(
                f"downlink: what has changed before round {version} is not finite once it is "
                "encoded; lower the optimizer's lr or the trainer's"
            )
        length = sum(body(step, coding.expected({"adapter": shapes})).sizes.values())
        steps, sizes = {**self.steps, version: step}, {**self.sizes, version: length}
        oldest, whole = min(known, default=version), 4 * size(shapes.values())
        kept, total, unpacked = list[int](), 0, 0
        for at in sorted(steps, reverse=True):
            total += sizes[at]
            unpacked += sum(v.nbytes for arrays in steps[at].values() for v in arrays.values())
            if at <= oldest or total >= whole or unpacked > 2 * whole:
                break
            kept.insert(0, at)
        return Mirror(tensors, {v: steps[v] for v in kept}, {v: sizes[v] for v in kept})

    def reaches(self, version: int) -> bool:
        """Tell whether all differences after ``version`` are there."""
        return version + 1 in self.steps

    def since(self, version: int) -> Sections:
        """Return the differences after ``version``, each array under the version it leads to."""
        found: dict[str, dict[str, NDArray[Any]]] = {}
        for at, step in self.steps.items():
            for section, arrays in step.items():
                own = found.setdefault(section, {})
                own |= {f"{at}/{k}": v for k, v in arrays.items()} if at > version else {}
        return found


def followed(coding: Coding, held: Tensors, sections: Sections, versions: Sequence[int]) -> Tensors:
    """Return what a client holds once it has the differences that lead to ``versions``.

    ``sections`` are those of :meth:`Mirror.since`. Raises ``WireError`` for any others.
    """
    shapes, steps = shapes_of(held), dict[int, dict[str, dict[str, NDArray[Any]]]]()
    for version in versions:
        steps[version] = {section: {} for section in sections}
    known = {str(version): version for version in versions}
    for section, arrays in sections.items():
        for name, value in arrays.items():
            leads_to, _, rest = name.partition("/")
            if leads_to not in known:
                raise WireError(f"array {name[:80]!r} is of no version that is missing")
            steps[known[leads_to]][section][rest] = value
    for step in steps.values():
        held = _moved(held, coding.decode(step, shapes))
    if not is_finite(held):
        raise WireError("differences do not lead to finite tensors")
    return held


def whole(sections: Sections, shapes: Shapes) -> Tensors:
    """Return what came in one piece. Raises ``WireError`` unless it is float32 of these shapes."""
    found = {name: value for arrays in sections.values() for name, value in arrays.items()}
    if {*found} != {*shapes} or any(found[k].shape != s for k, s in shapes.items()):
        raise WireError("adapter has other names or shapes than this plan's")
    if not is_float32(found):
        raise WireError("adapter is not float32, or not finite")
    return {name: found[name] for name in shapes}


def _moved(held: Tensors, change: Tensors) -> Tensors:
    with np.errstate(over="ignore", invalid="ignore"):
        return {name: value + change[name] for name, value in held.items()}
