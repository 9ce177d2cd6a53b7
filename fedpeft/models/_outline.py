"""What a model looks like, read from its files without loading it (and without torch).

The header of a safetensors file names every tensor and its shape, which is all that a plan needs to
count parameters and bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpeft.errors import ModelError
from fedpeft.models._locate import Location, file_of, locate
from fedpeft.models._vision import head_shapes, loaded_name, loaded_tensors
from fedpeft.types import Shapes, Tensors

HEADS = (
    *("classifier", "score", "classification_head", "pre_classifier", "qa_outputs", "lm_head"),
    *("cls_classifier", "distillation_classifier"),
)
"""Names of output modules, which adapters never wrap."""
_EMBEDDINGS = re.compile(
    r"(^|[._])(embed(?!ding_hidden|dings_project)\w*|wte|wpe|\w*embeddings?|relative_attention_bias)\."
)
_PRETRAINING = (
    "cls",
    "predictions",
    "lm_predictions",
    "mask_predictions",
    "discriminator_predictions",
    "generator_predictions",
    "vocab_transform",
    "vocab_layer_norm",
    "vocab_projector",
)
"""Roots of pretraining heads, which a checkpoint may hold and a classifier does not load."""
_KNOWN = (
    "bert",
    "albert",
    "distilbert",
    "deberta-v2",
    "llama",
    "mistral",
    "qwen2",
    "gpt2",
    "gemma",
)
"""Other architectures whose classification head is known."""
_OWN_POOLING = ("roberta", "xlm-roberta", "camembert", "electra", "mpnet")
"""Architectures whose classification head pools by itself: the encoder's pooler is not loaded."""


@dataclass(frozen=True, slots=True)
class Outline:
    """The modules an adapter may touch.

    ``linear`` maps the path of each Linear or Conv1D module to (out, in) features; ``head`` and
    ``parameters`` map parameter names to shapes. ``limit`` is the longest input in tokens.
    ``exact`` is false where the head's shape had to be guessed from the configuration.
    """

    linear: Mapping[str, tuple[int, int]]
    head: Shapes
    parameters: Shapes
    limit: int
    exact: bool


def outline(model: str, head: str, classes: int) -> Outline:
    """Read the outline of ``model`` as it would be loaded for ``head`` with ``classes`` labels.

    Raises ``ModelError`` where files are missing or damaged.
    """
    location = locate(model)
    config = read_config(location)
    tensors = _tensors(location)
    shapes: Shapes = {}
    exact = True
    if head == "image-classification":
        tensors = loaded_tensors(tensors, config)
        shapes, exact = head_shapes(config, classes)
    elif head == "sequence-classification":
        tensors = {k: s for k, s in tensors.items() if not _idle(k, config)}
        shapes, exact = _head_shapes(config, classes, tensors)
    transposed = config.get("model_type") == "gpt2"
    linear = {}
    for name, shape in tensors.items():
        module = name.removesuffix(".weight")
        if module == name or len(shape) != 2 or _EMBEDDINGS.search(name + "."):
            continue
        if not is_head(module):
            linear[module] = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    own = {k: v for k, v in tensors.items() if not (shapes and is_head(k.rpartition(".")[0]))}
    return Outline(linear, shapes, {**own, **shapes}, input_limit(config), exact)


def is_head(module: str) -> bool:
    """Tell whether a module path belongs to an output head."""
    return any(part in HEADS for part in module.split("."))


def read_config(location: Location) -> dict[str, Any]:
    """Return ``config.json``."""
    path = file_of(location, "config.json")
    if path is None:
        raise ModelError(f"model {location.source!r} has no config.json")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not JSON ({error}); fetch the model again") from None
    return dict(found)


def named_as_loaded(tensors: Tensors, folder: Path) -> Tensors:
    """Return the tensors of a saved model by the names that they have once it is loaded."""
    location = Location(str(folder), str(folder), folder)
    if file_of(location, "config.json") is None:
        return tensors
    config = read_config(location)
    return {loaded_name(name, config): value for name, value in tensors.items()}


def input_limit(config: Mapping[str, Any]) -> int:
    """Return the longest input, in tokens, that the positions of the model allow."""
    positions = config.get("max_position_embeddings") or config.get("n_positions") or 2**31
    offset = ("roberta", "xlm-roberta", "camembert", "mpnet")
    reserved = 2 if config.get("model_type") in offset else 0
    return int(positions) - reserved


def _idle(name: str, config: Mapping[str, Any]) -> bool:
    """Tell whether a classifier leaves this tensor of a checkpoint alone."""
    parts = name.split(".")
    pooler = config.get("model_type") in _OWN_POOLING and "pooler" in parts
    return parts[0] in _PRETRAINING or pooler


def _head_shapes(config: Mapping[str, Any], classes: int, tensors: Shapes) -> tuple[Shapes, bool]:
    width = int(config.get("hidden_size") or config.get("n_embd") or config.get("dim") or 0)
    kind = str(config.get("model_type"))
    dense = {"weight": (width, width), "bias": (width,)}
    out = {"weight": (classes, width), "bias": (classes,)}
    if kind in _OWN_POOLING:
        named = {"classifier.dense": dense, "classifier.out_proj": out}
    elif kind == "distilbert":
        named = {"pre_classifier": dense, "classifier": out}
    elif kind in ("bert", "albert"):
        named = {"classifier": out}
        if kind == "bert" and not any(name.endswith("pooler.dense.weight") for name in tensors):
            named = {"bert.pooler.dense": dense, **named}
    elif kind == "deberta-v2":
        named = {"pooler.dense": dense, "classifier": out}
    else:  # decoders: one matrix without bias
        named = {"score": {"weight": (classes, width)}}
    known = kind in (*_OWN_POOLING, *_KNOWN)
    return {f"{m}.{p}": s for m, ps in named.items() for p, s in ps.items()}, known


def _tensors(location: Location) -> Shapes:
    index = file_of(location, "model.safetensors.index.json")
    files = ["model.safetensors"]
    if index is not None:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    found: dict[str, tuple[int, ...]] = {}
    for name in files:
        if location.folder is None:
            found |= _hub_header(location, name)
            continue
        path = location.folder / name
        if not path.is_file():
            raise ModelError(f"model {location.source!r} has no {name}; fedpeft reads safetensors")
        found |= header(path)
    return found


def header(path: Path) -> Shapes:
    """Return names and shapes of the floating-point tensors of a safetensors file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= 100_000_000:
                raise ValueError("impossible header length")
            entries = json.loads(file.read(length))
    except (ValueError, OSError) as error:
        raise ModelError(f"{path}: not a safetensors file ({error})") from None
    entries.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if path.stat().st_size != 8 + length + end:
        raise ModelError(f"{path}: cut short; fetch the model again")
    return {
        name: tuple(int(n) for n in entry["shape"])
        for name, entry in entries.items()
        if entry["dtype"].startswith(("F", "BF"))
    }


def _hub_header(location: Location, name: str) -> Shapes:
    from huggingface_hub import parse_safetensors_file_metadata, try_to_load_from_cache
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    cached = try_to_load_from_cache(location.source, name)
    if isinstance(cached, str):
        return header(Path(cached))
    try:
        parsed = parse_safetensors_file_metadata(location.source, name)
    except (NotASafetensorsRepoError, SafetensorsParsingError, OSError) as error:
        raise ModelError(
            f"model {location.source!r}: cannot read the header of {name} "
            f"({type(error).__name__}); fedpeft reads safetensors"
        ) from error
    return {k: tuple(t.shape) for k, t in parsed.tensors.items() if t.dtype.startswith(("F", "BF"))}
