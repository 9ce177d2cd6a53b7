"""The result as other tools take it: a PEFT folder with a model card, or a merged model."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft.durable import remove_folder, replace_folder
from fedpeft.errors import ModelError
from fedpeft.plan import Plan
from fedpeft.site import Site
from fedpeft.types import Tensors

PROVENANCE = "fedpeft.json"
"""Beside the weights: the plan's lines and the classes, for ``fedpeft eval`` and ``predict``."""


def write_adapter(
    path: Path,
    plan: Plan,
    site: Site,
    tensors: Tensors,
    card: str,
) -> None:
    """Write the adapter folder in the place of ``path``; a reader sees the old one or the new.

    ``card`` is its model card.
    """
    temporary = path.with_name(f".{path.name}.new")
    remove_folder(temporary)
    temporary.mkdir(parents=True)
    solid = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    plan.adapter.export(site.base, solid, temporary)
    about = {"lines": plan.lines(), "classes": list(site.federation.classes)}
    (temporary / PROVENANCE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    (temporary / "README.md").write_text(card, encoding="utf-8")
    replace_folder(path, temporary, "adapter")


def read_tensors(folder: Path) -> Tensors:
    """Return the tensors of an exported folder, whatever its adapter."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from fedpeft.adapters._peft_folder import PREFIX
    from fedpeft.models._outline import named_as_loaded

    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ModelError(f"{folder}: no weights in it")
    try:
        held = {k.removeprefix(PREFIX): v for path in paths for k, v in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{folder}: its weights are damaged ({error})") from None
    return named_as_loaded(held, folder)


def provenance(folder: Path) -> dict[str, Any]:
    """Return the plan's lines and classes of an exported folder. Raises ``ModelError``."""
    try:
        return dict(json.loads((folder / PROVENANCE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ModelError(
            f"{folder}: no {PROVENANCE} in it; give a run or the adapter folder of a run"
        ) from None
    except ValueError:
        raise ModelError(f"{folder / PROVENANCE}: not JSON") from None


def merge(adapter: Path, out: Path) -> None:
    """Fold an adapter into its base and write a ``transformers`` model folder.

    Raises ``ModelError`` where ``out`` exists.
    """
    import torch
    from peft import PeftModel

    from fedpeft.models._base import load_base

    if out.exists():
        raise ModelError(f"{out}: exists; choose another --out")
    about = provenance(adapter)
    plan = Plan.from_lines(about["lines"])
    classes = tuple(about["classes"])
    base = load_base.__wrapped__(plan.model, plan.task.head, classes, "cpu")  # ours, to be edited
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=out.parent, prefix=".merge-") as temporary,
        torch.no_grad(),
    ):
        target = Path(temporary) / "model"
        if (adapter / "adapter_config.json").is_file():
            model = PeftModel.from_pretrained(base.model, str(adapter)).merge_and_unload()
            model.save_pretrained(target)
        else:
            plan.adapter.export(base, read_tensors(adapter), target)
        base.tokenizer.save_pretrained(target)
        (target / PROVENANCE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        replace_folder(out, target, "merged")


def folder_digest(folder: Path) -> str:
    """Return a digest of an adapter folder's weights and configuration."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.suffix == ".safetensors" or path.name.endswith("config.json"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
