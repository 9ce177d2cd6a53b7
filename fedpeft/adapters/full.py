"""Every parameter of the model trains and travels (McMahan et al. 2017, arXiv 1602.05629)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from fedpeft.errors import ModelError
from fedpeft.models._outline import Outline, named_as_loaded
from fedpeft.rng import derive
from fedpeft.spec import method
from fedpeft.types import Attached, Roles, Shapes, Stacked, Tensors

if TYPE_CHECKING:
    from fedpeft.models._base import Base


@method
class Full:
    """No adapter: the model itself. Clients train one at a time."""

    max_group: ClassVar[int | None] = 1
    offers: ClassVar[Mapping[str, str]] = {
        "one-factor": "the weights themselves move: nothing that moves multiplies them"
    }

    def shapes(self, outline: Outline) -> Shapes:
        """Return every parameter; tied ones once."""
        return outline.parameters

    def roles(self, shapes: Shapes, round: int) -> Roles:
        """Everything trains and travels."""
        everything = frozenset(shapes)
        return Roles(train=everything, down=everything, up=everything)

    def initial(self, base: Base, shapes: Shapes, seed: int) -> Tensors:
        """Copy the pretrained parameters; a new head is drawn by name."""
        new = base.missing
        return {k: _new(k, s, seed) if k in new else base.parameter(k) for k, s in shapes.items()}

    def attach(self, base: Base) -> Attached:
        """Call the model as a function of its parameters."""
        from fedpeft.adapters._functional import Functional

        return Functional(base)

    def precondition(self, fixed: Stacked) -> Stacked:
        """Nothing is fixed."""
        return {}

    def after_fit(self, trained: Tensors, received: Tensors, round: int) -> Tensors:
        """What was trained is what counts."""
        return trained

    def export(self, base: Base, tensors: Tensors, folder: Path) -> None:
        """Write a ``transformers`` model folder."""
        import torch

        state = {k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}
        base.save_pretrained(folder, state)

    def restore(self, folder: Path, shapes: Shapes) -> Tensors:
        """Read such a folder. Raises ``ModelError`` where a parameter is missing or misshapen."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = folder / "model.safetensors"
        if not path.is_file():
            raise ModelError(f"{folder}: no model.safetensors; give a model folder")
        try:
            held = {k: v.float().numpy() for k, v in load_file(path).items()}
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: cannot be read ({error})") from None
        found = named_as_loaded(held, folder)
        for name, shape in shapes.items():
            if name not in found or found[name].shape != shape:
                raise ModelError(f"{path}: {name} of shape {shape} is missing")
        return {name: found[name] for name in shapes}


def _new(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    if name.endswith("bias"):
        return np.zeros(shape, np.float32)
    values = 0.02 * derive(seed, "adapter", name).standard_normal(shape)
    return values.astype(np.float32)
