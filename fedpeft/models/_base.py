"""A base model in memory: loaded once per process, frozen, without dropout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError

from fedpeft.errors import ModelError
from fedpeft.models._attention import suit_attention
from fedpeft.models._images import load_processor, suit_images
from fedpeft.models._locate import Location, file_of, locate, unreachable
from fedpeft.models._outline import HEADS, Outline, input_limit, is_head, read_config

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """A frozen model in evaluation mode, its tokenizer (of images: processor) and its outline.

    ``missing`` names the parameters that the checkpoint did not have (a new head).
    """

    model: torch.nn.Module
    tokenizer: Any
    outline: Outline
    location: Location
    head_kind: str
    classes: tuple[str, ...]
    missing: frozenset[str]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def parameter(self, name: str) -> NDArray[np.float32]:
        """Return a copy of one parameter."""
        value = self.model.get_parameter(name).detach().to("cpu", torch.float32)
        return np.array(value.numpy())

    def save_pretrained(self, folder: Path, state: Mapping[str, torch.Tensor]) -> None:
        """Write a ``transformers`` folder with these parameters."""
        model: Any = self.model
        model.save_pretrained(folder, state_dict=dict(state))
        self.tokenizer.save_pretrained(folder)


class PerVersion(Generic[_T]):
    """Cache a loader's results by its arguments and the version of the model's files.

    A path means another model once the working directory or the files have changed.
    """

    def __init__(self, load: Callable[..., _T], size: int) -> None:
        self.__wrapped__ = load
        self._cached = lru_cache(maxsize=size)(lambda version, *given: load(*given))

    def __call__(self, model: str, *given: Any) -> _T:
        """Load, unless it was loaded before."""
        return self._cached(_version(locate(model)), model, *given)

    def cache_clear(self) -> None:
        """Forget everything."""
        self._cached.cache_clear()


def per_version(size: int) -> Callable[[Callable[..., _T]], PerVersion[_T]]:
    """Return the decorator for a cache of ``size`` results."""
    return lambda load: PerVersion(load, size)


@per_version(4)
def load_tokenizer(model: str, head: str = "causal-lm") -> Any:
    """Load the tokenizer of ``model``; one without a padding token pads with its end token.

    For a ``head`` that classifies images it is the image processor. Raises ``ModelError``.
    """
    from transformers import AutoTokenizer

    location = locate(model)
    if head == "image-classification":
        return load_processor(location)
    try:
        tokenizer = AutoTokenizer.from_pretrained(location.source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _cannot_load(location, "tokenizer", error) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"model {model!r}: its tokenizer has neither a pad nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@per_version(2)
def load_base(
    model: str, head: str, classes: tuple[str, ...], device: str, precision: str = "float32"
) -> Base:
    """Load ``model`` in ``precision`` for ``head``, frozen and without dropout.

    Parameters the checkpoint does not have (a new classification head) belong to the outline's
    ``head``. Raises ``ModelError``.
    """
    import transformers

    location = locate(model)
    tokenizer = load_tokenizer(model, head)
    auto = {
        "sequence-classification": transformers.AutoModelForSequenceClassification,
        "image-classification": transformers.AutoModelForImageClassification,
        "causal-lm": transformers.AutoModelForCausalLM,
    }[head]
    labels = _labels(classes) if classes else {}
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        loaded, info = auto.from_pretrained(
            location.source,
            dtype=getattr(torch, precision),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            **labels,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise _cannot_load(location, "model", error) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    if head == "image-classification":
        suit_images(loaded, tokenizer)
    else:
        loaded.config.pad_token_id = tokenizer.pad_token_id
        loaded.config.use_cache = False
    loaded.requires_grad_(False).eval().to(device)
    suit_attention(loaded, torch.device(device))
    parameters = dict(loaded.named_parameters())
    mismatched = {entry[0] for entry in info["mismatched_keys"]}
    missing = frozenset(k for k in {*info["missing_keys"], *mismatched} if k in parameters)
    if missing and head == "causal-lm":
        raise ModelError(
            f"model {model!r}: its files have no {min(missing)}; give a pretrained language model"
        )
    return Base(
        loaded,
        tokenizer,
        _outline(location, loaded, head, missing),
        location,
        head,
        classes,
        missing,
    )


@per_version(16)
def fingerprint(model: str) -> str:
    """Return a digest of the model's files, or the hub's revision."""
    location = locate(model)
    if location.folder is None:
        path = file_of(location, "config.json")  # fetched, so that the first run knows it too
        return path.parent.name if path is not None else location.source
    digest = xxhash.xxh3_128()
    for path in _files(location.folder):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    """Return what the model and its tokenizer are read from."""
    kinds = (".safetensors", ".json", ".txt", ".model", ".jinja")
    return [path for path in sorted(folder.glob("*")) if path.suffix in kinds]


def _version(location: Location) -> tuple[Any, ...]:
    """Return what changes when a local model's files do."""
    files = _files(location.folder) if location.folder else []
    stats = [(path.name, path.stat()) for path in files]
    return location.source, *((n, s.st_mtime_ns, s.st_size) for n, s in stats)


def _outline(location: Location, model: Any, head: str, missing: frozenset[str]) -> Outline:
    from transformers.pytorch_utils import Conv1D

    linear: dict[str, tuple[int, int]] = {}
    classify = head != "causal-lm"
    output = model.get_output_embeddings()
    for name, module in model.named_modules():
        if is_head(name) or module is output:
            continue
        if isinstance(module, torch.nn.Linear):
            linear[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            linear[name] = (module.weight.shape[1], module.weight.shape[0])
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    heads = {
        name: shape
        for name, shape in parameters.items()
        if classify and (name in missing or name.split(".")[0] in HEADS)
    }
    linear = {k: v for k, v in linear.items() if f"{k}.weight" not in heads}
    return Outline(linear, heads, parameters, input_limit(read_config(location)), True)


def _labels(classes: tuple[str, ...]) -> dict[str, Any]:
    return {
        "num_labels": len(classes),
        "id2label": dict(enumerate(classes)),
        "label2id": {name: i for i, name in enumerate(classes)},
    }


def _cannot_load(location: Location, what: str, error: Exception) -> ModelError:
    if location.folder is None:
        return ModelError(unreachable(location))
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ModelError(f"model {location.source!r}: cannot load its {what}: {reason}")
