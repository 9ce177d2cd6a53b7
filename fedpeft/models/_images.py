"""Images as bytes up to the model's input, where they become the floats its processor makes.

So caches, processes and devices are sent a quarter of what floats would take.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from fedpeft.data._images import channels_of, pixels
from fedpeft.errors import ModelError
from fedpeft.models._locate import Location, file_of, unreachable
from fedpeft.models._outline import read_config
from fedpeft.models._vision import image_size

_NAME = "preprocessor_config.json"
_PROBE = 32


@dataclass(frozen=True, slots=True)
class Floats:
    """A forward pre-hook: uint8 images [b, C, H, W] become ``scale * image + offset``.

    Both have one number per channel. Other inputs pass as they are.
    """

    scale: tuple[float, ...]
    offset: tuple[float, ...]

    def __call__(
        self, module: torch.nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the module's inputs, in the precision of its parameters."""
        kind = next(module.parameters()).dtype

        def ready(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or value.dtype != torch.uint8:
                return value
            exact = torch.promote_types(kind, torch.float32)
            scale, offset = _columns(self.scale, self.offset, exact, value.device)
            return torch.addcmul(offset, value.to(exact), scale).to(kind)

        return tuple(map(ready, args)), {name: ready(value) for name, value in inputs.items()}


@lru_cache(maxsize=16)
def _columns(
    scale: tuple[float, ...], offset: tuple[float, ...], kind: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both as [C, 1, 1] on ``device``; kept, since a GPU waits for what is copied to it."""
    with torch.inference_mode(False):
        made = torch.tensor([scale, offset], dtype=kind, device=device)[..., None, None]
    return made[0], made[1]


def load_processor(location: Location) -> Any:
    """Load the image processor of a model.

    Raises ``ModelError`` where there is none, or where it does not make what the model takes:
    images of its channels and, if the model takes one size only, of that size.
    """
    from transformers import AutoImageProcessor

    try:
        found = AutoImageProcessor.from_pretrained(
            location.source, backend="pil", trust_remote_code=False
        )
    except (OSError, ValueError, ImportError) as error:
        if location.folder is None:
            raise ModelError(unreachable(location)) from error
        if file_of(location, _NAME) is None:
            raise ModelError(
                f"model {location.source!r} has no {_NAME}; save its image processor beside it, "
                "such as ViTImageProcessorPil(size=...).save_pretrained(folder)"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ModelError(
            f"model {location.source!r}: cannot load its image processor: {reason}"
        ) from error
    _check(found, location)
    return found


def suit_images(model: Any, processor: Any) -> None:
    """Have ``model`` take uint8 images as ``processor`` cuts them, and rescale and normalise them.

    The hook is on the encoder: PEFT calls the ``forward`` of the model around it, past all hooks.
    """
    model.base_model.register_forward_pre_hook(_floats(processor), with_kwargs=True)


def _floats(processor: Any) -> Floats:
    """Return the hook; two images of one colour tell what a processor does to numbers.

    Some shift them, so their fields do not.
    """
    low, high = (_centre(processor, value) for value in (0, 255))
    return Floats(tuple(((high - low) / 255).tolist()), tuple(low.tolist()))


def _centre(processor: Any, value: int) -> np.ndarray:
    """Return what the middle pixel [C] of a plain image becomes, float64."""
    made = np.asarray(processor(_plain(processor, value))["pixel_values"][0], np.float64)
    found: np.ndarray = made[:, made.shape[1] // 2, made.shape[2] // 2]
    return found


def _plain(processor: Any, value: int, height: int = _PROBE, width: int = _PROBE) -> Any:
    from PIL import Image

    mode, colour = ("L", value) if channels_of(processor) == 1 else ("RGB", (value,) * 3)
    return Image.new(mode, (width, height), colour)


def _check(processor: Any, location: Location) -> None:
    config = read_config(location)
    about, wanted = f"model {location.source!r}: its {_NAME}", image_size(config)
    channels, taken = channels_of(processor), int(config.get("num_channels") or 3)
    if channels != taken or taken not in (1, 3):
        raise ModelError(
            f"{about} makes images of {channels} channels (image_mean) and the model takes "
            f"{taken} (num_channels); make them agree, on 1 or 3"
        )
    try:
        made = pixels(processor, _plain(processor, 0, *(wanted or (_PROBE, _PROBE))))
        _floats(processor)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ModelError(f"{about} cannot be used ({error}); write a plain one") from error
    if wanted and made.shape[1:] != wanted:
        shown = " x ".join(map(str, made.shape[1:]))
        size = {"height": wanted[0], "width": wanted[1]}
        raise ModelError(
            f"{about} makes images of {shown} and the model takes {wanted[0]} x {wanted[1]}; "
            f"set its size (or crop_size) to {size}"
        )
