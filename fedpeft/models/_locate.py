"""Where a model's files are: an embedded name, a local folder, or a hub id."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path

from fedpeft.errors import ModelError
from fedpeft.spec import names, nearest


@dataclass(frozen=True, slots=True)
class Location:
    """``source`` is what ``from_pretrained`` takes; ``origin`` is what a model card names."""

    source: str
    origin: str
    folder: Path | None


def locate(model: str) -> Location:
    """Find ``model`` without loading it. Raises ``ModelError`` naming every place looked."""
    name = model.replace("-", "_")
    if name in names("models"):
        module = importlib.import_module(f"fedpeft.models.{name}")
        return Location(str(module.folder()), module.ORIGIN, module.folder())
    root = Path(os.environ.get("FEDPEFT_MODELS", "../shared/models"))
    places = [Path(model).expanduser(), root / model]
    for place in places:
        if (place / "config.json").is_file():
            return Location(str(place.resolve()), model, place.resolve())
    looks_local = model.startswith((".", "/", "~")) or places[0].exists() or model.count("/") > 1
    if looks_local:
        looked = " or ".join(str(p) for p in places)
        raise ModelError(f"model {model!r}: no config.json in {looked}; give a model folder")
    if "/" not in model:
        raise ModelError(
            f"model {model!r} is neither embedded, nor a folder, nor a hub id (org/name)"
            + nearest(name, names("models")).replace("_", "-")
        )
    return Location(model, model, None)


def file_of(location: Location, name: str) -> Path | None:
    """Return a file of the model, from the hub's cache or the hub; ``None`` where it has none."""
    if location.folder is not None:
        path = location.folder / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(location.source, name))
    except LocalEntryNotFoundError as error:
        raise ModelError(unreachable(location)) from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(f"{unreachable(location)} ({type(error).__name__})") from error


def unreachable(location: Location) -> str:
    """Say that the hub did not give the model, and the remedy."""
    return (
        f"model {location.source!r} is not on this machine and the model hub did not give it; "
        "check the id and the network, or give a local folder"
    )
