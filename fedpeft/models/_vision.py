"""What the files of vision models say about the loaded model. Needs no torch.

Files keep the names of a model's first release, and ``transformers`` 5 renames them on loading.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fedpeft.types import Shapes

_ATTENTION = (
    (r"\battention\.(attention|self)\.query\b", "attention.q_proj"),
    (r"\battention\.(attention|self)\.key\b", "attention.k_proj"),
    (r"\battention\.(attention|self)\.value\b", "attention.v_proj"),
    (r"\battention\.output\.dense\b", "attention.o_proj"),
)
_DENSE = ((r"\bintermediate\.dense\b", "mlp.fc1"), (r"\boutput\.dense\b", "mlp.fc2"))
_VIT = ((r"\bencoder\.layer\.", "layers."), *_ATTENTION, *_DENSE)
_TABLE = r"\battention\.self\.relative_position_bias_table\b"
_RENAMED: Mapping[str, tuple[tuple[str, str], ...]] = {
    "vit": _VIT,
    "deit": _VIT,
    "vit_msn": _VIT,
    "ijepa": _VIT,
    "dinov2": _ATTENTION,
    "swin": (
        *_ATTENTION,
        *_DENSE,
        (_TABLE, "attention.relative_position_bias.relative_position_bias_table"),
    ),
    "convnext": (),
}
"""Architecture to patterns of names in its files and what they become, one after the other."""
_FIXED = ("vit", "deit", "vit_msn", "ijepa")
"""Architectures that take images of one size only."""
_PREFIXES = {"vit_msn": "vit"}
"""Where the encoder's name in a classifier is not that of the architecture."""
_ENCODER = ("embeddings", "encoder", "layers", "layernorm", "pooler")
_IDLE = ("pooler", "decoder", "lm_head")
"""Parts of pretraining that a classifier does not load."""


def loaded_name(name: str, config: Mapping[str, Any]) -> str:
    """Return what the loaded classifier calls the tensor ``name`` of a file.

    That is the same name where it is not known to be another, as with models of text.
    """
    kind = str(config.get("model_type"))
    if kind not in _RENAMED:
        return name
    for pattern, target in _RENAMED[kind]:
        name = re.sub(pattern, target, name)
    inside = name.split(".")[0] in _ENCODER
    return f"{_PREFIXES.get(kind, kind)}.{name}" if inside else name


def loaded_tensors(tensors: Shapes, config: Mapping[str, Any]) -> Shapes:
    """Return the tensors of a file that a classifier loads, by the names that it gives them."""
    masks = config.get("model_type") in _FIXED  # others replace patches in classifiers, too
    named = {loaded_name(name, config): shape for name, shape in tensors.items()}
    found = {}
    for name, shape in named.items():
        parts = name.split(".")
        if not (set(parts[:2]) & set(_IDLE) or (masks and parts[-1] == "mask_token")):
            found[name] = shape
    return found


def head_shapes(config: Mapping[str, Any], classes: int) -> tuple[Shapes, bool]:
    """Return a classifier's head for ``classes`` labels, and whether it is known to be this."""
    kind = str(config.get("model_type"))
    width = int((config.get("hidden_sizes") or [config.get("hidden_size") or 0])[-1])
    names = ["classifier"]
    if "DeiTForImageClassificationWithTeacher" in (config.get("architectures") or ()):
        names = ["cls_classifier", "distillation_classifier"]
    if kind == "dinov2":
        width *= 2  # of the class token beside the mean of the patches
    if kind == "swin":
        width = int(config["embed_dim"]) << (len(config["depths"]) - 1)
    known = kind in _RENAMED and not config.get("use_swiglu_ffn")
    shapes = {"weight": (classes, width), "bias": (classes,)}
    return {f"{name}.{part}": shape for name in names for part, shape in shapes.items()}, known


def image_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the only (height, width) that a model takes; ``None`` where it takes others."""
    given = config.get("image_size")
    if config.get("model_type") not in _FIXED or not given:
        return None
    height, width = (given, given) if isinstance(given, int) else given
    return int(height), int(width)
