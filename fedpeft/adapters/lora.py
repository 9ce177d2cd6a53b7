"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from fedpeft.adapters import _peft_folder
from fedpeft.errors import ModelError, SpecError
from fedpeft.models._outline import Outline
from fedpeft.rng import derive
from fedpeft.spec import bounded, method
from fedpeft.types import Attached, Rng, Roles, Shapes, Tensors

if TYPE_CHECKING:
    from fedpeft.models._base import Base

ATTENTION = (
    *("query", "value", "q_proj", "v_proj", "q_lin", "v_lin", "query_proj", "value_proj"),
    *("attn.q", "attn.v", "c_attn", "query_key_value", "qkv_proj", "Wqkv"),
)
"""The query and value projections by the names that architectures give them; fused ones whole."""


@method
class Lora:
    """``h = W x + s B A x`` with ``A`` [r, in], ``B`` [out, r] and ``s = alpha / r``.

    ``targets`` are module names as PEFT takes them (separated by commas), ``"all-linear"``, or
    ``"attention"`` for the query and value projections. ``train`` names the factors that train and
    travel; the others are frozen at their start, equal on every side. ``init`` draws ``A``:
    ``kaiming`` as PEFT, ``orthonormal`` rows (arXiv 2402.16842) or ``gaussian`` with deviation 1/r;
    ``B`` starts at zero. With ``train="A"`` it is the other way round, ``B`` drawn as the transpose
    of an ``A``: beside a ``B`` frozen at zero nothing could move.
    ``head`` says what becomes of a classification head: ``average`` it like the adapter, keep it
    ``local``, or leave it ``frozen``. ``rslora`` scales by alpha / sqrt(r) (arXiv 2312.03732).
    """

    r: int = bounded(default=8, low=1)
    alpha: float = bounded(default=16.0, above=0)
    targets: str = "attention"
    dropout: float = bounded(default=0.0, low=0, below=1)
    train: Literal["A,B", "A", "B"] = "A,B"
    init: Literal["kaiming", "orthonormal", "gaussian"] = "kaiming"
    head: Literal["average", "local", "frozen"] = "average"
    rslora: bool = False

    offers: ClassVar[Mapping[str, str]] = {"stacked": "many clients share one pass"}

    def check(self) -> None:
        """Raise ``SpecError`` for an empty list of targets."""
        if not _split(self.targets):
            raise SpecError("lora: targets='' names no module; try 'attention' or 'all-linear'")

    @property
    def scale(self) -> float:
        """The factor ``s``."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def modules(self, outline: Outline) -> list[str]:
        """Return the paths of the wrapped modules. Raises ``ModelError`` for an idle target."""
        if self.targets == "all-linear":
            return sorted(outline.linear)
        wanted = ATTENTION if self.targets == "attention" else _split(self.targets)
        fits = {w: [m for m in outline.linear if ("." + m).endswith("." + w)] for w in wanted}
        found = {m for modules in fits.values() for m in modules}
        idle = [w for w, modules in fits.items() if not modules]
        if not found or (idle and self.targets != "attention"):
            last = sorted({m.rpartition(".")[2] for m in outline.linear})
            word = self.targets if not found else idle[0]
            raise ModelError(
                f"lora: targets={word!r} matches no linear module; this model has {', '.join(last)}"
            )
        return sorted(found)

    def shapes(self, outline: Outline) -> Shapes:
        """Return ``<module>.lora_A.weight``, ``<module>.lora_B.weight`` and the head's tensors."""
        found: dict[str, tuple[int, ...]] = {}
        for module in self.modules(outline):
            out, width = outline.linear[module]
            if self.r > min(out, width):
                raise ModelError(f"lora: r={self.r} exceeds {module} ({out} x {width})")
            found[f"{module}.lora_A.weight"] = (self.r, width)
            found[f"{module}.lora_B.weight"] = (out, self.r)
        return {**found, **outline.head}

    def roles(self, shapes: Shapes, round: int) -> Roles:
        """The same in every round."""
        factors = {k for k in shapes if _factor(k) in self.train.split(",")}
        heads = {k for k in shapes if not _factor(k)}
        shared = frozenset(factors | (heads if self.head == "average" else set()))
        own = frozenset(heads if self.head == "local" else set())
        return Roles(train=shared | own, down=shared, up=shared, local=own)

    def initial(self, base: Base, shapes: Shapes, seed: int) -> Tensors:
        """Draw ``A`` (or ``B``) and a new head by name; a trained head is kept."""
        own = {k: base.parameter(k) for k in base.outline.head if k not in base.missing}
        return {k: own[k] if k in own else self._draw(k, s, seed) for k, s in shapes.items()}

    def attach(self, base: Base) -> Attached:
        """Hook the low-rank products and the head into ``base``."""
        from fedpeft.adapters._stacked import StackedLora

        return StackedLora(base, self.modules(base.outline), self.scale, self.dropout)

    def export(self, base: Base, tensors: Tensors, folder: Path) -> None:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT does."""
        fields: dict[str, Any] = {
            "r": self.r,
            "lora_alpha": int(self.alpha) if self.alpha.is_integer() else self.alpha,
            "fan_in_fan_out": _all_conv1d(base, self.modules(base.outline)),
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "target_modules": self.modules(base.outline),
        }
        _peft_folder.write(folder, base, "LORA", fields, tensors)

    def restore(self, folder: Path, shapes: Shapes) -> Tensors:
        """Read such a folder. Raises ``ModelError`` where rank, scale or modules differ."""
        config = _peft_folder.read_config(folder)
        held = {k: config.get(k) for k in ("peft_type", "r", "lora_alpha", "use_rslora")}
        mine = dict(zip(held, ("LORA", self.r, self.alpha, self.rslora), strict=True))
        if wrong := [k for k in held if (held[k] or False) != mine[k]]:
            told = ", ".join(f"{k}={held[k]}, the plan says {mine[k]}" for k in wrong)
            raise ModelError(f"{folder}: holds {told}; make the adapter line agree")
        if special := [k for k in ("alpha_pattern", "rank_pattern", "use_dora") if config.get(k)]:
            raise ModelError(f"{folder}: uses {special[0]}, which this adapter does not have")
        return _peft_folder.read(folder, shapes)

    def _draw(self, name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
        rng, factor = derive(seed, "adapter", name), _factor(name)
        drawn = "B" if self.train == "A" else "A"
        if factor not in ("", drawn) or name.endswith("bias"):
            return np.zeros(shape, np.float32)
        if not factor:
            return (0.02 * rng.standard_normal(shape)).astype(np.float32)
        if factor == "B":
            return np.ascontiguousarray(self._rows(rng, (shape[1], shape[0])).T)
        return self._rows(rng, shape)

    def _rows(self, rng: Rng, shape: tuple[int, ...]) -> np.ndarray:
        if self.init == "gaussian":
            return (rng.standard_normal(shape) / self.r).astype(np.float32)
        if self.init == "orthonormal":
            basis, upper = np.linalg.qr(rng.standard_normal(shape[::-1]))
            return np.ascontiguousarray((basis * np.sign(np.diag(upper))).T, np.float32)
        limit = 1 / math.sqrt(shape[1])
        return rng.uniform(-limit, limit, shape).astype(np.float32)


def _all_conv1d(base: Base, modules: list[str]) -> bool:
    """Tell whether the weights lie transposed, [in, out], as in GPT-2."""
    from transformers.pytorch_utils import Conv1D

    return all(isinstance(base.model.get_submodule(m), Conv1D) for m in modules)


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _factor(name: str) -> str:
    return {"lora_A.weight": "A", "lora_B.weight": "B"}.get(".".join(name.split(".")[-2:]), "")
