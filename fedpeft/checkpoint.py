"""The whole server state as one file: complete and checked, or refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from fedpeft.errors import RunError
from fedpeft.evaluation import Best
from fedpeft.folds import Fold
from fedpeft.last_updates import LastUpdates
from fedpeft.learned import Learned
from fedpeft.mirror import Mirror
from fedpeft.releases import Coins
from fedpeft.state import ServerState
from fedpeft.tensor_file import read_tensor_file, write_tensor_file
from fedpeft.tensors import prefixed, select
from fedpeft.turns import Turns
from fedpeft.types import Flight, Tensors

KEPT = 2
"""Checkpoints kept: the newest, and one before it in case the newest is damaged.

Under secret coins ``RunFolder.save`` keeps one: the older has the key of noise that was released.
"""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state after a round, the best adapter so far and the round's ledger line.

    ``clock`` is when the round was over, ``flying`` whose replies the next one waits for.
    ``turns`` is how often each client was asked, where that is limited, and ``over`` why there are
    no further rounds. ``replied`` is who took part in it and ``course`` what of it the plan does
    not decide; they are not kept.
    """

    state: ServerState
    best: Best = field(default_factory=Best)
    best_params: Tensors = field(default_factory=dict)
    line: Mapping[str, Any] = field(default_factory=dict)
    clock: float = 0.0
    flying: Sequence[Flight] = ()
    turns: Turns = field(default_factory=dict)
    over: str = ""
    replied: Sequence[str] = ()
    course: Mapping[str, Any] = field(default_factory=dict)


def save_checkpoint(folder: Path, checkpoint: Checkpoint, digest: str) -> None:
    """Write ``state-<round>.safetensors`` and drop all but the newest two."""
    state = checkpoint.state
    tensors = {
        **prefixed("params", state.params),
        **prefixed("slots", state.slots),
        **prefixed("control", state.control),
        **prefixed("fold", state.fold.tensors),
        **prefixed("kept", state.kept),
        **prefixed("once", state.once),
        **prefixed("mirror", state.mirror.tensors),
        **_flat(state.mirror),
        **prefixed("learned", state.learned.scalars),
        **prefixed("last", state.last.total),
        **prefixed("best", checkpoint.best_params),
        **{k: v for at, old in state.past.items() for k, v in prefixed(f"past/{at}", old).items()},
    }
    note = {
        "digest": digest,
        "round": state.round,
        "acks": dict(state.acks),
        "learned": list(state.learned.clients),
        "last": list(state.last.clients),
        "fold": [[round, *ranks] for round, ranks in state.fold.ranks.items()],
        "steps": [[v, state.mirror.sizes[v], *step] for v, step in state.mirror.steps.items()],
        "best": asdict(checkpoint.best),
        "line": dict(checkpoint.line),
        "clock": checkpoint.clock,
        "flying": [astuple(flight) for flight in checkpoint.flying],
        "past": list(state.past),
        "turns": dict(checkpoint.turns),
        "over": checkpoint.over,
    }
    private = bool(state.coins.key)
    if private:
        note["coins"] = {"key": state.coins.key.hex(), "clip": state.coins.clip}
    path = folder / f"state-{state.round:06d}.safetensors"
    write_tensor_file(path, tensors, note, "checkpoint", private=private)
    drop_old(folder)


def drop_old(folder: Path, kept: int = KEPT) -> None:
    """Delete all but the newest checkpoints; a kill may have come before that was done."""
    for old in sorted(folder.glob("state-*.safetensors"))[:-kept]:
        old.unlink()


def load_checkpoint(folder: Path, digest: str) -> Checkpoint | None:
    """Return the newest checkpoint; ``None`` where there is none.

    Raises ``RunError`` where it is cut short or damaged, or belongs to another plan.
    """
    paths = sorted(folder.glob("state-*.safetensors"))
    if not paths:
        return None
    path, remedy = paths[-1], "start again in another folder"
    if len(paths) > 1:
        remedy = f"delete it to resume from {paths[-2].name}"
    tensors, note = read_tensor_file(path, remedy)
    if note["digest"] != digest:
        raise RunError(f"{path}: belongs to another plan; {remedy}")
    names = ("params", "slots", "control", "best", "fold", "kept", "once")
    params, slots, control, best, edits, kept, once = (select(tensors, name) for name in names)
    fold = Fold(edits, {round: ranks for round, *ranks in note.get("fold", [])})
    mirror, known = Mirror(select(tensors, "mirror")), note.get("steps", [])
    if known:
        steps = {v: {s: select(tensors, f"step/{v}/{s}") for s in own} for v, _, *own in known}
        mirror = replace(mirror, steps=steps, sizes={v: length for v, length, *_ in known})
    learned = Learned(tuple(note.get("learned", ())), select(tensors, "learned"))
    past = {at: select(tensors, f"past/{at}") for at in note.get("past", [])}
    acks, round = note["acks"], note["round"]
    last = LastUpdates(tuple(note.get("last", ())), select(tensors, "last"))
    told = note.get("coins", {})
    coins = Coins(bytes.fromhex(told["key"]), told["clip"]) if told else Coins()
    state = ServerState(
        params, slots, control, acks, round, fold, kept, once, mirror, learned, last, past, coins
    )
    flying = [Flight(*told) for told in note.get("flying", [])]
    clock, turns, over = note.get("clock", 0.0), note.get("turns", {}), note.get("over", "")
    return Checkpoint(state, Best(**note["best"]), best, note["line"], clock, flying, turns, over)


def _flat(mirror: Mirror) -> Tensors:
    """Return the arrays of the differences, each under its version and section."""
    found: dict[str, NDArray[Any]] = {}
    for version, step in mirror.steps.items():
        for section, arrays in step.items():
            found |= prefixed(f"step/{version}/{section}", arrays)
    return found
