"""The app that Flower brings to sites and server: ``client/`` and ``server/``, no library."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import fedpeft
from fedpeft.errors import SiteError
from fedpeft.types import Scalar

_PACKAGE = Path(fedpeft.__file__).parent
_PLACES = (_PACKAGE / "_app", _PACKAGE.parent)
"""Where the app's files are: in an installed wheel, in a checkout."""
_FILES = (
    "pyproject.toml",
    *(f"{side}/{name}.py" for side in ("client", "server") for name in ("__init__", "app")),
)


def bundle() -> bytes:
    """Return the app bundle: the same bytes for the same files.

    Raises ``SiteError`` where this installation has no app.
    """
    from flwr.cli.build import build_fab_from_files

    place = next((p for p in _PLACES if all((p / name).is_file() for name in _FILES)), None)
    if place is None:
        raise SiteError(
            f"{_PLACES[0]}: the app is not there; install fedpeft from its wheel, or in a checkout"
        )
    try:
        with warnings.catch_warnings():  # Flower asks another library by an old name
            warnings.simplefilter("ignore", DeprecationWarning)
            files = {name: (place / name).read_bytes() for name in _FILES}
            found, _ = build_fab_from_files(files)
    except ValueError as error:
        raise SiteError(f"{place}: is no app that Flower takes ({error})") from None
    return bytes(found)


def as_seen(app: bytes, config: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return the run-config as nodes see it: the app's defaults under the run's own lines.

    Raises ``SiteError`` for a key that the app does not have.
    """
    from flwr.common.config import flatten_dict, fuse_dicts, get_fab_config

    defaults = flatten_dict(get_fab_config(app)["tool"]["flwr"]["app"].get("config", {}))
    try:
        return dict(fuse_dicts(defaults, dict(config), check_keys=True))
    except ValueError as error:
        raise SiteError(f"the app does not take this run-config ({error})") from None
