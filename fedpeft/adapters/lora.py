"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from fedpeft.adapters import _align, _claims, _draw, _folded, _peft_folder, _ranks, _targets
from fedpeft.adapters._draw import Init, factor
from fedpeft.errors import ModelError
from fedpeft.models._outline import Outline
from fedpeft.rng import derive
from fedpeft.spec import bounded, method
from fedpeft.types import Attached, Roles, Shapes, Stacked, Tensors

if TYPE_CHECKING:
    from fedpeft.models._base import Base


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
    and clients by name, ``"anna=4,ben=16,8"`` (8 for all others). With ``"1..16"`` the server draws
    one for everybody in each round, and the higher ranks rest (DyLoRA, arXiv 2210.07558, as in
    DP-DyLoRA, arXiv 2405.06368). The scale stays that of ``r``, where papers divide alpha by the
    rank: what is evaluated would be another function than what was trained.
    ``fresh`` has both factors begin anew in every round, drawn for each ``client`` or for the
    ``round``; then only their product at the end of a round counts, and the aggregator has to add
    it to the base (FLoRA, arXiv 2409.05976).
    ``align`` says how far clients turn their factors, after training, towards the ones that were
    sent (FedRot-LoRA, arXiv 2602.23638): 0 not at all, 1 all the way; to ``A`` in odd rounds, to
    ``B`` in even ones.
    """

    r: int = bounded(default=8, low=1)
    alpha: float = bounded(default=16.0, above=0)
    targets: str = "attention"
    dropout: float = bounded(default=0.0, low=0, below=1)
    train: Literal["A,B", "A", "B", "B/A"] = "A,B"
    init: Init = "kaiming"
    head: Literal["average", "local", "frozen"] = "average"
    rslora: bool = False
    send: Literal["trained", "both"] = "trained"
    local: Literal["none", "A", "B"] = "none"
    align: float = bounded(default=0.0, low=0, high=1)
    ranks: str = ""
    fresh: Literal["none", "client", "round"] = "none"

    max_group: ClassVar[int | None] = None

    def check(self) -> None:
        """Raise ``SpecError`` for fields that contradict each other."""
        _claims.check(self)

    @property
    def offers(self) -> Mapping[str, str]:
        """What an aggregator may rely on."""
        return _claims.offers(self)

    @property
    def needs(self) -> Mapping[str, str]:
        """What factors that begin anew, or rest, ask of the aggregator."""
        return _claims.needs(self)

    @property
    def refuses(self) -> Mapping[str, str]:
        """What ranks that rest cannot bear."""
        return _claims.refuses(self)

    @property
    def scale(self) -> float:
        """The factor ``s``."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    @property
    def highest_rank(self) -> int:
        """``r``: clients have it or less."""
        return self.r

    def modules(self, outline: Outline) -> list[str]:
        """Return the paths of the wrapped modules. Raises ``ModelError`` for an idle target."""
        return _targets.modules(outline, self.targets)

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

    def narrow(self, shapes: Shapes, client: str, seed: int, round: int | None) -> Shapes:
        """Return the shapes at the client's rank. Raises ``PlanError`` where it has none."""
        rank = _ranks.parse(self.ranks).of(client, seed, round) if self.ranks else self.r
        return shapes if rank == self.r else _ranks.narrowed(shapes, rank)

    def check_clients(self, names: Collection[str]) -> None:
        """Raise ``PlanError`` where ``ranks`` names others than these, or leaves one out."""
        if self.ranks:
            _ranks.parse(self.ranks).check(names)

    def roles(self, shapes: Shapes, round: int) -> Roles:
        """Heads as ``head`` says; factors as ``train``, ``send`` and ``local`` say."""
        active = self.train.split(",") if self.train != "B/A" else ["BA"[round % 2]]
        trained = {k for k in shapes if factor(k) in active}
        resting = {k for k in shapes if factor(k)} - trained
        heads = {k for k in shapes if not factor(k)}
        own = {k for k in trained if factor(k) == self.local}
        own |= heads if self.head == "local" else set()
        up = (trained | (heads if self.head == "average" else set())) - own
        down = up | (resting if self.send == "both" or self.train == "B/A" else set())
        fresh = trained | resting if self.fresh != "none" else set()
        return Roles(
            train=frozenset(up | own),
            down=frozenset(down - fresh),
            up=frozenset(up),
            local=frozenset(own),
            fresh=frozenset(fresh),
        )

    def initial(self, base: Base, shapes: Shapes, seed: int) -> Tensors:
        """Draw ``A`` (or ``B``) and a new head by name; a trained head is kept."""
        own = {k: base.parameter(k) for k in base.outline.head if k not in base.missing}
        return {k: own[k] if k in own else self._draw(k, s, seed) for k, s in shapes.items()}

    def begin(self, shapes: Shapes, round: int, client: str, seed: int) -> Tensors:
        """Draw the factors anew as ``fresh`` says."""
        if self.fresh == "none":
            return {}
        whose = (round, client) if self.fresh == "client" else (round,)
        return {k: self._draw(k, s, seed, *whose) for k, s in shapes.items() if factor(k)}

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
        """Write ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT does.

        Edits of the base are in it: the ranks grow by theirs.
        """
        whole, ranks = _folded.joined(tensors)
        fields: dict[str, Any] = {
            "r": self.r,
            "lora_alpha": int(self.alpha) if self.alpha.is_integer() else self.alpha,
            "fan_in_fan_out": _all_conv1d(base, self.modules(base.outline)),
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "target_modules": self.modules(base.outline),
            **_folded.patterns(ranks, self.scale, rslora=self.rslora),
        }
        _peft_folder.write(folder, base, "LORA", fields, whole)

    def restore(self, folder: Path, shapes: Shapes) -> Tensors:
        """Read such a folder. Raises ``ModelError`` where rank, scale or modules differ."""
        config = _peft_folder.read_config(folder)
        if config.get("rank_pattern"):
            raise ModelError(
                f"{folder}: holds modules of several ranks, as a run leaves them that edits the "
                "base; merge it, and start from the merged model"
            )
        held = {k: config.get(k) for k in ("peft_type", "r", "lora_alpha", "use_rslora")}
        mine = dict(zip(held, ("LORA", self.r, self.alpha, self.rslora), strict=True))
        if wrong := [k for k in held if (held[k] or False) != mine[k]]:
            told = ", ".join(f"{k}={held[k]}, the plan says {mine[k]}" for k in wrong)
            raise ModelError(f"{folder}: holds {told}; make the adapter line agree")
        if special := [k for k in ("alpha_pattern", "use_dora") if config.get(k)]:
            raise ModelError(f"{folder}: uses {special[0]}, which this adapter does not have")
        return _peft_folder.read(folder, shapes)

    def _draw(self, name: str, shape: tuple[int, ...], seed: int, *whose: int | str) -> np.ndarray:
        rng, drawn = derive(seed, "adapter", name, *whose), "B" if self.train == "A" else "A"
        return _draw.start(name, shape, rng, self.init, drawn)


def _all_conv1d(base: Base, modules: list[str]) -> bool:
    """Tell whether the weights lie transposed, [in, out], as in GPT-2."""
    from transformers.pytorch_utils import Conv1D

    return all(isinstance(base.model.get_submodule(m), Conv1D) for m in modules)
