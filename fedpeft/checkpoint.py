"""The whole server state as one safetensors file: complete and checked, or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedpeft.durable import replace_file
from fedpeft.errors import RunError
from fedpeft.evaluation import Best
from fedpeft.rounds import ServerState
from fedpeft.tensors import prefixed, select
from fedpeft.types import Tensors

KEPT = 2
"""Checkpoints kept: the newest, and one before it in case the newest is damaged."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state after a round, the best adapter so far and the round's ledger line."""

    state: ServerState
    best: Best = field(default_factory=Best)
    best_params: Tensors = field(default_factory=dict)
    line: Mapping[str, Any] = field(default_factory=dict)


def save_checkpoint(folder: Path, checkpoint: Checkpoint, digest: str) -> None:
    """Write ``state-<round>.safetensors`` and drop all but the newest two."""
    state = checkpoint.state
    tensors = {
        **prefixed("params", state.params),
        **prefixed("slots", state.slots),
        **prefixed("control", state.control),
        **prefixed("best", checkpoint.best_params),
    }
    # safetensors takes the buffer as it lies, so a transposed view would be written scrambled
    solid = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    about = {
        "digest": digest,
        "round": state.round,
        "acks": dict(state.acks),
        "best": asdict(checkpoint.best),
        "line": dict(checkpoint.line),
        "checksum": _checksum(solid),
    }
    path = folder / f"state-{state.round:06d}.safetensors"
    replace_file(path, [save(solid, {"fedpeft": json.dumps(about)})], "checkpoint")
    for old in sorted(folder.glob("state-*.safetensors"))[:-KEPT]:
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
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {})["fedpeft"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise RunError(f"{path}: cut short or damaged ({error}); {remedy}") from None
    if about["checksum"] != _checksum(tensors):
        raise RunError(f"{path}: its checksum does not match; {remedy}")
    if about["digest"] != digest:
        raise RunError(f"{path}: belongs to another plan")
    parts = {name: select(tensors, name) for name in ("params", "slots", "control", "best")}
    state = ServerState(
        parts["params"], parts["slots"], parts["control"], about["acks"], about["round"]
    )
    return Checkpoint(state, Best(**about["best"]), parts["best"], about["line"])


def _checksum(tensors: Tensors) -> str:
    digest = xxhash.xxh3_64()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
