"""PEFT's folder format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.errors import ModelError
from fedpeft.types import Shapes, Tensors

if TYPE_CHECKING:
    from fedpeft.models._base import Base

PREFIX = "base_model.model."
_TASKS = {"sequence-classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}
"""Heads that PEFT has a word for; it knows none for images."""


def write(
    folder: Path, base: Base, peft_type: str, fields: Mapping[str, Any], tensors: Tensors
) -> None:
    """Write the two files; head tensors go where PEFT keeps ``modules_to_save``."""
    from peft import PeftConfig, get_peft_config
    from safetensors.numpy import save

    config: PeftConfig = get_peft_config(
        {
            "peft_type": peft_type,
            "task_type": _TASKS.get(base.head_kind),
            "base_model_name_or_path": base.location.origin,
            "inference_mode": True,
            "modules_to_save": _head_modules(base) or None,
            **fields,
        }
    )
    config.save_pretrained(str(folder))
    _sort_lists(folder / "adapter_config.json")
    named = {PREFIX + name: value for name, value in tensors.items()}
    content = save(named, metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").write_bytes(content)


def read(folder: Path, shapes: Shapes, file: str = "adapter_model.safetensors") -> Tensors:
    """Return float32 tensors of these names and shapes.

    Raises ``ModelError`` naming the first tensor that is missing, unexpected or misshapen.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / file
    try:
        found = {k.removeprefix(PREFIX): v.float().numpy() for k, v in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: cannot be read ({error})") from None
    if unknown := sorted(set(found) - set(shapes)):
        raise ModelError(f"{path}: holds {unknown[0]}, which the plan's adapter does not have")
    for name, shape in shapes.items():
        if name not in found:
            raise ModelError(f"{path}: has no {name}, which the plan's adapter has")
        if found[name].shape != shape:
            raise ModelError(f"{path}: {name} is {found[name].shape}, the plan expects {shape}")
    return {name: found[name] for name in shapes}


def read_config(folder: Path) -> dict[str, Any]:
    """Return ``adapter_config.json``. Raises ``ModelError`` where there is none."""
    path = folder / "adapter_config.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ModelError(f"{folder}: not a PEFT folder (no adapter_config.json)") from None
    except ValueError:
        raise ModelError(f"{path}: not JSON") from None


def _sort_lists(path: Path) -> None:
    """Write PEFT's sets in one order, so that equal adapters are equal files."""
    config = json.loads(path.read_text(encoding="utf-8"))
    ordered = {k: sorted(v) if isinstance(v, list) else v for k, v in config.items()}
    path.write_text(json.dumps(ordered, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _head_modules(base: Base) -> list[str]:
    paths = {name.rpartition(".")[0] for name in base.outline.head}
    roots = {p.split(".")[0] if p.split(".")[0] in ("classifier", "score") else p for p in paths}
    return sorted(roots)
