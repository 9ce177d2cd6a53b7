"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from fedpeft.adapters import _align, _peft_folder, _ranks
from fedpeft.errors import ModelError, SpecError
from fedpeft.models._outline import Outline
from fedpeft.rng import derive
from fedpeft.spec import bounded, method
from fedpeft.types import Attached, Rng, Roles, Shapes, Stacked, Tensors

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
    of an ``A``: beside a ``B`` frozen at zero nothing could move. ``train="B/A"`` alternates by
    round, ``B`` first (RoLoRA, arXiv 2502.01755). ``send="both"`` sends down the factor at rest as
    well, for aggregators that replace it. ``local`` keeps a factor that trains in each client's
    memory (FedSA-LoRA, arXiv 2410.01463).
    ``head`` says what becomes of a classification head: ``average`` it like the adapter, keep it
    ``local``, or leave it ``frozen``. ``rslora`` scales by alpha / sqrt(r) (arXiv 2312.03732).
    ``ranks`` gives clients less than ``r``: the first rows of ``A`` and columns of ``B``. It lists
    ranks that are drawn by the client's name, ``"4,8,16"`` or with weights ``"4*40,8*20,16*10"``,
    and clients by name, ``"anna=4,ben=16,8"`` (8 for all others). The scale stays that of ``r`` for
    everybody: with their own, what a client is sent would be another function.
    ``align`` says how far clients turn their factors, after training, towards the ones that were
    sent (FedRot-LoRA, arXiv 2602.23638): 0 not at all, 1 all the way; to ``A`` in odd rounds, to
    ``B`` in even ones.
    """

    r: int = bounded(default=8, low=1)
    alpha: float = bounded(default=16.0, above=0)
    targets: str = "attention"
    dropout: float = bounded(default=0.0, low=0, below=1)
    train: Literal["A,B", "A", "B", "B/A"] = "A,B"
    init: Literal["kaiming", "orthonormal", "gaussian"] = "kaiming"
    head: Literal["average", "local", "frozen"] = "average"
    rslora: bool = False
    send: Literal["trained", "both"] = "trained"
    local: Literal["none", "A", "B"] = "none"
    align: float = bounded(default=0.0, low=0, high=1)
    ranks: str = ""

    max_group: ClassVar[int | None] = None

    def check(self) -> None:
        """Raise ``SpecError`` for an empty list of targets."""
        if not _split(self.targets):
            raise SpecError("lora: targets='' names no module; try 'attention' or 'all-linear'")
        if self.local != "none" and self.train != "A,B":
            raise SpecError(
                f"lora: local={self.local!r} keeps one factor while the other travels, so both "
                f"must train: set train='A,B' instead of {self.train!r}"
            )
        if self.local != "none" and self.send == "both":
            raise SpecError(f"lora: a factor cannot be local={self.local!r} and be sent to all")
        if self.align and (self.train != "A,B" or self.local != "none"):
            raise SpecError(
                f"lora: align={self.align:g} turns both factors, so both must train and travel: "
                f"set train='A,B' and local='none' instead of {self.train!r} and {self.local!r}"
            )
        if self.ranks and (most := max(_ranks.parse(self.ranks).known)) != self.r:
            raise SpecError(
                f"lora: ranks={self.ranks!r} goes up to {most}, and r={self.r} is the rank of the "
                f"whole adapter; set r={most}"
            )

    @property
    def offers(self) -> Mapping[str, str]:
        """What an aggregator may rely on."""
        both = self.local == "none" and (self.train in ("A,B", "B/A") or self.send == "both")
        found = {"both-factors": "every client is sent A and B"} if both else {}
        if self.train != "A,B":
            found["one-factor"] = "one factor moves in a round, the other is common to all clients"
        if self.train == "B":
            found["precondition"] = "a fixed A gives a matrix to multiply the gradients of B by"
        if self.ranks:
            found["mixed-ranks"] = "clients have ranks of their own"
        if self.align:
            found["turned"] = "clients turn what they trained before they send it"
        return found

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

    def narrow(self, shapes: Shapes, client: str, seed: int) -> Shapes:
        """Return the shapes at the client's rank. Raises ``PlanError`` where it has none."""
        rank = _ranks.parse(self.ranks).of(client, seed) if self.ranks else self.r
        return shapes if rank == self.r else _ranks.narrowed(shapes, rank)

    def check_clients(self, names: Collection[str]) -> None:
        """Raise ``PlanError`` where ``ranks`` names others than these, or leaves one out."""
        if self.ranks:
            _ranks.parse(self.ranks).check(names)

    def roles(self, shapes: Shapes, round: int) -> Roles:
        """Heads as ``head`` says; factors as ``train``, ``send`` and ``local`` say."""
        active = self.train.split(",") if self.train != "B/A" else ["BA"[round % 2]]
        trained = {k for k in shapes if _factor(k) in active}
        resting = {k for k in shapes if _factor(k)} - trained
        heads = {k for k in shapes if not _factor(k)}
        own = {k for k in trained if _factor(k) == self.local}
        own |= heads if self.head == "local" else set()
        up = trained | (heads if self.head == "average" else set())
        up -= own
        down = up | (resting if self.send == "both" or self.train == "B/A" else set())
        return Roles(
            train=frozenset(up | own), down=frozenset(down), up=frozenset(up), local=frozenset(own)
        )

    def initial(self, base: Base, shapes: Shapes, seed: int) -> Tensors:
        """Draw ``A`` (or ``B``) and a new head by name; a trained head is kept."""
        own = {k: base.parameter(k) for k in base.outline.head if k not in base.missing}
        return {k: own[k] if k in own else self._draw(k, s, seed) for k, s in shapes.items()}

    def attach(self, base: Base) -> Attached:
        """Hook the low-rank products and the head into ``base``."""
        from fedpeft.adapters._stacked import StackedLora

        return StackedLora(base, self.modules(base.outline), self.scale, self.dropout)

    def precondition(self, fixed: Stacked) -> Stacked:
        """Return ``(A A^T)^-1 / s^2`` for each ``B`` beside a fixed ``A`` (arXiv 2308.03303)."""
        from fedpeft.adapters import _precondition

        return _precondition.through(fixed, self.scale)

    def after_fit(self, trained: Tensors, received: Tensors, round: int) -> Tensors:
        """Turn the factors as ``align`` says."""
        if not self.align:
            return trained
        return _align.aligned(trained, received, "A" if round % 2 else "B", self.align)

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
