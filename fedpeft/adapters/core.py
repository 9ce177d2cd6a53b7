"""Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private)
Federated LoRA Fine-Tuning (Singhal et al. 2025, arXiv 2502.15436).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedpeft.adapters import _frozen, _peft_folder
from fedpeft.adapters.lora import Lora
from fedpeft.errors import ModelError, SpecError
from fedpeft.models._outline import Outline
from fedpeft.rng import derive
from fedpeft.spec import bounded, method
from fedpeft.types import Attached, Roles, Shapes, Stacked, Tensors

if TYPE_CHECKING:
    from fedpeft.models._base import Base

FILE = "core.safetensors"
"""Beside PEFT's files: what the product ``B R`` in them no longer tells apart."""
_A, _B, _CORE, _SCALE = _frozen.A, _frozen.B, _frozen.CORE, _frozen.SCALE
_START = {"orthonormal": 0.0, "svd": 1e-5, "gradient": 0.0}
"""Standard deviation of ``R`` before round 0; LoRA-XS has the second."""
_Array: TypeAlias = NDArray[np.float32]


@method
class Core:
    """``h = W x + s B R A x``: ``R`` [r, r] trains and travels; ``B`` and ``A`` never do either.

    Both frozen factors follow from the plan on every side, so the mean of ``R`` is exactly the mean
    of the products. ``init`` says what they are: ``orthonormal`` draws them and ``R`` starts at
    zero; ``svd`` takes the leading singular vectors of ``W`` and ``R`` starts at N(0, 1e-5^2)
    (LoRA-XS, arXiv 2405.17604), whose released code also leaves the singular values in ``A``:
    ``sigma_to="A"``. A decomposition in float64 of every wrapped module takes O(m n min(m, n))
    operations, once in each process. ``gradient`` takes those of a first step of sign descent of
    length ``step`` on the first ``records`` training records of the data line ``public``, and ``R``
    starts at their singular values, so that the product is that step (LoRA-SB, arXiv 2411.19557).
    Fed-SB's released code takes the clients' own records for it, which its privacy does not count.
    Only the server reads ``public``; clients are sent both factors once.

    With ``heads`` = h the factors have h r columns and rows, and ``R`` is h blocks [h, r, r], each
    between its own columns of ``B`` and rows of ``A``. ``scales="trained"`` multiplies every block
    by a number that starts at one in each round, trains, and is multiplied into what is sent
    (RAVAN, arXiv 2506.05568). ``scale`` is ``s``. ``targets``, ``dropout`` and ``head`` are those
    of ``lora``.
    """

    r: int = bounded(default=16, low=1)
    heads: int = bounded(default=1, low=1)
    scale: float = bounded(default=1.0, above=0)
    targets: str = "attention"
    dropout: float = bounded(default=0.0, low=0, below=1)
    init: Literal["orthonormal", "svd", "gradient"] = "orthonormal"
    sigma_to: Literal["none", "A"] = "none"
    scales: Literal["fixed", "trained"] = "fixed"
    head: Literal["average", "local", "frozen"] = "average"
    public: str = ""
    records: int = bounded(default=64, low=1)
    step: float = bounded(default=1e-5, above=0)

    max_group: ClassVar[int | None] = None

    def check(self) -> None:
        """Raise ``SpecError`` for fields that contradict each other."""
        with _named():
            self._lora.check()
        if self.sigma_to != "none" and self.init != "svd":
            raise SpecError(
                f"core: sigma_to={self.sigma_to!r} needs singular values: set init='svd' instead "
                f"of {self.init!r}"
            )
        if (self.init == "gradient") != bool(self.public):
            raise SpecError(
                f"core: init={self.init!r} with public={self.public!r}: the gradient is that of "
                "public records, so give init='gradient' and a data line, or neither"
            )
        if self.init == "gradient" and (self.heads > 1 or self.scales == "trained"):
            raise SpecError(
                "core: init='gradient' starts R at singular values, which is of one head: set "
                "heads=1 and scales='fixed'"
            )

    @property
    def offers(self) -> Mapping[str, str]:
        """What other parts must know."""
        found = {"one-factor": "R moves between factors that are common to all clients"}
        if self.scales == "trained":
            found["turned"] = "clients multiply the scales that they trained into what they send"
        return found

    @property
    def highest_rank(self) -> int:
        """That of all blocks together."""
        return self.heads * self.r

    @property
    def _lora(self) -> Lora:
        """The LoRA of equal function: ``B R`` for its ``B``."""
        rank = self.heads * self.r
        return Lora(
            r=rank,
            alpha=self.scale * rank,
            targets=self.targets,
            dropout=self.dropout,
            head=self.head,
        )

    def modules(self, outline: Outline) -> list[str]:
        """Return the paths of the wrapped modules. Raises ``ModelError`` for an idle target."""
        with _named():
            return self._lora.modules(outline)

    def shapes(self, outline: Outline) -> Shapes:
        """Return the factors, ``R`` and scales of each module, and the head's tensors."""
        rank, found = self.heads * self.r, dict[str, tuple[int, ...]]()
        for module in self.modules(outline):
            out, width = outline.linear[module]
            if rank > min(out, width):
                told = f"r={self.r}" + (f" x heads={self.heads}" if self.heads > 1 else "")
                raise ModelError(f"core: {told} exceeds {module} ({out} x {width})")
            found[module + _A] = (rank, width)
            found[module + _CORE] = (*((self.heads,) if self.heads > 1 else ()), self.r, self.r)
            if self.scales == "trained":
                found[module + _SCALE] = (self.heads,)
            found[module + _B] = (out, rank)
        return {**found, **outline.head}

    def roles(self, shapes: Shapes, round: int) -> Roles:
        """``R`` travels, scales only train; heads as ``head`` says."""
        scales = {k for k in shapes if k.endswith(_SCALE)}
        heads = {k for k in shapes if not k.endswith((_A, _B, _CORE, _SCALE))}
        own = heads if self.head == "local" else set[str]()
        up = {k for k in shapes if k.endswith(_CORE)}
        up |= heads if self.head == "average" else set()
        shared, frozen = frozenset(up), {k for k in shapes if k.endswith((_A, _B))}
        once = frozen if self.init == "gradient" else set[str]()
        return Roles(
            train=shared | scales | own,
            down=shared,
            up=shared,
            local=frozenset(own),
            once=frozenset(once),
        )

    def initial(self, base: Base, shapes: Shapes, seed: int) -> Tensors:
        """Draw or decompose the factors; a new head is drawn, a trained one kept."""
        found = dict(self._lora.initial(base, base.outline.head, seed))
        for module in self.modules(base.outline):
            a, b = self._factors(base, module, seed)
            rng = derive(seed, "adapter", module + _CORE)
            core = rng.normal(0.0, _START[self.init], shapes[module + _CORE])
            found |= {module + _A: a, module + _B: b, module + _CORE: core.astype(np.float32)}
            found[module + _SCALE] = np.ones(self.heads, np.float32)
        return {name: found[name] for name in shapes}

    def informant(self) -> tuple[str, int] | None:
        """Return the data line and how many of its training records."""
        return (self.public, self.records) if self.public else None

    def informed(self, initial: Tensors, gradients: Tensors) -> Tensors:
        """Decompose ``-step sign(gradient)`` of each module into ``B R A``."""
        found = dict(initial)
        for module, gradient in gradients.items():
            moved = -self.step / self.scale * np.sign(gradient)
            rng = derive(0, "first-step", module)
            b, s, a = _frozen.principal(moved, self.r, rng)
            named = {module + _B: b, module + _CORE: np.diag(s), module + _A: a}
            found |= {k: np.ascontiguousarray(v, np.float32) for k, v in named.items()}
        return found

    def attach(self, base: Base) -> Attached:
        """Hook the products and the head into ``base``."""
        from fedpeft.adapters._stacked import StackedLora
        from fedpeft.adapters._stacked_core import three_factors

        modules = self.modules(base.outline)
        return StackedLora(base, modules, self.scale, self.dropout, three_factors, "core")

    def precondition(self, fixed: Stacked) -> Stacked:
        """Nothing: orthonormal factors leave nothing to undo."""
        return {}

    def after_fit(self, trained: Tensors, received: Tensors, round: int) -> Tensors:
        """Multiply the scales into ``R``."""
        return _frozen.folded(trained)

    def export(self, base: Base, tensors: Tensors, folder: Path) -> None:
        """Write PEFT's folder of a LoRA of rank h r, and a file with what it does not tell."""
        from safetensors.numpy import save

        folded = _frozen.folded(tensors)
        own = {k: v for k, v in folded.items() if k.endswith((_B, _CORE, _SCALE))}
        plain = {k: v for k, v in folded.items() if not k.endswith((_CORE, _SCALE))}
        self._lora.export(base, {**plain, **_frozen.products(own)}, folder)
        (folder / FILE).write_bytes(save(own))

    def restore(self, folder: Path, shapes: Shapes) -> Tensors:
        """Read such a folder.

        Raises ``ModelError`` for a LoRA that is none of ours: its ``B`` is no ``B R``.
        """
        plain = {k: s for k, s in shapes.items() if not k.endswith((_CORE, _SCALE))}
        held = self._lora.restore(folder, plain)
        if not (folder / FILE).is_file():
            raise ModelError(
                f"{folder}: no {FILE}, so its factors are not those of a core; give a folder that "
                "adapter core exported, or make the adapter line lora(...)"
            )
        own = {k: s for k, s in shapes.items() if k.endswith((_B, _CORE, _SCALE))}
        found = _peft_folder.read(folder, own, FILE)
        for name, product in _frozen.products(found).items():
            if np.abs(product - held[name]).max() > 1e-5 * np.abs(product).max():
                raise ModelError(
                    f"{folder}: {name} is not the product of the factors in {FILE}; "
                    "one of the files was changed"
                )
        return {name: {**held, **found}[name] for name in shapes}

    def _factors(self, base: Base, module: str, seed: int) -> tuple[_Array, _Array]:
        """Return ``A`` and ``B`` of a module."""
        rank, (out, width) = self.heads * self.r, base.outline.linear[module]
        if self.init == "svd":
            b, a = _frozen.singular(_frozen.weight(base, module), rank, self.sigma_to == "A")
            return a, b
        a = _frozen.orthonormal(derive(seed, "adapter", module + _A), width, rank).T
        return np.ascontiguousarray(a), _frozen.orthonormal(
            derive(seed, "adapter", module + _B), out, rank
        )


@contextmanager
def _named() -> Iterator[None]:
    """Put this adapter's name before what ``lora`` finds wrong."""
    try:
        yield
    except (ModelError, SpecError) as error:
        raise type(error)("core" + str(error).removeprefix("lora")) from None
