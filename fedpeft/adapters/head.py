"""A linear probe: only the head of a classifier trains (Alain, Bengio 2016, arXiv 1610.01644)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from fedpeft.adapters._draw import start
from fedpeft.errors import ModelError
from fedpeft.models._outline import Outline
from fedpeft.rng import derive
from fedpeft.spec import method
from fedpeft.types import Attached, Roles, Shapes, Stacked, Tensors

if TYPE_CHECKING:
    import torch

    from fedpeft.models._base import Base

_DUMMY = "dummy-target-modules"
"""PEFT's word for an adapter that wraps no module."""


@method
class Head:
    """The base stays as it is, so each record goes through it once.

    What goes into the head, a record's features, is kept beside the tokens
    (``$FEDPEFT_CACHE/tokens``) and never computed again: a step costs one small matrix product. For
    models whose head is one linear layer on one vector per record.
    """

    max_group: ClassVar[int | None] = None
    offers: ClassVar[Mapping[str, str]] = {
        "one-factor": "the weights themselves move: nothing that moves multiplies them",
        "features": "one linear layer trains, on one vector per record",
    }
    needs: ClassVar[Mapping[str, str]] = {
        "labels": "trains a classification head, and this task has none; use adapter: lora"
    }

    highest_rank: ClassVar[int] = 0

    def shapes(self, outline: Outline) -> Shapes:
        """Return the head's weight and bias. Raises ``ModelError`` where it is no single layer."""
        _module(outline)
        return outline.head

    def roles(self, shapes: Shapes, round: int) -> Roles:
        """Everything trains and travels."""
        everything = frozenset(shapes)
        return Roles(train=everything, down=everything, up=everything)

    def initial(self, base: Base, shapes: Shapes, seed: int) -> Tensors:
        """Keep a trained head; draw a new one by name."""
        new = base.missing
        drawn = {k: start(k, shapes[k], derive(seed, "adapter", k), "kaiming", "") for k in new}
        return {k: drawn[k] if k in drawn else base.parameter(k) for k in shapes}

    def attach(self, base: Base) -> Attached:
        """Hook the head into ``base``."""
        from fedpeft.adapters._probe import Probe

        return Probe(base, _module(base.outline))

    def features(self, base: Base, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return what goes into the head [b, d]. Raises ``ModelError`` for other shapes."""
        from fedpeft.adapters._probe import features

        return features(base, _module(base.outline), inputs)

    def precondition(self, fixed: Stacked) -> Stacked:
        """Nothing is fixed."""
        return {}

    def after_fit(self, trained: Tensors, received: Tensors, round: int) -> Tensors:
        """What was trained is what counts."""
        return trained

    def export(self, base: Base, tensors: Tensors, folder: Path) -> None:
        """Write a PEFT folder that wraps no module and brings the head."""
        from fedpeft.adapters import _peft_folder

        _peft_folder.write(folder, base, "LORA", {"target_modules": _DUMMY}, tensors)

    def restore(self, folder: Path, shapes: Shapes) -> Tensors:
        """Read such a folder. Raises ``ModelError`` where it does not fit."""
        from fedpeft.adapters import _peft_folder

        if _peft_folder.read_config(folder).get("target_modules") != _DUMMY:
            raise ModelError(f"{folder}: holds more than a head; use the adapter it was made with")
        return _peft_folder.read(folder, shapes)


def _module(outline: Outline) -> str:
    """Return the path of the head. Raises ``ModelError`` where it is not one layer at the end."""
    modules = sorted({name.rpartition(".")[0] for name in outline.head})
    if len(modules) != 1 or modules == ["score"]:
        found = ", ".join(modules) or "none"
        why = "; this one is applied before pooling" if modules == ["score"] else ""
        raise ModelError(
            f"head: the model must have a head of one linear layer, and its head is {found}{why}; "
            "use adapter: lora"
        )
    return modules[0]
