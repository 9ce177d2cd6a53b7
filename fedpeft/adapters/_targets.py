"""Which modules an adapter wraps."""

from __future__ import annotations

from fedpeft.errors import ModelError
from fedpeft.models._outline import Outline

ATTENTION = (
    *("query", "value", "q_proj", "v_proj", "q_lin", "v_lin", "query_proj", "value_proj"),
    *("attn.q", "attn.v", "c_attn", "query_key_value", "qkv_proj", "Wqkv"),
)
"""The query and value projections by the names that architectures give them; fused ones whole."""


def named(targets: str) -> tuple[str, ...]:
    """Return the names in a list with commas."""
    return tuple(part.strip() for part in targets.split(",") if part.strip())


def modules(outline: Outline, targets: str) -> list[str]:
    """Return the paths of the wrapped modules. Raises ``ModelError`` for an idle target."""
    if targets == "all-linear":
        return sorted(outline.linear)
    wanted = ATTENTION if targets == "attention" else named(targets)
    fits = {w: [m for m in outline.linear if ("." + m).endswith("." + w)] for w in wanted}
    found = {m for modules in fits.values() for m in modules}
    idle = [w for w, modules in fits.items() if not modules]
    if not found or (idle and targets != "attention"):
        last = sorted({m.rpartition(".")[2] for m in outline.linear})
        word = targets if not found else idle[0]
        raise ModelError(
            f"lora: targets={word!r} matches no linear module; this model has {', '.join(last)}"
        )
    return sorted(found)
