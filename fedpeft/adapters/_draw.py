"""What the factors and heads of LoRA start with."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import numpy as np

from fedpeft.types import Rng

Init: TypeAlias = Literal["kaiming", "orthonormal", "gaussian"]


def factor(name: str) -> str:
    """Return ``A`` or ``B`` for a factor, nothing for any other tensor."""
    return {"lora_A.weight": "A", "lora_B.weight": "B"}.get(".".join(name.split(".")[-2:]), "")


def start(name: str, shape: tuple[int, ...], rng: Rng, init: Init, drawn: str) -> np.ndarray:
    """Draw the factor ``drawn`` and the weight of a head; all else starts at zero."""
    kind = factor(name)
    if kind not in ("", drawn) or name.endswith("bias"):
        return np.zeros(shape, np.float32)
    if not kind:
        return (0.02 * rng.standard_normal(shape)).astype(np.float32)
    if kind == "B":
        return np.ascontiguousarray(_rows(rng, (shape[1], shape[0]), init).T)
    return _rows(rng, shape, init)


def _rows(rng: Rng, shape: tuple[int, ...], init: Init) -> np.ndarray:
    if init == "gaussian":
        return (rng.standard_normal(shape) / shape[0]).astype(np.float32)
    if init == "orthonormal":
        basis, upper = np.linalg.qr(rng.standard_normal(shape[::-1]))
        return np.ascontiguousarray((basis * np.sign(np.diag(upper))).T, np.float32)
    limit = 1 / math.sqrt(shape[1])
    return rng.uniform(-limit, limit, shape).astype(np.float32)
